"""The kernels as `torch.library` operators: what a compiled or exported graph holds in their place.

Only traced calls go through here, by the recompute schedule: the logits' memory is the compiler's to plan. Eager
calls reach the backends directly, because an operator defined in Python costs several microseconds a call; and
transforms (torch.func, forward AD) never come here, because an operator with a registered derivative drops their
tangents without a word.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import dispatch, reference
from .options import Extras, Options
from .rows import row_shape

_CALL = "Tensor input, Tensor target, Tensor? weight"
# The fields of Options but the last three, which a graph has no use for, and the backend's name.
_OPTIONS = (
    "int ignore_index, float label_smoothing, float logit_scale, float? softcap, float lse_square_scale, "
    "str reduction, ScalarType dtype, Tensor? num_items, str? backend"
)
_LIBRARY: Any = torch.library.Library("fused_ce", "DEF")  # type: ignore[no-untyped-call]
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_LIBRARY.define(
    f"forward({_CALL}, {_OPTIONS}, bool stats, bool extras) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    f"backward(Tensor? grad_output, Tensor? g_lse, {_CALL}, {_OPTIONS}, Tensor stats, bool wants_target)"
    " -> (Tensor, Tensor)",
    tags=_TAGS,
)


def arguments(options: Options, input: Tensor) -> tuple[Any, ...]:
    """The part of the options that is the operators' arguments."""
    num_items = options.num_items
    if num_items is not None and not isinstance(num_items, Tensor):
        num_items = torch.full((), num_items, dtype=torch.float64, device=input.device)
    return *options[:5], options.reduction, options.dtype or input.dtype, num_items


def _forward(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *fields, backend, wants_stats, wants_extras = rest
    options = Options(*fields)._replace(return_stats=wants_extras)
    chosen = dispatch.choose(input, target, weight, options, backend) or reference
    schedule = "recompute" if wants_stats else "loss"
    loss, _, stats, extras = chosen.forward(input, target, weight, options, schedule)
    return loss, _or_empty(stats, input), *(extras or [input.new_empty(0) for _ in Extras._fields])


def _backward(
    grad_output: Tensor | None,
    g_lse: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *fields, backend, stats, wants_target = rest
    options = Options(*fields)
    chosen = dispatch.choose(input, target, weight, options, backend) or reference
    upstream = input.new_zeros(()) if grad_output is None else grad_output
    dx, dt = chosen.backward(upstream, g_lse, input, target, weight, options, None, stats, True, wants_target)
    return dx, _or_empty(dt, input)


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An operator cannot return None."""
    return like.new_empty(0) if tensor is None else tensor


def _forward_fake(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *fields, _, wants_stats, wants_extras = rest
    options = Options(*fields)
    shape = row_shape(input)
    acc = torch.float64 if input.dtype == torch.float64 else torch.float32
    loss = input.new_empty(shape if options.reduction == "none" else (), dtype=options.dtype)
    stats = input.new_empty((math.prod(shape), 4), dtype=torch.float64) if wants_stats else None
    extras = [input.new_empty(0) for _ in Extras._fields]
    if wants_extras:
        lse, z_loss, entropy = (input.new_empty(shape, dtype=acc) for _ in range(3))
        extras = [*Extras(lse, z_loss, input.new_empty(shape, dtype=torch.int64), entropy)]
    return loss, _or_empty(stats, input), *extras


def _backward_fake(
    grad_output: Tensor | None, g_lse: Tensor | None, input: Tensor, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(input, memory_format=torch.contiguous_format)
    dt = torch.empty_like(target, memory_format=torch.contiguous_format) if rest[-1] else None
    return dx, _or_empty(dt, input)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, target, weight, *ctx.options, _, wants_extras = inputs
    _, stats, lse, *others = output
    ctx.save_for_backward(input, target, weight, stats)
    ctx.wants_extras = wants_extras
    ctx.mark_non_differentiable(stats, *others, *(() if wants_extras else (lse,)))


def _derivative(ctx: Any, grad_output: Tensor, _: Tensor, g_lse: Tensor, *__: Tensor) -> tuple[Tensor | None, ...]:
    input, target, weight, stats = ctx.saved_tensors
    wants_target = ctx.needs_input_grad[1]
    dx, dt = torch.ops.fused_ce.backward(
        grad_output, g_lse if ctx.wants_extras else None, input, target, weight, *ctx.options, stats, wants_target
    )
    return dx, dt if wants_target else None, *([None] * (len(ctx.options) + 3))


for _name, _kernel, _fake in (("forward", _forward, _forward_fake), ("backward", _backward, _backward_fake)):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_ce::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("fused_ce::forward", _derivative, setup_context=_save, lib=_LIBRARY)


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError(
        "expected one derivative of a compiled or exported fused_ce.cross_entropy, got a second one: "
        "call it outside torch.compile for double backward"
    )


torch.library.register_autograd("fused_ce::backward", _refuse, lib=_LIBRARY)
