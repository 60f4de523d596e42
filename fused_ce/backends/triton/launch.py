"""Backend "triton": runs the kernels on CUDA tensors (and, under TRITON_INTERPRET=1, on CPU tensors).

Nothing here waits for the device, but for the first look at a kernel (`self_check`): every number that decides
something is read by a kernel.
"""

from __future__ import annotations

import importlib.util
import math
import os

import torch
from torch import Tensor

from ...contract import Call, Forward, Gradients, Schedule, Stats, Upstream, row_shape
from ...options import FLOATS, Options
from .. import reference
from . import kernels, self_check
from .arguments import Grads, Out, Received
from .plan import Cut, cut
from .readable import host, number, packed, readable
from .rows import NOTHING, matrices, rows
from .shards import finish as finish
from .shards import part as part
from .targets import check_targets as check_targets

INSTALLED = importlib.util.find_spec("triton") is not None
CHUNK = 32768  # rows one program sums; more rows take a second launch
SUMS = {"CHUNK": CHUNK, "BLOCK": 4096, "num_warps": 8}


def unsupported(call: Call) -> list[str]:
    """Why the kernels cannot take the call, in words; empty if they can."""
    input, target, weight, options = call
    reasons = []
    if input.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append("triton on CPU tensors runs only under TRITON_INTERPRET=1")
    elif input.device.type == "cuda" and not torch.cuda.is_available():
        reasons.append("no CUDA device was found")
    elif input.device.type not in ("cpu", "cuda"):
        reasons.append(f"triton takes CUDA tensors, got {input.device.type}")
    if self_check.declines(input.device):
        reasons.append(f"its kernels did not agree with torch on this device ({self_check.DECLINED[input.device]})")
    if not INSTALLED:
        reasons.append("triton is not installed (pip install triton)")
    if any(t.device != input.device for t in (target, weight) if t is not None):
        reasons.append("input, target and weight must be on one device")
    if input.dtype not in FLOATS:
        reasons.append(f"input must be float32, float64, bfloat16 or float16, got {input.dtype}")
    elif options.dtype == torch.float64 and torch.float64 not in (input.dtype, target.dtype):
        reasons.append(f"the loss was asked for in {options.dtype} from {input.dtype} logits")
    elif options.dtype is not None and options.dtype.itemsize < input.itemsize:
        reasons.append(f"rounding {input.dtype} logits to {options.dtype} first takes a copy")
    if target.dtype not in (torch.int64, torch.uint8, *FLOATS):
        reasons.append(f"target must hold class indices, int64 or uint8, or probabilities, got {target.dtype}")
    if input.dim() == 0 or target.shape != (input.shape if call.has_probs else row_shape(input)):
        reasons.append(f"input must be (N, C, d1..dk) or (C), got {tuple(input.shape)}, target {tuple(target.shape)}")
    elif call.classes == 0:
        reasons.append("input has no classes")
    elif weight is not None and (weight.dtype not in FLOATS or weight.shape != (call.shard.total,)):
        reasons.append(f"weight must be (C) and floating, got {tuple(weight.shape)} of {weight.dtype}")
    return reasons


def saved_shape(call: Call) -> tuple[int, ...]:
    """(rows + 1, 4) of a call of that many rows.

    A row is m, so, q_others and y: the target or, under probabilities, the largest logit; -1 for an ignored row. The
    last begins with the two divisors of `reduce.prepare`, if there are any: backward then need not find them again.
    """
    return math.prod(call.row_shape) + 1, 4


def forward(call: Call, schedule: Schedule) -> Forward:
    """See `contract.Backend`; a fused gradient of 32 bits or more saves nothing, unless lse may get a gradient."""
    return _forward(call, schedule, None)[0]


def _forward(call: Call, schedule: Schedule, like: Cut | None) -> tuple[Forward, Tensor]:
    """The result, and the losses of the rows; by the variant of `like`, for `self_check`, without a look at it."""
    input, target, _, options = call
    shape, acc, dtype = call.row_shape, call.acc, options.dtype or input.dtype
    none, fused = options.reduction == "none", schedule == "fused"
    loss = input.new_empty(shape, dtype=dtype if none else acc)
    saves = schedule == "recompute" or (fused and (options.return_stats or input.itemsize == 2))
    saved = input.new_empty(saved_shape(call), dtype=torch.float64) if saves else None
    stats = None
    if options.return_stats:
        lse, z_loss, entropy = (input.new_empty(shape, dtype=acc) for _ in range(3))
        stats = Stats(lse, z_loss, input.new_empty(shape, dtype=torch.int64), entropy)
    grad = (input if options.inplace else input.new_empty(input.shape)) if fused else None
    norm = _norm(call, saved)
    if loss.numel():
        sizes, views = matrices(input, target if call.has_probs else None, grad)
        plan = cut(call, sizes, views, held=True)
        if like is not None:
            plan = plan.as_in(like)
        elif variant := self_check.unsettled("forward", call, plan, views, schedule):
            if not self_check.forward_is_right(variant, call, schedule, lambda few: _forward(few, schedule, plan)):
                return self_check.forward_by_torch(call, schedule, saved), loss
        kernels.run_forward(call, plan, sizes, views, norm, Out(loss, saved, stats, views[2] or NOTHING))
    losses = loss
    if not none:
        loss = _total(loss.view(-1), norm, loss.new_empty((), dtype=dtype))
    return Forward(loss, grad, saved, stats), losses


