"""Linear cross entropy against float64: every option, dtype and way through the loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import HAS_TRITON, Backend
from linear_cases import CASES, Case, H, V, bf16, distance, f16, f32, f64, gradients, in_float64
from torch import Tensor

from fused_ce import CrossEntropyOutput, _torch, cross_entropy, linear_cross_entropy
from fused_ce.linear import chunks, products

# Relative, of roots of mean squares. 16 bits: one rounding costs at most 2^-9 and 2^-12 of it.
BOUNDS = {f32: 1e-6, f64: 1e-14, bf16: 2**-9, f16: 2**-12}
TRITON = pytest.param("triton", marks=[] if HAS_TRITON else pytest.mark.skip("triton is not installed"))
# The loop is the same for every instruction set, which tests/test_backends.py takes in turn.
any_backend = pytest.mark.parametrize("backend", ["cpu", "reference", TRITON], indirect=True)


def check(name: str, ours: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Within a rounding of the dtype, or no further from the truth than 1.2 times torch's operators in that dtype."""
    assert (ours.shape, ours.dtype) == (eager.shape, eager.dtype), name
    if exact.isnan().any():
        assert torch.equal(ours.isnan(), exact.isnan()), name
        return
    error, theirs = distance(ours, exact), distance(eager, exact)
    assert error <= max(BOUNDS[ours.dtype], 1.2 * theirs), (name, error, theirs)


