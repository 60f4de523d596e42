"""The backend that CONTRIBUTING walks through: cross entropy in NumPy, for plain rows of float32 or float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fused_ce.contract import Call, Forward, Gradients, Schedule, Upstream
from fused_ce.options import Options


def unsupported(call: Call) -> list[str]:
    input, target, weight, options = call
    reasons = []
    if not (input.is_cpu and target.is_cpu):
        reasons.append(f"NumPy takes CPU tensors, got {input.device}")
    if input.dtype not in (torch.float32, torch.float64) or options.dtype not in (None, input.dtype):
        reasons.append(
            f"the loss was asked for in {options.dtype} from {input.dtype} logits, not in one of float32, float64"
        )
    if input.dim() != 2 or 0 in input.shape or target.dtype != torch.int64 or target.dim() != 1:
        reasons.append(f"input must be (N, C), target (N) int64; got {tuple(input.shape)}, {tuple(target.shape)}")
    if (
        weight is not None
        or options.smoothing
        or options.return_stats
        or options.inplace
        or options.softcap is not None
    ):
        reasons.append("weight, label_smoothing, softcap, return_stats and inplace are not written")
    if options.lse_square_scale or options.logit_scale != 1:
        reasons.append("lse_square_scale and logit_scale are not written")
    return reasons


def saved_shape(call: Call) -> tuple[int, ...]:
    return (call.input.shape[0], 2)  # lse in two parts, m and lse - m


def forward(call: Call, schedule: Schedule) -> Forward:
    x, y, counted = _rows(call)
    rows = np.arange(len(x))
    m = x.max(1)
    others = np.exp(x - m[:, None])
    others[rows, y] = 0
    lse_m = np.log1p(others.sum(1) + (np.exp(x[rows, y] - m) - 1))
    losses = np.where(counted, lse_m + (m - x[rows, y]), 0)
    total = losses if call.options.reduction == "none" else losses.sum() / _divisor(call)
    saved = torch.from_numpy(np.stack([m, lse_m], 1))
    loss = torch.as_tensor(total).to(call.options.dtype or call.input.dtype)
    if schedule != "fused":
        return Forward(loss, None, saved if schedule == "recompute" else None, None)
    expected = torch.as_tensor(1.0 if call.options.grad_scale is None else call.options.grad_scale)
    return Forward(loss, backward(call, None, saved, Upstream(expected), True, False).input, None, None)


def backward(
    call: Call, grad: Tensor | None, saved: Tensor | None, upstream: Upstream, keep: bool, wants_target: bool
) -> Gradients:
    if grad is not None or saved is None:
        return Gradients(rescale(grad, call.target, call.options, upstream.loss, keep, False))
    x, y, counted = _rows(call)
    rows, (m, lse_m) = np.arange(len(x)), saved.numpy().T
    dz = np.exp((x - m[:, None]) - lse_m[:, None])
    dz[rows, y] = 0
    dz[rows, y] = -dz.sum(1)  # p_y - 1, without its rounding
    dz = dz * (upstream.loss.double().numpy().reshape(-1, 1) / _divisor(call))
    if upstream.lse is not None:
        raise NotImplementedError("return_stats was declined")
    dx = np.ascontiguousarray(np.where(counted[:, None], dz, 0))
    return Gradients(torch.from_numpy(dx).to(call.input.dtype))


def rescale(grad: Tensor, target: Tensor, options: Options, upstream: Tensor, keep: bool, exactly: bool) -> Tensor:
    return (grad.double() * (upstream.double() / (1.0 if options.grad_scale is None else options.grad_scale))).to(
        grad.dtype
    )


def _rows(call: Call) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits in float64 (zeros where the row is ignored), targets, and which rows count."""
    y, C = call.target.numpy(), call.input.shape[1]
    counted = y != call.options.ignore_index
    if (bad := y[counted & ((y < 0) | (y >= C))]).size:
        raise IndexError(f"Target {bad[0]} is out of bounds.")
    x = call.input.detach().numpy().astype(np.float64)
    return np.where(counted[:, None], x, 0), np.where(counted, y, 0), counted


def _divisor(call: Call) -> float:
    if call.options.reduction != "mean":
        return 1.0
    given = call.options.num_items
    return float((call.target != call.options.ignore_index).sum() if given is None else given)
