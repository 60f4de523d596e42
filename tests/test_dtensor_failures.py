"""Calls of DTensors that are refused, that fail on one rank, and that write to the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import bits, relative_error
from dtensors import CLASSES, EPS, ROWS, mesh_of, placed, target_of, uneven
from ranks import Ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from fused_ce import cross_entropy
from fused_ce.backends import cpu


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
    with pytest.raises(TypeError, match="expected targets as a tensor, got list"):
        cross_entropy(by_class, y.tolist())
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
        (logits, labels)[changed].mul_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_in_place(ranks: Ranks, dim: int, dtype: torch.dtype) -> None:
    ranks(run_in_place, dim, dtype)