def backward(
    call: Call, grad: Tensor | None, saved: Tensor | None, upstream: Upstream, keep: bool, wants_target: bool
) -> Gradients:
    """The gradients: recomputed, or the fused one made right if the upstream gradient is not grad_scale."""
    if upstream.entropy is not None:  # which the kernels do not differentiate yet
        return self_check.backward_by_torch(call, None, upstream, keep, wants_target)
    return _backward(call, grad, saved, upstream, keep, wants_target, None)


def _backward(
    call: Call,
    grad: Tensor | None,
    saved: Tensor | None,
    upstream: Upstream,
    keep: bool,
    wants_target: bool,
    like: Cut | None,  # as in `_forward`
) -> Gradients:
    input, target, _, options = call
    if self_check.declines(input.device):
        return self_check.backward_by_torch(call, grad, upstream, keep, wants_target)
    upstream = Upstream(readable(upstream.loss), None if upstream.lse is None else readable(upstream.lse))
    if grad is not None and grad.itemsize > 2 and upstream.lse is None:
        rescaled = rescale(grad, target, options, upstream.loss, keep, exactly=True)
        assert rescaled is not None
        return Gradients(rescaled)
    assert saved is not None
    saved = readable(saved)
    spare = None if keep or grad is None else readable(grad)
    dx = spare if spare is not None else input if options.inplace else input.new_empty(input.shape)
    dt = target.new_empty(target.shape) if wants_target else None
    if input.numel():
        sizes, views = matrices(input, target if call.has_probs else None, dx, dt)
        plan = cut(call, sizes, views, held=False, again=spare is not None and upstream.lse is None)
        if like is not None:
            plan = plan.as_in(like)
        elif variant := self_check.unsettled("backward", call, plan, views, upstream.loss.dtype, upstream.lse is None):

            def run(few: Call, spare: Tensor | None, saved: Tensor, upstream: Upstream) -> Gradients:
                return _backward(few, spare, saved, upstream, False, wants_target, plan)

            if not self_check.backward_is_right(variant, call, spare, saved, upstream, wants_target, run):
                return self_check.backward_by_torch(call, grad, upstream, keep, wants_target)
        received = Received(
            saved,
            saved[-1, :2] if options.reduction == "mean" else None,
            rows(upstream.loss),
            None if upstream.lse is None else rows(upstream.lse),
            number(options.grad_scale, upstream.loss.dtype, input.device),
        )
        kernels.run_backward(call, plan, sizes, views, received, Grads(views[2] or NOTHING, views[3] or NOTHING))
    return Gradients(dx, dt)


def rescale(
    grad: Tensor, target: Tensor, options: Options, upstream: Tensor, keep: bool, exactly: bool
) -> Tensor | None:
    """See `contract.Backend`; 16 bits need the logits, because nobody waits to see whether the upstream differs."""
    if exactly and grad.itemsize == 2:
        return None
    grad, upstream = readable(grad), readable(upstream)
    expected = number(options.grad_scale, upstream.dtype, grad.device)

    def run(grad: Tensor, upstream: Tensor) -> Tensor:
        return _rescale(grad, upstream, expected, keep)

    if not self_check.rescale_is_right(grad, upstream, expected, keep, run):
        return reference.rescale(grad, target, options, upstream, keep)
    return run(grad, upstream)


def _rescale(grad: Tensor, upstream: Tensor, expected: Tensor | None, keep: bool) -> Tensor:
    out, n = torch.empty_like(grad) if keep else grad, grad.numel()
    if n:
        programs = min(-(-n // 4096), 2048)
        meta = {"IN_PLACE": not keep, "BLOCK": 4096, "num_warps": 8}
        kernels.launch("rescale_grad", (programs,), grad, upstream, expected, out, n, **meta)
    return out


def _norm(call: Call, saved: Tensor | None) -> Tensor | None:
    """(2,) float64: divisor of the cross entropy, divisor of the z-loss; part of what is saved. None: they are 1."""
    input, target, weight, options = call
    if options.reduction != "mean":
        return None
    norm = input.new_empty(2, dtype=torch.float64) if saved is None else saved[-1, :2]
    if options.num_items is None and not call.has_probs:
        N, chunks = target.numel(), _chunks(target.numel())
        parts = norm if chunks == 1 else norm.new_empty((chunks, 2))
        labels, ignore_index = rows(target), options.ignore_index
        kernels.launch("prepare", (chunks,), labels, packed(weight), parts, N, call.classes, ignore_index, **SUMS)
        return norm if chunks == 1 else _total(parts, None, norm)
    norm[:] = math.prod(call.row_shape) if options.num_items is None else host(options.num_items)
    return norm


def _total(terms: Tensor, norm: Tensor | None, out: Tensor) -> Tensor:  # (N,) -> (), (N, 2) -> (2,)
    """Sum over the first dimension, divided by norm[0] if given; a long one in two steps."""
    columns = math.prod(terms.shape[1:])
    if len(terms) > CHUNK:
        parts = terms.new_empty((_chunks(len(terms)), *terms.shape[1:]), dtype=torch.float64)
        kernels.launch("total", (len(parts), columns), terms, None, parts, len(terms), **SUMS)
        terms = parts
    kernels.launch("total", (1, columns), terms, norm, out, len(terms), **(SUMS | {"CHUNK": 1 << 30}))
    return out


def _chunks(n: int) -> int:
    return max(1, -(-n // CHUNK))
