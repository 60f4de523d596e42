r"""The mathematics of fused_ce, written once, in plain PyTorch: any device, any dtype, differentiable.

`csrc/cross_entropy.inl.h` and `kernels.py` hold the same five functions, same letters, same order:

    transform, transform_grad, row_lse, row_loss, row_grad

One row of logits x (C classes), class weights w (1 if none), label smoothing e, logit scale k,
softcap s, z-loss factor L (`lse_square_scale`):

    z_c   = s tanh(k x_c / s)            (k x_c without softcap)              transform
    lse   = log sum_c exp z_c                                                 row_lse
    q_c   = (1 - e) w_y [c = y] + (e / C) w_c      target: class index y
    q_c   = w_c ((1 - e) t_c + e / C)              target: probabilities t
    a     = sum_c q_c
    loss  = a lse - sum_c q_c z_c + L lse^2                                   row_loss
    p_c   = exp(z_c - lse)
    dz_c  = (a + 2 L lse + g_lse) p_c - q_c   g_lse: upstream gradient of lse, where lse was returned
    dx_c  = dz_c k / cosh(k x_c / s)^2   (dz_c k without softcap)             row_grad, transform_grad
    an ignored row: loss = 0 and dx = 0, whatever its logits hold

How it is computed. m is the largest z of the row, and one class y is left out of the sum:

    so    = sum over c != y of exp(z_c - m),   e_y = exp(z_y - m)
    lse   = m + log1p(so + (e_y - 1))
    p_y   = e_y / (so + e_y),   1 - p_y = so / (so + e_y)

Where y is certain (e_y = 1, so tiny), `1 + so` would round so away: log(1 + so) becomes 0 and p_y - 1
becomes 0, which is why other cross entropies lose a confident row's loss and gradient. With so kept
apart, every term of the loss is a sum of non-negative parts and nothing cancels. y is the target or,
under probability targets, the largest logit. For the same reason the softcap's slope is 1 / cosh^2
rather than the equal 1 - (z / s)^2.

Origin of the parts: softmax minus one-hot as in Bridle (1990); label smoothing as in Szegedy et al.
(2016); softcap as in Gemma 2 (2024); the z-loss L lse^2 as in PaLM (2022).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .options import Extras, Options
from .rows import row_shape


class Lse(NamedTuple):
    """The log-sum-exp of each row, kept in the two parts that lose nothing."""

    m: Tensor  # (R,) the largest z
    so: Tensor  # (R,) sum of exp(z - m) over the classes other than y

    def minus_m(self, e_y: Tensor) -> Tensor:  # (R,) -> (R,)
        return torch.log1p(self.so + (e_y - 1))


# [1] transform
def transform(x: Tensor, options: Options) -> Tensor:  # (R, C) -> (R, C)
    z = x * options.logit_scale
    return z if options.softcap is None else options.softcap * torch.tanh(z / options.softcap)


# [2] transform_grad
def transform_grad(x: Tensor, options: Options) -> Tensor | float:  # (R, C) -> dz/dx
    if options.softcap is None:
        return options.logit_scale
    return options.logit_scale / torch.cosh(x * (options.logit_scale / options.softcap)) ** 2


# [3] row_lse
def row_lse(z: Tensor, y: Tensor) -> Lse:  # (R, C), (R,)
    m = z.detach().amax(-1)
    others = z.scatter(-1, y[:, None], -torch.inf)
    return Lse(m, torch.exp(others - m[:, None]).sum(-1))


# [4] row_loss
def row_loss(
    z: Tensor,  # (R, C)
    lse: Lse,
    y: Tensor,  # (R,)
    probs: Tensor | None,  # (R, C)
    weight: Tensor | None,  # (C,)
    options: Options,
) -> tuple[Tensor, Tensor]:  # (R,) cross entropy, (R,) z-loss
    e = _smoothing(options)
    z_y = z.gather(-1, y[:, None]).squeeze(-1)
    lse_m = lse.minus_m(torch.exp(z_y - lse.m))
    if probs is not None:
        q = (1 - e) * probs + e / z.shape[-1]
        loss = _weighted_sum(q * (lse_m[:, None] + (lse.m[:, None] - z)), weight)
    else:
        loss = lse_m + (lse.m - z_y)
        if weight is not None:
            loss = loss * weight[y]
        if e > 0:
            uniform = _weighted_sum(lse_m[:, None] + (lse.m[:, None] - z), weight)
            loss = (1 - e) * loss + e / z.shape[-1] * uniform
    # Not 0 * lse^2, which is NaN where the square overflows.
    L = options.lse_square_scale
    return loss, L * (lse.m + lse_m) ** 2 if L else torch.zeros_like(loss)


# [5] row_grad
def row_grad(
    x: Tensor,  # (R, C)
    z: Tensor,  # (R, C)
    lse: Lse,
    y: Tensor,  # (R,)
    probs: Tensor | None,  # (R, C)
    weight: Tensor | None,  # (C,)
    options: Options,
    scale: Tensor,  # (R,) upstream gradient of the cross entropy
    z_scale: Tensor,  # (R,) upstream gradient of the z-loss
    g_lse: Tensor | float = 0.0,  # (R,) upstream gradient of lse, where lse was returned
) -> Tensor:  # (R, C) dx
    e, C = _smoothing(options), z.shape[-1]
    onehot = torch.zeros_like(z).scatter(-1, y[:, None], 1.0)
    w = z.new_ones(C) if weight is None else weight
    q = w * ((1 - e) * (onehot if probs is None else probs) + e / C)
    rest = (q * (1 - onehot)).sum(-1)  # a - q_y
    e_y = torch.exp(z.gather(-1, y[:, None]).squeeze(-1) - lse.m)
    s = lse.so + e_y
    q_y = q.gather(-1, y[:, None]).squeeze(-1)
    z_part = z_scale * 2 * options.lse_square_scale * (lse.m + lse.minus_m(e_y)) + g_lse
    dz = (scale * (rest + q_y) + z_part)[:, None] * torch.exp(z - lse.m[:, None]) / s[:, None] - scale[:, None] * q
    dz_y = (scale * rest + z_part) * (e_y / s) - scale * q_y * (lse.so / s)
    return dz.scatter(-1, y[:, None], dz_y[:, None]) * transform_grad(x, options)


def _smoothing(options: Options) -> float:
    """torch reads a smoothing that is not above zero (NaN too) as none."""
    return options.label_smoothing if options.label_smoothing > 0 else 0.0


def _weighted_sum(terms: Tensor, weight: Tensor | None) -> Tensor:  # (R, C), (C,) -> (R,)
    return (terms if weight is None else terms * weight).sum(-1)


def target_grad(
    z: Tensor,  # (R, C)
    lse: Lse,
    y: Tensor,  # (R,)
    weight: Tensor | None,  # (C,)
    options: Options,
    scale: Tensor,  # (R,)
) -> Tensor:  # (R, C) gradient of probabilities
    lse_m = lse.minus_m(torch.exp(z.gather(-1, y[:, None]).squeeze(-1) - lse.m))
    minus_log_p = lse_m[:, None] + (lse.m[:, None] - z)
    dt = (scale * (1 - _smoothing(options)))[:, None] * minus_log_p
    return dt if weight is None else dt * weight


def row_extras(z: Tensor, lse: Lse, y: Tensor, valid: Tensor, options: Options) -> Extras:  # (R, C), (R,)
    lse_m = lse.minus_m(torch.exp(z.gather(-1, y[:, None]).squeeze(-1) - lse.m))
    below = lse.m[:, None] - z
    p = torch.exp(-below - lse_m[:, None])
    entropy = lse_m + torch.where(p == 0, 0, p * below).sum(-1)
    whole, zero = lse.m + lse_m, torch.zeros_like(lse_m)
    z_loss = options.lse_square_scale * whole**2 if options.lse_square_scale else zero
    return Extras(
        torch.where(valid, whole, zero),
        torch.where(valid, z_loss, zero).detach(),
        torch.where(valid, z.argmax(-1), -1),
        torch.where(valid, entropy, zero).detach(),
    )


def cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """The loss alone of `composite`."""
    return composite(input, target, weight, options._replace(return_stats=False))[0]


def composite(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> tuple[Tensor, Extras | None]:
    """The whole loss out of plain differentiable torch operators, and the extras if asked for.

    Takes what `torch.nn.functional.cross_entropy` takes (input (N, C, d1..dk) or (C), class indices or
    probabilities) once torch has accepted the shapes, and every derivative of any order.
    """
    _, z, lse, y, probs, valid, w = _row_parts(input, target, weight, options)
    loss, z_loss = row_loss(z, lse, y, probs, w, options)
    loss, z_loss = torch.where(valid, loss, 0), torch.where(valid, z_loss, 0)
    if options.reduction == "none":
        total = (loss + z_loss).reshape(row_shape(input))
    else:
        D, count = divisors(y, valid, probs, w, options)
        total = loss.sum() / D + z_loss.sum() / count
    promoted = input.dtype if probs is None else torch.promote_types(input.dtype, target.dtype)
    extras = None
    if options.return_stats:
        rows = row_shape(input)
        extras = Extras(*(extra.reshape(rows) for extra in row_extras(z, lse, y, valid, options)))
    return total.to(options.dtype or promoted), extras


def divisors(
    y: Tensor,  # (R,)
    valid: Tensor,  # (R,)
    probs: Tensor | None,  # (R, C)
    weight: Tensor | None,  # (C,)
    options: Options,
) -> tuple[Tensor | float, Tensor | float]:
    """What the cross entropy and the z-loss are divided by: class weights count in the first only."""
    if options.reduction != "mean":
        return 1.0, 1.0
    if options.num_items is not None:
        return options.num_items, options.num_items
    count = valid.sum()
    if weight is None or probs is not None:
        return count, count
    return torch.where(valid, weight[y], 0).sum(), count


def unsupported(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> list[str]:
    """Why this backend cannot take the call, in words; an empty list when it can."""
    reasons = []
    if input.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        reasons.append(f"the input is {input.dtype}; the formula is written for floating point logits")
    if input.dim() == 0:
        reasons.append("the input has no class dimension")
    return reasons


def forward(
    input: Tensor,  # (N, C, d1..dk) or (C)
    target: Tensor,  # (N, d1..dk) or () class indices, or probabilities of the input's shape
    weight: Tensor | None,  # (C,)
    options: Options,
    schedule: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Extras | None]:
    """See `dispatch.py` for the contract. The stats are left as they come: backward starts from the logits again."""
    if target.shape != input.shape:
        check_target(target.long(), input.shape[_class_dim(input)], options.ignore_index)
    with torch.no_grad():
        loss, extras = composite(input, target, weight, options)
        stats = None if schedule == "loss" else input.new_empty((row_shape(input).numel(), 4), dtype=torch.float64)
        if schedule != "fused":
            return loss, None, stats, extras
        expected = torch.ones_like(loss) if options.grad_scale is None else options.grad_scale * torch.ones_like(loss)
        grad, _ = backward(expected, None, input, target, weight, options, None, None, True, False)
    return loss, grad, stats, extras


def backward(
    grad_output: Tensor,  # () or (N, d1..dk)
    g_lse: Tensor | None,  # (N, d1..dk)
    input: Tensor | None,  # (N, C, d1..dk) or (C); None: changed since forward
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    grad: Tensor | None,  # the input's shape
    stats: Tensor | None,
    keep: bool,
    wants_target: bool,
) -> tuple[Tensor, Tensor | None]:
    if input is None:
        assert grad is not None
        return (grad * (grad_output / (options.grad_scale or 1.0))).to(grad.dtype), None
    x, z, lse, y, probs, valid, w = _row_parts(input, target, weight, options)
    D, count = divisors(y, valid, probs, w, options)
    upstream = grad_output.reshape(-1).to(z.dtype).expand(z.shape[0])
    of_lse = 0.0 if g_lse is None else g_lse.reshape(-1).to(z.dtype)
    dx = row_grad(x, z, lse, y, probs, w, options, upstream / D, upstream / count, of_lse)
    dx = _like(torch.where(valid[:, None], dx, 0), input)
    return dx, _like(target_grad(z, lse, y, w, options, upstream / D), target) if wants_target else None


def check_target(target: Tensor, C: int, ignore_index: int) -> None:
    """Raise torch's own IndexError for a class index outside [0, C) that is not ignored."""
    bad = ((target < 0) | (target >= C)) & (target != ignore_index)
    if bad.any():
        raise IndexError(f"Target {int(target[bad].flatten()[0])} is out of bounds.")


