"""What is wrong on one rank of a vocab-parallel cross entropy is an error on all of them, at once."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from ranks import Ranks
from torch import Tensor

from fused_ce.backends.dispatch import BACKENDS
from fused_ce.distributed import exchange, vocab_parallel_cross_entropy


def wrong_call(rank: int, size: int, name: str) -> Any:
    """A call in which the last rank, or every rank, does something that is wrong."""
    N, V, last = 6, 16, rank == size - 1
    x = torch.randn(N, V // size, generator=torch.Generator().manual_seed(rank))
    y = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    given: dict[str, Any] = {"vocab_size": V}
    exchange.MOST_GATHERED = -1 if name.endswith("by reductions") else 4 << 20
    name = name.removesuffix(" by reductions")
    if name == "bad target":
        y[2] = V
    elif name == "bad target of one" and last:
        y[2] = -7
    elif name == "targets of one" and last:
        y = y.flip(0)
    elif name == "dtype of one" and last:
        x = x.to(torch.complex64)
    elif name == "double of one" and last:
        x = x.double()
    elif name == "target's shape of one" and last:
        y = y[:3]
    elif name == "softcap of one" and last:
        given["softcap"] = 5.0
    elif name == "smoothing of one" and last:
        given["label_smoothing"] = 0.1
    elif name == "statistics of one" and last:
        given["return_stats"] = True
    elif name == "typo of one" and last:
        given["reduction"] = "average"
    elif name == "weight of one" and last:
        given["weight"] = torch.rand(V)
    elif name == "size of one" and last:
        given["vocab_size"] = V + 4
    elif name == "overlap":
        given["vocab_start"] = 0
    elif name == "not filled":
        given["vocab_size"] = V + 4
        given["vocab_start"] = rank * (V // size)
    elif name == "out of memory of one" and last:
        backend = BACKENDS["cpu"]
        kept, backend.part = backend.part, raise_out_of_memory
        try:
            return vocab_parallel_cross_entropy(x, y, **given)
        finally:
            backend.part = kept
    return vocab_parallel_cross_entropy(x, y, **given)


def raise_out_of_memory(*_: object) -> NoReturn:
    raise MemoryError("injected")


WRONG = {
    "bad target": (IndexError, "Target 16 is out of bounds"),
    "bad target of one": (IndexError, "Target -7 is out of bounds"),
    "targets of one": (RuntimeError, "had other targets"),
    "dtype of one": (TypeError, "got torch.complex64"),
    "double of one": (RuntimeError, "dtypes of logits"),
    "target's shape of one": (ValueError, "expected targets of shape"),
    "softcap of one": (RuntimeError, "had other options"),
    "smoothing of one": (RuntimeError, "had other options"),
    "statistics of one": (RuntimeError, "had other options"),
    "weight of one": (RuntimeError, "had other options or class weights"),
    "typo of one": (ValueError, "got 'average'"),
    "size of one": (RuntimeError, r"had other vocab_size: \[16, "),
    "overlap": (ValueError, "expected shards that tile the 16 classes"),
    "not filled": (ValueError, "expected shards that tile the 20 classes, got 16 together"),
    "out of memory of one": (MemoryError, "injected"),
}


@pytest.mark.parametrize("how", ["", " by reductions"])
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_on_one_rank_raises_on_all(ranks: Ranks, name: str, how: str) -> None:
    kind, words = WRONG[name]
    outcomes = ranks.outcomes(wrong_call, name + how)
    for outcome in outcomes:
        assert isinstance(outcome, kind), outcome
        assert re.search(words, str(outcome))
    if name.endswith("of one") and kind is not RuntimeError:
        assert f"on rank {ranks.size - 1} of the group" in str(outcomes[0])
    assert all(isinstance(outcome, Tensor) for outcome in ranks(wrong_call, "nothing"))


def die(rank: int, size: int) -> None:
    if rank == size - 1:
        os._exit(3)
    wrong_call(rank, size, "nothing")


def come_late(rank: int, size: int) -> None:
    if rank == size - 1:
        time.sleep(4)
    else:
        wrong_call(rank, size, "nothing")


@pytest.mark.parametrize("how", [die, come_late])
def test_a_peer_that_does_not_come_is_the_engines_error(how: Callable[..., None]) -> None:
    few = Ranks(2, timeout=1.5)
    try:
        outcome, *_ = few.outcomes(how)
    finally:
        few.stop()
    assert isinstance(outcome, RuntimeError), outcome
