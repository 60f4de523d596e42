"""What threads touch between two barriers, and whether an order of theirs decides what is found there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .faults import Faults
from .memory import Buffer
from .rounding import Array


class Touch(NamedTuple):
    """One load or store."""

    cells: Array  # (n, cells of an access)
    threads: Array  # (n,)
    values: Array | None  # (n, cells of an access) what was stored
    line: int


Touches = dict[Buffer, list[Touch]]


class Order:
    """The touches that no barrier has put in order yet: of threads in their CTA, or of CTAs in their cluster.

    What lies between arriving at a barrier and waiting for it is in no order with what lies on either side.
    """

    def __init__(self, faults: Faults, actor: Array, realm: Array) -> None:
        self.faults, self.actor, self.realm = faults, actor, realm  # of each thread
        self.before: Touches = defaultdict(list)
        self.now: Touches = defaultdict(list)

    def add(self, buffer: Buffer, touch: Touch) -> None:
        self.now[buffer].append(touch)

    def arrive(self) -> None:
        self.before, self.now = self.now, defaultdict(list)

    def wait(self) -> None:
        both = defaultdict(list, {buffer: list(touches) for buffer, touches in self.before.items()})
        for buffer, touches in self.now.items():
            both[buffer] += touches
        for buffer, touches in both.items():
            for where, example, times in self._conflicts(buffer, touches):
                self.faults.add("race", where, example, times)
        self.before = defaultdict(list)

    def barrier(self) -> None:
        """Arrive and wait at once."""
        if self.before:  # between arriving at another barrier and waiting for it
            self.wait()
        self.arrive()
        self.wait()

    def _conflicts(self, buffer: Buffer, touches: list[Touch]) -> Iterator[tuple[str, str, int]]:
        """Places that several actors of a realm touch, one of them writing, unless all write the same."""
        if all(touch.values is None for touch in touches):
            return
        written = np.zeros(len(buffer.valid), bool)
        for touch in touches:
            if touch.values is not None:
                written[touch.cells] = True
        kept = [_on(written, touch) for touch in touches]
        cells, threads, values, writes = (np.concatenate(part) for part in zip(*kept, strict=True))
        place = cells * (int(self.realm.max()) + 1) + self.realm[threads]
        order = np.argsort(place, kind="stable")
        place, cells, actors = place[order], cells[order], self.actor[threads[order]]
        values, writes = values[order], writes[order]
        starts = np.flatnonzero(np.r_[True, place[1:] != place[:-1]])
        low, high = np.minimum.reduceat(actors, starts), np.maximum.reduceat(actors, starts)
        any_write, all_write = np.logical_or.reduceat(writes, starts), np.logical_and.reduceat(writes, starts)
        same = all_write & (np.minimum.reduceat(values, starts) == np.maximum.reduceat(values, starts))
        bad = np.flatnonzero((low != high) & any_write & ~same)
        if len(bad):
            cell = cells[starts[bad[0]]]
            lines = sorted({touch.line for touch in touches if (touch.cells == cell).any()})
            who = f"{int(low[bad[0]])} and {int(high[bad[0]])}"
            yield f"lines {lines}", f"{buffer.name}[{int(cell)}] by {who}", len(bad)


def _on(written: Array, touch: Touch) -> tuple[Array, Array, Array, Array]:
    """The part of a touch on such cells: cells, threads, values, whether it writes."""
    keep = written[touch.cells]
    cells = touch.cells[keep]
    threads = np.broadcast_to(touch.threads[:, None], touch.cells.shape)[keep]
    values = np.zeros(len(cells), np.uint64) if touch.values is None else touch.values[keep]
    return cells, threads, values, np.full(len(cells), touch.values is not None)


class Barriers:
    """The orders of a program, and whether its threads keep to the protocol of a cluster."""

    def __init__(self, faults: Faults, cta: Array) -> None:  # (threads,)
        threads = np.arange(len(cta))
        self.faults, self.ctas = faults, int(cta.max()) + 1
        self.orders = [Order(faults, threads, cta)]
        if self.ctas > 1:
            self.orders.append(Order(faults, cta, np.zeros_like(cta)))
        self.arrived = self.started = False
        self.remote = self.remote_before = False  # remote accesses since arriving, and before it

    def add(self, buffer: Buffer, touch: Touch) -> None:
        for order in self.orders:
            order.add(buffer, touch)

    def reach(self, where: object) -> None:
        """Another CTA's shared memory."""
        if not self.started:
            self.faults.add("cluster", where, "remote access before any cluster barrier")
        self.remote = True

    def barrier(self) -> None:
        """Of each CTA."""
        self.orders[0].barrier()

    def arrive(self, where: object) -> None:
        if self.arrived:
            self.faults.add("cluster", where, "arrives twice without waiting")
        for order in self.orders:
            order.arrive()
        self.arrived, self.remote_before, self.remote = True, self.remote, False

    def wait(self, where: object) -> None:
        if not self.arrived:
            self.faults.add("cluster", where, "waits without having arrived")
        for order in self.orders:
            order.wait()
        self.arrived, self.started, self.remote_before = False, True, False

    def leave(self) -> None:
        for order in self.orders:
            order.wait()
        if self.arrived:
            self.faults.add("cluster", "exit", "arrived and did not wait")
        if self.remote or self.remote_before:
            self.faults.add("cluster", "exit", "may leave while another still reads its shared memory")
