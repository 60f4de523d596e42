"""The "cpu" backend: makes the tensors of a result and hands all of them to the C++ kernels."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

# After torch, so that the kernels join torch's own OpenMP pool, which torch.set_num_threads governs.
from .. import _torch, operators
from ..contract import Call, Forward, Gradients, Schedule, Stats, Upstream
from ..options import FLOATS, Options
from . import pool

_C: Any
try:
    from .. import _C
except ImportError as error:
    _C = None
    _missing = f"the C++ kernels cannot be loaded ({error}); pip install . builds them"

if _C is not None:
    _C.meet(Tensor, torch.nn.Parameter)
    if _forced := os.environ.get("FUSED_CE_ISA"):
        _C.set_isa(_forced)  # a wrong name is an error, not a slower run

_ONE = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in FLOATS}
_MAX_DIMS = 8


def unsupported(call: Call) -> list[str]:
    """Why the C++ kernels cannot take the call, in words; an empty list when they can."""
    input, target, weight, options = call
    reasons = []
    dtype, loss_dtype, kind, dims = input.dtype, options.dtype, target.dtype, input.dim()
    if _C is None:
        reasons.append(_missing)
    if not (input.is_cpu and target.is_cpu and (weight is None or weight.is_cpu)):
        reasons.append(f"the tensors are on {input.device}, not all on the cpu")
    if dtype not in FLOATS:
        reasons.append(f"the input is {dtype}, not float32, float64, bfloat16 or float16")
    elif loss_dtype is None or loss_dtype is dtype:
        pass
    elif loss_dtype is not torch.float32 and not (loss_dtype is torch.float64 and torch.float64 in (dtype, kind)):
        reasons.append(f"the loss was asked for in {loss_dtype} from {dtype} logits")
    elif loss_dtype.itemsize < dtype.itemsize:
        reasons.append(f"rounding {dtype} logits to {loss_dtype} first takes a copy")
    if kind not in pool.DTYPES:
        reasons.append(f"the target is {kind}, not class indices (int64, uint8) or probabilities")
    if not 1 <= dims <= _MAX_DIMS:
        reasons.append(f"the input has {dims} dimensions, not 1 to {_MAX_DIMS}")
    elif input.shape[0 if dims == 1 else 1] == 0:
        reasons.append("there are no classes")
    if options.shard is not None and call.has_probs:
        reasons.append("the target is probabilities, where a shard of the classes takes class indices")
    return reasons


def is_common(call: Call) -> bool:
    """Whether the call is as most are: of all questions about it, one answer for a tenth of their time."""
    return _C is not None and _C.is_common(call, _torch.WATCHERS, _torch.WATCHERS_OF_HALVES)


def saved_shape(call: Call) -> tuple[int, ...]:
    """(columns, rows): m, so, q_others, the largest logit under probabilities, and e_drop with statistics.

    Nothing of few classes, whose sums backward makes again.
    """
    columns = 3 + call.has_probs + call.options.return_stats
    return 0 if call.classes <= _C.few_classes else columns, call.rows


def forward(call: Call, schedule: Schedule) -> Forward:
    """See `contract.Backend`; a fused gradient needs saved rows only for that of lse."""
    return _forward(call, schedule, call.input if call.options.inplace else None)


def _forward(call: Call, schedule: Schedule, into: Tensor | None) -> Forward:
    """`into`: the memory that a fused gradient is written to."""
    input, target, weight, options = call
    fused = schedule == "fused"
    dtype = options.dtype or input.dtype
    loss = _empty(dtype, *(call.row_shape if options.reduction == "none" else ()))
    if fused and into is None:
        into = pool.empty_like(input)
    grad = into if fused else None
    saved, table = None, None
    if schedule == "recompute" or (fused and options.return_stats):
        saved = _empty(torch.float64, *saved_shape(call))
    if options.return_stats:
        table = _empty(torch.float64, call.rows, _C.stats_size)
    _C.forward(
        input,
        target,
        _in_acc(weight, call),
        options,
        _num_items(options),
        options.expected(dtype),
        loss,
        grad,
        saved,
        table,
        torch.get_num_threads(),
    )
    return Forward(loss, grad, saved, None if table is None else _torch.in_any_process(lambda: _stats(table, call)))


def backward(
    call: Call, grad: Tensor | None, saved: Tensor | None, upstream: Upstream, keep: bool, wants_target: bool
) -> Gradients:
    """See `contract.Backend`."""
    input, target, weight, options = call
    of_rows, scale = _of_loss(upstream, call)
    if grad is not None:
        # Once more, for what has come: the first was right only for what was expected.
        options = options._replace(grad_scale=scale, return_stats=False)
        again = _forward(call._replace(options=options), "fused", None if keep else grad).grad
        assert again is not None
        return Gradients(again)
    dx = input if options.inplace else pool.empty_like(input)
    dt = pool.empty_like(target) if wants_target else None
    _C.backward(
        input,
        target,
        _in_acc(weight, call),
        options,
        _num_items(options),
        of_rows,
        scale,
        _in_acc(upstream.lse, call),
        _in_acc(upstream.entropy, call),
        dx,
        dt,
        saved,
        torch.get_num_threads(),
    )
    return Gradients(dx, dt)


def part(call: Call) -> Tensor:
    """See `contract.Backend`."""
    input, target, weight, options = call
    sums = _empty(torch.float64, 8, call.rows)
    _C.part(input, target, _in_acc(weight, call), options, sums, torch.get_num_threads())
    return sums


def finish(call: Call, sums: Tensor, upstream: Upstream, into: Tensor) -> None:
    """See `contract.Backend`."""
    input, target, weight, options = call
    _C.finish(
        input,
        target,
        _in_acc(weight, call),
        options,
        sums,
        *_of_loss(upstream, call),
        _in_acc(upstream.lse, call),
        _in_acc(upstream.entropy, call),
        into,
        torch.get_num_threads(),
    )


def rescale(
    grad: Tensor, target: Tensor, options: Options, upstream: Tensor, keep: bool, exactly: bool
) -> Tensor | None:
    """See `contract.Backend`; `exactly`: 16 bits would be rounded twice, and what is too small for 32 or 64 already."""
    given, expected = upstream.item(), options.expected(upstream.dtype)
    if given == expected:
        return _torch.in_any_process(grad.clone) if keep else grad
    ratio = given / expected if expected != 0 and math.isfinite(expected) else math.nan
    if exactly and (grad.itemsize == 2 or not torch.finfo(grad.dtype).tiny <= abs(ratio) <= 8):
        return None
    return _torch.in_any_process(lambda: _multiplied(grad, ratio, target, options, keep))


def _of_loss(upstream: Upstream, call: Call) -> tuple[Tensor | None, float]:
    """The upstream gradients of the losses, and what multiplies them."""
    # One number: of a reduced loss, or expanded, as that of a sum over the losses is.
    if upstream.loss.dim() == 0 or (not any(upstream.loss.stride()) and call.rows > 0):
        return None, upstream.loss.as_strided((), ()).item()
    return _in_acc(upstream.loss, call), 1.0


def _multiplied(grad: Tensor, ratio: float, target: Tensor, options: Options, keep: bool) -> Tensor:
    info = torch.finfo(torch.float64 if grad.dtype == torch.float64 else torch.float32)
    # Three factors where the dtype cannot hold the ratio.
    mantissa, exponent = math.frexp(ratio)
    fits = info.tiny <= abs(ratio) <= info.max or not math.isfinite(ratio)
    factors = [ratio] if fits else [mantissa, 2.0 ** (exponent // 2), 2.0 ** (exponent - exponent // 2)]
    for factor in factors:
        grad = grad * factor if keep else grad.mul_(factor)
        keep = False
    return grad if math.isfinite(ratio) else grad.masked_fill_(operators.ignored(grad, target, options), 0)


def _stats(table: Tensor, call: Call) -> Stats:  # (rows, 4) float64
    """The C++ struct's fields lse, z_loss, entropy, argmax as tensors of their own."""
    shape = call.row_shape
    lse, z_loss, entropy = (table[:, i].to(call.acc, copy=True).reshape(shape) for i in range(3))
    return Stats(lse, z_loss, table[:, 3].view(torch.int64).clone().reshape(shape), entropy)


def _num_items(options: Options) -> float:
    """Minus infinity: not given."""
    return -math.inf if options.num_items is None else float(options.num_items)


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    one = _ONE[dtype]  # which costs half as much as to name dtype and device
    return one.new_empty(*shape) if shape else torch.empty_like(one)


def _in_acc(tensor: Tensor | None, call: Call) -> Tensor | None:
    if tensor is None or (tensor.dtype is call.acc and tensor.is_contiguous() and not tensor.is_neg()):
        return tensor
    return _torch.in_any_process(lambda: tensor.detach().to(call.acc).contiguous().resolve_neg())
