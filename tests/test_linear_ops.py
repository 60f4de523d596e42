"""Linear cross entropy as an operator of a traced graph: torch.compile, torch.export, opcheck, modes that watch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import p, w, x, y
from cases import EVERYTHING
from oracle import composed
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

from fused_ce import LinearCrossEntropyLoss, linear_cross_entropy
from fused_ce.ops import LIBRARY, OPERATORS
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
    assert sum(f"{LIBRARY.ns}.linear_forward" in name for name in seen) == 1
    assert not any("linear" in name and LIBRARY.ns not in name for name in seen)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_with_no_keyword_at_all(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="eager")
    call = x(4, 3).to(dtype), x(5, 3).to(dtype), TARGET
    torch.testing.assert_close(compiled(*call), linear_cross_entropy(*call))


def test_one_graph_for_all_batch_sizes() -> None:
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda i, W, y: linear_cross_entropy(i, W, y, chunk_rows=3), fullgraph=True, backend=counter, dynamic=True
    )
    for N in (11, 13, 17, 19, 23):
        call = x(N, 3), x(5, 3), torch.arange(N) % 5
        torch.testing.assert_close(compiled(*call), linear_cross_entropy(*call), rtol=1e-12, atol=0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("chunk_rows", [None, 1 << 18])
def test_rows_that_nobody_has_counted_yet(chunk_rows: int | None) -> None:
    """A graph does not know how many rows a mask leaves."""

    def loss(i: Tensor, W: Tensor, y: Tensor) -> Tensor:
        kept = (y != -100).nonzero().squeeze(1)
        return linear_cross_entropy(i[kept], W, y[kept], chunk_rows=chunk_rows)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    # So many that the bounds alone do not tell whether the call is small.
    call = x(2**20, 3), x(5, 3).requires_grad_(), TARGET.repeat(2**18)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = torch.compile(loss, fullgraph=True, backend="aot_eager")(*call)
        torch.testing.assert_close(found, loss(*call), rtol=1e-12, atol=0)
        same = [torch.autograd.grad(value, call[1])[0] for value in (found, loss(*call))]
    torch.testing.assert_close(*same, rtol=1e-12, atol=0)


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
    operator = OPERATORS.linear_forward.default
    original = OPERATORS.linear_forward

    class Watching:
        def __call__(self, *arguments: Any) -> Any:
            seen.append(arguments)
            return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OPERATORS, "linear_forward", Watching())
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
    assert any(f"{LIBRARY.ns}.linear_forward" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x(4, 3)), model(x(4, 3)), rtol=1e-12, atol=0)


def test_export_of_any_batch_size() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = LinearCrossEntropyLoss(3, 5, dtype=torch.float64, chunk_rows=4)

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return self.loss(input, target)

    model, n = Model(), torch.export.Dim("n", min=2, max=1000)
    exported = torch.export.export(model, (x(11, 3), y(11)), dynamic_shapes=({0: n}, {0: n}))
    torch.testing.assert_close(exported.module()(x(31, 3), y(31)), model(x(31, 3), y(31)), rtol=1e-12, atol=0)


def test_a_second_derivative_of_a_compiled_graph_is_refused() -> None:
    torch._dynamo.reset()
    tensors = leaves()
    loss = torch.compile(ours("none"), fullgraph=True, backend="aot_eager")(*tensors).sum()
    (first,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(first.sum(), tensors)
