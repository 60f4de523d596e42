"""What a call should give: the exact values in float64, and what torch's own operators make of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot  # by name: tests patch the module

from fused_ce import formula, operators
from fused_ce.backends import reference
from fused_ce.contract import Call, Upstream
from fused_ce.options import Options


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu().double()


def exact_loss(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """The loss in float64. `formula.py` is held against torch and against decimals in test_reference.py."""
    target = double(target) if target.is_floating_point() else target.cpu()
    options = options._replace(dtype=torch.float64, return_stats=False)
    return operators.composite(Call(double(input), target, double(weight), options))[0]


def exact_grad(grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """The gradient of the input in float64."""
    target = double(target) if target.is_floating_point() else target.cpu()
    options = options._replace(dtype=None)
    call = Call(double(input), target, double(weight), options)
    return reference.backward(call, None, None, Upstream(double(grad_output)), True, False).input


def composed(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """The loss as a user of torch would write it, in the input's dtype."""
    z = input * options.logit_scale
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    reduction = "sum" if options.num_items is not None else options.reduction
    loss = cross_entropy(
        z,
        target,
        weight,
        ignore_index=options.ignore_index,
        label_smoothing=options.label_smoothing,
        reduction=reduction,
    )
    if options.lse_square_scale:
        squares = torch.logsumexp(z, 0 if z.dim() == 1 else 1) ** 2 * options.lse_square_scale
        valid = torch.ones_like(squares, dtype=torch.bool)
        if target.shape != input.shape:
            valid = target.long() != options.ignore_index
        squares = torch.where(valid, squares, 0)
        loss = loss + {"none": squares, "sum": squares.sum(), "mean": squares.sum() / valid.sum()}[reduction]
    return loss if options.num_items is None else loss / options.num_items


as_rows = operators.as_rows  # (N, C, d1..dk) or (C) -> (R, C)


def terms(grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """Size of what is added and subtracted in each element of the gradient.

    The formula of `formula.row_grad` with every sign a plus: an element near zero between large terms cannot
    be more exact than they are.
    """
    target = double(target) if target.is_floating_point() else target.cpu()
    call = Call(double(input), target, double(weight), options._replace(dtype=None))
    rows = operators.rows_of(call)
    z, C = rows.z, rows.z.shape[1]
    onehot = one_hot(rows.y, C)
    p = z.softmax(1)
    q = (rows.sums.q_y[:, None] * onehot if rows.q is None else rows.q).abs()
    a, others = q.sum(1, keepdim=True), (p * (1 - onehot)).sum(1, keepdim=True)
    z_part = 2 * abs(options.lse_square_scale) * (z.logsumexp(1).abs() + z.amax(1).abs())[:, None]
    size = torch.where(onehot.bool(), (a - q + z_part) * p + q * others, (a + z_part) * p + q)
    D, _ = operators.divisors(call, rows)
    size = size * double(grad_output).abs().reshape(-1, 1) / D * formula.transform_grad(rows.x, options)
    size = torch.where(rows.counted[:, None], size, 0).abs()
    return size.view(input.shape) if input.dim() < 3 else size.view(input.movedim(1, -1).shape).movedim(-1, 1)
