"""Which calls are the kernels', which are torch's own, and why.

Something unusual (a tensor subclass, a torch.func transform, forward AD, a mode, arguments that torch refuses) is
torch's to judge, in its own words and with its own derivatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _torch, formula
from .backends import dispatch
from .contract import Backend, Call, Stats
from .options import FLOATS, REDUCTIONS

_PLAIN = (Tensor, torch.nn.Parameter)
_HALVES = (torch.bfloat16, torch.float16)
_INDICES = (torch.int64, torch.uint8)


def judge(call: Call, name: str | None) -> tuple[Call, Backend | None]:
    """The backend that takes the call (None: `composite`), and the call with the dtype of its loss settled.

    Raises:
        ValueError, NotImplementedError: see `dispatch.choose`.
    """
    # An autograd Function under a transform inside a compiled graph loses its derivative in torch 2.13.
    if _torch.transforms_active() or _torch.dual_level_active():
        return call, None
    compiling = torch.compiler.is_compiling()  # the modes on the stack are then the compiler's
    if (not compiling and _torch.is_watched()) or not _is_ordinary(call):
        return call, None
    if not compiling and (call.input.is_neg() or call.target.is_neg()):
        return call, None
    call = _with_loss_dtype(call)
    return call, dispatch.choose(call, name)


def composite(call: Call) -> tuple[Tensor, Stats | None]:
    """The same loss out of torch's own operators: every derivative, every transform, every error message."""
    input, target, weight, options = call
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
    return formula.composite(Call(input, target, weight, options))


def again(call: Call) -> tuple[Tensor, Stats | None]:
    """A call that the kernels took, for the derivatives of its gradient: ignored rows keep their zeros there too."""
    input, target, _, options = call
    if not target.is_floating_point():
        ignored = target == options.ignore_index
        input = torch.where(ignored.unsqueeze(1) if input.dim() > 1 else ignored, 0, input)
    return composite(call._replace(input=input))


def check_inplace(call: Call) -> None:
    """Refuse `inplace=True` where it would harm someone.

    Raises:
        RuntimeError: the logits are a leaf's, share memory with the target, or are not contiguous.
    """
    input = call.input
    if _torch.shares_a_leaf(input):
        raise RuntimeError(
            "inplace=True would overwrite a leaf tensor that requires grad, such as a parameter; "
            "expected logits computed by a model. Drop inplace."
        )
    if call.target.untyped_storage().data_ptr() == input.untyped_storage().data_ptr():
        raise RuntimeError("inplace=True would overwrite the target, which shares the logits' memory. Drop inplace.")
    if not input.is_contiguous():
        raise RuntimeError(
            f"inplace=True needs contiguous logits, got shape {tuple(input.shape)} with strides {input.stride()}. "
            "Drop inplace, or make them contiguous first."
        )


def _with_loss_dtype(call: Call) -> Call:
    """torch's rule: the logits' dtype, at least float32 under autocast, promoted with that of probabilities."""
    input, target, _, options = call
    own = input.dtype
    dtype = options.dtype or own
    if dtype in _HALVES and torch.is_autocast_enabled(input.device.type):
        dtype = torch.float32
    if target.dtype in FLOATS:
        dtype = torch.promote_types(dtype, target.dtype)
    # None, where it may be: replacing a field costs as much as all of this.
    return call if dtype is (options.dtype or own) else call._replace(options=options._replace(dtype=dtype))


def _is_ordinary(call: Call) -> bool:
    """Plain strided tensors and options that torch accepts; all else is torch's to judge, in its own words."""
    input, target, weight, options = call
    if not (_is_plain(input) and _is_plain(target) and input.dtype in FLOATS and type(options.ignore_index) is int):
        return False
    shape, labels, kind = input.shape, target.shape, target.dtype
    rank = len(shape)
    if rank == 2 and labels == shape[:1]:
        fits = kind in _INDICES
    elif labels == shape:
        fits = kind in FLOATS and options.ignore_index < 0 and rank > 0
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
