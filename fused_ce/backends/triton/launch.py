"""Backend "triton": launches `kernels.py` on CUDA tensors (and, under TRITON_INTERPRET=1, on CPU tensors).

Nothing here waits for the device: every number that decides something is read by a kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...contract import Stats as Extras, row_shape
from ...options import Options
from .rows import NOTHING, Matrix, alignment, congruent, matrices, rows

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INSTALLED = importlib.util.find_spec("triton") is not None
MANY = 1 << 30
CHUNK = 32768  # rows one program sums; more rows take a second launch
ODD = 4096  # rows that begin anywhere are cut at boundaries of the memory if they have more classes
_BAD: dict[torch.device, Tensor] = {}
SUMS = {"CHUNK": CHUNK, "BLOCK": 4096, "num_warps": 8}


class Out(NamedTuple):
    """What `kernels.forward` writes, one value a row; None: not asked for."""

    loss: Tensor  # (N, d1..dk)
    stats: Tensor | None  # (rows, 4)
    extras: Extras | None


class Device(NamedTuple):
    """What a plan has to know of the device."""

    capability: tuple[int, int] | None  # None: not NVIDIA's
    multiprocessors: int
    l2_bytes: int
    clusters: bool  # whether Triton can spread one program over several multiprocessors


class Plan(NamedTuple):
    """How `kernels.forward` cuts the rows."""

    rows: int  # that a program takes at a time
    block: int  # classes of a tile
    pieces: int  # tiles that a row is held in; 0: it is walked, and read a second time for its gradient
    warps: int
    ctas: int  # of a cluster
    programs: int  # at most


def plan(C: int, dtype: torch.dtype, side: int, extra: int, held: bool, device: Device) -> Plan:
    """Pick the tile: many rows whole if they are short, one in registers if it fits, and the longest in steps.

    `side`: how many rows lie side by side in memory, 1 where it is the classes that do; `extra`: how much more than its
    exponential a class needs in registers; not `held`: for backward, which keeps nothing. Sized by what the compiled
    kernels take (at most 128 registers without extra, no spills); not yet tuned on a GPU. The number of rows has no
    part in it, so that no row's bits depend on the others.
    """
    side, warp = min(32, _power_of_2(side)), 32 if device.capability else 64
    if held and side == 1 and C > 512:
        values = max(16, 2048 // warp >> extra)  # that a thread holds
        clusters = ((8, 2), (8, 4), (8, 8), (16, 8)) if device.clusters else ((16, 1),)
        for warps, ctas in ((1, 1), (2, 1), (4, 1), (8, 1), *clusters):
            threads = ctas * warps * warp
            if threads * values >= C:
                block = threads * 16 // dtype.itemsize  # a load of 16 bytes for each
                return Plan(1, block, -(-C // block), warps, ctas, MANY)
    whole, piece, values = (4096, 2048, 8) if extra else (16384, 4096, 16)
    piece *= 1 + held  # two sweeps with few rows at a time: more of a row instead
    walked = side * C > (piece if side == 1 else whole)
    block = piece // side if walked else _power_of_2(max(C, 2))
    rows = max(side, 1024 // block)
    # What a row's second reading should find in the cache; but a multiprocessor without work finds nothing.
    resident = max(device.multiprocessors, device.l2_bytes // 2 // (rows * C * dtype.itemsize))
    warps = min(16, max(4, rows * block // (values * warp)))
    return Plan(rows, block, int(not walked), warps, 1, resident if walked else MANY)


def device(tensor: Tensor) -> Device:
    """The device that a launch on this tensor runs on."""
    return _device(tensor.device.index) if tensor.is_cuda else Device(None, 1, 0, False)


@functools.cache
def _device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    capability = None if torch.version.hip else (found.major, found.minor)
    return Device(capability, found.multi_processor_count, found.L2_cache_size, has_clusters(capability))


def has_clusters(capability: tuple[int, int] | None) -> bool:
    """Triton 3.8 leaves a cluster without waiting for it, and the launch fails."""
    import triton

    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    return capability is not None and capability >= (9, 0) and version >= (3, 9)


def unsupported(call) -> list[str]:
    input, target, weight, options = call
    """Why the kernels cannot take the call, in words; empty if they can."""
    reasons = []
    if input.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append("triton on CPU tensors runs only under TRITON_INTERPRET=1")
    elif input.device.type == "cuda" and not torch.cuda.is_available():
        reasons.append("no CUDA device was found")
    elif input.device.type not in ("cpu", "cuda"):
        reasons.append(f"triton takes CUDA tensors, got {input.device.type}")
    if not INSTALLED:
        reasons.append("triton is not installed (pip install triton)")
    if any(t.device != input.device for t in (target, weight) if t is not None):
        reasons.append("input, target and weight must be on one device")
    if input.dtype not in FLOATS:
        reasons.append(f"input must be float32, float64, bfloat16 or float16, got {input.dtype}")
    elif options.dtype == torch.float64 and torch.float64 not in (input.dtype, target.dtype):
        reasons.append(f"the loss was asked for in {options.dtype} from {input.dtype} logits")
    elif options.dtype is not None and options.dtype.itemsize < input.itemsize:
        reasons.append(f"rounding {input.dtype} logits to {options.dtype} first takes a copy")
    if target.dtype not in (torch.int64, torch.uint8, *FLOATS):
        reasons.append(f"target must hold class indices, int64 or uint8, or probabilities, got {target.dtype}")
    if input.dim() == 0 or target.shape != (input.shape if target.is_floating_point() else row_shape(input)):
        reasons.append(f"input must be (N, C, d1..dk) or (C), got {tuple(input.shape)}, target {tuple(target.shape)}")
    elif _classes(input) == 0:
        reasons.append("input has no classes")
    elif weight is not None and (weight.dtype not in FLOATS or weight.shape != (_classes(input),)):
        reasons.append(f"weight must be (C) and floating, got {tuple(weight.shape)} of {weight.dtype}")
    return reasons


def forward(
    input: Tensor,  # (N, C, d1..dk) or (C)
    target: Tensor,  # (N, d1..dk) or (), or probabilities of the input's shape
    weight: Tensor | None,  # (C,)
    options: Options,
    schedule: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Extras | None]:
    """See `dispatch.py`. The stats are (rows, 4) float64; a float32 or float64 fused gradient needs none.

    They are m, so, rest and the divisor of the mean, or y under probabilities; rest is a - q_y + 2 L' lse, where
    L' = L D / count: backward need neither find the divisors nor know of the z-loss.
    """
    shape = row_shape(input)
    acc, dtype = _acc(input.dtype), options.dtype or input.dtype
    none, fused = options.reduction == "none", schedule == "fused"
    loss = input.new_empty(shape, dtype=dtype if none else acc)
    needs_stats = schedule == "recompute" or (fused and (options.return_stats or input.itemsize == 2))
    stats = input.new_empty((loss.numel(), 4), dtype=torch.float64) if needs_stats else None
    extras = None
    if options.return_stats:
        lse, z_loss, entropy = (input.new_empty(shape, dtype=acc) for _ in range(3))
        extras = Extras(lse, z_loss, input.new_empty(shape, dtype=torch.int64), entropy)
    grad = (input if options.inplace else input.new_empty(input.shape)) if fused else None
    norm = _norm(input, target, weight, options)
    if loss.numel():
        sizes, (logits, probs, dx) = matrices(input, target if target.is_floating_point() else None, grad)
        cut, meta = _meta(input, target, weight, options, sizes, (logits, probs, dx), held=True)
        bundles = math.prod(sizes[:-1]) * -(-sizes[-1] // cut.rows)
        parts: Tensor | None = None
        grids: dict[int, tuple[int, ...]] = {0: (min(bundles, cut.programs),)}
        if not cut.pieces and cut.rows == 1 and 2 * bundles <= device(input).multiprocessors and not options.inplace:
            # Few rows: one program a tile, and then one to join the tiles' sums in the same order as ever.
            tiles = -(-_classes(input) // cut.block)
            parts = loss.new_empty((bundles, tiles, 8), dtype=torch.float64)
            grids = {1: (bundles, tiles), 2: (bundles, tiles if fused else 1)}
        for step, grid in grids.items():
            _launch(
                "forward",
                grid,
                logits,
                probs or rows(target),
                _packed(weight),
                norm,
                _number(options.grad_scale, dtype, input.device),
                None if probs else _bad(input.device),
                parts,
                Out(loss, stats, extras),
                dx or NOTHING,
                tuple(sizes[-2::-1]) or None,
                bundles,
                sizes[-1],
                *_scalars(input, options),
                options.lse_square_scale,
                **meta,
                PIECES=cut.pieces,
                STEP=step,
                **({"num_ctas": cut.ctas} if cut.ctas > 1 else {}),
            )
    return loss if none else _total(loss.view(-1), norm, dtype), grad, stats, extras


def backward(
    grad_output: Tensor,  # () or (N, d1..dk)
    g_lse: Tensor | None,  # (N, d1..dk)
    input: Tensor | None,  # (N, C, d1..dk) or (C); None: changed since forward
    target: Tensor,
    weight: Tensor | None,  # (C,)
    options: Options,
    grad: Tensor | None,  # the input's shape, made by forward for an upstream gradient of grad_scale
    stats: Tensor | None,  # (rows, 4)
    keep: bool,
    wants_target: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients: recomputed, or the fused one made right if the upstream gradient is not grad_scale."""
    if grad is not None and (input is None or grad.itemsize > 2):
        return _rescale(grad, grad_output, options, keep), None
    assert input is not None
    assert stats is not None
    spare = None if keep else grad
    dx = spare if spare is not None else input if options.inplace else input.new_empty(input.shape)
    dt = target.new_empty(target.shape) if wants_target else None
    if len(stats):
        probs = target if target.is_floating_point() else None
        sizes, views = matrices(input, probs, dx, dt)
        cut, meta = _meta(input, target, weight, options, sizes, views, held=False)
        bundles = math.prod(sizes[:-1]) * -(-sizes[-1] // cut.rows)
        programs = min(bundles, 2048)
        # In place, a row is one program's: another might overwrite x_y before it is read.
        pieces = 1 if options.inplace else min(-(-_classes(input) // cut.block), 2048 // programs)
        _launch(
            "backward",
            (programs, pieces),
            views[0],
            views[1] or rows(target),
            _packed(weight),
            None if probs is None else _norm(input, target, weight, options),
            rows(grad_output),
            None if g_lse is None else rows(g_lse),
            _number(options.grad_scale, grad_output.dtype, input.device),
            stats,
            *(view or NOTHING for view in views[2:]),
            tuple(sizes[-2::-1]) or None,
            bundles,
            sizes[-1],
            *_scalars(input, options),
            **meta,
            UNLESS_EXPECTED=spare is not None,
        )
    return dx, dt


def _rescale(grad: Tensor, grad_output: Tensor, options: Options, keep: bool) -> Tensor:
    out = torch.empty_like(grad) if keep else grad
    n, expected = grad.numel(), _number(options.grad_scale, grad_output.dtype, grad.device)
    if n:
        programs = min(-(-n // 4096), 2048)
        meta = {"IN_PLACE": not keep, "BLOCK": 4096, "num_warps": 8}
        _launch("rescale", (programs,), grad, grad_output, expected, out, n, **meta)
    return out


def _norm(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor | None:
    """(2,) float64: divisor of the cross entropy, divisor of the z-loss. None: they are 1."""
    if options.reduction != "mean":
        return None
    given = options.num_items
    if given is None and not target.is_floating_point():
        labels, N = rows(target), target.numel()
        parts = target.new_empty((_chunks(N), 2), dtype=torch.float64)
        _launch(
            "prepare", (len(parts),), labels, _packed(weight), parts, N, _classes(input), options.ignore_index, **SUMS
        )
        return parts[0] if len(parts) == 1 else _total(parts, None, torch.float64)
    norm = input.new_empty(2, dtype=torch.float64)
    norm[:] = row_shape(input).numel() if given is None else given
    return norm


def _total(terms: Tensor, norm: Tensor | None, dtype: torch.dtype) -> Tensor:  # (N,) -> (), (N, 2) -> (2,)
    """Sum over the first dimension, divided by norm[0] if given; a long one in two steps."""
    columns = math.prod(terms.shape[1:])
    if len(terms) > CHUNK:
        parts = terms.new_empty((_chunks(len(terms)), *terms.shape[1:]), dtype=torch.float64)
        _launch("total", (len(parts), columns), terms, None, parts, len(terms), **SUMS)
        terms = parts
    out = terms.new_empty(terms.shape[1:], dtype=dtype)
    _launch("total", (1, columns), terms, norm, out, len(terms), **(SUMS | {"CHUNK": 1 << 30}))
    return out


def _scalars(input: Tensor, options: Options) -> tuple[Any, ...]:
    s = 1.0 if options.softcap is None else options.softcap
    return _classes(input), options.ignore_index, _smoothing(options), options.logit_scale, s


def _meta(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    sizes: list[int],
    views: Sequence[Matrix | None],
    held: bool,
) -> tuple[Plan, dict[str, Any]]:
    """The plan, and what is settled when compiling."""
    C, (logits, _, grad, *_), probs = _classes(input), views, target.is_floating_point()
    assert logits is not None
    # Pixels lie side by side in the gradient at least; rows of classes that lie apart may.
    pixels = row_shape(input)[1:].numel()
    side = pixels if pixels > 1 else 1 if logits.col is None else 32
    dense, softcap = probs or _smoothing(options) > 0, options.softcap is not None
    weighted = dense and not probs and weight is not None
    extra = (input.dtype == torch.float64) + softcap + dense + probs + weighted + options.return_stats
    cut, align = plan(C, input.dtype, side, extra, held, device(input)), alignment(C, sizes[-1], views)
    vector = 16 // input.itemsize
    odd = grad is not None and logits.col is grad.col is None and align < vector and C > ODD
    same = grad is not None and odd and congruent(logits, grad, vector)
    meta = {
        "DENSE": dense,
        "PROBS": probs,
        "SCALED": options.logit_scale != 1,
        "SOFTCAP": softcap,
        "INPLACE": options.inplace,
        "ALIGN": align,
        "VECTOR": vector if odd else 1,
        "SAME": same,
        "ROWS": cut.rows,
        "BLOCK": cut.block,
        "num_warps": cut.warps,
    }
    return cut, meta


def _bad(device: torch.device) -> Tensor:  # (1,)
    """The last target of this device that was out of range, or 0, which no target can be."""
    if device not in _BAD:
        with torch.inference_mode(False):
            _BAD.setdefault(device, torch.zeros(1, dtype=torch.int64, device=device))
    return _BAD[device]


def check_targets() -> None:
    """Raise for a class index out of range that a GPU has met since the last check; waits for the GPU.

    On a GPU nothing else looks: such a row's loss and gradient are NaN.

    Raises:
        IndexError: with torch's message, for one of the targets.
    """
    for bad in _BAD.values():
        value = int(bad)
        bad.zero_()
        if value:
            raise IndexError(f"Target {value} is out of bounds.")


def _number(value: float | Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:  # ()
    """Where a kernel can read it, rounded as an upstream gradient of that dtype is; filled in, because a copy waits."""
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return None if value is None else torch.full((), value, dtype=dtype, device=device)


def _smoothing(options: Options) -> float:
    return options.label_smoothing if options.label_smoothing > 0 else 0.0


def _classes(input: Tensor) -> int:
    return input.shape[1 if input.dim() > 1 else 0]


def _launch(kernel: str, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    tensor = args[0] if isinstance(args[0], Tensor) else args[0].ptr
    with torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]  # triton launches on the current device
        getattr(_kernels(), kernel)[grid](*args, **meta, enable_fp_fusion=True)


@functools.cache
def _kernels() -> ModuleType:
    from . import kernels  # here, because triton is optional and slow to import

    return kernels


def _packed(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(n: int) -> int:
    return max(1, -(-n // CHUNK))


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
