"""The "cpu" backend: hands tensors to the C++ kernels as pointers, sizes and strides."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

# After torch, so that the kernels join torch's own OpenMP pool, which torch.set_num_threads governs.
from ..contract import Call, Forward, Gradients, Stats, Upstream, row_shape
from ..options import REDUCTIONS, Options

_C: Any
try:
    from .. import _C
except ImportError as error:
    _C = None
    _missing = f"the C++ kernels cannot be loaded ({error}); pip install . builds them"

if _C is not None and (_forced := os.environ.get("FUSED_CE_ISA")):
    _C.set_isa(_forced)  # a wrong name is an error, not a slower run

_LOGITS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_DTYPES = {**_LOGITS, torch.int64: 4, torch.uint8: 5}
_REDUCTIONS = {name: code for code, name in enumerate(REDUCTIONS)}
_MAX_DIMS = 8
_PID = os.getpid()
_CONTIGUOUS = torch.contiguous_format
T = TypeVar("T")


def unsupported(call: Call) -> list[str]:
    """Why the C++ kernels cannot take the call, in words; an empty list when they can."""
    input, target, weight, options = call
    reasons = []
    dtype, loss_dtype, kind, dims = input.dtype, options.dtype, target.dtype, input.dim()
    if _C is None:
        reasons.append(_missing)
    if not (input.is_cpu and target.is_cpu and (weight is None or weight.is_cpu)):
        reasons.append(f"the tensors are on {input.device}, not all on the cpu")
    if dtype not in _LOGITS:
        reasons.append(f"the input is {dtype}, not float32, float64, bfloat16 or float16")
    elif loss_dtype is None or loss_dtype is dtype:
        pass
    elif loss_dtype is not torch.float32 and not (loss_dtype is torch.float64 and torch.float64 in (dtype, kind)):
        reasons.append(f"the loss was asked for in {loss_dtype} from {dtype} logits")
    elif loss_dtype.itemsize < dtype.itemsize:
        reasons.append(f"rounding {dtype} logits to {loss_dtype} first takes a copy")
    if kind not in _DTYPES:
        reasons.append(f"the target is {kind}, not class indices (int64, uint8) or probabilities")
    if not 1 <= dims <= _MAX_DIMS:
        reasons.append(f"the input has {dims} dimensions, not 1 to {_MAX_DIMS}")
    elif input.shape[0 if dims == 1 else 1] == 0:
        reasons.append("there are no classes")
    return reasons


def saved_shape(call):
    return (math.prod(call.row_shape), _C.stats_size)


def forward(call: Call, schedule) -> Forward:
    input, target, weight, options = call
    fused = schedule == "fused"
    needs_stats = schedule == "recompute" or (fused and options.return_stats)
    per_row = needs_stats or options.return_stats or options.reduction == "none"
    shape = row_shape(input) if per_row else ()
    loss = torch.empty(shape if options.reduction == "none" else (), dtype=options.dtype or input.dtype)
    grad = (input if options.inplace else torch.empty_like(input, memory_format=_CONTIGUOUS)) if fused else None
    rows = math.prod(shape)
    stats = torch.empty((rows, _C.stats_size), dtype=torch.float64) if needs_stats else None
    extras = torch.empty((rows, _C.extras_size), dtype=torch.float64) if options.return_stats else None
    weight = _in_acc(weight, input)
    _C.forward(
        _view(input),
        _view(target),
        _pointer(weight),
        *_options(options),
        1.0 if options.grad_scale is None else _expected(options, loss.dtype),
        loss.data_ptr(),
        _DTYPES[loss.dtype],
        None if grad is None else _view(grad),
        _pointer(stats),
        _pointer(extras),
        torch.get_num_threads(),
    )
    return Forward(loss, grad, stats, None if extras is None else _by_torch(lambda: _extras(extras, shape, input)))


def backward(call, grad, saved, upstream, keep, wants_target):
    input, target, weight, options = call
    stats = saved
    grad_output, g_lse = upstream
    one_for_all = grad_output.dim() == 0
    upstream = grad_output.item() if one_for_all else 1.0
    if grad is not None:
        expected = _expected(options, grad_output.dtype)
        if upstream == expected:
            return Gradients(_scaled(grad, 1.0, keep) if keep else grad, None)
        scales = expected != 0 and math.isfinite(expected)  # a grad_scale may have left the loss's dtype
        ratio = upstream / expected if scales else math.nan
        # One more rounding; or none, for a power of two and the exponents of bfloat16.
        exact = grad.dtype == torch.bfloat16 and math.frexp(ratio)[0] in (0.5, -0.5)
        if (grad.itemsize > 2 and scales) or exact:
            return Gradients(_scaled(grad, ratio, keep), None)
        # Once more, for what has come; the first was right only for what was expected.
        options = options._replace(grad_scale=upstream, return_stats=False)
        dx = forward(call._replace(options=options), "fused")[1]
        assert dx is not None
        return Gradients(dx, None)
    assert input is not None
    dx = input if options.inplace else torch.empty_like(input, memory_format=_CONTIGUOUS)
    dt = torch.empty_like(target, memory_format=_CONTIGUOUS) if wants_target else None
    weight = _in_acc(weight, input)
    rows = None if one_for_all else _in_acc(grad_output, input)
    g_lse = _in_acc(g_lse, input)
    _C.backward(
        _view(input),
        _view(target),
        _pointer(weight),
        *_options(options),
        _pointer(rows),
        upstream,
        _pointer(g_lse),
        _view(dx),
        None if dt is None else _view(dt),
        _pointer(stats),
        torch.get_num_threads(),
    )
    return Gradients(dx, dt)


def rescale(grad, options, upstream, keep):
    u, expected = upstream.item(), _expected(options, upstream.dtype)
    scales = expected != 0 and math.isfinite(expected)
    return _scaled(grad, u / expected if scales else math.nan, keep)


def _expected(options: Options, dtype: torch.dtype) -> float:
    """The upstream gradient to expect, rounded as it will arrive: in the loss's dtype."""
    if options.grad_scale is None:
        return 1.0
    return torch.as_tensor(options.grad_scale, dtype=torch.float64).to(dtype).item()


