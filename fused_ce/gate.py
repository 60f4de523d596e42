"""Which calls are the kernels', which are torch's own, and why.

Something unusual (a tensor subclass, a torch.func transform, forward AD, a mode, arguments that torch refuses) is
torch's to judge, in its own words and with its own derivatives.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from . import _torch, operators
from .backends import dispatch
from .contract import Backend, Call, Stats
from .options import FLOATS, REDUCTIONS, Options

_PLAIN = (Tensor, torch.nn.Parameter)
_HALVES = (torch.bfloat16, torch.float16)
_INDICES = (torch.int64, torch.uint8)
# Taken once: some assign fused_ce.cross_entropy to torch.nn.functional, and it must not call itself.
_torch_cross_entropy = F.cross_entropy


def at_a_glance(call: Call) -> Backend | None:
    """The backend of a call as most are, about which nothing else need be asked; None: `judge` it."""
    # torch.compile, which could not look into C, reads no further than this constant.
    return None if torch.compiler.is_compiling() else dispatch.at_a_glance(call)


def judge(call: Call, name: str | None) -> tuple[Call, Backend | None]:
    """The call as a backend is to see it, and the backend (None: `composite`).

    Raises:
        ValueError, NotImplementedError: see `dispatch.choose`.
        RuntimeError: a tensor's storage was freed.
    """
    if name is not None:
        dispatch.check_name(name)
    if _unusual(call) or not _is_ordinary(call):
        return call, None
    call = with_loss_dtype(call)
    if not _takes_weight(call):
        return call, None
    backend = dispatch.choose(call, name)
    if backend is not None and not torch.compiler.is_compiling():
        call = _with_memory(call)
    return call, backend


def tell(call: Call, name: str | None) -> None:
    """Warn where a call that asked for more than torch's cross entropy ran torch's operators, and say why."""
    options = call.options
    if torch.compiler.is_compiling() or (options.is_plain and not options.inplace and name is None):
        return
    why = _unusual(call)
    if not why and _is_ordinary(call) and _takes_weight(call):
        why = dispatch.reasons(call)
    called, level = _call_site()
    # Of the line that called: Python tells each line once.
    warnings.warn(
        f"fused_ce.{called} ran torch's own operators, which is slower and takes more memory; inplace, grad_scale "
        f"and backend have no effect on them. The kernels declined: {why or 'they do not take these tensors'}.",
        RuntimeWarning,
        stacklevel=level,
    )


def _call_site() -> tuple[str, int]:
    """Which of the package's losses was called, and how far above the caller of this the call stands."""
    called, level, frame = "cross_entropy", 0, sys._getframe(1)
    while frame.f_back and str(frame.f_globals.get("__name__")).partition(".")[0] == __package__:
        if frame.f_code.co_name == "linear_cross_entropy":
            called = "linear_cross_entropy"
        frame, level = frame.f_back, level + 1
    return called, level + 1


def composite(call: Call) -> tuple[Tensor, Stats | None]:
    """The same loss out of torch's own operators: every derivative, every transform, every error message."""
    if _has_plain_memory(call):
        call = _with_memory(call)
    input, target, weight, options = call
    if options.is_plain:
        if options.dtype is not None:
            input = input.to(options.dtype) if isinstance(input, Tensor) else input
            weight = weight.to(options.dtype) if isinstance(weight, Tensor) else weight
        return _by_torch(input, target, weight, options), None
    call = _judged_by_torch(call)
    return operators.composite(call)


