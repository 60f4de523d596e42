"""The kernels as operators of a traced graph: what torch.compile, torch.export and opcheck make of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import p, w, x, y
from cases import EVERYTHING
from oracle import composed
from torch import Tensor

from fused_ce import CrossEntropyLoss, cross_entropy
from fused_ce.backends.dispatch import BACKENDS, choose
from fused_ce.contract import Call
from fused_ce.ops import LIBRARY, OPERATORS, arguments
from fused_ce.options import Options

CALLS: dict[str, tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]] = {
    "mean": (x(4, 5), y(4), None, {}),
    "none": (x(4, 5), y(4), w(), {"reduction": "none"}),
    "everything": (x(4, 5), y(4), w(), EVERYTHING),
    "one-row": (x(5), y(), None, {}),
    "pixels": (x(2, 5, 3), y(2, 3), w(), {"label_smoothing": 0.1}),
    "probabilities": (x(4, 5), p(4, 5), None, {"softcap": 2.0}),
    "num-items": (x(4, 5), y(4), None, {"num_items": 7.0}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("wants_stats", [False, True])
def test_opcheck(name: str, wants_stats: bool) -> None:
    input, target, weight, keywords = CALLS[name]
    options = Options(**keywords)._replace(dtype=torch.float64)
    call = Call(input.clone().requires_grad_(), target, weight, options)
    torch.library.opcheck(OPERATORS.forward.default, (*arguments(call, None), True, wants_stats))


@pytest.mark.parametrize("name", CALLS)
def test_one_operator_and_no_break(name: str) -> None:
    input, target, weight, keywords = CALLS[name]
    seen: list[Any] = []

    def look(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend=look)
    results = []
    for ours in (True, False):
        leaf = input.clone().requires_grad_()
        call = leaf, target, weight
        loss = compiled(*call, **keywords) if ours else composed(*call, Options(**keywords))
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    torch.testing.assert_close(*results)
    assert any("fused_ce" in str(target) for target in seen)
    assert F.cross_entropy not in seen


def test_dynamic_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 5), (7, 33), (2, 100)):
        ours, theirs = x(*shape).requires_grad_(), x(*shape).requires_grad_()
        loss, expected = compiled(ours, y(shape[0])), F.cross_entropy(theirs, y(shape[0]))
        loss.backward()
        expected.backward()
        torch.testing.assert_close((loss, ours.grad), (expected, theirs.grad))


def test_stats_from_a_compiled_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    ours, theirs = x(4, 5).requires_grad_(), x(4, 5).requires_grad_()
    results = [compiled(ours, y(4), return_stats=True), cross_entropy(theirs, y(4), return_stats=True)]
    torch.testing.assert_close(tuple(results[0]), tuple(results[1]))
    for output in results:
        (output.loss + output.lse.square().sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_derivatives_inside_a_compiled_graph_are_not_lost() -> None:
    torch._dynamo.reset()
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        ours = torch.compile(lambda i, t=transform: t(cross_entropy)(i, y(4)), backend="aot_eager")(x(4, 5))
        torch.testing.assert_close(ours, transform(F.cross_entropy)(x(4, 5), y(4)))


TARGET = y(4)


class Model(torch.nn.Module):
    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(5, 7, dtype=torch.float64)
        self.loss = CrossEntropyLoss(**keywords)

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.linear(features), target)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("keywords", [{}, EVERYTHING | {"reduction": "none"}], ids=["mean", "everything-none"])
def test_export(keywords: dict[str, Any], strict: bool) -> None:
    torch._dynamo.reset()
    model, call = Model(**keywords), (x(4, 5), y(4, C=7))
    program = torch.export.export(model, call, strict=strict)
    assert [str(node.target) for node in program.graph.nodes].count(f"{LIBRARY.ns}.forward.default") == 1
    torch.testing.assert_close(program.module()(*call), model(*call))


def test_export_for_any_number_of_rows() -> None:
    rows = torch.export.Dim("rows", min=2, max=64)
    model, call = Model(), (x(4, 5), y(4, C=7))
    program = torch.export.export(model, call, strict=False, dynamic_shapes=({0: rows}, {0: rows}))
    for N in (4, 3, 9):
        torch.testing.assert_close(program.module()(x(N, 5), y(N, C=7)), model(x(N, 5), y(N, C=7)))


@pytest.mark.parametrize("keywords", [{}, {"reduction": "none"}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("name", ["indices", "probabilities"])
def test_opcheck_of_the_derivative(name: str, keywords: dict[str, Any]) -> None:
    options = Options(**keywords)._replace(dtype=torch.float64)
    call = Call(x(4, 5), p(4, 5) if name == "probabilities" else y(4), w(), options)
    loss, saved, lse, _, _, entropy = OPERATORS.forward(*arguments(call, None), True, True)
    upstream = torch.ones_like(loss), torch.ones_like(lse), torch.ones_like(entropy)
    torch.library.opcheck(OPERATORS.backward.default, (*upstream, *arguments(call, None), saved, call.has_probs))


ENGINES = ["eager", "aot_eager", "inductor"]


def compiled_with(engine: str, function: Any, dynamic: bool) -> tuple[Any, list[list[str]]]:
    """The function compiled whole, and the operators of each graph that was made of it."""
    graphs: list[list[str]] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return torch._dynamo.backends.registry.lookup_backend(engine)(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=look, dynamic=dynamic), graphs


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_engines(engine: str, dynamic: bool) -> None:
    def loss(function: Any, input: Tensor, target: Tensor) -> Tensor:
        return function(input * 2, target).square() + function(input.unsqueeze(2), target.unsqueeze(1), reduction="sum")

    compiled, graphs = compiled_with(engine, lambda *call: loss(cross_entropy, *call), dynamic)
    for shape in ((4, 5), (7, 33), (3, 100)) if dynamic else ((4, 5),):
        ours, theirs = x(*shape).requires_grad_(), x(*shape).requires_grad_()
        value, expected = compiled(ours, y(shape[0])), loss(F.cross_entropy, theirs, y(shape[0]))
        value.backward()
        expected.backward()
        torch.testing.assert_close((value, ours.grad), (expected, theirs.grad))
    assert all(sum("fused_ce" in name and "forward" in name for name in graph) == 2 for graph in graphs)


def test_one_graph_for_every_shape() -> None:
    compiled, graphs = compiled_with("aot_eager", cross_entropy, True)
    for shape in ((4, 5), (7, 33), (3, 100)):
        compiled(x(*shape).requires_grad_(), y(shape[0])).backward()
    assert len(graphs) <= 2  # the second drops a guess that the first made


@pytest.mark.parametrize("keywords", [EVERYTHING, {"num_items": 3.0}, {"return_stats": True}], ids=str)
def test_dynamic_shapes_with_keywords(keywords: dict[str, Any]) -> None:
    compiled, _ = compiled_with("eager", cross_entropy, True)
    ours, theirs = x(4, 5).requires_grad_(), x(4, 5).requires_grad_()
    pair = compiled(ours, y(4), **keywords), cross_entropy(theirs, y(4), **keywords)
    torch.testing.assert_close(*pair)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian, torch.func.vmap])
def test_transforms_in_one_graph(transform: Any) -> None:
    function = transform(lambda input: cross_entropy(input * 2, TARGET, softcap=2.0))
    input = torch.stack([x(4, 5), x(5, 4).T]) if transform is torch.func.vmap else x(4, 5)
    compiled, _ = compiled_with("aot_eager", function, False)
    torch.testing.assert_close(compiled(input), function(input))
    assert function(input).abs().sum() > 0


# "eager" runs the graph under autograd; aot_eager and inductor refuse a second derivative loudly, as for any function.
def test_double_backward_of_a_compiled_graph_is_not_lost() -> None:
    compiled, _ = compiled_with("eager", lambda input: cross_entropy(input * 2, TARGET), False)
    results = []
    for function in (compiled, lambda input: F.cross_entropy(input * 2, TARGET)):
        input = x(4, 5).requires_grad_()
        (first,) = torch.autograd.grad(function(input), input, create_graph=True)
        try:
            (first.square().sum() + input.sum() * 0).backward()
        except RuntimeError:
            return  # loud is as good
        results.append(input.grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("engine", ["aot_eager"])
def test_double_backward_of_a_compiled_graph_is_refused(engine: str) -> None:
    compiled, _ = compiled_with(engine, cross_entropy, False)
    input = x(4, 5).requires_grad_()
    (first,) = torch.autograd.grad(compiled(input, y(4)), input, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        first.square().sum().backward()


@pytest.mark.parametrize(
    "keywords",
    [{"dtype": torch.float32}, {"inplace": True}, {"grad_scale": 3.0}, {"backend": "reference"}, {"backend": "cpu"}],
    ids=str,
)
def test_other_keywords_in_a_graph(keywords: dict[str, Any]) -> None:
    compiled, graphs = compiled_with("aot_eager", lambda input: cross_entropy(input * 2, TARGET, **keywords), False)
    ours, theirs = (x(4, 5, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    loss, expected = compiled(ours), cross_entropy(theirs * 2, TARGET, **keywords)
    loss.backward()
    expected.backward()
    assert any("fused_ce" in name for name in graphs[0])
    assert loss.dtype == expected.dtype
    torch.testing.assert_close((loss, ours.grad), (expected, theirs.grad), rtol=1e-5, atol=0)


def test_autocast_in_a_graph() -> None:
    def loss(input: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(input, TARGET)

    compiled, graphs = compiled_with("aot_eager", loss, False)
    input = x(4, 5, dtype=torch.bfloat16)
    assert compiled(input).dtype == torch.float32
    torch.testing.assert_close(compiled(input), loss(input))
    assert any("fused_ce" in name for name in graphs[0])


@pytest.mark.parametrize("keywords", [{}, {"reduction": "none"}, {"softcap": 2.0, "return_stats": True}], ids=str)
@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3)], ids=str)
def test_meta_and_fake_tensors(shape: tuple[int, ...], keywords: dict[str, Any]) -> None:
    dense = cross_entropy(x(*shape), y(shape[0], *shape[2:]), **keywords)
    options = Options(**(keywords | {"return_stats": False}))._replace(dtype=torch.float64)
    with torch._subclasses.FakeTensorMode() as mode:
        fake, labels = mode.from_tensor(x(*shape)), mode.from_tensor(y(shape[0], *shape[2:]))
        wants_stats = keywords.get("return_stats", False)
        call = Call(fake, labels, None, options)
        op = OPERATORS.forward(*arguments(call, None), True, wants_stats)
        results = [cross_entropy(fake, labels, **keywords)]
    results.append(cross_entropy(x(*shape).to("meta"), y(shape[0], *shape[2:]).to("meta"), **keywords))
    for result in results:
        for mine, its in zip(*((r,) if isinstance(r, Tensor) else r for r in (result, dense)), strict=True):
            assert (mine.shape, mine.dtype) == (its.shape, its.dtype)
    assert op[0].shape == (dense if isinstance(dense, Tensor) else dense.loss).shape
    real = Call(x(*shape), y(shape[0], *shape[2:]), None, options)
    assert op[1].shape == (choose(real, None) or BACKENDS["reference"]).saved_shape(real)
