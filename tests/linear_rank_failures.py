"""Checks of `linear_ranks.py`: what goes wrong on one rank is raised on all of them, at once, wherever it happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from linear_cases import Case, V
from linear_ranks import RANKS, check, local, ours, raises_everywhere
from torch import Tensor

from fused_ce.distributed import exchange
from fused_ce.linear import chunks, products

LAST = RANKS - 1  # the rank that fails
CASE = Case("failures", bias=True)  # 5 chunks


def given(rank: int, case: Case = CASE) -> tuple[dict[str, Tensor], dict[str, Any]]:
    own, shard, _ = local(rank, "even", case.build())
    return own, shard


@contextmanager
def failing(function: str, call: int, here: bool = True) -> Iterator[None]:
    """The product of this name finds no memory, in its n-th call."""
    right, calls = getattr(products, function), iter(range(1000))

    def product(*arguments: Any) -> Any:
        if here and next(calls) == call:
            raise MemoryError("no memory for a product")
        return right(*arguments)

    setattr(products, function, product)
    try:
        yield
    finally:
        setattr(products, function, right)


def still_in_step(rank: int) -> None:
    own, shard = given(rank)
    torch.testing.assert_close(ours(CASE, own, **shard), CASE.ours(CASE.build()))


@check
def targets_out_of_range(rank: int) -> None:
    for where, value in ((0, V), (20, -7), (36, 10**6)):
        own, shard = given(rank)
        own["target"][where] = value
        with raises_everywhere(IndexError, f"Target {value} is out of bounds"):
            ours(CASE, own, **shard)
    still_in_step(rank)


@check
def a_target_out_of_range_on_one_rank(rank: int) -> None:
    own, shard = given(rank)
    if rank == LAST:
        own["target"][30] = V
    with raises_everywhere(RuntimeError, "called alike", "targets"):
        ours(CASE, own, **shard)
    still_in_step(rank)


@check
def bad_arguments_on_one_rank(rank: int) -> None:
    for name, kind, words, change in (
        ("input", TypeError, "one floating dtype", lambda x: x.double()),
        ("input", TypeError, "one floating dtype", lambda x: x.to(torch.complex64)),
        ("input", RuntimeError, "last dimensions", lambda x: x[:, 1:]),
        ("input", ValueError, "one class index a row", lambda x: x[1:]),
        ("input", TypeError, "expected tensors, got list", lambda x: x.tolist()),
        ("target", ValueError, "one class index a row", lambda y: y[1:]),
        ("target", TypeError, "class indices", lambda y: y.float()),
        ("linear_weight", ValueError, "(V_local, H)", lambda W: W[:, None]),
        ("linear_bias", RuntimeError, "linear_bias shape", lambda b: b[1:]),
    ):
        own, shard = given(rank)
        if rank == LAST:
            own[name] = change(own[name].detach())  # type: ignore[no-untyped-call]
        with raises_everywhere(kind, words):
            ours(CASE, own, **shard)
    for keywords, kind, words in (
        ({"softcap": -1.0}, ValueError, "softcap"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows"),
        ({"label_smoothing": 2.0}, ValueError, "label_smoothing"),
        ({"reduction": "avg"}, ValueError, "reduction"),
        ({"weight": torch.ones(3)}, ValueError, "one class weight for each"),
        ({"backend": "triton"}, NotImplementedError, "backend 'triton'"),
        ({"vocab_start": -1}, ValueError, "vocab_start"),
    ):
        own, shard = given(rank)
        with raises_everywhere(kind, words):
            ours(CASE, own, **shard, **(keywords if rank == LAST else {}))
    still_in_step(rank)


@check
def ranks_called_differently(rank: int) -> None:
    for keywords, words in (
        ({"softcap": 5.0}, "options"),
        ({"label_smoothing": 0.1}, "options"),
        ({"weight": torch.full((V,), 2.0)}, "class weights"),
        ({"chunk_rows": 16}, "rows of a chunk"),
        ({"grad_scale": 2.0}, "grad_scale"),
        ({"reduce_input_grad": False}, "reduce_input_grad"),
    ):
        own, shard = given(rank)
        with raises_everywhere(RuntimeError, "called alike", words):
            ours(CASE, own, **shard, **(keywords if rank == LAST else {}))
    for name in ("input", "linear_weight"):
        own, shard = given(rank)
        own[name].requires_grad_(rank != LAST)
        with raises_everywhere(RuntimeError, "called alike", "require grad"):
            ours(CASE, own, **shard)
    own, shard = given(rank)
    rows = 30 if rank == LAST else 37
    with raises_everywhere(RuntimeError, "called alike", "numbers of rows"):
        ours(CASE, own | {"input": own["input"][:rows], "target": own["target"][:rows]}, **shard)
    own, shard = given(rank)
    own["target"][3] = -100 if rank == LAST else 3  # of which follow other chunks
    with raises_everywhere(RuntimeError, "called alike", "targets"):
        ours(CASE, own, **shard)
    still_in_step(rank)


@check
def shards_that_are_no_vocabulary(rank: int) -> None:
    own, shard = given(rank)
    with raises_everywhere(ValueError, "tile"):
        ours(CASE, own, **shard, vocab_start=0)
    with raises_everywhere(ValueError, "tile"):
        ours(CASE, own, vocab_size=V + 40 * RANKS)
    still_in_step(rank)


@check
def no_memory_in_the_middle(rank: int) -> None:
    """In the first, a middle and the last chunk, before and after its exchange."""
    for function in ("logits", "input_grad", "add_weight_grad", "add_bias_grad"):
        for call in (0, 2, 4):
            own, shard = given(rank)
            with failing(function, call, rank == LAST), raises_everywhere(MemoryError, "no memory for a product"):
                ours(CASE, own, **shard)
    still_in_step(rank)


@check
def no_memory_without_a_gather(rank: int) -> None:
    most, exchange.MOST_GATHERED = exchange.MOST_GATHERED, 0
    try:
        no_memory_in_the_middle(rank)
    finally:
        exchange.MOST_GATHERED = most


@check
def no_memory_in_backward(rank: int) -> None:
    case = Case("failures", options={"reduction": "none"})
    for function in ("logits", "input_grad", "add_weight_grad"):
        for call in (0, 2, 4):
            own, shard = given(rank, case)
            loss = ours(case, own, **shard).sum()
            with failing(function, call, rank == LAST), raises_everywhere(MemoryError, "no memory for a product"):
                loss.backward()
    still_in_step(rank)


@check
def where_nobody_looks(rank: int) -> None:
    """As on a GPU: a rank that fails raises, and the others get NaN; none of them waits."""
    waits, looks = chunks.can_wait, exchange._check
    chunks.can_wait, exchange._check = lambda tensor: False, lambda told: None
    try:
        for function, call in (("logits", 0), ("input_grad", 2), ("add_weight_grad", 4)):
            own, shard = given(rank)
            if rank == LAST:
                with failing(function, call), raises_everywhere(MemoryError, "no memory for a product"):
                    ours(CASE, own, **shard, return_stats=True)
                continue
            loss = ours(CASE, own, **shard, return_stats=True).loss
            dist.barrier()
            assert loss.isnan() or call == 4  # when its sums were known already
            assert torch.autograd.grad(loss, own["input"])[0].isnan().all()
        own, shard = given(rank)
        if rank == LAST:
            with raises_everywhere(ValueError, "softcap"):
                ours(CASE, own, **shard, softcap=-1.0)
        else:
            loss = ours(CASE, own, **shard)
            dist.barrier()
            assert loss.isnan()
    finally:
        chunks.can_wait, exchange._check = waits, looks
    still_in_step(rank)


@check
def outside_the_group(rank: int) -> None:
    first = dist.new_group([0])
    own, _ = given(rank)
    if rank:
        with pytest.raises(ValueError, match="this process is in"):
            ours(CASE, own, group=first)
