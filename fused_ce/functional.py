"""`cross_entropy`: the gate between a user's call, the kernels, and torch's own operators."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch, reference
from .autograd import CrossEntropy
from .options import REDUCTIONS, Options, check_extras

_PLAIN = (Tensor, torch.nn.Parameter)


def cross_entropy(
    input: Tensor,  # (N, C), (C) or (N, C, d1..dk)
    target: Tensor,  # (N), () or (N, d1..dk); or probabilities of the input's shape
    weight: Tensor | None = None,  # (C,)
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    num_items: float | Tensor | None = None,  # ()
    backend: str | None = None,
) -> Tensor:
    """Cross entropy between logits and targets, with its gradient made in the same pass.

    A drop-in for `torch.nn.functional.cross_entropy`: the first eight arguments, their meaning, their
    results and their errors are torch's. What the kernels do not take runs torch's own operators.

    Args:
        input: logits, shape (N, C), (C) or (N, C, d1..dk); float32, float64, bfloat16 or float16.
        target: class indices in [0, C), shape (N), () or (N, d1..dk), int64 or uint8; or class
            probabilities, of the input's shape and any floating dtype.
        weight: rescales each class, shape (C), in the input's dtype.
        size_average, reduce: deprecated by torch; use `reduction`.
        ignore_index: rows with this target get loss 0 and gradient 0, even where their logits are
            not finite, and do not count in the mean.
        reduction: "none" (one loss a row), "mean" (over rows that are not ignored, weighted by the
            class weights) or "sum".
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].
        dtype: dtype of the loss, as if the input had been cast first (as in `torch.log_softmax`), without
            the copy; the gradient stays in the input's dtype. Default: the input's, float32 under autocast.
        logit_scale: the logits are multiplied by it first.
        softcap: then bounded smoothly to (-softcap, softcap): softcap * tanh(logits / softcap).
        lse_square_scale: adds lse_square_scale * logsumexp(logits)^2 to each row's loss (the z-loss of
            PaLM); in a mean it is divided by the number of rows that are not ignored.
        num_items: replaces the divisor of the mean: rows counted over all micro-batches, for instance.
        backend: "cpu", "triton" or "reference" instead of the best that takes the call; also the
            environment variable FUSED_CE_BACKEND.

    Returns:
        A scalar, or one loss a row with reduction="none" (the target's shape, for class indices).

    Raises:
        IndexError: a target outside [0, C) that is not ignored (CPU). On a GPU that row's loss and
            gradient are NaN.
        ValueError, RuntimeError, TypeError: as torch raises them.
        NotImplementedError: the backend that was asked for cannot take the call; the message says why.

    The formula stands in `fused_ce/reference.py`.
    """
    options = Options(
        ignore_index, label_smoothing, logit_scale, softcap, lse_square_scale, reduction, dtype, num_items
    )
    if size_average is not None or reduce is not None:
        options = options._replace(reduction=torch.nn._reduction.legacy_get_string(size_average, reduce))
    if not options.is_plain:
        check_extras(options)
    if not (_is_ordinary_call() and _is_ordinary(input, target, weight, options)):
        return _composite(input, target, weight, options)
    if dtype is None:
        options = options._replace(dtype=_loss_dtype(input, target))
    chosen = dispatch.choose(input, target, weight, options, backend)
    if chosen is None:
        return _composite(input, target, weight, options)
    if not (input.requires_grad and torch.is_grad_enabled()):
        loss: Tensor = chosen.forward(input, target, weight, options, "loss")[0]
        return loss
    composite = partial(_composite, target=target, weight=weight, options=options)
    return CrossEntropy.apply(input, target, weight, options, chosen, composite)  # type: ignore[no-any-return, no-untyped-call]


def _loss_dtype(input: Tensor, target: Tensor) -> torch.dtype:
    """torch's rule: the input's dtype, at least float32 under autocast, promoted with that of probabilities."""
    dtype = input.dtype
    if dtype.itemsize == 2 and torch.is_autocast_enabled(input.device.type):
        dtype = torch.float32
    return torch.promote_types(dtype, target.dtype) if target.is_floating_point() else dtype


def _is_ordinary_call() -> bool:
    """Plain eager execution: nothing traces, transforms or intercepts torch's operators."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    )


def _is_ordinary(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> bool:
    """Plain strided tensors and options that torch accepts; all else is torch's to judge, in its own words."""
    if not (_is_plain(input) and _is_plain(target) and (weight is None or _is_plain(weight))):
        return False
    dim = input.dim()
    if dim == 0 or not input.is_floating_point():
        return False
    C = input.shape[0 if dim == 1 else 1]
    if target.shape == input.shape:
        fits = target.is_floating_point() and options.ignore_index < 0
    else:
        rows = input.shape[:0] if dim == 1 else input.shape[:1] + input.shape[2:]
        is_index = target.dtype == torch.int64 or (target.dtype == torch.uint8 and dim <= 2)
        fits = is_index and target.shape == rows
    if weight is not None:
        # torch takes uint8 targets with a weight, but not with smoothing too.
        fits = fits and weight.shape == (C,) and weight.dtype == input.dtype and not weight.requires_grad
        fits = fits and (target.dtype != torch.uint8 or not options.label_smoothing > 0)
    return (
        fits
        and type(options.ignore_index) is int
        and -(2**63) <= options.ignore_index < 2**63
        and options.reduction in REDUCTIONS
        and type(options.label_smoothing) in (float, int)
        and not options.label_smoothing > 1
        and not target.requires_grad
    )


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_neg()


def _composite(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """The same loss out of torch's own operators: every derivative, every transform, every error message."""
    if options.dtype is not None:
        input = input.to(options.dtype)
        weight = weight if weight is None else weight.to(options.dtype)
    plain = F.cross_entropy(
        input,
        target,
        weight,
        ignore_index=options.ignore_index,
        reduction=options.reduction,
        label_smoothing=options.label_smoothing,
    )
    if options.is_plain:
        return plain
    # torch has judged the arguments; its value is not what was asked for.
    return reference.cross_entropy(input, target, weight, options)
