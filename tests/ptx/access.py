"""Loads and stores of all threads at once, each of them checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from .code import Instruction
from .faults import Faults
from .memory import SPACE, WINDOW, Buffer, Places, Shared, Storage
from .races import Barriers, Touch
from .rounding import UINT, Array


class Access:
    """The memory that one program sees."""

    def __init__(
        self,
        faults: Faults,
        barriers: Barriers,
        program: int,
        cta: Array,  # (threads,)
        buffers: dict[int, Storage],
        shared: Shared,
    ) -> None:
        self.faults, self.barriers, self.program, self.cta = faults, barriers, program, cta
        self.buffers, self.shared = buffers, shared

    def load(self, i: Instruction, space: str, address: Array, width: int, count: int, mask: Any) -> list[Array]:
        """`count` words of `width` bytes for each thread, (threads,) each; threads outside of the mask get 0."""
        alike = mask is None and len(address) == 1 and space == "global"
        found = self._locate(i, space, address, width, count, mask)
        if found is None:
            return [np.zeros(1, UINT[width * 8])] * count
        buffer, threads, places = found
        if buffer is self.shared and not buffer.known[places.cells].all():
            self.faults.add("uninit", i, "shared memory that nobody wrote")
        self.barriers.add(buffer, Touch(places.cells, threads, None, i.line))
        if buffer is not self.shared:
            before = buffer.reader[places.cells]
            one = (before == -1) | (before == self.program)
            buffer.reader[places.cells] = np.where(one, self.program, -2)
        data, words = buffer.view(width), places.start // width
        if alike and len(threads):
            return [data[words[:1] + k] for k in range(count)]
        result = np.zeros((count, len(self.cta)), UINT[width * 8])
        for k in range(count):
            result[k, threads] = data[words + k]
        return list(result)

    def store(self, i: Instruction, space: str, address: Array, values: list[Array], mask: Any) -> None:
        """One word of each of `values`, (threads,) or (1,)."""
        width = values[0].dtype.itemsize
        found = self._locate(i, space, address, width, len(values), mask)
        if found is None:
            return
        buffer, threads, places = found
        stored = np.stack([np.broadcast_to(value, len(self.cta))[threads] for value in values], -1)
        data, words = buffer.view(width), places.start // width
        for k in range(len(values)):
            data[words + k] = stored[:, k]
        if isinstance(buffer, Shared):
            buffer.known[places.cells] = True
        else:
            before = buffer.writer[places.cells]
            others = (before != -1) & (before != self.program)
            if buffer.name == "shared.bad":
                return  # any of several targets out of range may be the one that is told
            if others.any():
                who = f"{int(before[others][0])} and {self.program}"
                self.faults.add("programs", i, f"{buffer.name}: programs {who} write one place", others.sum())
            buffer.writer[places.cells] = self.program
        parts = np.ascontiguousarray(stored).view(UINT[8 * min(buffer.cell, width * len(values))])
        self.barriers.add(buffer, Touch(places.cells, threads, parts.astype(np.uint64), i.line))

    def _locate(
        self, i: Instruction, space: str, address: Array, width: int, count: int, mask: Any
    ) -> tuple[Any, Array, Places] | None:
        """The buffer, and which threads go where in it; those that would go wrong are reported and left out."""
        threads = np.arange(len(self.cta)) if mask is None else np.flatnonzero(mask)
        address, size = np.broadcast_to(address, len(self.cta))[threads], width * count
        buffer: Buffer | None
        if space == "global":
            numbers = np.unique(address >> SPACE)
            if len(numbers) > 1:
                self.faults.add("bounds", i, f"addresses in {len(numbers)} buffers at once")
            buffer = self.buffers.get(int(numbers[0]))
            if buffer is None:
                self.faults.add("bounds", i, f"{int(address[0]):#x} is no tensor's", len(threads))
                return None
            offset = address - (numbers[0] << SPACE)
        else:
            buffer, offset = self.shared, self._shared_offset(i, space, address, threads)
        places = buffer.places(offset, size)

        def report(kind: str, wrong: Array) -> None:
            if wrong.any():
                k = np.flatnonzero(wrong)[0]
                who = f"program {self.program}, thread {threads[k]}"
                self.faults.add(kind, i, f"{who}: {buffer.name} + {offset[k]}, {size} bytes wide", wrong.sum())

        report("alignment", offset % size != 0)
        report("bounds", ~places.inside)
        keep = places.inside & (offset % width == 0)
        if keep.all():
            return buffer, threads, places
        return buffer, threads[keep], Places(places.start[keep], places.cells[keep], places.inside[keep])

    def _shared_offset(self, i: Instruction, space: str, address: Array, threads: Array) -> Array:
        rank, own = address >> WINDOW, self.cta[threads]
        if space == "shared" and rank.any():
            self.faults.add("cluster", i, "a cluster's address in an access to the CTA's own shared memory")
        to = np.where(rank == 0, own, rank - 1)
        if (to != own).any():
            self.barriers.reach(i)
        return self.shared.offset(to, address)
