"""Checks of `linear_ranks.py`: `fused_ce.linear_cross_entropy` of a DTensor weight whose classes are sharded."""

from __future__ import annotations

from typing import Any

import torch
from linear_cases import CASES, Case, H, V, distance, in_float64
from linear_ranks import RANKS, check, raises_everywhere
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from fused_ce import CrossEntropyOutput, LinearCrossEntropyLoss, linear_cross_entropy

ROWS = ("input", "target")
IDS = ("mean-float32", "sum-float64-upstream-3", "none-everything", "mean-everything-weight", "num-items-z-loss")


def placed(whole: dict[str, Tensor], mesh: DeviceMesh, rows: list[Any], classes: list[Any]) -> dict[str, Any]:
    """Leaves, class weights left plain."""
    found: dict[str, Any] = {}
    for name, tensor in whole.items():
        if name == "weight":
            found[name] = tensor
            continue
        part = distribute_tensor(tensor.detach(), mesh, rows if name in ROWS else classes)
        found[name] = part.requires_grad_(tensor.requires_grad)
    return found


def compare(case: Case, tensors: dict[str, Any], expected: dict[str, Any]) -> None:
    """Loss and gradients against float64; `expected`: the placements of the gradients."""
    whole = case.build()
    exact = in_float64(whole)
    loss: Any = linear_cross_entropy(**tensors, **case.options, chunk_rows=case.chunk_rows)
    right, most = case.exact(exact), 1e-12 if case.dtype == torch.float64 else 1e-6
    got = loss.full_tensor() if isinstance(loss, DTensor) else loss
    assert isinstance(loss, DTensor) == isinstance(tensors["input"], DTensor)
    assert distance(got.detach(), right.detach()) < most
    loss.sum().backward()
    right.sum().backward()
    for name, placements in expected.items():
        grad = tensors[name].grad
        if placements is not None:
            assert grad.placements == placements
            grad = grad.full_tensor()
        assert distance(grad, exact[name].grad) < most


@check
def dtensor_weight(rank: int) -> None:
    """The input plain, replicated, or its rows sharded over the ranks that share the classes (sequence parallel)."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for id in IDS:
        case = next(case for case in CASES if case.id == id)
        whole = case.build()
        bias = {"linear_bias": (Shard(0),)} if case.bias else {}
        for rows in ([Replicate()], [Shard(0)], [Shard(1)], None):
            own_rows = rows if rows != [Shard(1)] else [Replicate()]
            tensors = placed(whole, mesh, own_rows or [Replicate()], [Shard(0)])
            if rows == [Shard(1)]:
                tensors["input"] = distribute_tensor(whole["input"].detach(), mesh, rows).requires_grad_()
            if rows is None:
                tensors |= {name: whole[name].detach().clone() for name in ROWS}
                tensors["input"].requires_grad_()
            of_input = None if rows is None else tuple(rows)
            compare(case, tensors, {"input": of_input, "linear_weight": (Shard(0),), **bias})


@check
def dtensor_rows_on_another_mesh_dimension(rank: int) -> None:
    """2 x 1, or 2 x 2 of four ranks: one divisor for all rows, whoever holds more that count."""
    if RANKS % 2:
        return
    mesh = init_device_mesh("cpu", (2, RANKS // 2))
    for id in IDS:
        case = next(case for case in CASES if case.id == id)
        tensors = placed(case.build(), mesh, [Shard(0), Replicate()], [Replicate(), Shard(0)])
        shared = (Partial(), Shard(0))
        compare(case, tensors, {"input": (Shard(0), Replicate()), "linear_weight": shared})


@check
def dtensor_statistics(rank: int) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    whole = Case("statistics", ignored=0.3).build()
    tensors = placed(whole, mesh, [Replicate()], [Shard(0)])
    found = linear_cross_entropy(**tensors, return_stats=True, lse_square_scale=0.1)
    right = linear_cross_entropy(**whole, return_stats=True, lse_square_scale=0.1)
    for name in CrossEntropyOutput._fields:
        torch.testing.assert_close(getattr(found, name).full_tensor(), getattr(right, name), rtol=1e-5, atol=1e-6)


@check
def dtensor_module(rank: int) -> None:
    """A `LinearCrossEntropyLoss` whose linear weight was distributed."""
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    loss = LinearCrossEntropyLoss(H, V, bias=True)
    x, y = torch.randn(12, H, requires_grad=True), torch.randint(V, (12,))
    right = loss(x, y)
    right.backward()
    grad, x.grad = x.grad, None
    for name, parameter in list(loss.linear.named_parameters()):
        part = torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)]))
        setattr(loss.linear, name, part)
    found = loss(x, y)
    found.backward()
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(x.grad, grad)


@check
def dtensor_failures(rank: int) -> None:
    mesh = init_device_mesh("cpu", (RANKS,))
    whole = Case("failures", bias=True).build()
    for change, kind, words in (
        ({"target": whole["target"].clone().fill_(V)}, IndexError, "out of bounds"),
        ({"linear_bias": whole["linear_bias"]}, ValueError, "linear_bias as a DTensor"),
        ({"softcap": -1.0}, ValueError, "softcap"),
    ):
        tensors: dict[str, Any] = placed(whole, mesh, [Replicate()], [Shard(0)]) | change
        with raises_everywhere(kind, words):
            linear_cross_entropy(**tensors, chunk_rows=8)
    if RANKS % 2:
        return
    square = init_device_mesh("cpu", (2, RANKS // 2))
    tensors = placed(whole, square, [Shard(0), Replicate()], [Replicate(), Shard(0)])
    with raises_everywhere(ValueError, "of which rows"):
        linear_cross_entropy(**tensors | {"target": whole["target"]})
    with raises_everywhere(ValueError, "whether all ranks hold the same rows"):
        linear_cross_entropy(**tensors | {"input": whole["input"], "target": whole["target"]})
    with raises_everywhere(ValueError, "mesh"):
        linear_cross_entropy(**tensors | {"input": distribute_tensor(whole["input"].detach(), mesh, [Replicate()])})
    last = whole["target"].clone()
    last[-1] = V  # a row of which only the last ranks know
    bad = distribute_tensor(last, square, [Shard(0), Replicate()])
    with raises_everywhere(IndexError, "out of bounds"):
        linear_cross_entropy(**tensors | {"target": bad}, chunk_rows=8)
