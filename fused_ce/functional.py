"""`cross_entropy`: the gate between a user's call, the kernels, and torch's own operators."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import dispatch, ops, reference
from .autograd import CrossEntropy
from .options import REDUCTIONS, Extras, Options, check_extras

_PLAIN = (Tensor, torch.nn.Parameter)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)
_INDICES = (torch.int64, torch.uint8)


class CrossEntropyOutput(NamedTuple):
    """What `cross_entropy(..., return_stats=True)` returns. R: the shape of one value a row, (N, d1..dk).

    The last three and `z_loss` carry no gradient. An ignored row has lse, entropy and z-loss 0, argmax -1, and is
    not correct.
    """

    loss: Tensor  # the loss, z-loss included
    lse: Tensor  # R, logsumexp of the (scaled, capped) logits; float32, or float64 for float64; differentiable
    z_loss: Tensor  # the z-loss alone, reduced as the loss
    argmax: Tensor  # R, int64, the class with the largest logit
    correct: Tensor  # R, bool, whether that is the target (or the target's largest probability)
    entropy: Tensor  # R, of softmax, in nats


# Callers see a Tensor unless they ask for more; what the arguments are is said once, below.
@overload
def cross_entropy(
    input: Tensor, target: Tensor, *args: Any, return_stats: Literal[True], **keywords: Any
) -> CrossEntropyOutput: ...
@overload
def cross_entropy(input: Tensor, target: Tensor, *args: Any, return_stats: bool = False, **keywords: Any) -> Tensor: ...
def cross_entropy(  # type: ignore[misc]
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
    grad_scale: float | Tensor | None = None,  # ()
    inplace: bool = False,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | CrossEntropyOutput:
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
        grad_scale: the upstream gradient that backward will see, such as a loss scaler's scale (default 1).
            A hint: the gradient is right for any other too, it only costs another pass.
        inplace: let the gradient take the logits' memory, so that no second tensor of their size is made. After
            forward (mean, sum) or backward (none, float16) they hold the gradient; whoever else saved them for a
            backward gets torch's error about in-place changes. Needs contiguous logits that are not a leaf;
            without a gradient to make, and under torch.compile or torch.func, nothing is overwritten.
        return_stats: return a `CrossEntropyOutput`: loss, lse, z_loss, argmax, correct, entropy, out of the
            same pass.
        backend: "cpu", "triton" or "reference" instead of the best that takes the call; also the
            environment variable FUSED_CE_BACKEND, read at import.

    Returns:
        A scalar, or one loss a row with reduction="none" (the target's shape, for class indices); with
        return_stats a `CrossEntropyOutput`.

    Raises:
        IndexError: a target outside [0, C) that is not ignored (CPU). On a GPU that row's loss and
            gradient are NaN, and `fused_ce.check_targets` raises.
        ValueError, RuntimeError, TypeError: as torch raises them.
        NotImplementedError: the backend that was asked for cannot take the call; the message says why.

    The formula stands in `fused_ce/reference.py`.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    options = Options(
        ignore_index,
        label_smoothing,
        logit_scale,
        softcap,
        lse_square_scale,
        reduction,
        dtype,
        num_items,
        grad_scale,
        inplace,
        return_stats,
    )
    if not options.is_plain or grad_scale is not None:
        check_extras(options)
    loss, extras = _run(input, target, weight, options, backend)
    return _output(loss, extras, input, target, options) if return_stats else loss


def _run(
    input: Tensor, target: Tensor, weight: Tensor | None, options: Options, backend: str | None
) -> tuple[Tensor, Extras | None]:
    if torch.compiler.is_compiling():
        return _trace(input, target, weight, options, backend)
    ordinary = _is_untransformed() and _is_untraced() and _is_ordinary(input, target, weight, options)
    if not ordinary or input.is_neg() or target.is_neg():
        return _composite(input, target, weight, options)
    options = _with_loss_dtype(options, input, target)
    chosen = dispatch.choose(input, target, weight, options, backend)
    if chosen is None:
        return _composite(input, target, weight, options)
    if not (torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)):
        loss, _, _, extras = chosen.forward(input, target, weight, options, "loss")
        return loss, extras
    if options.inplace:
        _check_inplace(input, target)
    outputs = CrossEntropy.apply(input, target, weight, options, chosen, _again)  # type: ignore[no-untyped-call]
    return (outputs[0], Extras(*outputs[1:])) if options.return_stats else (outputs, None)


def _trace(
    input: Tensor, target: Tensor, weight: Tensor | None, options: Options, backend: str | None
) -> tuple[Tensor, Extras | None]:
    """The same for a graph that torch.compile or torch.export is tracing: the kernels as one operator in it."""
    # An autograd Function under a transform inside a compiled graph loses its derivative in torch 2.13.
    if not (_is_untransformed() and _is_ordinary(input, target, weight, options)):
        return _composite(input, target, weight, options)
    options = _with_loss_dtype(options, input, target)
    if dispatch.choose(input, target, weight, options, backend) is None:
        return _composite(input, target, weight, options)
    wants_grad = torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)
    loss, _, *extras = torch.ops.fused_ce.forward(
        input, target, weight, *ops.arguments(options, input), backend, wants_grad, options.return_stats
    )
    return loss, Extras(*extras) if options.return_stats else None


def _output(loss: Tensor, extras: Extras | None, input: Tensor, target: Tensor, options: Options) -> CrossEntropyOutput:
    assert extras is not None
    label = target.argmax(0 if input.dim() == 1 else 1) if target.shape == input.shape else target
    z_loss = extras.z_loss
    if options.reduction != "none":
        z_loss = z_loss.sum()
    if options.reduction == "mean":
        z_loss = z_loss / ((extras.argmax >= 0).sum() if options.num_items is None else options.num_items)
    correct = (extras.argmax == label) & (extras.argmax >= 0)
    return CrossEntropyOutput(loss, extras.lse, z_loss, extras.argmax, correct, extras.entropy)


def _check_inplace(input: Tensor, target: Tensor) -> None:
    base = input._base if input._is_view() else input
    if base is not None and base.is_leaf and base.requires_grad:
        raise RuntimeError(
            "inplace=True would overwrite a leaf tensor that requires grad, such as a parameter; "
            "expected logits computed by a model. Drop inplace."
        )
    if target.untyped_storage().data_ptr() == input.untyped_storage().data_ptr():
        raise RuntimeError("inplace=True would overwrite the target, which shares the logits' memory. Drop inplace.")
    if not input.is_contiguous():
        raise RuntimeError(
            f"inplace=True needs contiguous logits, got shape {tuple(input.shape)} with strides {input.stride()}. "
            "Drop inplace, or make them contiguous first."
        )


def _with_loss_dtype(options: Options, input: Tensor, target: Tensor) -> Options:
    """torch's rule: the logits' dtype, at least float32 under autocast, promoted with that of probabilities."""
    own = input.dtype
    dtype = options.dtype or own
    if dtype in _HALVES and torch.is_autocast_enabled(input.device.type):
        dtype = torch.float32
    if target.dtype in _FLOATS:
        dtype = torch.promote_types(dtype, target.dtype)
    # None, where it may be: replacing a field costs as much as all of this.
    return options if dtype is (options.dtype or own) else options._replace(dtype=dtype)


def _is_untransformed() -> bool:
    """No torch.func transform and no forward-mode AD is at work."""
    return not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def _is_untraced() -> bool:
    """Nothing records or intercepts torch's operators."""
    return not (
        torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    )