@pytest.mark.parametrize("waits", [True, False], ids=["on-a-cpu", "as-on-a-gpu"])
@any_backend
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64(case: Case, backend: Backend, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend.name == "triton" and not (case.interpreted and not waits):
        pytest.skip("slow in the interpreter")
    if not waits:  # nothing looks at numbers, ignored rows take part, and float16 has products of its own
        monkeypatch.setattr(chunks, "can_wait", lambda tensor: False)
        monkeypatch.setattr(products, "computed_in", lambda dtype, device: dtype)
    ours, eager = case.build(), case.build()
    exact = in_float64(ours)
    loss, theirs, truth = case.ours(ours, backend=backend.name), case.eager(eager), case.exact(exact)
    check("loss", loss.detach(), theirs.detach(), truth.detach())
    # The second time with the same graph, and for another upstream gradient.
    for upstream in (case.upstream, 2 * case.upstream):
        triple = (gradients(of, given, upstream) for of, given in ((loss, ours), (theirs, eager), (truth, exact)))
        made, by_torch, right = triple
        assert made.keys() == right.keys()
        for name in right:
            check(name, made[name], by_torch[name], right[name])


@pytest.mark.parametrize("waits", [True, False], ids=["on-a-cpu", "as-on-a-gpu"])
@any_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics(reduction: str, backend: Backend, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend.name == "triton" and waits:
        pytest.skip("slow in the interpreter")
    if not waits:
        monkeypatch.setattr(chunks, "can_wait", lambda tensor: False)
    case = Case("statistics", dtype=f64, bias=True, ignored=0.3, N=20)
    tensors = case.build()
    logits = F.linear(tensors["input"], tensors["linear_weight"], tensors["linear_bias"]).detach()
    options: dict[str, Any] = {"reduction": reduction, "lse_square_scale": 1e-2, "return_stats": True}
    found = linear_cross_entropy(**tensors, chunk_rows=8, backend=backend.name, **options)
    exact = linear_cross_entropy(**in_float64(tensors), backend="reference", chunk_rows=99, **options)
    for name in ("loss", "lse", "z_loss", "argmax", "correct", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=1e-12, atol=0)
    counted = tensors["target"] != -100
    torch.testing.assert_close(found.lse[counted], logits.logsumexp(1)[counted], rtol=1e-12, atol=0)
    assert torch.equal(found.argmax[counted], logits.argmax(1)[counted])
    # lse with a gradient of its own, and alone.
    for f in (lambda o: o.loss.sum() * 2 + o.lse.pow(2).sum(), lambda o: o.lse.pow(2).sum()):
        z = F.linear(tensors["input"], tensors["linear_weight"], tensors["linear_bias"]).requires_grad_()
        whole = cross_entropy(z, tensors["target"], backend="reference", **options)
        assert isinstance(whole, CrossEntropyOutput)
        wanted = [tensors[name] for name in ("input", "linear_weight", "linear_bias")]
        ours = torch.autograd.grad(f(found), wanted, retain_graph=True)
        for got, right in zip(ours, torch.autograd.grad(f(whole), wanted), strict=True):
            assert distance(got, right) < 1e-14


def test_shapes() -> None:
    """(H), (N, H) and (B, T, H), and torch's K-dimensional loss: the same numbers as (N, H)."""
    case = Case("shapes", N=12, dtype=f64, ignored=0.3)
    x, W, y = (case.build()[name].detach() for name in ("input", "linear_weight", "target"))
    rows = linear_cross_entropy(x, W, y, reduction="none")
    given = linear_cross_entropy(x.view(3, 4, -1), W, y.view(3, 4), reduction="none", return_stats=True)
    assert all(field.shape == (3, 4) for field in given)
    assert torch.equal(given.loss, rows.view(3, 4))
    assert torch.equal(linear_cross_entropy(x.view(3, 2, 2, -1), W, y.view(3, 2, 2)), linear_cross_entropy(x, W, y))
    one = linear_cross_entropy(x[0], W, y[0].clamp(min=0), return_stats=True)
    assert one.lse.shape == one.loss.shape == ()
    p = torch.randn(3, 4, len(W), dtype=f64).softmax(-1)
    whole = linear_cross_entropy(x, W, p.view(12, -1))
    assert torch.equal(linear_cross_entropy(x.view(3, 4, -1), W, p), whole)
    assert linear_cross_entropy(x[0], W, p[0, 0]).shape == ()
    deep = linear_cross_entropy(x, W[:130].view(13, 10, -1), y[:, None].expand(12, 10) % 13, reduction="none")
    exact = F.cross_entropy(F.linear(x, W[:130]).view(12, 13, 10), y[:, None].expand(12, 10) % 13, reduction="none")
    torch.testing.assert_close(deep, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_ignored_rows_hold_reaches_nothing(value: float, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not waits:
        monkeypatch.setattr(chunks, "can_wait", lambda tensor: False)
    case = Case("inf", dtype=f64, ignored=0.3, bias=True)
    clean, spoilt = case.build(), case.build()
    rows = (spoilt["target"] == -100)[:, None]
    spoilt["input"] = spoilt["input"].detach().masked_fill(rows, value).requires_grad_()
    results = [gradients(case.ours(tensors), tensors, 1.0) for tensors in (clean, spoilt)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    # Second derivatives go through whole logits.
    x = spoilt["input"]
    (dW,) = torch.autograd.grad(case.ours(spoilt), spoilt["linear_weight"], create_graph=True)
    assert torch.autograd.grad(dW.pow(2).sum(), x)[0].isfinite().all()


def test_bits_do_not_depend_on_threads() -> None:
    if products.chosen():
        pytest.skip("oneDNN may sum in another order")
    case = Case("threads", N=512, chunk_rows=128)
    threads, found = torch.get_num_threads(), []
    for n in (1, 2):
        torch.set_num_threads(n)
        tensors = case.build()
        loss = case.ours(tensors)
        found.append([loss.detach(), *gradients(loss, tensors, 1.0).values()])
    torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("product", [(), (products.LOGITS, products.INPUT_GRAD, products.WEIGHT_GRAD)], ids=str)
def test_either_products(product: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's float32 products, wherever they can be called, are about as exact as torch.mm's."""
    if _torch.why_no_linear():
        pytest.skip(_torch.why_no_linear())
    monkeypatch.setattr(products, "chosen", lambda: product)
    seed = torch.Generator().manual_seed(0)
    x, W = torch.randn(200, 200, generator=seed), torch.randn(9000, 200, generator=seed) / 14
    b, y = torch.randn(9000, generator=seed), torch.randint(9000, (200,), generator=seed)
    tensors = {"input": x, "linear_weight": W, "linear_bias": b, "target": y}
    for name in ("input", "linear_weight", "linear_bias"):
        tensors[name].requires_grad_()
    case, exact = Case("products", chunk_rows=200), in_float64(tensors)
    loss, eager, truth = case.ours(tensors), case.eager(tensors), case.exact(exact)
    check("loss", loss.detach(), eager.detach(), truth.detach())
    pairs = ((loss, tensors), (eager, tensors), (truth, exact))
    ours, theirs, right = (gradients(*pair, 1.0) for pair in pairs)
    for name in right:
        # oneDNN sums more terms of the weight's gradient one after another than MKL does.
        most = 1.5 if product and name == "linear_weight" else 1.2
        assert distance(ours[name], right[name]) <= most * distance(theirs[name], right[name]), name


@pytest.mark.parametrize("product", [(), (products.LOGITS,)], ids=str)
def test_a_bias_of_any_stride(product: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN reads a bias as if it were contiguous, beyond its memory."""
    if product and _torch.why_no_linear():
        pytest.skip(_torch.why_no_linear())
    monkeypatch.setattr(products, "chosen", lambda: product)
    seed = torch.Generator().manual_seed(0)
    x, W = torch.randn(32, 200, generator=seed), torch.randn(5000, 200, generator=seed) / 14
    y, b = torch.randint(5000, (32,), generator=seed), torch.randn(10000, generator=seed)
    for bias in (b[::2], b[:1].expand(5000), b[:5000].view(50, 100).t().reshape(-1), b.view(5000, 2)[:, 1]):
        found = linear_cross_entropy(x, W, y, linear_bias=bias, chunk_rows=32)
        torch.testing.assert_close(found, F.cross_entropy(F.linear(x, W, bias.clone()), y), rtol=1e-5, atol=0)


def test_gradients_of_no_rows() -> None:
    for dtype, keywords in ((f32, {"return_stats": True}), (torch.float16, {"reduction": "sum"})):
        input, W = torch.ones(0, H, dtype=dtype, requires_grad=True), torch.ones(V, H, dtype=dtype, requires_grad=True)
        found: Any = linear_cross_entropy(input, W, torch.ones(0).long(), chunk_rows=8, **keywords)  # type: ignore[call-overload]
        value = found.lse.sum() if "return_stats" in keywords else found
        for tensor, gradient in zip((input, W), torch.autograd.grad(value, (input, W)), strict=True):
            assert gradient.shape == tensor.shape
            assert not gradient.any()


def test_the_loss_of_16_bits_is_summed_in_float32() -> None:
    """torch's chunked bfloat16 loss over 4096 rows is 5 to 40 % off."""
    seed = torch.Generator().manual_seed(0)
    x, W = torch.randn(4096, 64, generator=seed).bfloat16(), torch.randn(1000, 64, generator=seed).bfloat16()
    y = torch.randint(1000, (4096,), generator=seed)
    dtype = products.computed_in(torch.bfloat16, x.device)
    exact = F.cross_entropy(F.linear(x.to(dtype), W.to(dtype)).double(), y)  # of the logits as this dtype holds them
    assert abs(linear_cross_entropy(x, W, y, chunk_rows=8, dtype=f32).double() / exact - 1) < 1e-6