def _by_torch(work: Callable[[], T]) -> T:
    """In a forked child torch's own operators would wait for threads that are not there."""
    threads = torch.get_num_threads()
    if os.getpid() == _PID or threads == 1:
        return work()
    torch.set_num_threads(1)
    try:
        return work()
    finally:
        torch.set_num_threads(threads)


def _scaled(grad: Tensor, ratio: float, keep: bool) -> Tensor:
    return _by_torch(lambda: grad * ratio if keep else grad.mul_(ratio))


def _extras(table: Tensor, shape: tuple[int, ...], input: Tensor) -> Stats:  # (rows, 4) float64
    """The C++ struct's fields lse, z_loss, entropy, argmax as tensors of their own."""
    acc = torch.float64 if input.dtype == torch.float64 else torch.float32
    lse, z_loss, entropy = (table[:, i].to(acc, copy=True).reshape(shape) for i in range(3))
    return Stats(lse, z_loss, table[:, 3].view(torch.int64).clone().reshape(shape), entropy)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _view(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), _DTYPES[tensor.dtype], tensor.shape, tensor.stride()


def _in_acc(tensor: Tensor | None, input: Tensor) -> Tensor | None:
    if tensor is None:
        return None
    acc = torch.float64 if input.dtype == torch.float64 else torch.float32
    return _by_torch(lambda: tensor.detach().to(acc).contiguous().resolve_neg())


def _options(options: Options) -> tuple[Any, ...]:
    smoothing = options.label_smoothing if options.label_smoothing > 0 else 0.0
    return (
        (options.ignore_index, smoothing, options.logit_scale, options.softcap or 0.0, options.lse_square_scale),
        _REDUCTIONS[options.reduction],
        math.nan if options.num_items is None else float(options.num_items),
    )
