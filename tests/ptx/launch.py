"""Takes what fused_ce would launch on a GPU, on CPU tensors, and runs its PTX on their memory."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple
from unittest import mock

import gpu_static
import numpy as np
import torch
from torch import Tensor

from fused_ce.backends.triton import kernels, launch, plan

from .code import Code
from .faults import Faults
from .machine import Grid, Machine
from .memory import Storage, address_of, storages
from .rounding import FLOAT, UINT, Array

WALKING = ("forward", "backward", "rescale_grad")  # kernels whose programs walk on by their number


class Launched(NamedTuple):
    """What one launch was and did."""

    kernel: str
    grid: Grid
    executed: int  # instructions times threads
    warps: int
    ctas: int


class Emulator:
    """In a `with` block, the "triton" backend takes CPU tensors, and their launches are run here.

    `mutate` is given the name and the PTX of each kernel, and what it returns is run; `order` shuffles the programs of
    each launch. `few`: two multiprocessors, no cache, and half as many programs as would be launched, so that they walk
    over rows.
    """

    def __init__(
        self,
        target: str = "sm_90",
        noise: bool = False,
        mutate: Callable[[str, str], str] = lambda kernel, ptx: ptx,
        order: int | None = None,
        few: bool = False,
    ) -> None:
        self.target, self.noise, self.mutate, self.order, self.few = target, noise, mutate, order, few
        self.compiler = gpu_static.TARGETS[target]
        if few:
            self.compiler = self.compiler._replace(multiprocessors=2, l2_bytes=1)
        self.faults = Faults()
        self.launches: list[Launched] = []
        self.digests: list[str] = []  # of what each launch left in memory, and where it wrote
        self._codes: dict[str, Code] = {}
        self._patches = [
            mock.patch.object(kernels, "launch", self.launch),
            mock.patch.object(launch, "unsupported", _unsupported(launch.unsupported)),
            mock.patch.object(plan, "device", return_value=self.compiler.device),
            mock.patch.object(torch, "empty", _filled(torch.empty)),
            mock.patch.object(torch, "empty_like", _filled(torch.empty_like)),
            mock.patch.object(Tensor, "new_empty", _filled(Tensor.new_empty)),
        ]

    def __enter__(self) -> Emulator:
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    @property
    def codes(self) -> list[Code]:
        """Of the kernels that were launched."""
        return list(self._codes.values())

    def launch(self, name: str, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        if self.few and name in WALKING:
            grid = (-(-grid[0] // 2), *grid[1:])
        kernel = gpu_static.compiled(gpu_static.Launch("", name, grid, args, meta), self.compiler)
        code = self._codes.get(kernel.hash)
        if code is None:
            code = self._codes[kernel.hash] = Code(self.mutate(name, kernel.asm["ptx"]))
        assert (code.threads, code.ctas) == (32 * kernel.metadata.num_warps, kernel.metadata.num_ctas)
        machine = Machine(code, kernel.metadata.shared, self.faults, self.noise)
        names = kernels.table()[name].arg_names
        given = dict(zip(names, args, strict=False)) | meta
        leaves = [leaf for key, kind in kernel.src.signature.items() for leaf in _leaves(key, kind, given[key])]
        found = storages([(path, value) for path, kind, value in leaves if kind[0] == "*"])
        params = _params(code, leaves, found)
        full = Grid(*grid)
        for program in self._programs(full):
            machine.run(program, full, params, found)
        for storage in found.values():
            mixed = (storage.writer >= 0) & (storage.reader != -1) & (storage.reader != storage.writer)
            if mixed.any() and storage.name != "shared.bad":
                self.faults.add("programs", name, f"{storage.name}: one reads what another writes", mixed.sum())
            storage.write_back()
        self.digests.append(_digest(found))
        self.launches.append(Launched(name, full, machine.executed, kernel.metadata.num_warps, code.ctas))

    def _programs(self, grid: Grid) -> Iterator[Grid]:
        programs = [Grid(x, y, z) for z, y, x in itertools.product(*map(range, grid[::-1]))]
        if self.order is not None:
            Random(self.order).shuffle(programs)
        yield from programs


def _digest(found: dict[int, Storage]) -> str:
    parts = [part for storage in found.values() for part in (storage.data, storage.writer)]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def _unsupported(original: Callable[[Any], list[str]]) -> Callable[[Any], list[str]]:
    """`launch.unsupported`, but CPU tensors will do."""
    return lambda call: [why for why in original(call) if "TRITON_INTERPRET" not in why]


def _filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With NaN, so that what nobody wrote is seen, and is alike each time; not what takes memory only once touched."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        made = allocate(*args, **kwargs)
        if made.numel() < 1 << 28:
            with torch.no_grad():
                made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).max)
        return made

    return run


def _leaves(path: str, kind: Any, value: Any) -> Iterator[tuple[str, str, Any]]:
    """The single arguments of a kernel: name, Triton's type, value."""
    if isinstance(kind, tuple):
        for name, k, v in zip(getattr(value, "_fields", range(len(kind))), kind, value, strict=True):
            yield from _leaves(f"{path}.{name}", k, v)
    elif kind != "constexpr":
        yield path, kind, value


def _params(code: Code, leaves: list[tuple[str, str, Any]], found: dict[int, Storage]) -> dict[str, Array]:
    """The parameters as the kernel loads them; those behind the arguments are Triton's own scratch, null."""
    params = {name: np.zeros(1, UINT[bits]) for name, bits in code.params[len(leaves) :]}
    for (name, bits), (_, kind, value) in zip(code.params, leaves, strict=False):
        if kind[0] == "*":
            assert isinstance(value, Tensor)
            params[name] = np.array([address_of(value, found)], np.uint64)
        elif kind in ("fp64", "fp32"):
            params[name] = np.array([value], FLOAT[bits]).view(UINT[bits])
        else:
            params[name] = np.array([int(value) & ((1 << bits) - 1)], np.uint64).astype(UINT[bits])
    assert len(code.params) >= len(leaves)
    return params
