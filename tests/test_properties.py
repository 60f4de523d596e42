"""What holds for any logits: hypothesis looks for a counterexample, judged by float64 and relative to the terms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from judge import check, check_grad, expected_grad, expected_loss
from torch import Tensor

from fused_ce import cross_entropy
from fused_ce.backends import cpu
from fused_ce.options import Options

# The same examples on every run; the `isa` fixture stays as it is from one to the next.
quick = settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
pytestmark = [pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built"), pytest.mark.usefixtures("isa")]
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Drawn = tuple[Tensor, Tensor, dict[str, Any]]


@st.composite
def calls(draw: st.DrawFn, smoothing: bool = True, ignored: bool = True) -> Drawn:
    """Logits of any size, spread and dtype, class indices, and keywords."""
    N, C = draw(st.integers(1, 5)), draw(st.sampled_from((1, 2, 3, 7, 16, 17, 64, 65, 100, 257)))
    pixels = draw(st.sampled_from(((), (), (1,), (3,), (2, 3))))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread, shift = draw(st.sampled_from((0.0, 0.1, 1.0, 10.0))), draw(st.sampled_from((0.0, -3.0, 100.0)))
    x = torch.randn(N, C, *pixels, generator=seed, dtype=torch.float64) * spread + shift
    y = torch.randint(C, (N, *pixels), generator=seed)
    if ignored and draw(st.booleans()) and y.numel() > 1:
        y.view(-1)[-1] = -100
    keywords: dict[str, Any] = {"reduction": draw(st.sampled_from(("mean", "sum", "none")))}
    if smoothing:
        keywords["label_smoothing"] = draw(st.sampled_from((0.0, 0.1, 1.0)))
    return x.to(draw(st.sampled_from(FLOATS))), y, keywords


def run(x: Tensor, target: Tensor, weight: Tensor | None = None, **keywords: Any) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    loss = cross_entropy(x, target, weight, **keywords)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


def hold(result: tuple[Tensor, Tensor], x: Tensor, target: Tensor, **keywords: Any) -> None:
    """Loss and gradient are the exact ones of the call given here."""
    call = x, target, None, Options(**keywords)
    loss, grad = result
    check(loss, expected_loss(call))
    check_grad(grad, call, expected_grad(torch.ones_like(loss), call))


@quick
@given(calls())
def test_any_call_is_exact(call: Drawn) -> None:
    x, y, keywords = call
    hold(run(x, y, **keywords), x, y, **keywords)


@quick
@given(calls(), st.sampled_from((1.0, -4.0, 64.0)))
def test_a_shift_of_all_logits_changes_nothing(call: Drawn, shift: float) -> None:
    x, y, keywords = call
    x = (x.float() * 16).round().clamp(-1000, 1000) / 16  # so that adding the shift is exact
    loss, grad = run(x, y, **keywords)
    shifted_loss, shifted_grad = run(x + shift, y, **keywords)
    if x.shape[1] <= 256:  # only differences from the largest logit are looked at
        assert torch.equal(loss, shifted_loss)
        assert torch.equal(grad, shifted_grad)
    else:  # docs/decisions.md, "Exponentials relative to a shift": last bits may change, exactness does not
        hold((shifted_loss, shifted_grad), x, y, **keywords)


@quick
@given(calls(), st.randoms(use_true_random=False))
def test_the_order_of_classes_does_not_matter(call: Drawn, random: Any) -> None:
    x, y, keywords = call
    order = torch.tensor(random.sample(range(x.shape[1]), x.shape[1]))
    place = order.argsort()
    target = torch.where(y == -100, y, place[y.clamp(min=0)])
    loss, grad = run(x[:, order], target, **keywords)
    hold((loss, grad[:, place].contiguous()), x, y, **keywords)


@quick
@given(calls(), st.integers(0, 5))
def test_a_batch_is_the_sum_of_its_parts(call: Drawn, at: int) -> None:
    x, y, keywords = call
    keywords["reduction"] = "sum"
    first, second = (run(x[part].double(), y[part], **keywords) for part in (slice(at), slice(at, None)))
    hold((first[0] + second[0], torch.cat([first[1], second[1]])), x.double(), y, **keywords)
    count = (y != -100).sum()
    if count:  # the mean over all by parts, as micro-batches count it
        parts = (run(x[part].double(), y[part], num_items=count) for part in (slice(at), slice(at, None)))
        loss, grad = run(x.double(), y)
        (loss_1, grad_1), (loss_2, grad_2) = parts
        torch.testing.assert_close(loss_1 + loss_2, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.cat([grad_1, grad_2]), grad, rtol=1e-12, atol=0)


@quick
@given(calls(smoothing=False), st.floats(0, 1))
def test_smoothing_is_linear(call: Drawn, e: float) -> None:
    x, y, keywords = call
    x = x.double()
    (loss_0, grad_0), (loss_1, grad_1) = (run(x, y, label_smoothing=end, **keywords) for end in (0.0, 1.0))
    mixed = (1 - e) * loss_0 + e * loss_1, (1 - e) * grad_0 + e * grad_1
    hold(mixed, x, y, label_smoothing=e, **keywords)
    hold(run(x, y, label_smoothing=e, **keywords), x, y, label_smoothing=e, **keywords)


@quick
@given(calls(ignored=False))
def test_one_hot_probabilities_are_indices(call: Drawn) -> None:
    x, y, keywords = call
    onehot = torch.nn.functional.one_hot(y, x.shape[1]).movedim(-1, 1).to(x.dtype)
    hold(run(x, onehot, **keywords), x, y, **keywords)


@quick
@given(calls(smoothing=False), st.integers(1, 70))
def test_classes_of_minus_infinity_do_not_count(call: Drawn, more: int) -> None:
    x, y, keywords = call
    padding = torch.full((x.shape[0], more, *x.shape[2:]), -torch.inf, dtype=x.dtype)
    loss, grad = run(torch.cat([x, padding], 1), y, **keywords)
    assert not grad[:, x.shape[1] :].any()
    hold((loss, grad[:, : x.shape[1]].contiguous()), x, y, **keywords)


@quick
@given(calls(), st.sampled_from((0.25, 2.0, 1024.0)))
def test_scaling_the_weights_leaves_the_mean(call: Drawn, factor: float) -> None:
    x, y, keywords = call
    keywords["reduction"] = "mean"
    weight = torch.linspace(0.5, 1.5, x.shape[1]).to(x.dtype)
    for ours, scaled in zip(run(x, y, weight, **keywords), run(x, y, weight * factor, **keywords), strict=True):
        assert torch.equal(ours.isnan(), scaled.isnan())  # all ignored
        assert torch.equal(ours.nan_to_num(), scaled.nan_to_num())  # a power of two changes no digit


@quick
@given(calls())
def test_a_gradient_adds_up_to_zero(call: Drawn) -> None:
    x, y, keywords = call
    _, grad = run(x.double(), y, **keywords)
    assert (grad.sum(1).abs() <= 1e-13 * grad.abs().sum(1)).all()
