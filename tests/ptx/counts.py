"""How many instructions of PTX the forward kernel executes for each logit, with its gradient: `python -m ptx --counts`.

Counted over all threads, masked lanes included: what a compiler of PTX will make of them, and their time, are not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .cases import case, found_in
from .launch import Emulator

CLASSES = (1000, 4099, 32000, 50257, 128256)
WAYS = {"alone": "fused few", "shared": "fused"}  # a row by one program at a time, or, where rows are few, by several


def counts(targets: list[str], dtype: torch.dtype, classes: list[int] | None) -> Iterator[str]:
    """A line for each number of classes: every target, rows alone and, where it makes a difference, shared."""
    for C in classes or CLASSES:
        parts = []
        for target in targets:
            alone, shared = (_a_logit(target, dtype, C, words) for words in WAYS.values())
            more = f", shared {shared:.1f}" if abs(shared - alone) > 0.05 * alone else ""
            parts.append(f"{target} {alone:.1f}{more}")
        yield f"{str(dtype)[6:]} {C}: " + "; ".join(parts)


def _a_logit(target: str, dtype: torch.dtype, C: int, words: str) -> float:
    emulator = Emulator(target, few="few" in words.split())
    faults = found_in(case(words, C, dtype), emulator)
    assert not faults, faults
    executed = sum(one.executed for one in emulator.launches if one.kernel == "forward")
    return executed / (3 * C)
