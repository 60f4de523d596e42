"""The "reference" backend: `formula.py` as it stands, on any device; it is never the fastest."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import formula
from ..contract import Call, Forward, Gradients, Schedule, Upstream
from ..options import FLOATS, Options


def unsupported(call: Call) -> list[str]:
    """Why this backend cannot take the call, in words; an empty list when it can."""
    reasons = []
    if call.input.dtype not in FLOATS:
        reasons.append(f"the input is {call.input.dtype}; the formula is written for floating point logits")
    if call.input.dim() == 0:
        reasons.append("the input has no class dimension")
    return reasons


def saved_shape(call: Call) -> tuple[int, ...]:
    """Nothing: backward starts from the logits again."""
    return (0,)


def forward(call: Call, schedule: Schedule) -> Forward:
    if call.target.shape != call.input.shape:
        check_target(call)
    with torch.no_grad():
        loss, stats = formula.composite(call)
        saved = None if schedule == "loss" else call.input.new_empty(saved_shape(call), dtype=torch.float64)
        if schedule != "fused":
            return Forward(loss, None, saved, stats)
        scale = call.options.grad_scale
        expected = torch.ones_like(loss) if scale is None else scale * torch.ones_like(loss)
        grad = backward(call, None, None, Upstream(expected), True, False).input
    return Forward(loss, grad, saved, stats)


def backward(
    call: Call,
    grad: Tensor | None,  # the input's shape
    saved: Tensor | None,
    upstream: Upstream,
    keep: bool,
    wants_target: bool,
) -> Gradients:
    rows = formula.rows_of(call)
    z, counted = rows.z, rows.counted
    D, count = formula.divisors(call, rows)
    of_loss = upstream.loss.reshape(-1).to(z.dtype).expand(len(z))
    of_lse = 0.0 if upstream.lse is None else upstream.lse.reshape(-1).to(z.dtype)
    scale, options = of_loss / D, call.options
    dx = formula.row_grad(rows.x, z, rows.y, rows.q, rows.sums, options, scale, of_loss / count, of_lse)
    dx = _like(torch.where(counted[:, None], dx, 0), call.input)
    if not wants_target:
        return Gradients(dx)
    return Gradients(dx, _like(formula.target_grad(z, rows.sums, rows.weight, options, scale), call.target))


def rescale(grad: Tensor, options: Options, upstream: Tensor, keep: bool) -> Tensor:
    return (grad * (upstream / (options.grad_scale or 1.0))).to(grad.dtype)


def check_target(call: Call) -> None:
    """Raise torch's own IndexError for a class index outside [0, C) that is not ignored."""
    target = call.target.long()
    bad = ((target < 0) | (target >= call.classes)) & (target != call.options.ignore_index)
    if bad.any():
        raise IndexError(f"Target {int(target[bad].flatten()[0])} is out of bounds.")


def _like(rows: Tensor, tensor: Tensor) -> Tensor:  # (R, C) -> the tensor's shape and dtype, contiguous
    if tensor.dim() > 1:
        rows = rows.reshape(tensor.shape[:1] + tensor.shape[2:] + tensor.shape[1:2]).movedim(-1, 1)
    return rows.reshape(tensor.shape).to(tensor.dtype).contiguous()
