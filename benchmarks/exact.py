"""How far a loss and a gradient are from the float64 truth."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peers import Problem
from torch import Tensor

# In ULP (see below). Wide enough for torch itself, which rounds log_softmax to 16 bits on the way; a wrong factor,
# divisor or element is thousands.
BOUNDS = {torch.float32: 256.0, torch.float64: 256.0, torch.bfloat16: 32.0, torch.float16: 32.0}
CHUNK = 1 << 22  # logits held in float64 at a time


def errors(problem: Problem, loss: Any, grad: Any) -> tuple[float, float | None]:
    """Largest error of the loss and of the gradient in ULP, the spacing of the dtype's numbers at the exact value."""
    N, C = problem.input.shape
    losses, worst, rows = [], 0.0, max(1, CHUNK // C)
    loss, grad = tensor(loss), None if grad is None else tensor(grad)
    share = 1 / N if problem.reduction == "mean" else 1.0
    given = torch.ones(()) if problem.upstream is None else problem.upstream.double()
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        input = problem.input.detach()[part].double().requires_grad_()
        each = F.cross_entropy(input, problem.target[part], reduction="none")
        losses.append(each.detach())
        if grad is not None:
            upstream = given[part] if given.dim() else torch.full_like(each, share) * given
            worst = max(worst, ulps(grad[part], torch.autograd.grad(each, input, upstream)[0]))
    exact = torch.cat(losses)
    if problem.reduction != "none":
        exact = exact.sum() * share
    if loss.shape != exact.shape or (grad is not None and grad.shape != problem.input.shape):
        return float("inf"), float("inf")
    return ulps(loss, exact), None if grad is None else worst


def wrong(problem: Problem, loss_error: float, grad_error: float | None) -> str:
    """Why results with these errors are no answer to the problem; empty if they are one."""
    bound = BOUNDS[problem.input.dtype]
    found = {"loss": loss_error, "gradient": grad_error}
    far = [f"{name} is {error:.3g} ULP" for name, error in found.items() if error is not None and not error <= bound]
    return f"wrong: {' and '.join(far)} from float64, over the limit of {bound:.0f}" if far else ""


def ulps(got: Tensor, exact: Tensor) -> float:
    info = torch.finfo(got.dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.tiny)).exponent - 1
    spacing = torch.ldexp(torch.full_like(exact, info.eps), exponent)
    return float(((got.double() - exact).abs() / spacing).nan_to_num(nan=torch.inf).max())


def tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    return torch.from_dlpack(value) if hasattr(value, "__dlpack__") else torch.as_tensor(value)
