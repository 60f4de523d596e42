"""Derivatives of every kind and order are torch's: never a silent zero, whatever takes them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import p, w, x, y
from cases import OPTIONS
from judge import check_grad, expected_grad
from oracle import composed
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from fused_ce import cross_entropy
from fused_ce.options import Options

Loss = Callable[..., Tensor]
TARGET = torch.tensor([1, -100, 3, 0])
# name: (target, weight, keywords) of logits (4, 5)
KINDS: dict[str, tuple[Tensor, Tensor | None, dict[str, Any]]] = {
    "mean": (TARGET, None, {}),
    "sum": (TARGET, None, {"reduction": "sum"}),
    "none": (TARGET, None, {"reduction": "none"}),
    "weight": (TARGET, w(), {}),
    "weight-smoothing": (TARGET, w(), {"label_smoothing": 0.2}),
    "probabilities": (p(4, 5), None, {}),
    "probabilities-weight-smoothing": (p(4, 5), w(), {"label_smoothing": 0.2, "reduction": "none"}),
    **{name: (TARGET, None, keywords) for name, keywords in OPTIONS.items()},
}


def pair(kind: str) -> tuple[Loss, Loss]:
    """The same function of logits (4, 5), ours and torch's."""
    target, weight, keywords = KINDS[kind]
    return (
        lambda input: cross_entropy(input, target, weight, **keywords),
        lambda input: composed(input, target, weight, Options(**keywords)),
    )


