"""Vocab-parallel cross entropy on ranks of a gloo group, held to what the same call in one process is held to."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accuracy import bits, relative_error
from cases import CASES, Case
from judge import check, check_grad, expected_of
from ranks import Ranks
from torch import Tensor

import fused_ce
from fused_ce.contract import Call
from fused_ce.distributed import exchange, vocab_parallel_cross_entropy

Cuts = list[tuple[int, int]]  # the first class of each rank, and how many it holds


def of_width(C: int, size: int, width: int) -> Cuts:
    starts = [min(C, rank * width) for rank in range(size)]
    return [(start, min(C - start, width)) for start in starts]


def by_hand(C: int, size: int) -> Cuts:
    """One class, none at all, and the rest."""
    cuts = sorted([min(1, C), *[min(C, 3)] * (size - 2)])
    return [(a, b - a) for a, b in zip([0, *cuts], [*cuts, C], strict=True)]


LAYOUTS: dict[str, Callable[[int, int], Cuts]] = {
    "of DTensor": lambda C, size: of_width(C, size, -(-C // size)),
    "padded": lambda C, size: of_width(C, size, -(-C // size) + 3),
    "by hand": by_hand,
}
SHARDED = [case for case in CASES if case.probs is None and not case.declined_by]


def share(call: Call, layout: str, rank: int, size: int) -> tuple[Tensor, dict[str, Any]]:
    """The rank's logits, in memory like the whole ones', and where they belong."""
    dim = 1 if call.input.dim() > 1 else 0
    first, held = LAYOUTS[layout](call.classes, size)[rank]
    own = call.input.narrow(dim, first, held)
    where: dict[str, Any] = {"vocab_size": call.classes}
    if layout == "padded":
        width = -(-call.classes // size) + 3 - held
        own = torch.cat([own, torch.full_like(call.input.narrow(dim, 0, 1), 3e4).repeat_interleave(width, dim)], dim)
    if layout == "by hand":
        where["vocab_start"] = first
    return own, where


def run_case(rank: int, size: int, number: int, layout: str, most_gathered: int) -> tuple[Tensor, Tensor]:
    exchange.MOST_GATHERED = most_gathered
    call = SHARDED[number].build()
    own, where = share(call, layout, rank, size)
    own = own.detach().requires_grad_()
    loss = vocab_parallel_cross_entropy(own, call.target, call.weight, **where, **call.options.keywords())
    loss.backward(torch.ones_like(loss))
    return loss.detach(), own.grad


WAYS = [("of DTensor", exchange.MOST_GATHERED), ("padded", -1), ("by hand", exchange.MOST_GATHERED)]


@pytest.mark.parametrize(("layout", "most_gathered"), WAYS, ids=["DTensor-gather", "padded-reduce", "by-hand-gather"])
@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_every_case(ranks: Ranks, case: Case, layout: str, most_gathered: int) -> None:
    call, (loss, grad) = case.build(), expected_of(case)
    losses, grads = zip(*ranks(run_case, SHARDED.index(case), layout, most_gathered), strict=True)
    for other in losses[1:]:
        assert torch.equal(bits(losses[0]), bits(other))
    check(losses[0], loss)
    dim, cuts = 1 if call.input.dim() > 1 else 0, LAYOUTS[layout](call.classes, ranks.size)
    for own, (_, held) in zip(grads, cuts, strict=True):
        assert not own.narrow(dim, held, own.shape[dim] - held).any()  # of padding
    whole = torch.cat([own.narrow(dim, 0, held) for own, (_, held) in zip(grads, cuts, strict=True)], dim)
    check_grad(whole, call, grad)


def hard_rows(dtype: torch.dtype = torch.float32, V: int = 50) -> tuple[Tensor, Tensor]:
    """Confident, ignored and NaN, half of -inf, equal logits in several shards, NaN that counts."""
    seed = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, V, generator=seed) * 3, torch.randint(V, (7,), generator=seed)
    x[0, y[0]] = x[0].max() + 25
    y[1], x[1, 0] = -100, torch.nan
    x[2, V // 2 :], y[2] = -torch.inf, 0
    x[3, [3, V - 2]] = x[3].max() + 1
    x[4, V - 1] = torch.nan
    return x.to(dtype), y


def run_stats(
    rank: int, size: int, dtype: torch.dtype, most_gathered: int, reduction: str, given: dict[str, Any]
) -> Any:
    exchange.MOST_GATHERED = most_gathered
    x, y = hard_rows(dtype)
    width = -(-x.shape[1] // size)
    own = x[:, rank * width : (rank + 1) * width].clone().requires_grad_()
    call = partial(
        vocab_parallel_cross_entropy,
        target=y,
        vocab_size=x.shape[1],
        reduction=reduction,
        return_stats=True,
        lse_square_scale=1e-2,
        **given,
    )
    found = call(own)
    (found.loss.nansum() + (found.lse.nan_to_num() * torch.arange(7) + found.entropy.nan_to_num()).sum()).backward()
    with torch.no_grad():
        again = call(own)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, again, strict=True))
    return [field.detach() for field in found], own.grad


@pytest.mark.parametrize("given", [{}, {"label_smoothing": 0.1}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("most_gathered", [exchange.MOST_GATHERED, -1], ids=["gather", "reduce"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_statistics_are_those_of_one_process(
    ranks: Ranks, dtype: torch.dtype, most_gathered: int, reduction: str, given: dict[str, Any]
) -> None:
    results = ranks(run_stats, dtype, most_gathered, reduction, given)
    x, y = hard_rows(dtype)
    whole = x.double().clone().requires_grad_()
    exact = fused_ce.cross_entropy(whole, y, reduction=reduction, return_stats=True, lse_square_scale=1e-2, **given)
    (exact.loss.nansum() + (exact.lse.nan_to_num() * torch.arange(7) + exact.entropy.nan_to_num()).sum()).backward()
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for (loss, lse, z_loss, argmax, correct, entropy), _ in results:
        assert relative_error(loss, exact.loss.detach()) < 8 * eps
        for found, of in ((lse, exact.lse), (z_loss, exact.z_loss), (entropy, exact.entropy)):
            assert relative_error(found, of.detach(), of.detach().abs().clamp(min=1)) < 8 * eps
        assert torch.equal(argmax, exact.argmax)
        assert torch.equal(correct, exact.correct)
    grad = torch.cat([own for _, own in results], 1)
    live = torch.tensor([0, 1, 2, 3, 5, 6])
    size = whole.grad.abs() + whole.detach().nan_to_num().softmax(1) * (1 + torch.arange(7.0))[:, None]
    assert relative_error(grad[live], whole.grad[live], size[live], 1e-38) < 40 * eps


def run_twice(rank: int, size: int) -> list[Any]:
    x, y = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank)).double(), torch.arange(4)
    own = x.requires_grad_()
    loss = vocab_parallel_cross_entropy(own, y)
    (first,) = torch.autograd.grad(loss, own, create_graph=True)
    with pytest.raises(RuntimeError, match="expected one derivative"):
        first.pow(2).sum().backward()
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda own: vocab_parallel_cross_entropy(own, y))(own.detach())
    return [first.detach()]


def test_a_second_derivative_is_refused(ranks: Ranks) -> None:
    ranks(run_twice)


def run_inplace(rank: int, size: int, dtype: torch.dtype) -> None:
    x, y = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank)).to(dtype), torch.arange(4)
    leaf = x.requires_grad_()
    vocab_parallel_cross_entropy(leaf, y).backward()
    again = leaf.detach().requires_grad_()
    logits = again * 1
    vocab_parallel_cross_entropy(logits, y, inplace=True).backward()
    assert torch.equal(bits(again.grad), bits(leaf.grad))
    assert torch.equal(bits(logits.detach()), bits(leaf.grad))
    logits = again * 1
    loss = vocab_parallel_cross_entropy(logits, y)
    logits += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place(ranks: Ranks, dtype: torch.dtype) -> None:
    ranks(run_inplace, dtype)


def run_edges(rank: int, size: int) -> None:
    none = vocab_parallel_cross_entropy(torch.zeros(0, 4), torch.zeros(0).long(), reduction="none")
    assert none.shape == (0,)
    own = torch.randn(3, 4, requires_grad=True)
    loss = vocab_parallel_cross_entropy(own, torch.full((3,), -100), reduction="sum")
    loss.backward()
    assert loss == 0
    assert not own.grad.any()
    assert vocab_parallel_cross_entropy(own, torch.full((3,), -100)).isnan()
    alone = [torch.distributed.new_group([i]) for i in range(size)][rank]
    one = vocab_parallel_cross_entropy(own, torch.tensor([0, 3, 1]), group=alone)
    exact = torch.nn.functional.cross_entropy(own.double(), torch.tensor([0, 3, 1]))
    assert relative_error(one.detach(), exact.detach()) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert vocab_parallel_cross_entropy(own.bfloat16(), torch.tensor([0, 3, 1])).dtype == torch.float32
    assert vocab_parallel_cross_entropy(own.bfloat16(), torch.tensor([0, 3, 1])).dtype == torch.bfloat16


def test_edges(ranks: Ranks) -> None:
    ranks(run_edges)


def run_compiled(rank: int, size: int) -> None:
    own, y = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank)), torch.arange(4)

    def f(own: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(own * 2, y) + 1

    eager, compiled = own.clone().requires_grad_(), own.clone().requires_grad_()
    f(eager).backward()
    torch.compile(f, backend="aot_eager")(compiled).backward()
    assert torch.equal(bits(eager.grad), bits(compiled.grad))


def test_a_compiled_model_leaves_its_graph_for_it(ranks: Ranks) -> None:
    ranks(run_compiled)


def test_alone_without_a_group() -> None:
    x, y = hard_rows()
    exact = fused_ce.cross_entropy(x[:4].double(), y[:4])
    assert relative_error(vocab_parallel_cross_entropy(x[:4], y[:4]), exact) < 1e-6
    with pytest.raises(TypeError, match="expected logits"):
        vocab_parallel_cross_entropy(torch.tensor(1.0), y)
    with pytest.raises(IndexError, match="Target 60 is out of bounds"):
        vocab_parallel_cross_entropy(x, y + 50)