def _is_ordinary(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> bool:
    """Plain strided tensors and options that torch accepts; all else is torch's to judge, in its own words."""
    if not (_is_plain(input) and _is_plain(target) and input.dtype in _FLOATS and type(options.ignore_index) is int):
        return False
    shape, labels, kind = input.shape, target.shape, target.dtype
    rank = len(shape)
    if rank == 2 and labels == shape[:1]:
        fits = kind in _INDICES
    elif labels == shape:
        fits = kind in _FLOATS and options.ignore_index < 0 and rank > 0
    elif rank > 2:
        fits = kind is torch.int64 and labels == shape[:1] + shape[2:]
    else:
        fits = kind in _INDICES and rank == 1 and len(labels) == 0
    if weight is not None:
        classes = shape[:1] if rank == 1 else shape[1:2]
        fits = fits and _is_plain(weight) and weight.shape == classes and weight.dtype == input.dtype
        # torch takes uint8 targets with a weight, but not with smoothing too.
        fits = fits and not (weight.requires_grad or (kind is torch.uint8 and options.label_smoothing > 0))
    return (
        fits
        and -(2**63) <= options.ignore_index < 2**63
        and options.reduction in REDUCTIONS
        and type(options.label_smoothing) in (float, int)
        and not options.label_smoothing > 1
    )


def _is_plain(tensor: Tensor) -> bool:
    # While compiling, the tensors that stand for the real ones are of other types.
    return (type(tensor) in _PLAIN or torch.compiler.is_compiling()) and tensor.layout is torch.strided


def _composite(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> tuple[Tensor, Extras | None]:
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
        return plain, None
    # torch has judged the arguments; its value is not what was asked for.
    return reference.composite(input, target, weight, options)


def _again(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> tuple[Tensor, Extras | None]:
    """A call that the kernels took, for the derivatives of its gradient: ignored rows keep their zeros there too."""
    if not target.is_floating_point():
        ignored = target == options.ignore_index
        input = torch.where(ignored.unsqueeze(1) if input.dim() > 1 else ignored, 0, input)
    return _composite(input, target, weight, options)