def leaf() -> Tensor:
    return x(4, 5).requires_grad_()


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    ours, _ = pair(kind)
    assert torch.autograd.gradcheck(ours, leaf(), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(ours, leaf(), check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_equals_torchs(kind: str) -> None:
    results = []
    for loss in pair(kind):
        input = leaf()
        upstream = torch.linspace(0.5, 2, 4, dtype=torch.float64).view(4).requires_grad_()
        value = loss(input)
        given = upstream if value.dim() else upstream[0]
        (first,) = torch.autograd.grad(value, input, given, create_graph=True)
        assert first.requires_grad
        results.append((first, *torch.autograd.grad(first.pow(2).sum() + first.sum(), (input, upstream))))
    same(*results)


@pytest.mark.parametrize("kind", KINDS)
def test_every_transform_equals_torchs(kind: str) -> None:
    ours, theirs = pair(kind)
    input, tangent = x(4, 5), x(5, 4).T

    def scalar(loss: Loss) -> Loss:
        return lambda input: (loss(input) * torch.tensor(1.5, dtype=input.dtype)).sum()

    same(jvp(ours, (input,), (tangent,)), jvp(theirs, (input,), (tangent,)))
    same(jacrev(ours)(input), jacrev(theirs)(input))
    same(jacfwd(ours)(input), jacfwd(theirs)(input))
    same(grad(scalar(ours))(input), grad(scalar(theirs))(input))
    same(hessian(scalar(ours))(input), hessian(scalar(theirs))(input))
    same(jacrev(grad(scalar(ours)))(input), jacrev(grad(scalar(theirs)))(input))
    for backward in (ours, theirs):
        assert torch.autograd.functional.hessian(scalar(backward), input).abs().sum() > 0.01
    same(*(torch.autograd.functional.hessian(scalar(loss), input) for loss in (ours, theirs)))
    same(*(torch.autograd.functional.jacobian(loss, input, vectorize=True) for loss in (ours, theirs)))
    same(*(torch.autograd.functional.hvp(scalar(loss), input, tangent) for loss in (ours, theirs)))
    many = torch.stack([input, tangent, -input])
    same(vmap(ours)(many), vmap(theirs)(many))
    same(vmap(ours, in_dims=2)(many.movedim(0, 2)), vmap(theirs)(many))
    same(vmap(grad(scalar(ours)))(many), vmap(grad(scalar(theirs)))(many))


@pytest.mark.parametrize("keywords", [{}, {"reduction": "none"}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_ignored_rows_stay_zero_in_every_order(value: float, keywords: dict[str, Any]) -> None:
    results = []
    for bad in (value, 0.0):
        input = x(4, 5).index_fill(0, torch.tensor([1]), bad).requires_grad_()
        (first,) = torch.autograd.grad(cross_entropy(input, TARGET, **keywords).sum(), input, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), input)
        assert not first[1].any()
        assert not second[1].any()
        results.append((first, second))
    same(*results)


@pytest.mark.parametrize("negative", [("weight",), ("upstream",), ("weight", "upstream")], ids="-".join)
def test_the_negative_bit(negative: tuple[str, ...]) -> None:
    # One at a time too: a sign lost in both would not be seen.
    weight = torch._neg_view(w()) if "weight" in negative else w()
    upstream = torch._neg_view(x(4)) if "upstream" in negative else x(4)
    results = []
    for function in (cross_entropy, F.cross_entropy):
        input = x(4, 5).requires_grad_()
        loss = function(input, TARGET, weight, reduction="none")
        results.append((loss.detach(), *torch.autograd.grad(loss, input, upstream)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


def test_logits_of_inference_mode() -> None:
    with torch.inference_mode():
        logits = x(4, 5)
    results = []
    for function in (cross_entropy, F.cross_entropy):
        target = p(4, 5).requires_grad_()
        results.append(
            torch.autograd.grad(function(logits.clone() if function is F.cross_entropy else logits, target), target)
        )
    same(*results)


def test_vmap_over_every_argument() -> None:
    inputs, targets, weights = x(3, 4, 5), y(3, 4), torch.stack([w(), w() * 2, w().flip(0)])
    same(vmap(cross_entropy)(inputs, targets, weights), vmap(F.cross_entropy)(inputs, targets, weights))
    same(vmap(cross_entropy, (0, None))(inputs, targets[0]), vmap(F.cross_entropy, (0, None))(inputs, targets[0]))
    rows = vmap(cross_entropy)(inputs[0], targets[0])  # (C) and () each
    same(rows, F.cross_entropy(inputs[0], targets[0], reduction="none"))


def test_vjp_through_a_module() -> None:
    module = torch.nn.Linear(3, 5, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def loss(function: Loss, parameters: dict[str, Tensor]) -> Tensor:
        return function(functional_call(module, parameters, (x(4, 3),)), y(4))

    ours, theirs = (vjp(lambda q, f=f: loss(f, q), parameters) for f in (cross_entropy, F.cross_entropy))
    same(ours[0], theirs[0])
    same(ours[1](torch.ones_like(ours[0])), theirs[1](torch.ones_like(theirs[0])))


@pytest.mark.parametrize("kind", ["mean", "none", "weight-smoothing", "everything"])
def test_dual_numbers(kind: str) -> None:
    results = []
    for loss in pair(kind):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x(4, 5), x(5, 4).T)
            results.append(torch.autograd.forward_ad.unpack_dual(loss(dual)))
    assert results[0].tangent.abs().sum() > 0.01
    same(tuple(results[0]), tuple(results[1]))


@pytest.mark.parametrize("kind", ["mean", "none", "everything"])
def test_many_upstream_gradients_at_once(kind: str) -> None:
    results = []
    for loss in pair(kind):
        input = leaf()
        value = loss(input)
        upstream = torch.stack([torch.ones_like(value), torch.full_like(value, -0.5), torch.zeros_like(value)])
        results.append(torch.autograd.grad(value, input, upstream, is_grads_batched=True))
    same(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_again_and_again(dtype: torch.dtype, reduction: str) -> None:
    input, target = x(4, 65, dtype=dtype).requires_grad_(), y(4)
    loss = cross_entropy(input, target, reduction=reduction)
    for value in (1.0, 3.0, 1.0, -0.3, 0.0, 1.0):
        upstream = torch.full_like(loss, value)
        (result,) = torch.autograd.grad(loss, input, upstream, retain_graph=True)
        call = input, target, None, Options(reduction=reduction)
        check_grad(result, call, expected_grad(upstream, call))
        result.fill_(7)  # the caller's own from now on
    loss.backward(torch.ones_like(loss))
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward(torch.ones_like(loss))


def test_hooks_may_change_the_gradient_in_place() -> None:
    results = []
    for loss in pair("mean"):
        input = leaf()
        logits = input * 1
        logits.register_hook(lambda g: g.mul_(2))
        value = loss(logits)
        value.backward(retain_graph=True)
        value.backward(torch.tensor(3.0, dtype=torch.float64))
        results.append(input.grad)
    same(*results)


def test_accumulates_into_grad() -> None:
    results = []
    for loss in pair("mean"):
        input = leaf()
        for _ in range(3):
            loss(input).backward()
        results.append(input.grad)
    same(*results)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    input = leaf()
    other = leaf()
    value = cross_entropy(input, TARGET) + cross_entropy(other, TARGET, reduction="sum")
    (result,) = torch.autograd.grad(value, other)
    same(result, torch.autograd.grad(F.cross_entropy(other, TARGET, reduction="sum"), other)[0])
    assert input.grad is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    for kind in ("mean", "none", "everything"):
        results = []
        for loss in pair(kind):
            input = leaf()
            value = checkpoint(lambda input, loss=loss: loss(input * 2).sum(), input, use_reentrant=reentrant)
            value.backward()
            results.append((value, input.grad))
        same(*results)


@pytest.mark.parametrize("engine", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["mean", "none", "weight-smoothing", "everything"])
def test_compile(engine: str, kind: str) -> None:
    if engine == "inductor" and kind != "mean":
        return  # one is enough: it takes seconds
    torch._dynamo.reset()
    ours, theirs = pair(kind)
    compiled = torch.compile(lambda input: ours(input * 2).sum(), fullgraph=True, backend=engine)
    input, other = leaf(), leaf()
    loss, expected = compiled(input), theirs(other * 2).sum()
    loss.backward()
    expected.backward()
    same((loss, input.grad), (expected, other.grad))


def test_deterministic_mode() -> None:
    ours, theirs = leaf(), leaf()
    torch.use_deterministic_algorithms(True)
    try:
        for shape in ((4, 5), (4, 5, 3)):
            cross_entropy(x(*shape) + ours.mean(), y(4, *shape[2:])).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for shape in ((4, 5), (4, 5, 3)):
        F.cross_entropy(x(*shape) + theirs.mean(), y(4, *shape[2:])).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)


def test_eight_python_threads() -> None:
    def work(_: int) -> tuple[Tensor, Tensor]:
        input = x(64, 100, dtype=torch.float32).requires_grad_()
        for _ in range(5):
            input.grad = None
            loss = cross_entropy(input, y(64))
            loss.backward()
        return loss.detach(), input.grad

    with ThreadPoolExecutor(8) as pool:
        first, *others = pool.map(work, range(24))
    for loss, gradient in others:
        assert torch.equal(loss, first[0])
        assert torch.equal(gradient, first[1])


def test_memory_is_given_back() -> None:
    logits = leaf() * 1
    alive = weakref.ref(logits)
    loss = cross_entropy(logits, TARGET, reduction="none").sum()
    loss.backward()
    del logits
    gc.collect()
    assert alive() is None  # freed by backward, though the loss lives on
    assert loss.requires_grad
