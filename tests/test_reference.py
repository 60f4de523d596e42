"""The formula itself: `formula.py` in float64 against torch, against its own autograd, and against decimals."""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
import torch
from accuracy import relative_error, same_kind
from cases import CASES, EVERYTHING, OPTIONS, Case, confident, ignore, ramp
from oracle import composed, exact_grad, exact_loss, terms
from torch import Tensor

from fused_ce import operators
from fused_ce.backends import reference
from fused_ce.contract import Call, Upstream
from fused_ce.options import Options


def in_float64(case: Case) -> Call:
    input, target, weight, options = case.build()
    weight = None if weight is None else weight.double()
    target = target.double() if target.is_floating_point() else target
    return Call(input.double(), target, weight, options._replace(dtype=None, grad_scale=None))


def torch_is_exact(case: Case) -> bool:
    """torch's float64 loses confident rows, and writes NaN gradients into ignored rows that are not finite."""
    return not any(
        word in case.id for word in ("margin", "x10", "reached", "up-to", "ignored-row", "pixels-ignored", "huge")
    )


@pytest.mark.parametrize("case", list(filter(torch_is_exact, CASES)), ids=str)
def test_equals_torch_in_float64(case: Case) -> None:
    input, *rest = call = in_float64(case)
    input = input.detach().clone().requires_grad_()
    theirs = composed(input, *rest)
    (their_grad,) = torch.autograd.grad(theirs.sum(), input)
    ones = torch.ones_like(theirs)
    theirs = theirs.detach()
    loss, grad, _, _ = reference.forward(call, "fused")
    assert same_kind(loss, theirs)
    assert relative_error(loss, theirs) < 1e-13
    assert same_kind(grad, their_grad)
    assert relative_error(grad, their_grad, terms(ones, *call) + 1e-300) < 1e-11


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 3), (2, 5, 3, 2)], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_row_grad_equals_autograd(options: str, shape: tuple[int, ...], probabilities: bool) -> None:
    options = Options(**OPTIONS[options])
    seed = torch.Generator().manual_seed(len(shape))
    input = torch.randn(shape, generator=seed, dtype=torch.float64, requires_grad=True)
    if probabilities:
        target = torch.rand(shape, generator=seed, dtype=torch.float64)
    else:
        target = torch.randint(5, shape[:-1] if len(shape) == 1 else (shape[0], *shape[2:]), generator=seed)
    for reduction in ("mean", "sum", "none") if options.num_items is None else ("mean",):
        call = Call(input, target, ramp(5).double(), options._replace(reduction=reduction))
        loss, _ = operators.composite(call)
        upstream = torch.randn(loss.shape, generator=seed, dtype=torch.float64)
        (by_autograd,) = torch.autograd.grad(loss, input, upstream)
        by_formula = reference.backward(call, None, None, Upstream(upstream), True, False).input
        torch.testing.assert_close(by_formula, by_autograd, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(loss, composed(*call), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("options", [*OPTIONS, "none"])
def test_derivatives(options: str) -> None:
    options = Options(reduction="none") if options == "none" else Options(**OPTIONS[options])
    input = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    target = ignore(1)(torch.tensor([4, 0, 2]))

    def loss(input: Tensor) -> Tensor:
        return operators.composite(Call(input, target, ramp(5).double(), options))[0]

    assert torch.autograd.gradcheck(loss, input, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, input)


def decimals(x: Tensor, y: int, softcap: float | None) -> tuple[float, Tensor]:
    """Loss and gradient of one row; p_y - 1 may need 300 digits."""
    with localcontext() as context:
        context.prec = 320
        z, slope = [Decimal(value) for value in x.tolist()], [Decimal(1)] * len(x)
        if softcap is not None:
            cap = Decimal(softcap)
            E = [(-2 * value / cap).exp() for value in z]
            z = [cap * (1 - E_c) / (1 + E_c) for E_c in E]
            slope = [4 * E_c / (1 + E_c) ** 2 for E_c in E]
        powers = [value.exp() for value in z]
        p = [power / sum(powers) for power in powers]
        grad = [float((p_c - (c == y)) * slope_c) for c, (p_c, slope_c) in enumerate(zip(p, slope, strict=True))]
        return float(-p[y].ln()), torch.tensor(grad, dtype=torch.float64)


@pytest.mark.parametrize("softcap", [None, 3.0, 50.0])
@pytest.mark.parametrize("margin", [-50, 0, 5, 15, 20, 30, 60, 300, 600])
def test_equals_decimals(margin: float, softcap: float | None) -> None:
    seed = torch.Generator().manual_seed(0)
    y = torch.tensor([3])
    x = confident(margin)(torch.randn(1, 17, generator=seed, dtype=torch.float64), y)
    loss, grad = decimals(x[0], 3, softcap)
    ours, our_grad, *_ = reference.forward(Call(x, y, None, Options(softcap=softcap)), "fused")
    assert ours.item() == pytest.approx(loss, rel=1e-13)
    assert relative_error(our_grad[0], grad) < 1e-12


def test_large_logits_change_nothing() -> None:
    x = torch.tensor([[3e300, 3e300, 3e300], [1e200, 1e200, 0], [-3e300, -3e300, -3e300]], dtype=torch.float64)
    y = torch.tensor([0, 1, 2])
    loss, _, _, _ = reference.forward(Call(x, y, None, Options(reduction="none")), "loss")
    torch.testing.assert_close(loss.exp(), torch.tensor([3, 2, 3], dtype=torch.float64))
    third, half = 1 / 3, 1 / 2
    grad = exact_grad(torch.ones(3), x, y, None, Options(reduction="none"))
    expected = [[third - 1, third, third], [half, half - 1, 0], [third, third, third - 1]]
    torch.testing.assert_close(grad, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_probabilities_in_other_dtypes(dtype: torch.dtype) -> None:
    seed = torch.Generator().manual_seed(0)
    input = torch.randn(4, 33, generator=seed).to(dtype)
    target = torch.randn(4, 33, generator=seed).softmax(1)
    call = Call(input, target, None, Options(label_smoothing=0.1))
    loss, grad, _, _ = reference.forward(call, "fused")
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    assert relative_error(loss, exact_loss(*call)) < 1e-6
    scale = torch.tensor(0.25 / 33)  # the gradient is a difference of terms of this size
    assert relative_error(grad, exact_grad(torch.ones(()), *call), scale) < 5e-6


def test_everything_ignored() -> None:
    call = Call(torch.randn(3, 5, dtype=torch.float64), torch.full((3,), -100), None, Options(**EVERYTHING))
    loss, grad, _, _ = reference.forward(call, "fused")
    assert loss.isnan()
    assert torch.equal(grad, torch.zeros(3, 5, dtype=torch.float64))
