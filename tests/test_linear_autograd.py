"""Derivatives of linear cross entropy, of every kind and order, are torch's; what lies between forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import p, w, x
from cases import EVERYTHING
from linear_cases import Case, H, V, bf16, distance, f32, gradients, in_float64
from oracle import composed
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

from fused_ce import linear_cross_entropy
from fused_ce.linear import chunks, products
from fused_ce.options import Options

TARGET = torch.tensor([1, -100, 3, 0])
# name: (target, class weight, keywords) of input (4, 3) and linear_weight (5, 3)
KINDS: dict[str, tuple[Tensor, Tensor | None, dict[str, Any]]] = {
    "mean": (TARGET, None, {}),
    "sum": (TARGET, None, {"reduction": "sum"}),
    "none": (TARGET, None, {"reduction": "none"}),
    "weight-everything": (TARGET, w(), EVERYTHING),
    "num-items": (TARGET, None, {"num_items": 7.0}),
    "probabilities": (p(4, 5), w(), {"label_smoothing": 0.1}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def pair(kind: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The same function of input, linear_weight and linear_bias, ours and torch's."""
    target, weight, keywords = KINDS[kind]
    return (
        lambda input, W, b: linear_cross_entropy(
            input, W, target, linear_bias=b, weight=weight, chunk_rows=2, **keywords
        ),
        lambda input, W, b: composed(F.linear(input, W, b), target, weight, Options(**keywords)),
    )


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    return x(4, 3).requires_grad_(), x(5, 3).requires_grad_(), x(5).requires_grad_()


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@kinds
def test_gradcheck(kind: str) -> None:
    ours, _ = pair(kind)
    assert torch.autograd.gradcheck(ours, leaves(), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(ours, leaves(), check_fwd_over_rev=True, check_batched_grad=True)


@kinds
def test_double_backward_equals_torchs(kind: str) -> None:
    results = []
    for loss in pair(kind):
        tensors = leaves()
        upstream = x(4).requires_grad_()
        value = loss(*tensors)
        given = upstream if value.dim() else upstream[0]
        first = torch.autograd.grad(value, tensors, given, create_graph=True)
        assert all(tensor.requires_grad for tensor in first)
        penalty = sum(tensor.pow(2).sum() + tensor.sum() for tensor in first)
        # As in training with a penalty on the gradient: torch's chunked loss loses it without a word.
        results.append(torch.autograd.grad(value.sum() + 100 * penalty, (*tensors, upstream)))
    same(*results)


@kinds
def test_every_transform_equals_torchs(kind: str) -> None:
    ours, theirs = pair(kind)
    tensors = tuple(tensor.detach() for tensor in leaves())
    tangents = tuple(tensor.flip(0) for tensor in tensors)

    def scalar(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *tensors: (loss(*tensors) * torch.tensor(1.5, dtype=tensors[0].dtype)).sum()

    every = (0, 1, 2)
    for transform in (
        lambda f: jvp(f, tensors, tangents),
        lambda f: jacrev(f, every)(*tensors),
        lambda f: jacfwd(f, every)(*tensors),
        lambda f: grad(scalar(f), every)(*tensors),
        lambda f: hessian(scalar(f), every)(*tensors),
        lambda f: torch.autograd.functional.hessian(scalar(f), tensors),
        lambda f: torch.autograd.functional.jacobian(f, tensors, vectorize=True),
        lambda f: vmap(f, (0, None, None))(torch.stack([tensors[0], tangents[0]]), *tensors[1:]),
        lambda f: vmap(grad(scalar(f), every), (0, None, None))(torch.stack([tensors[0], tangents[0]]), *tensors[1:]),
    ):
        same(transform(ours), transform(theirs))


def test_probabilities_and_class_weights_get_gradients() -> None:
    results = []
    for loss in (linear_cross_entropy, lambda input, W, t, weight: F.cross_entropy(F.linear(input, W), t, weight)):
        input, W, _ = leaves()
        t, weight = p(4, 5).requires_grad_(), w().requires_grad_()
        results.append(torch.autograd.grad(loss(input, W, t, weight=weight), (input, W, t, weight)))
    same(*results)


def test_tied_weights() -> None:
    """The same parameter is the embedding and the head."""
    results = []
    for loss in pair("mean"):
        W = x(5, 3).requires_grad_()
        value = loss(F.embedding(torch.tensor([4, 2, 0, 1]), W), W, x(5))
        value.backward()
        results.append(W.grad)
    same(*results)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_again_and_again(dtype: torch.dtype, reduction: str) -> None:
    case = Case("again", dtype=dtype, options={"reduction": reduction}, bias=True)
    tensors = case.build()
    loss, exact = case.ours(tensors), in_float64(tensors)
    truth = case.exact(exact)
    for value in (1.0, 3.0, 1.0, -0.25, 0.0, 1.0):
        ours, right = gradients(loss, tensors, value), gradients(truth, exact, value)
        for name, gradient in ours.items():
            assert distance(gradient, right[name]) <= (1e-6 if dtype == f32 else 1.2e-2)
            gradient.fill_(7)  # the caller's own from now on
    loss.backward(torch.ones_like(loss))
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward(torch.ones_like(loss))


def test_an_upstream_gradient_costs_no_rounding_of_its_own() -> None:
    """That of bfloat16 weights is summed in float32, multiplied, and rounded once."""
    case = Case("once", dtype=bf16, N=64, chunk_rows=8)
    tensors = case.build()
    loss = case.ours(tensors)
    sums: Any = loss.grad_fn
    dW = next(tensor for tensor in sums.saved_tensors[5:] if tensor is not None and tensor.shape == (V, H))
    assert dW.dtype == f32
    for upstream in (1.5, 3.0, 0.3):
        given = torch.tensor(upstream, dtype=bf16).item()
        found = gradients(loss, tensors, upstream)["linear_weight"]
        assert torch.equal(found, (dW.double() * given).to(bf16))


def test_a_known_loss_scale() -> None:
    """float16 widened, or not: the hint is right for what was hinted, and for anything else."""
    for hint in (1024.0, torch.tensor(1024.0)):
        for upstream in (1024.0, 8.0):
            case = Case("scale", dtype=torch.float16, N=300, chunk_rows=64)
            tensors, eager = case.build(), case.build()
            exact = in_float64(tensors)
            ours = gradients(case.ours(tensors, grad_scale=hint), tensors, upstream)
            theirs, right = gradients(case.eager(eager), eager, upstream), gradients(case.exact(exact), exact, upstream)
            for name in right:
                assert distance(ours[name], right[name]) <= max(2**-12, distance(theirs[name], right[name]))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_an_upstream_gradient_that_is_not_finite(value: float) -> None:
    case = Case("upstream", ignored=0.3)
    tensors = case.build()
    dx = gradients(case.ours(tensors), tensors, value)["input"]
    ignored = tensors["target"] == -100
    assert not dx[ignored].any()
    assert dx[~ignored].isfinite().logical_not().all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    for kind in ("mean", "none"):
        results = []
        for loss in pair(kind):
            tensors = leaves()
            value = checkpoint(lambda a, b, c, loss=loss: loss(a * 2, b, c).sum(), *tensors, use_reentrant=reentrant)
            value.backward()
            results.append([value, *(tensor.grad for tensor in tensors)])
        same(*results)


def test_hooks_of_saved_tensors_see_the_inputs_alone() -> None:
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t.clone(), lambda t: t):  # type: ignore[func-returns-value]
        tensors = leaves()
        loss = pair("mean")[0](*tensors)
    held = {tensor.data_ptr() for tensor in (*tensors, TARGET)}
    assert {tensor.data_ptr() for tensor in seen} <= held
    same(torch.autograd.grad(loss, tensors), torch.autograd.grad(pair("mean")[1](*tensors), tensors))


def test_the_weight_may_change_between_forward_and_backward() -> None:
    """A fused gradient does not read it; what reads it again is loud."""
    for kind, fails in (("mean", False), ("none", True)):
        tensors = leaves()
        loss, exact = (f(*tensors).sum() for f in pair(kind))
        expected = torch.autograd.grad(exact, tensors)
        with torch.no_grad():
            tensors[1].mul_(2)
        if fails:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            same(torch.autograd.grad(loss, tensors), expected)


def test_gradients_that_nobody_wants_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[chunks.Wanted] = []
    forward = chunks.forward

    def watched(call: Any, backend: Any, wanted: chunks.Wanted) -> Any:
        made.append(wanted)
        return forward(call, backend, wanted)

    monkeypatch.setattr(chunks, "forward", watched)
    input, W, b = leaves()
    linear_cross_entropy(input, W.detach(), TARGET, linear_bias=b.detach(), chunk_rows=2)
    linear_cross_entropy(input.detach(), W, TARGET, linear_bias=b, chunk_rows=2)
    with torch.no_grad():
        linear_cross_entropy(input, W, TARGET, linear_bias=b, chunk_rows=2)
    assert made == [(True, False, False), (False, True, True), (False, False, False)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction: str) -> None:
    """Products in the dtype of autocast, the loss in float32, gradients in the dtypes of the parameters."""
    case = Case("autocast", bias=True, ignored=0.3, chunk_rows=64, options={"reduction": reduction})
    ours, theirs = case.build(), case.build()
    exact = in_float64(ours)
    results = []
    for tensors, loss in ((ours, case.ours), (theirs, case.eager)):
        with torch.autocast("cpu", bf16):
            value = loss(tensors)
        assert value.dtype == f32
        results.append(gradients(value, tensors, 3.0))
    right = gradients(case.exact(exact), exact, 3.0)
    for name, tensor in right.items():
        assert results[0][name].dtype == f32
        # A mean's gradient is rounded before the upstream one comes, torch's after: some rows fare better, some worse.
        assert distance(results[0][name], tensor) <= 1.5 * distance(results[1][name], tensor)
    with torch.autocast("cpu", bf16):  # backward inside of it, and a second derivative
        loss = case.ours(ours)
        inside = gradients(loss, ours, 3.0)
        (first,) = torch.autograd.grad(loss.sum(), ours["input"], create_graph=True)
    assert all(torch.equal(inside[name], results[0][name]) for name in inside)
    assert torch.autograd.grad(first.float().pow(2).sum(), ours["linear_weight"])[0].dtype == f32


def test_float16_products_keep_small_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divided by a million rows before the loss scale comes, most of them would be zero."""
    monkeypatch.setattr(products, "computed_in", lambda dtype, device: dtype)
    case = Case("float16", dtype=torch.float16, options={"num_items": 1e6})
    tensors = case.build()
    exact = in_float64(tensors)
    ours = gradients(case.ours(tensors, dtype=f32), tensors, 65536.0)
    right = gradients(case.exact(exact), exact, 65536.0)
    for name in right:
        assert distance(ours[name], right[name]) <= 2e-3
