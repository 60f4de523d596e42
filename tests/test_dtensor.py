"""`fused_ce.cross_entropy` of DTensors on ranks of a gloo group, held to what a call in one process is held to."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import bits, relative_error
from cases import CASES
from judge import check, check_grad, expected_of
from ranks import Ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

import fused_ce
from fused_ce import cross_entropy
from fused_ce.backends import cpu

EPS = torch.finfo(torch.float32).eps
ROWS, CLASSES, PIXELS, COPY, PART = "rows", "classes", "pixels", "copy", "part"
# What the dimensions of a mesh shard; a second one has two ranks.
LAYOUTS = [
    (ROWS,),
    (CLASSES,),
    (PIXELS,),
    (COPY,),
    (PART,),
    (ROWS, CLASSES),
    (CLASSES, ROWS),
    (PIXELS, CLASSES),
    (ROWS, ROWS),
    (CLASSES, CLASSES),
    (ROWS, COPY),
    (PART, CLASSES),
]
# A layout is held to some of the cases, and each case by some layout.
SMALL = [case for case in CASES if case.N * case.C <= 2500]
CASES_OF = {layout: SMALL[number :: len(LAYOUTS)] for number, layout in enumerate(LAYOUTS)}
_meshes: dict[tuple[int, ...], DeviceMesh] = {}


def mesh_of(size: int, layout: tuple[str, ...] = (ROWS,)) -> DeviceMesh:
    shape = (size,) if len(layout) == 1 else (size // 2, 2)
    if shape not in _meshes:
        _meshes[shape] = DeviceMesh("cpu", torch.arange(size).view(shape))
    return _meshes[shape]


def placed(whole: Tensor, layout: tuple[str, ...], size: int, has_classes: bool = True) -> DTensor:
    """Logits (N, C, d1..dk) or, without classes, targets, placed as the logits' layout has it."""
    mesh, dims = mesh_of(size, layout), whole.dim() + (not has_classes)
    places: list[Any] = []
    for what in layout:
        dim = {ROWS: 0 if dims > 1 else None, CLASSES: min(1, dims - 1), PIXELS: 2 if dims > 2 else None}.get(what)
        if not has_classes and dim is not None:
            dim = None if what == CLASSES else max(0, dim - 1)
        places.append(Replicate() if dim is None else Shard(dim))
    if not has_classes or PART not in layout:
        return distribute_tensor(whole, mesh, places)
    local = distribute_tensor(whole, mesh, places).to_local()
    local = local if mesh.get_coordinate()[0] == 0 else torch.zeros_like(local)
    places[0] = Partial()
    return DTensor.from_local(local, mesh, places, shape=whole.shape, stride=whole.contiguous().stride())


def target_of(target: Tensor, layout: tuple[str, ...], size: int, has_probs: bool = False) -> DTensor:
    layout = tuple(COPY if what == PART else what for what in layout)
    return placed(target, layout, size, has_classes=has_probs)


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


def uneven(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (7, 10), of which the last rows, and so the last ranks', are nearly all ignored; targets and weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 10, generator=generator, dtype=torch.float64) * 3
    y = torch.tensor([3, 9, 0, 5, -100, -100, 2])
    return x.to(dtype), y, torch.linspace(0.01, 3, 10, dtype=torch.float64).to(dtype)


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


def run_refusals(rank: int, size: int) -> None:
    x, y, w = uneven()
    mesh = mesh_of(size)
    by_class, by_row = (distribute_tensor(x, mesh, [Shard(dim)]).requires_grad_() for dim in (1, 0))
    with pytest.raises(ValueError, match=r"expected targets as a DTensor .* wrap it by DTensor.from_local"):
        cross_entropy(by_row, y)
    other = DeviceMesh("cpu", torch.arange(size).view(1, size))
    with pytest.raises(ValueError, match="expected targets on the logits' mesh"):
        cross_entropy(by_class, distribute_tensor(y, other, [Replicate(), Replicate()]))
    with pytest.raises(ValueError, match=r"expected targets of shape \(7,\) .* got \(6,\)"):
        cross_entropy(by_class, y[:6])
    with pytest.raises(NotImplementedError, match="class weights without a gradient"):
        cross_entropy(by_class, y, w.requires_grad_())
    with pytest.raises(ValueError, match="softcap must be a positive"):
        cross_entropy(by_row, distribute_tensor(y, mesh, [Shard(0)]), softcap=-1.0)
    with pytest.raises(RuntimeError, match="inplace=True would overwrite a leaf"):
        cross_entropy(by_class, y, inplace=True)
    (first,) = torch.autograd.grad(cross_entropy(by_class, y), by_class, create_graph=True)
    with pytest.raises(RuntimeError, match="one derivative"):
        first.pow(2).sum().backward()


def test_refusals(ranks: Ranks) -> None:
    ranks(run_refusals)


def run_failure(rank: int, size: int, layout: tuple[str, ...], what: str) -> str:
    """One rank, or the ranks of one part of the rows, have a bad target, or no memory."""
    x, y, _ = uneven()
    y[6] = 10 if what == "target" else 1
    own, target = placed(x, layout, size).requires_grad_(), target_of(y, layout, size)
    with pytest.MonkeyPatch.context() as patch:
        if what == "memory" and rank == size - 1:
            for name in ("forward", "part"):
                patch.setattr(cpu, name, no_memory)
        with pytest.raises(IndexError if what == "target" else MemoryError) as caught:
            cross_entropy(own, target)
    y[6] = 1
    loss = cross_entropy(placed(x, layout, size), target_of(y, layout, size)).full_tensor()
    assert relative_error(loss, F.cross_entropy(x.double(), y)) <= 4 * EPS
    return str(caught.value)


def no_memory(*_: Any) -> Any:
    raise MemoryError("no memory")


@pytest.mark.parametrize("what", ["target", "memory"])
@pytest.mark.parametrize(
    "layout", [(ROWS,), (CLASSES,), (ROWS, CLASSES), (CLASSES, ROWS), (ROWS, ROWS)], ids=" x ".join
)
def test_a_failure_on_one_rank_raises_on_all(ranks: Ranks, layout: tuple[str, ...], what: str) -> None:
    words = "Target 10 is out of bounds" if what == "target" else "no memory"
    told = ranks(run_failure, layout, what)
    assert all(words in message for message in told)
    if layout == (ROWS,):
        assert f"(on rank {ranks.size - 1})" in told[0]


def run_in_place(rank: int, size: int, dim: int, dtype: torch.dtype) -> None:
    x, y, _ = uneven(dtype)
    leaf = distribute_tensor(x, mesh_of(size), [Shard(dim)]).requires_grad_()
    target = distribute_tensor(y, mesh_of(size), [Replicate() if dim else Shard(0)])
    (grad,) = torch.autograd.grad(cross_entropy(leaf, target), leaf)
    logits = leaf * 1
    (again,) = torch.autograd.grad(cross_entropy(logits, target, inplace=True), leaf)
    for found in (again, logits.detach()):
        assert torch.equal(bits(found.to_local()), bits(grad.to_local()))
    logits = leaf * 1
    saved = logits.pow(2).sum()
    loss = cross_entropy(logits, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + saved).backward()
    for changed in (0, 1):  # the logits, or the target, before a backward that may read them
        logits, labels = leaf * 1, target.clone()
        loss = cross_entropy(logits, labels, reduction="sum")
        (logits, labels)[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_in_place(ranks: Ranks, dim: int, dtype: torch.dtype) -> None:
    ranks(run_in_place, dim, dtype)


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
