"""`fused_ce.cross_entropy` of DTensors on ranks of a gloo group, held to what a call in one process is held to."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import bits, relative_error
from cases import CASES
from dtensors import CLASSES, EPS, LAYOUTS, ROWS, mesh_of, placed, target_of, uneven
from judge import check, check_grad, expected_of
from ranks import Ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

import fused_ce
from fused_ce import cross_entropy

# A layout is held to some of the cases, and each case by some layout.
SMALL = [case for case in CASES if case.N * case.C <= 2500]
CASES_OF = {layout: SMALL[number :: len(LAYOUTS)] for number, layout in enumerate(LAYOUTS)}


def run_cases(rank: int, size: int, layout: tuple[str, ...]) -> list[tuple[Tensor, Tensor]]:
    results = []
    for case in CASES_OF[layout]:
        call = case.build()
        x = placed(call.input, layout, size).detach().requires_grad_()
        target = target_of(call.target, layout, size, call.has_probs)
        loss = cross_entropy(x, target, call.weight, **call.options.keywords())
        (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
        assert grad.placements == tuple(Replicate() if p == Partial() else p for p in x.placements), case
        # A sum over rows is known to every rank: item() of a partial one would give this rank's part.
        wanted = target.placements if loss.dim() and not call.has_probs else loss.placements
        assert loss.placements == (wanted if loss.dim() else (Replicate(),) * len(layout)), case
        results.append((loss.detach().full_tensor(), grad.full_tensor().contiguous()))
    return results


@pytest.mark.parametrize("layout", LAYOUTS, ids=" x ".join)
def test_every_case(ranks: Ranks, layout: tuple[str, ...]) -> None:
    for case, *results in zip(CASES_OF[layout], *ranks(run_cases, layout), strict=True):
        expected_loss, expected_grad = expected_of(case)
        check(results[0][0], expected_loss)
        check_grad(results[0][1], case.build(), expected_grad)
        for loss, grad in results:
            assert torch.equal(bits(loss), bits(results[0][0])), case
            assert torch.equal(bits(grad), bits(results[0][1])), case


def run_means(rank: int, size: int, keywords: dict[str, Any]) -> tuple[Tensor, Tensor]:
    x, y, w = uneven()
    x = distribute_tensor(x, mesh_of(size), [Shard(0)]).requires_grad_()
    loss = cross_entropy(x, distribute_tensor(y, mesh_of(size), [Shard(0)]), w, **keywords)
    loss.backward()
    return loss.detach().full_tensor(), x.grad.full_tensor()


@pytest.mark.parametrize(
    "keywords",
    [{}, {"lse_square_scale": 0.1}, {"label_smoothing": 0.2}, {"num_items": 3.0, "lse_square_scale": 0.1}],
    ids=str,
)
def test_weighted_means_over_rows_on_several_ranks(ranks: Ranks, keywords: dict[str, Any]) -> None:
    """The cross entropy is divided by the weights of all ranks' targets, the z-loss by their number."""
    x, y, w = uneven()
    whole = x.double().requires_grad_()
    exact = cross_entropy(whole, y, w.double(), **keywords)
    exact.backward()
    for loss, grad in ranks(run_means, keywords):
        assert relative_error(loss, exact.detach()) <= 4 * EPS
        assert relative_error(grad, whole.grad, whole.grad.abs().clamp(min=1e-4)) <= 1e-5


def run_statistics(rank: int, size: int, layout: tuple[str, ...], reduction: str) -> list[Any]:
    x, y, w = uneven()
    own = placed(x, layout, size).detach().requires_grad_()
    target = target_of(y, layout, size)
    out = cross_entropy(own, target, w, return_stats=True, lse_square_scale=0.1, softcap=20.0, reduction=reduction)
    (out.loss.sum() + out.lse.sum() * 0.5).backward()
    scalars = (Replicate(),) * len(layout)
    for name, value in out._asdict().items():
        is_row = name not in ("loss", "z_loss") or reduction == "none"
        assert value.placements == (target.placements if is_row else scalars), name
        assert value.shape == ((7,) if is_row else ()), name
    return [*(value.detach().full_tensor() for value in out), own.grad.full_tensor()]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("layout", [(ROWS,), (CLASSES,), (ROWS, CLASSES)], ids=" x ".join)
def test_statistics(ranks: Ranks, layout: tuple[str, ...], reduction: str) -> None:
    x, y, w = uneven()
    whole = x.double().requires_grad_()
    keywords: dict[str, Any] = {"lse_square_scale": 0.1, "softcap": 20.0, "reduction": reduction}
    exact = cross_entropy(whole, y, w.double(), return_stats=True, **keywords)
    (exact.loss.sum() + exact.lse.sum() * 0.5).backward()
    for *found, grad in ranks(run_statistics, layout, reduction):
        for value, of in zip(found, exact, strict=True):
            assert relative_error(value, of.detach().double()) <= 8 * EPS
        assert relative_error(grad, whole.grad, whole.grad.abs().clamp(min=1e-3)) <= 2e-5