def _like(rows: Tensor, tensor: Tensor) -> Tensor:  # (R, C) -> the tensor's shape and dtype, contiguous
    if tensor.dim() > 1:
        rows = rows.reshape(*row_shape(tensor), tensor.shape[1]).movedim(-1, 1)
    return rows.reshape(tensor.shape).to(tensor.dtype).contiguous()


def _class_dim(input: Tensor) -> int:
    return 0 if input.dim() == 1 else 1


def _row_parts(
    input: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Lse, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Input as rows of x and z, with lse, y, probabilities if any, which rows count, and the class weights."""
    wide = torch.float64 in (input.dtype, options.dtype, target.dtype)
    acc = torch.float64 if wide else torch.float32
    x = input.movedim(_class_dim(input), -1).reshape(-1, input.shape[_class_dim(input)]).to(acc)
    if target.shape == input.shape:
        probs = target.movedim(_class_dim(target), -1).reshape(x.shape).to(acc)
        valid = torch.ones_like(x[:, 0], dtype=torch.bool)
        z = transform(x, options)
        y = z.argmax(-1)
    else:
        probs = None
        target = target.reshape(-1).long()  # a uint8 of 156 equals -100
        valid = target != options.ignore_index
        # An ignored row may hold inf or NaN: zeros in its place keep its loss and gradient at 0.
        x = torch.where(valid[:, None], x, 0)
        z = transform(x, options)
        y = torch.where(valid, target, 0)
    return x, z, row_lse(z, y), y, probs, valid, None if weight is None else weight.to(acc)