def _by_torch(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    tensors = (input, target, weight)
    if not torch.compiler.is_compiling() and has_torch_function(tensors):
        # Torch itself would tell overrides the name's present value, which under `patch` is not what they know.
        return handle_torch_function(
            _torch_cross_entropy,
            tensors,
            input,
            target,
            weight=weight,
            size_average=None,
            ignore_index=options.ignore_index,
            reduce=None,
            reduction=options.reduction,
            label_smoothing=options.label_smoothing,
        )
    return _torch_cross_entropy(
        input,
        target,
        weight,
        ignore_index=options.ignore_index,
        reduction=options.reduction,
        label_smoothing=options.label_smoothing,
    )


def _judged_by_torch(call: Call) -> Call:
    """A call that torch cannot express, once torch has accepted its arguments; with the dtype of its loss.

    Raises:
        ValueError, RuntimeError, TypeError, IndexError: in torch's words.
    """
    input, target, weight, _ = call
    tensors = [input, target] if weight is None else [input, target, weight]
    if not (all(isinstance(tensor, Tensor) for tensor in tensors) and input.dtype in FLOATS):
        _by_torch(*call)
    call = with_loss_dtype(call)
    dtype = call.options.dtype or input.dtype

    def zeros(input: Sequence[int], target: Sequence[int], device: torch.device, index: torch.dtype) -> Tensor:
        x, t = torch.zeros(input, dtype=dtype, device=device), torch.zeros(target, dtype=index, device=device)
        kind = None if weight is None else call.options.dtype or weight.dtype
        w = None if weight is None else torch.zeros(weight.shape, dtype=kind, device=device)
        return _by_torch(x, t, w, call.options)

    # Not by a second pass over the logits: one row of zeros knows the dtypes and weights, and tensors that hold nothing
    # the shapes.
    row = 1, input.shape[1 if input.dim() > 1 else 0] if input.dim() else 1
    index = torch.int64 if target.dtype == torch.uint8 and input.dim() <= 2 else target.dtype  # meta knows fewer
    try:
        zeros(row, row if target.is_floating_point() else (1,), input.device, target.dtype)
        zeros(input.shape, target.shape, torch.device("meta"), index)
    except AssertionError:  # of what stands for an operator on meta
        _by_torch(*call)
    seen = _torch.under_transforms() or _torch.is_watched() or _torch.is_dispatched() or torch.compiler.is_compiling()
    if target.is_cpu and not target.is_floating_point() and not seen:
        operators.check_target(call)
    return call


def again(call: Call) -> tuple[Tensor, Stats | None]:
    """A call that the kernels took, for the derivatives of its gradient: ignored rows keep their zeros there too."""
    input, target, _, options = call
    if not target.is_floating_point():
        input = torch.where(operators.ignored(input, target, options), 0, input)
    return composite(call._replace(input=input))


def check_no_leaf(input: Tensor) -> None:
    """Refuse `inplace=True` where it would overwrite what a user holds.

    Raises:
        RuntimeError: the logits are a leaf's.
    """
    if _torch.shares_a_leaf(input):
        raise RuntimeError(
            "inplace=True would overwrite a leaf tensor that requires grad, such as a parameter; "
            "expected logits computed by a model. Drop inplace."
        )


def check_inplace(call: Call) -> None:
    """Refuse `inplace=True` where it would harm someone.

    Raises:
        RuntimeError: the logits are a leaf's, share memory with another tensor of the call, or are not contiguous.
    """
    input = call.input
    check_no_leaf(input)
    memory = input.untyped_storage().data_ptr()
    for name, other in (("target", call.target), ("weight", call.weight)):
        if memory and other is not None and other.untyped_storage().data_ptr() == memory:
            raise RuntimeError(
                f"inplace=True would overwrite the {name}, which shares the logits' memory. Drop inplace, or clone it."
            )
    if not input.is_contiguous():
        raise RuntimeError(
            f"inplace=True needs contiguous logits, got shape {tuple(input.shape)} with strides {input.stride()}. "
            "Drop inplace, or make them contiguous first."
        )


def _unusual(call: Call) -> str:
    """What goes on around the call that only torch's own operators are right for; "" if nothing does."""
    # An autograd Function under a transform inside a compiled graph loses its derivative in torch 2.13.
    if _torch.transforms_active():
        return "a torch.func transform is at work"
    if _torch.dual_level_active():
        return "forward-mode differentiation is at work"
    if torch.compiler.is_compiling():  # the modes on the stack are then the compiler's
        return ""
    if _torch.is_watched():
        return "a mode or torch.jit.trace watches torch's functions"
    if (
        isinstance(call.input, Tensor)
        and isinstance(call.target, Tensor)
        and (call.input.is_neg() or call.target.is_neg())
    ):
        return "the input or target has its negative bit set"
    return ""


def with_loss_dtype(call: Call) -> Call:
    """torch's rule: the logits' dtype, at least float32 under autocast, promoted with that of probabilities."""
    input, target, _, options = call
    own = input.dtype
    dtype = options.dtype or own
    if dtype in _HALVES and not input.is_meta and torch.is_autocast_enabled(input.device.type):
        dtype = torch.float32
    if target.dtype in FLOATS:
        dtype = torch.promote_types(dtype, target.dtype)
    # None, where it may be: replacing a field costs as much as all of this.
    return call if dtype is (options.dtype or own) else call._replace(options=options._replace(dtype=dtype))


def _is_ordinary(call: Call) -> bool:
    """Plain strided tensors and options that torch accepts; all else is torch's to judge, in its own words."""
    input, target, weight, options = call
    if not (is_strided(input) and is_strided(target) and input.dtype in FLOATS and type(options.ignore_index) is int):
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
        fits = fits and is_strided(weight) and weight.shape == classes and weight.dtype in FLOATS
        fits = fits and not weight.requires_grad
    return (
        fits
        and -(2**63) <= options.ignore_index < 2**63
        and options.reduction in REDUCTIONS
        and type(options.label_smoothing) in (float, int)
        and not options.label_smoothing > 1
        # torch takes uint8 targets with a weight, but not with smoothing too.
        and not (kind is torch.uint8 and weight is not None and options.label_smoothing > 0)
        and (options.dtype is None or options.dtype in FLOATS)
    )


def _takes_weight(call: Call) -> bool:
    """torch wants the input's dtype, but where it casts both: under autocast and for a dtype asked for."""
    if call.weight is None:
        return True
    own, dtype = call.weight.dtype, call.options.dtype
    return own is call.input.dtype or (dtype is not None and torch.promote_types(own, dtype) is dtype)


def _has_plain_memory(call: Call) -> bool:
    """Whether the tensors are such as have an address: torch's own operators crash where storage was freed."""
    if torch.compiler.is_compiling() or _torch.under_transforms():
        return False
    tensors = [call.input, call.target] if call.weight is None else [call.input, call.target, call.weight]
    return all(is_strided(tensor) and (tensor.is_cpu or tensor.is_cuda) for tensor in tensors)


def _with_memory(call: Call) -> Call:
    """Zeros that torch keeps without memory are made real.

    Raises:
        RuntimeError: a tensor's storage was freed.
    """
    input, target, weight, options = call
    for number in (options.num_items, options.grad_scale):
        if isinstance(number, Tensor):
            _torch.with_memory(number)
    x, t, w = _torch.with_memory(input), _torch.with_memory(target), _torch.with_memory(weight)
    return call if x is input and t is target and w is weight else Call(x, t, w, options)


def is_strided(tensor: Tensor) -> bool:
    """Whether it is torch's own strided tensor, not a subclass of it."""
    # While compiling, the tensors that stand for the real ones are of other types.
    return (type(tensor) in _PLAIN or torch.compiler.is_compiling()) and tensor.layout is torch.strided
