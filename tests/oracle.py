"""What a call should give: the exact values in float64, and what torch's own operators make of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot  # by name: tests patch the module

from fused_ce import reference
from fused_ce.options import Options


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu().double()


def exact_loss(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """The loss in float64. `reference.py` is held against torch and against decimals in test_reference.py."""
    target = double(target) if target.is_floating_point() else target.cpu()
    return reference.cross_entropy(double(input), target, double(weight), options._replace(dtype=torch.float64))


def exact_grad(grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """The gradient of the input in float64."""
    target = double(target) if target.is_floating_point() else target.cpu()
    options = options._replace(dtype=None)
    call = double(input), target, double(weight), options
    return reference.backward(double(grad_output), None, *call, None, None, True, False)[0]


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


def as_rows(tensor: Tensor) -> Tensor:  # (N, C, d1..dk) or (C) -> (R, C)
    return tensor.movedim(0 if tensor.dim() == 1 else 1, -1).flatten(0, -2) if tensor.dim() > 1 else tensor[None]


def terms(grad_output: Tensor, input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """Size of what is added and subtracted in each element of the gradient.

    The formula of `reference.row_grad` with every sign a plus: an element near zero between large terms cannot
    be more exact than they are.
    """
    x, target = as_rows(double(input)), target.cpu()
    if target.shape == input.shape:
        probs, valid = as_rows(double(target)), torch.ones(len(x), dtype=torch.bool)
        z = reference.transform(x, options)
        y = z.argmax(1)
    else:
        target = target.reshape(-1).long()
        probs, valid = None, target != options.ignore_index
        z = reference.transform(torch.where(valid[:, None], x, 0), options)
        y = torch.where(valid, target, 0)
    onehot = one_hot(y, z.shape[1])
    e = options.label_smoothing if options.label_smoothing > 0 else 0.0
    w = torch.ones(z.shape[1], dtype=torch.float64) if weight is None else double(weight)
    p = z.softmax(1)
    q = (w * ((1 - e) * (onehot if probs is None else probs) + e / z.shape[1])).abs()
    a, others = q.sum(1, keepdim=True), (p * (1 - onehot)).sum(1, keepdim=True)
    z_part = 2 * abs(options.lse_square_scale) * (z.logsumexp(1).abs() + z.amax(1).abs())[:, None]
    size = torch.where(onehot.bool(), (a - q + z_part) * p + q * others, (a + z_part) * p + q)
    D, _ = reference.divisors(y, valid, probs, double(weight), options)
    size = size * double(grad_output).abs().reshape(-1, 1) / D * reference.transform_grad(x, options)
    size = torch.where(valid[:, None], size, 0).abs()
    return size.view(input.shape) if input.dim() < 3 else size.view(input.movedim(1, -1).shape).movedim(-1, 1)