def run_views(rank: int, size: int, dim: int, inside: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 4, 11, generator=generator), torch.randint(11, (4, 4), generator=generator)
    logits = distribute_tensor(x, mesh_of(size), [Shard(dim)]).requires_grad_()
    target = distribute_tensor(y, mesh_of(size), [Shard(dim) if dim < 2 else Replicate()])
    with loss_parallel() if inside else nullcontext():
        loss = cross_entropy(logits.view(-1, 11), target.view(-1), label_smoothing=0.1)
        loss.backward()
    assert logits.grad.placements == logits.placements
    return loss.detach().full_tensor(), logits.grad.full_tensor()


@pytest.mark.parametrize("inside", [True, False], ids=["in loss_parallel", "outside"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_language_models_logits_flattened(ranks: Ranks, dim: int, inside: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 4, 11, generator=generator), torch.randint(11, (4, 4), generator=generator)
    whole = x.double().requires_grad_()
    exact = F.cross_entropy(whole.view(-1, 11), y.view(-1), label_smoothing=0.1)
    exact.backward()
    for loss, grad in ranks(run_views, dim, inside):
        assert relative_error(loss, exact.detach()) <= 4 * EPS
        assert relative_error(grad, whole.grad, whole.grad.abs().clamp(min=1e-3)) <= 1e-5


def run_targets(rank: int, size: int) -> list[float]:
    """The same loss, however targets, weights and numbers are handed in."""
    x, y, w = uneven()
    mesh = mesh_of(size)
    by_class, by_row, copies = (distribute_tensor(x, mesh, [place]) for place in (Shard(1), Shard(0), Replicate()))
    rows, everywhere = distribute_tensor(y, mesh, [Shard(0)]), distribute_tensor(y, mesh, [Replicate()])
    losses = [cross_entropy(logits, target, w) for logits in (by_class, copies) for target in (y, rows, everywhere)]
    losses += [cross_entropy(by_row, target, w) for target in (rows, everywhere)]
    losses.append(cross_entropy(by_class, y.byte(), w, ignore_index=156))
    losses += [cross_entropy(logits, rows, distribute_tensor(w, mesh, [Shard(0)])) for logits in (by_class, by_row)]
    losses.append(fused_ce.CrossEntropyLoss(w)(by_row, rows))
    number = w.double()[y[y >= 0]].sum()
    count = distribute_tensor(number, mesh, [Replicate()])
    losses += [cross_entropy(logits, rows, w, num_items=count) for logits in (by_class, by_row)]
    with torch.inference_mode():
        losses.append(cross_entropy(by_row, rows, w))
    return [float(loss.full_tensor()) for loss in losses]


def test_targets_and_weights_wherever_they_lie(ranks: Ranks) -> None:
    x, y, w = uneven()
    exact = float(F.cross_entropy(x.double(), y, w.double()))
    for found in ranks(run_targets):
        assert found == pytest.approx([exact] * len(found), rel=4 * EPS)


def run_what_users_call_next(rank: int, size: int) -> None:
    x, y, _ = uneven()
    mesh = mesh_of(size)
    logits = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
    target = distribute_tensor(y, mesh, [Shard(0)])
    exact = F.cross_entropy(x.double(), y).item()
    loss = cross_entropy(logits, target)
    assert loss.item() == pytest.approx(exact, rel=4 * EPS)
    assert loss.exp().item() == pytest.approx(torch.tensor(exact).exp().item(), rel=1e-5)
    aux = (logits * 0.01).pow(2).sum()
    total = loss * 2 + aux
    assert total.full_tensor().item() == pytest.approx(2 * exact + (x.double() * 0.01).pow(2).sum().item(), rel=1e-5)
    total.backward()
    whole = x.double().requires_grad_()
    (F.cross_entropy(whole, y) * 2 + (whole * 0.01).pow(2).sum()).backward()
    assert relative_error(logits.grad.full_tensor(), whole.grad, whole.grad.abs().clamp(min=1e-3)) <= 1e-5
    # A second derivative, of rows.
    (first,) = torch.autograd.grad(cross_entropy(logits, target), logits, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), logits)
    (first,) = torch.autograd.grad(F.cross_entropy(whole, y), whole, create_graph=True)
    (exactly,) = torch.autograd.grad(first.pow(2).sum(), whole)
    assert relative_error(second.full_tensor(), exactly, exactly.abs().clamp(min=1e-4)) <= 1e-4
    # A redistribution that nobody has waited for; a graph that torch compiles around the loss.
    late = (logits * 1).redistribute(placements=[Replicate()], async_op=True)
    assert cross_entropy(late, target).item() == pytest.approx(exact, rel=4 * EPS)
    compiled = torch.compile(lambda logits: cross_entropy(logits * 1, target), backend="eager")
    assert compiled(logits).item() == pytest.approx(exact, rel=4 * EPS)
    # Ranks outside the mesh.
    first_only = DeviceMesh("cpu", [0])
    logits = distribute_tensor(x, first_only, [Shard(1)]).requires_grad_()
    loss = cross_entropy(logits, distribute_tensor(y, first_only, [Replicate()]))
    loss.backward()
    assert loss.shape == ()
    assert rank > 0 or loss.item() == pytest.approx(exact, rel=4 * EPS)


def test_what_users_call_next(ranks: Ranks) -> None:
    ranks(run_what_users_call_next)
