"""Linear cross entropy as an operator of a traced graph: torch.compile, torch.export, opcheck, modes that watch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import p, w, x
from cases import EVERYTHING
from oracle import composed
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fused_ce import LinearCrossEntropyLoss, linear_cross_entropy
from fused_ce.options import Options

TARGET = torch.tensor([1, -100, 3, 0])
# name: (target, class weight, keywords) of input (4, 3), linear_weight (5, 3) and linear_bias (5)
KINDS: dict[str, tuple[Tensor, Tensor | None, dict[str, Any]]] = {
    "mean": (TARGET, None, {}),
    "none": (TARGET, None, {"reduction": "none"}),
    "everything": (TARGET, w(), EVERYTHING),
    "num-items": (TARGET, None, {"num_items": 7.0}),
    "probabilities": (p(4, 5), None, {"softcap": 2.0}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def leaves(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x(*shape, dtype=dtype).requires_grad_() for shape in ((4, 3), (5, 3), (5,)))  # type: ignore[return-value]


def ours(kind: str, **more: Any) -> Any:
    target, weight, keywords = KINDS[kind]
    return lambda input, W, b: linear_cross_entropy(
        input * 2, W, target, linear_bias=b, weight=weight, chunk_rows=3, **keywords, **more
    )


def eager(kind: str) -> Any:
    target, weight, keywords = KINDS[kind]
    return lambda input, W, b: composed(F.linear(input * 2, W, b), target, weight, Options(**keywords))


def results(f: Any, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    tensors = leaves(dtype)
    loss = f(*tensors).sum() * 3
    return loss.detach(), *torch.autograd.grad(loss, tensors)


@kinds
@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compiled_whole(kind: str, engine: str) -> None:
    if engine == "inductor" and kind != "mean":
        return  # one is enough: it takes seconds
    torch._dynamo.reset()
    compiled = torch.compile(ours(kind), fullgraph=True, backend=engine)
    torch.testing.assert_close(results(compiled), results(eager(kind)), rtol=1e-10, atol=1e-14)


def test_the_graph_holds_one_operator() -> None:
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    torch.compile(ours("mean"), fullgraph=True, backend=look)(*leaves())
    assert sum("fused_ce.linear_forward" in name for name in seen) == 1
    assert not any("linear" in name and "fused_ce" not in name for name in seen)


def test_compiled_with_frozen_weights_other_sizes_and_bfloat16() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda i, W, y: linear_cross_entropy(i, W, y, chunk_rows=64), fullgraph=True, backend="aot_eager"
    )
    for N in (4, 6, 9):
        input, W, y = x(N, 3).bfloat16().requires_grad_(), x(5, 3).bfloat16(), torch.arange(N) % 5
        for weight in (W, W.clone().requires_grad_()):
            found = torch.autograd.grad(compiled(input, weight, y) * 3, input)[0]
            right = torch.autograd.grad(linear_cross_entropy(input, weight, y, chunk_rows=64) * 3, input)[0]
            torch.testing.assert_close(found, right, rtol=0, atol=0)


def test_compiled_statistics() -> None:
    def loss(f: Any) -> Any:
        def run(*tensors: Tensor) -> Tensor:
            found = f(*tensors)
            return found.loss.sum() + found.lse.pow(2).sum() + found.entropy.sum().detach()

        return run

    torch._dynamo.reset()
    with_stats = ours("mean", return_stats=True)
    compiled = torch.compile(loss(with_stats), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled), results(loss(with_stats)), rtol=1e-10, atol=1e-14)


@kinds
def test_under_a_mode_that_watches_operators(kind: str) -> None:
    with FlopCounterMode(display=False):
        found = results(ours(kind))
        tensors = leaves()
        loss = ours(kind)(*tensors).sum()
        (first,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
        second = torch.autograd.grad(first.pow(2).sum(), tensors)
    torch.testing.assert_close(found, results(eager(kind)), rtol=1e-10, atol=1e-14)
    others = leaves()
    (right,) = torch.autograd.grad(eager(kind)(*others).sum(), others[0], create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(right.pow(2).sum(), others), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", ["mean", "none", "everything"])
@pytest.mark.parametrize("wants_stats", [False, True])
def test_opcheck(kind: str, wants_stats: bool) -> None:
    seen: list[tuple[Any, ...]] = []
    operator = torch.ops.fused_ce.linear_forward.default
    original = torch.ops.fused_ce.linear_forward

    class Watching:
        def __call__(self, *arguments: Any) -> Any:
            seen.append(arguments)
            return original(*arguments)

    from fused_ce.linear import ops

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.torch.ops.fused_ce, "linear_forward", Watching())
        with FlopCounterMode(display=False):
            ours(kind, return_stats=wants_stats)(*leaves())
    tensors = [t.detach().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in seen[0]]
    torch.library.opcheck(operator, tuple(tensors))


def test_export() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = LinearCrossEntropyLoss(3, 5, bias=True, dtype=torch.float64, chunk_rows=8)

        def forward(self, input: Tensor) -> Tensor:
            return self.loss(input, TARGET.clone())

    model = Model()
    exported = torch.export.export(model, (x(4, 3),))
    assert any("fused_ce.linear_forward" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x(4, 3)), model(x(4, 3)), rtol=1e-12, atol=0)


def test_a_second_derivative_of_a_compiled_graph_is_refused() -> None:
    torch._dynamo.reset()
    tensors = leaves()
    loss = torch.compile(ours("none"), fullgraph=True, backend="aot_eager")(*tensors).sum()
    (first,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(first.sum(), tensors)
