"""A whole call out of `formula.py` and plain torch operators: any device, any dtype, differentiable to any order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Call, RowSums, Stats, Upstream
from .formula import put_back, row_grad, row_loss, row_lse, row_stats, target_grad, transform
from .options import Options


class Rows(NamedTuple):
    """A call taken apart into rows, all in the dtype that it is computed in."""

    x: Tensor  # (R, C)
    z: Tensor  # (R, C)
    y: Tensor  # (R,) counted from the first class that the logits hold
    q: Tensor | None  # (R, C); None: no class but y has any
    sums: RowSums
    counted: Tensor  # (R,) bool, rows that are not ignored
    weight: Tensor | None  # (C,)


def rows_of(call: Call) -> Rows:
    input, target, weight, options = call
    first, total = call.shard
    # float32 would round z by 1e-6 near 30, and a scale w / D of tiny weights away.
    changed = options.logit_scale != 1 or options.softcap is not None
    wide = torch.float64 in (input.dtype, options.dtype, target.dtype)
    wide = wide or ((changed or weight is not None) and input.device.type != "mps")  # which has no float64
    acc = torch.float64 if wide else torch.float32
    x = as_rows(input).to(acc)
    C = x.shape[-1]
    w = None if weight is None else weight[first : first + C].to(acc)
    e = options.smoothing
    if target.shape == input.shape:
        counted = torch.ones_like(x[:, 0], dtype=torch.bool)
        z = transform(x, options)
        y = z.argmax(-1)
        q: Tensor | None = (1 - e) * as_rows(target).to(acc) + e / total
    else:
        target = target.reshape(-1).long()  # a uint8 of 156 equals -100
        counted = target != options.ignore_index
        # An ignored row may hold inf or NaN: zeros in its place keep its loss and gradient at 0.
        x = torch.where(counted[:, None], x, 0)
        z = transform(x, options)
        y = torch.where(counted, target, 0) - first
        at = y.clamp(0, C - 1)[:, None]
        q = (1 - e) * torch.zeros_like(z).scatter(-1, at, (at == y[:, None]).to(acc)) + e / total if e > 0 else None
    if q is None:
        q_y = torch.ones_like(y, dtype=z.dtype) if w is None else w[y.clamp(0, C - 1)]
    else:
        q = q if w is None else q * w
        q_y = q.gather(-1, y.clamp(0, C - 1)[:, None]).squeeze(-1)
    return Rows(x, z, y, q, row_lse(z, y, q_y, q, options.return_stats), counted, w)


def ignored(input: Tensor, target: Tensor, options: Options) -> Tensor:
    """Which rows are ignored, as a mask that broadcasts over the logits."""
    if target.is_floating_point():
        return torch.zeros_like(target, dtype=torch.bool)
    rows = target.long() == options.ignore_index  # a uint8 of 156 equals -100
    return rows.unsqueeze(1) if input.dim() > 1 else rows


def check_target(call: Call) -> None:
    """Raise torch's own IndexError for a class index outside [0, C) that is not ignored."""
    target = call.target.long()
    bad = ((target < 0) | (target >= call.shard.total)) & (target != call.options.ignore_index)
    if bad.any():
        raise IndexError(f"Target {int(target[bad].flatten()[0])} is out of bounds.")


def as_rows(tensor: Tensor) -> Tensor:  # (N, C, d1..dk) or (C) -> (R, C)
    class_dim = 0 if tensor.dim() == 1 else 1
    return tensor.movedim(class_dim, -1).reshape(-1, tensor.shape[class_dim])


def divisors(call: Call, rows: Rows) -> tuple[Tensor | float, Tensor | float]:
    """What the cross entropy and the z-loss are divided by: class weights count in the first only."""
    if call.options.reduction != "mean":
        return 1.0, 1.0
    if call.options.num_items is not None:
        return call.options.num_items, call.options.num_items
    count = rows.counted.sum()
    if rows.weight is None or call.target.shape == call.input.shape:
        return count, count
    return torch.where(rows.counted, rows.weight[rows.y], 0).sum(), count


def composite(call: Call) -> tuple[Tensor, Stats | None]:
    """The whole loss out of plain differentiable torch operators, and the statistics if asked for.

    Takes what `torch.nn.functional.cross_entropy` takes (input (N, C, d1..dk) or (C), class indices or
    probabilities) once torch has accepted the shapes, and every derivative of any order.
    """
    input, target, _, options = call
    rows = rows_of(call)
    counted, shape = rows.counted, call.row_shape
    loss, z_loss = (torch.where(counted, part, 0) for part in row_loss(rows.sums, options))
    if options.reduction == "none":
        total = (loss + z_loss).reshape(shape)
    else:
        D, count = divisors(call, rows)
        total = loss.sum() / D + z_loss.sum() / count
    promoted = torch.promote_types(input.dtype, target.dtype) if target.shape == input.shape else input.dtype
    stats = None
    if options.return_stats:
        lse, z_loss, argmax, entropy = row_stats(rows.sums, options)
        lse, z_loss, entropy = (torch.where(counted, value, 0) for value in (lse, z_loss.detach(), entropy))
        lse, z_loss, entropy = (value.to(call.acc).reshape(shape) for value in (lse, z_loss, entropy))
        stats = Stats(lse, z_loss, torch.where(counted, argmax, -1).reshape(shape), entropy)
    return total.to(options.dtype or promoted), stats


def gradients(call: Call, upstream: Upstream, wants_target: bool) -> tuple[Tensor, Tensor | None]:
    """The gradients of the logits and, if wanted, of probabilities, out of plain differentiable torch operators."""
    options = call.options._replace(return_stats=upstream.entropy is not None)
    rows = rows_of(call._replace(options=options))
    D, count = divisors(call, rows)
    g, g_lse, g_entropy = _of_rows(upstream, rows.z)
    dx = row_grad(rows.x, rows.z, rows.y, rows.q, rows.sums, options, g / D, g / count, g_lse, g_entropy)
    dx = _like(torch.where(rows.counted[:, None], dx, 0), call.input)
    if not wants_target:
        return dx, None
    return dx, _like(target_grad(rows.z, rows.sums, rows.weight, options, g / D), call.target)


def shard_gradient(call: Call, sums: RowSums, upstream: Upstream) -> Tensor:
    """See `contract.Backend.finish`."""
    rows, options = rows_of(call), call.options._replace(lse_square_scale=0.0)
    held = (rows.y >= 0) & (rows.y < call.classes)
    sums = put_back(RowSums(*(number.to(rows.z.dtype) for number in sums)), ~held)
    g, g_lse, g_entropy = _of_rows(upstream, sums.m)
    dx = row_grad(rows.x, rows.z, rows.y, rows.q, sums, options, g, g, g_lse, g_entropy)
    return _like(torch.where(rows.counted[:, None], dx, 0), call.input)


def _of_rows(upstream: Upstream, like: Tensor) -> tuple[Tensor, Tensor | float, Tensor | None]:  # (R,) each
    loss, lse, entropy = (
        None if number is None else number.reshape(-1).to(like.dtype).expand(len(like)) for number in upstream
    )
    assert loss is not None
    return loss, 0.0 if lse is None else lse, entropy


def _like(rows: Tensor, tensor: Tensor) -> Tensor:  # (R, C) -> the tensor's shape and dtype, contiguous
    if tensor.dim() > 1:
        rows = rows.reshape(tensor.shape[:1] + tensor.shape[2:] + tensor.shape[1:2]).movedim(-1, 1)
    return rows.reshape(tensor.shape).to(tensor.dtype).contiguous()
