"""Runs a kernel, one program after the other; the threads of a program, or of a cluster, in lockstep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .access import Access
from .code import LEAVES, Code, Instruction
from .faults import Faults
from .instructions import compiled
from .memory import Shared
from .races import Barriers
from .registers import Registers
from .rounding import Array

Run = Callable[[Any], None]  # by the threads of a mask (None: all)


class Grid(NamedTuple):
    x: int
    y: int = 1
    z: int = 1


class Machine:
    """A kernel made ready; `run` may be called for every program of a launch."""

    def __init__(self, code: Code, shared_bytes: int, faults: Faults, noise: bool = False) -> None:
        self.code, self.faults, self.shared_bytes, self.noise = code, faults, shared_bytes, noise
        self.threads = code.threads * code.ctas
        self.thread = np.arange(self.threads, dtype=np.int64)
        self.cta, self.lane = self.thread // code.threads, self.thread % 32
        self.registers = Registers(code, faults)
        self.executed = 0  # instructions times threads
        self.params: dict[str, Array] = {}
        self.prepared = [[self._guarded(i, compiled(i, self)) for i in block] for block in code.blocks]
        self.conditions = [
            self.registers.reader(block[-1].predicate, "pred", block[-1]) if block[-1].predicate else None
            for block in code.blocks
        ]
        self.access: Access
        self.barriers: Barriers
        self.alive: Array

    def run(self, program: Grid, grid: Grid, params: dict[str, Array], buffers: dict[int, Any]) -> None:
        def one(n: int) -> Array:
            return np.array([n], np.uint32)

        code, rank = self.code, self.cta.astype(np.uint32)
        sizes = {"tid": code.threads, "ctaid": grid.x * code.ctas, "clusterid": grid.x}
        self.registers.special = {
            "%tid.x": (self.thread % code.threads).astype(np.uint32),
            "%ctaid.x": one(program.x) if code.ctas == 1 else program.x * code.ctas + rank,
            "%clusterid.x": one(program.x),
            "%cluster_ctarank": rank if code.ctas > 1 else one(0),
            "%cluster_ctaid.x": rank,
            "%laneid": self.lane.astype(np.uint32),
            **{f"%n{name}.x": one(size) for name, size in sizes.items()},
            **{f"%{name}.{axis}": one(getattr(program, axis)) for name in ("ctaid", "clusterid") for axis in "yz"},
            **{f"%nctaid.{axis}": one(getattr(grid, axis)) for axis in "yz"},
            **{f"%tid.{axis}": one(0) for axis in "yz"},
        }
        self.registers.clear()
        self.params = params
        self.barriers = Barriers(self.faults, self.cta)
        number = (program.z * grid.y + program.y) * grid.x + program.x
        shared = Shared(code.ctas, self.shared_bytes)
        self.access = Access(self.faults, self.barriers, number, self.cta, buffers, shared)
        self.alive = np.ones(self.threads, bool)
        with np.errstate(all="ignore"):
            self._go(0, None, len(code.blocks))
            self.barriers.leave()

    def everyone(self, mask: Any, where: object) -> None:
        if mask is not None and not (np.broadcast_to(mask, self.threads) | ~self.alive).all():
            self.faults.add("barrier", where, "not all threads of the program get here")

    def whole_warps(self, mask: Any, where: object) -> None:
        if mask is not None:
            warps = np.broadcast_to(mask, self.threads).reshape(-1, 32)
            if (warps.any(1) & ~warps.all(1)).any():
                self.faults.add("barrier", where, "only some lanes of a warp get here")

    def all_threads(self, value: Array) -> Array:
        return np.broadcast_to(value, self.threads)

    def _guarded(self, i: Instruction, run: Run | None) -> Run | None:
        """`run` by the threads whose predicate holds."""
        if i.predicate is None or run is None:
            return run
        read = self.registers.reader(i.predicate, "pred", i)

        def guarded(mask: Any) -> None:
            p = ~read() if i.negated else read()
            within = p if mask is None or len(p) == 1 else p[mask]
            everywhere, anywhere = bool(within.all()), bool(within.any())
            i.outcomes.update((anywhere, everywhere))
            if everywhere:
                run(mask)
            elif anywhere:
                run(p if mask is None else p & mask)

        return guarded

    def _go(self, b: int, mask: Any, stop: int) -> None:
        """Run from block b until `stop`."""
        blocks, end, steps = self.code.blocks, len(self.code.blocks), 0
        while b not in (stop, end):
            steps += 1
            if steps > 1_000_000:
                raise RuntimeError("does not end")
            self.executed += len(blocks[b]) * (self.threads if mask is None else int(np.count_nonzero(mask)))
            for run in self.prepared[b]:
                if run is not None:
                    run(mask)
            last, condition = blocks[b][-1], self.conditions[b]
            if last.op in LEAVES:
                self.alive &= False if mask is None else ~mask
                return
            if not last.op.startswith("bra"):
                b += 1
                continue
            if condition is None:
                b = last.target
                continue
            p = ~condition() if last.negated else condition()
            taken = p if mask is None or len(p) == 1 else p[mask]
            if taken.all():
                b = last.target
            elif not taken.any():
                b += 1
            else:
                here = np.ones(self.threads, bool) if mask is None else mask
                self._go(last.target, here & p, self.code.joins[b])
                self._go(b + 1, here & ~p, self.code.joins[b])
                here, b = here & self.alive, self.code.joins[b]
                if not here.any():
                    return
                mask = None if here.all() else here
