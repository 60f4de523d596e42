"""How far from exact a result may be, and the assertions that hold it there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from accuracy import HALF, acc_dtype, relative_error, same_kind
from cases import Case
from oracle import as_rows, composed, exact_grad, exact_loss, terms
from torch import Tensor

from fused_ce import operators
from fused_ce.backends import reference
from fused_ce.contract import Call, Upstream

# Relative errors that are good enough wherever; on top of them comes only the rounding to a 16-bit result.
LOSS = {torch.float32: 4 * torch.finfo(torch.float32).eps, torch.float64: 1e-12}
GRAD = {torch.float32: 5e-6, torch.float64: 1e-12}


class Expected(NamedTuple):
    """An exact result and what it allows; the fields are those of `accuracy.relative_error`."""

    exact: Tensor
    terms: Tensor | None
    flush: float
    allowed: float


def expected_loss(call: Call) -> Expected:
    exact = exact_loss(*call)
    return Expected(exact, None, 0.0, _allowed(LOSS, call, lambda loss, *plain: loss(*plain), exact))


def expected_grad(grad_output: Tensor, call: Call) -> Expected:
    def of(loss: Callable[..., Tensor], input: Tensor, *rest: object) -> Tensor:
        upstream = grad_output.cpu().to(input.dtype)
        if loss is ours:
            return reference.backward(Call(input, *rest), None, None, Upstream(upstream), True, False).input
        input = input.detach().clone().requires_grad_()
        return torch.autograd.grad(loss(input, *rest), input, upstream)[0]

    exact, size = exact_grad(grad_output, *call), terms(grad_output, *call)
    largest = float(grad_output.abs().max()) if grad_output.numel() else 0.0
    flush = torch.finfo(acc_dtype(call[0].dtype)).tiny * max(1.0, largest)
    return Expected(exact, size, flush, _allowed(GRAD, call, of, exact, size, flush))


@cache
def expected_of(case: Case) -> tuple[Expected, Expected]:
    """Loss and gradient for upstream gradients of 1; the same for every backend, on a GPU too."""
    call = case.build()
    loss = expected_loss(call)
    return loss, expected_grad(torch.ones_like(loss.exact), call)


def ours(*call: object) -> Tensor:
    """The loss by `formula.py`, in the dtype of the input."""
    return operators.composite(Call(*call))[0]


def _allowed(least: dict[torch.dtype, float], call: Call, result_of: Callable[..., Tensor], *exact: object) -> float:
    """`least`, or for harder logits the smaller of torch's own error and twice the reference's, in float32."""
    input, target, weight, options = call
    acc = acc_dtype(input.dtype)
    if acc == torch.float64:
        return least[acc]
    plain = input.detach().cpu().to(acc), target.cpu(), None if weight is None else weight.cpu().to(acc)
    errors = []
    for loss in (composed, ours):
        result = result_of(loss, *plain, options._replace(dtype=None)).detach()
        errors.append(relative_error(result, *exact) if same_kind(result, exact[0]) else torch.inf)
    return max(least[acc], min(errors[0], 2 * errors[1]))


def check(result: Tensor, expected: Expected, roundings: int = 1) -> None:
    """Hold a loss or a gradient against the exact one; each rounding beyond the first adds half an ULP."""
    result = result.detach().cpu()
    assert result.shape == expected.exact.shape
    assert same_kind(result, expected.exact), (result, expected.exact)
    more = (roundings - 1) * torch.finfo(result.dtype).eps if result.dtype in HALF else 0.0
    exact, size, flush, allowed = expected
    assert relative_error(result, exact, size, flush) <= allowed + more


def check_grad(grad: Tensor, call: Call, expected: Expected, roundings: int = 1) -> None:
    """As `check`, and the gradient's dtype and layout, and zeros where the target is ignored."""
    input, target, _, options = call
    assert grad.dtype == input.dtype
    assert grad.is_contiguous()
    if target.shape != input.shape:
        assert not as_rows(grad)[target.reshape(-1).long() == options.ignore_index].any()
    check(grad, expected, roundings)
