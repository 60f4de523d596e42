"""Between forward and backward: what is kept and for whom, what may change, and any upstream gradient."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import x, y
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fused_ce import cross_entropy
from fused_ce.backends import cpu

pytestmark = pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built")
f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
REDUCTIONS = ["mean", "sum", "none"]
inf, nan = torch.inf, torch.nan
LOOSE = {"rtol": 2**-5, "atol": 2**-6}  # of sums in bfloat16, in another order


def gradient(loss: Callable[..., Tensor], input: Tensor, upstream: float = 1.0, **keywords: Any) -> Tensor:
    leaf = input.detach().requires_grad_()
    value = loss(leaf * 1 if keywords.get("inplace") else leaf, y(len(input), C=input.shape[1]), **keywords)
    return torch.autograd.grad(value, leaf, torch.full_like(value, upstream))[0]


# ---- what is kept


@pytest.mark.parametrize("keywords", [{}, {"return_stats": True}, {"inplace": True}, {"softcap": 3.0}], ids=str)
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_checkpointing_frees_the_logits(reduction: str, dtype: torch.dtype, keywords: dict[str, Any]) -> None:
    weight, alive = x(7, 5, dtype=dtype).requires_grad_(), []

    def chunk(hidden: Tensor) -> Tensor:
        logits = hidden @ weight
        alive.append(weakref.ref(logits))
        result = cross_entropy(logits, y(4), reduction=reduction, **keywords)
        return (result if isinstance(result, Tensor) else result.loss).sum()

    total = sum(checkpoint(chunk, x(4, 7, dtype=dtype) * i, use_reentrant=False) for i in range(1, 4))
    gc.collect()
    assert not [logits for logits in alive if logits() is not None]
    (grad,) = torch.autograd.grad(total, weight)
    alive.clear()
    (at_once,) = torch.autograd.grad(sum(chunk(x(4, 7, dtype=dtype) * i) for i in range(1, 4)), weight)
    torch.testing.assert_close(grad, at_once, **(LOOSE if dtype == bf16 else {}))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_hooks_see_the_logits_and_may_move_them(reduction: str) -> None:
    seen: list[torch.Size] = []
    wanted = gradient(cross_entropy, x(40, 50, dtype=f32), 2.0, reduction=reduction)
    with saved_tensors_hooks(lambda t: seen.append(t.shape) or t.numpy().copy(), torch.from_numpy):
        leaf = x(40, 50, dtype=f32).requires_grad_()
        logits = leaf * 1
        seen.clear()
        value = cross_entropy(logits.detach().requires_grad_(), y(40, C=50), reduction=reduction)
        assert seen.count(torch.Size([40, 50])) == 1  # the logits, and nothing of their size beside them
        value = cross_entropy(leaf, y(40, C=50), reduction=reduction)
    (got,) = torch.autograd.grad(value, leaf, torch.full_like(value, 2.0))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    with save_on_cpu():
        assert torch.equal(gradient(cross_entropy, x(40, 50, dtype=f32), 2.0, reduction=reduction), got)


def test_hooks_may_hand_back_copies_of_logits_that_were_changed_before() -> None:
    for reduction in REDUCTIONS:
        leaf = x(4, 5).requires_grad_()
        with saved_tensors_hooks(Tensor.clone, Tensor.clone):
            logits = (leaf * 2).add_(1)
            value = cross_entropy(logits, y(4), reduction=reduction).sum()
        (got,) = torch.autograd.grad(value, leaf)
        (wanted,) = torch.autograd.grad(F.cross_entropy(leaf * 2 + 1, y(4), reduction=reduction).sum(), leaf)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("keywords", [{}, {"inplace": True}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("holder", ["hook", "attribute"])
def test_logits_that_know_their_loss_are_collected(holder: str, keywords: dict[str, Any], retain: bool) -> None:
    logits = x(4, 5).requires_grad_() * 1
    known, loss = weakref.ref(logits), cross_entropy(logits, y(4), **keywords).sum()
    if holder == "hook":
        logits.register_hook(lambda grad, loss=loss: None)
    else:
        logits.loss = loss  # type: ignore[attr-defined]
    if retain:
        loss.backward(retain_graph=True)
    del logits, loss
    gc.collect()
    assert known() is None


def test_nothing_is_kept_after_backward() -> None:
    logits = x(4, 5).requires_grad_() * 1
    known, loss = weakref.ref(logits), cross_entropy(logits, y(4))
    del logits
    loss.backward()
    assert known() is None
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()


# ---- what may change


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "zero_": lambda t: t.zero_(),
    "masked_fill_": lambda t: t.masked_fill_(t > 0, 0.0),
    "a view's": lambda t: t[1:].fill_(3.0),
    "index_put_": lambda t: t.__setitem__(0, 1.0),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("upstream", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("dtype", [f32, f64, bf16], ids=str)
def test_logits_may_change_after_a_fused_forward(dtype: torch.dtype, upstream: float, change: str) -> None:
    results = []
    for loss in (cross_entropy, F.cross_entropy):
        leaf = (
            x(4, 5, dtype=dtype if loss is cross_entropy else f64).to(dtype).to(dtype if loss is cross_entropy else f64)
        )
        leaf.requires_grad_()
        logits = leaf * 1
        value = loss(logits, y(4))
        with torch.no_grad():
            CHANGES[change](logits)
        results.append(torch.autograd.grad(value, leaf, torch.full_like(value, torch.tensor(upstream, dtype=dtype)))[0])
    # One rounding more than otherwise where 16 bits are multiplied.
    tolerance = {f32: 1e-5, f64: 1e-12, bf16: 2**-7}[dtype]
    torch.testing.assert_close(results[0].double(), results[1], rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
def test_a_change_is_an_error_where_the_logits_are_read_again(dtype: torch.dtype) -> None:
    leaf = x(4, 5, dtype=dtype).requires_grad_()
    logits = leaf * 1
    value = cross_entropy(logits, y(4), reduction="none")
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()
    value = cross_entropy(leaf * 1, y(4), inplace=dtype != f16)
    with (
        pytest.raises(RuntimeError, match="modified by an inplace operation")
        if dtype == f32
        else pytest.MonkeyPatch.context()
    ):
        torch.autograd.grad(value, leaf, create_graph=True)


@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_freed_logits_are_right_or_an_error(dtype: torch.dtype, reduction: str) -> None:
    leaf = x(4, 5, dtype=dtype).requires_grad_()
    logits = leaf * 1
    value = cross_entropy(logits, y(4), reduction=reduction)
    logits.untyped_storage().resize_(0)
    upstream = torch.full_like(value, 0.3)
    if reduction == "none" or dtype == f16:
        with pytest.raises(RuntimeError, match="not allocated"):
            torch.autograd.grad(value, leaf, upstream)
        return
    (got,) = torch.autograd.grad(value, leaf, upstream)
    wanted = gradient(cross_entropy, x(4, 5, dtype=dtype), 0.3, reduction=reduction)
    torch.testing.assert_close(got, wanted, rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", ["num_items", "grad_scale"])
def test_numbers_may_change_after_forward(name: str) -> None:
    number = torch.tensor(3.0)
    wanted = gradient(cross_entropy, x(4, 5), 3.0, **{name: 3.0})
    leaf = x(4, 5).requires_grad_()
    value = cross_entropy(leaf, y(4), **{name: number})
    number.fill_(100.0)
    assert torch.equal(torch.autograd.grad(value, leaf, torch.full_like(value, 3.0))[0], wanted)


# ---- any upstream gradient


@pytest.mark.parametrize("upstream", [inf, -inf, nan])
@pytest.mark.parametrize("dtype", [f32, f64, bf16, f16], ids=str)
@pytest.mark.parametrize("keywords", [{}, {"inplace": True}, {"grad_scale": 4.0}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_rows_stay_0(reduction: str, keywords: dict[str, Any], dtype: torch.dtype, upstream: float) -> None:
    leaf = x(4, 5, dtype=dtype).requires_grad_()
    target = y(4).index_fill(0, torch.tensor([1, 2]), -100)
    for keep in (True, False):
        value = cross_entropy(leaf * 1, target, reduction=reduction, **keywords)
        (got,) = torch.autograd.grad(value, leaf, torch.full_like(value, upstream), retain_graph=keep)
        assert torch.equal(got[1:3], torch.zeros_like(got[1:3]))
        assert not got[[0, 3]].isfinite().any()


UPSTREAMS = {f32: [2.0**100, 2.0**-100, 2.0**-140, 3.0, 1e-30], bf16: [2.0**100, 2.0**-100, 4.0, 0.25, 3.0, 1e-38]}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("spread", [0.0, -60.0, -92.0, -100.0])
@pytest.mark.parametrize("dtype", UPSTREAMS, ids=str)
def test_small_gradients_under_any_upstream(dtype: torch.dtype, spread: float, reduction: str) -> None:
    # exp(-92) is subnormal: what was rounded there once must not be multiplied.
    input = torch.tensor([[0.0, spread, 1.0]], dtype=dtype)
    for upstream in UPSTREAMS[dtype]:
        leaf = input.clone().requires_grad_()
        value = cross_entropy(leaf, torch.tensor([0]), reduction=reduction)
        given = torch.full_like(value, upstream)
        (got,) = torch.autograd.grad(value, leaf, given)
        exact = input.double().requires_grad_()
        (wanted,) = torch.autograd.grad(F.cross_entropy(exact, torch.tensor([0])), exact, given.double())
        info = torch.finfo(dtype)
        exponent = torch.frexp(wanted.abs().clamp(min=info.tiny)).exponent - 1
        ulps = (got.double() - wanted).abs() / torch.ldexp(torch.full_like(wanted, info.eps), exponent)
        assert ulps.max() <= (0.51 if dtype == bf16 else 8), (upstream, ulps)


@pytest.mark.parametrize("keywords", [{}, {"grad_scale": 65536.0}], ids=str)
@pytest.mark.parametrize("upstream", [1.0, 3.0, 65536.0, 1 / 3])
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
def test_in_place_is_as_exact(dtype: torch.dtype, upstream: float, keywords: dict[str, Any]) -> None:
    if dtype == f16 and upstream == 65536:
        upstream = 32768.0
    input = x(40, 50, dtype=dtype)
    got = gradient(cross_entropy, input, upstream, inplace=True, **keywords)
    wanted = gradient(cross_entropy, input, upstream, **keywords)
    if dtype == f32:
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)
    else:
        assert torch.equal(got, wanted)


# ---- derivatives of backward


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("keywords", [{}, {"softcap": 2.0, "lse_square_scale": 0.1}], ids=str)
def test_forward_ad_over_backward(keywords: dict[str, Any], reduction: str) -> None:
    def tangents(loss: Callable[..., Tensor]) -> list[Tensor]:
        input = x(4, 5).requires_grad_()
        value = loss(input, y(4))
        one, direction = torch.ones_like(value), torch.linspace(1, 2, value.numel(), dtype=f64).reshape(value.shape)
        (_, by_func) = torch.func.jvp(
            lambda g: torch.autograd.grad(value, input, g, retain_graph=True)[0], (one,), (direction,)
        )
        with forward_ad.dual_level():
            (grad,) = torch.autograd.grad(value, input, forward_ad.make_dual(one, direction))
            by_dual = forward_ad.unpack_dual(grad).tangent
        return [by_func, by_dual]

    def of_torch(input: Tensor, target: Tensor) -> Tensor:
        z = 2 * torch.tanh(input / 2) if keywords else input
        rows = F.cross_entropy(z, target, reduction="none") + 0.1 * bool(keywords) * torch.logsumexp(z, 1) ** 2
        return rows if reduction == "none" else getattr(rows, reduction)()

    got = tangents(lambda i, t: cross_entropy(i, t, reduction=reduction, **keywords))
    torch.testing.assert_close(got, tangents(of_torch), rtol=1e-12, atol=1e-15)
