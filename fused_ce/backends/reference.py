"""The "reference" backend: `formula.py` as it stands, on any device; it is never the fastest."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from .. import operators
from ..contract import Call, Forward, Gradients, RowSums, Schedule, Upstream
from ..options import FLOATS, Options


def unsupported(call: Call) -> list[str]:
    """Why this backend cannot take the call, in words; an empty list when it can."""
    reasons = []
    if call.input.dtype not in FLOATS:
        reasons.append(f"the input is {call.input.dtype}; the formula is written for floating point logits")
    if call.input.dim() == 0:
        reasons.append("the input has no class dimension")
    return reasons


def part(call: Call) -> Tensor:
    """See `contract.Backend`."""
    operators.check_target(call)
    with torch.no_grad():
        rows = operators.rows_of(call)
        sums = rows.sums._replace(argmax=rows.sums.argmax + call.shard.first * call.options.return_stats)
        ignored = torch.tensor([[0.0]] * 7 + [[-1.0]], dtype=torch.float64, device=call.input.device)
        return torch.where(rows.counted, torch.stack([number.double() for number in sums]), ignored)


def finish(call: Call, sums: Tensor, upstream: Upstream, into: Tensor) -> None:
    """See `contract.Backend`."""
    with torch.no_grad():
        into.copy_(operators.shard_gradient(call, RowSums(*sums.unbind(0)), upstream))


def saved_shape(call: Call) -> tuple[int, ...]:
    """That of "triton", whose graphs run here once its kernels are declined; backward starts from the logits again."""
    return math.prod(call.row_shape) + 1, 4


def forward(call: Call, schedule: Schedule) -> Forward:
    if call.target.shape != call.input.shape:
        operators.check_target(call)
    with torch.no_grad():
        loss, stats = operators.composite(call)
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
    return Gradients(*operators.gradients(call, upstream, wants_target))


@overload
def rescale(
    grad: Tensor, target: Tensor, options: Options, upstream: Tensor, keep: bool, exactly: Literal[False] = False
) -> Tensor: ...
@overload
def rescale(
    grad: Tensor, target: Tensor, options: Options, upstream: Tensor, keep: bool, exactly: bool
) -> Tensor | None: ...
def rescale(
    grad: Tensor, target: Tensor, options: Options, upstream: Tensor, keep: bool, exactly: bool = False
) -> Tensor | None:
    """See `contract.Backend`."""
    if exactly:
        return None
    dx = grad.double() * (upstream.double() / (options.grad_scale or 1.0))
    return torch.where(operators.ignored(grad, target, options), 0, dx).to(grad.dtype)
