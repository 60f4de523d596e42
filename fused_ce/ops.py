"""The kernels as `torch.library` operators: what a compiled or exported graph holds in their place.

Traced calls go through here, and those under a mode that watches operators (a FLOP counter, selective
checkpointing), by the recompute schedule: the logits' memory is the compiler's to plan. Other calls reach the backends
directly, because an operator defined in Python costs several microseconds a call; and transforms (torch.func, forward
AD) never come here, because an operator with a registered derivative drops their tangents without a word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import __version__, _torch, gate
from .autograd import differentiable
from .backends import dispatch
from .contract import Backend, Call, Stats, Upstream
from .options import Options

_CALL = "Tensor input, Tensor target, Tensor? weight"
# The fields of Options but the last three, which a graph has no use for, and the backend's name. Numbers are tensors of
# the CPU, None where one is the default: a graph would be made again for each new value of a float.
OPTIONS = (
    "SymInt ignore_index, Tensor? label_smoothing, Tensor? logit_scale, Tensor? softcap, Tensor? lse_square_scale, "
    "str reduction, ScalarType dtype, Tensor? num_items, str? backend"
)
RECEIVED = "Tensor? grad_output, Tensor? g_lse, Tensor? g_entropy"
_DEFAULTS = Options()


def _own_library(copy: int = 1) -> Any:
    """One under the name of this version, so that graphs that a cache kept of another do not call it, and of this copy.

    A process may hold several copies: two packages that each bring one, or one imported again.
    """
    name = re.sub(r"\W", "_", f"{__package__}_{__version__}") + (f"_{copy}" if copy > 1 else "")
    try:
        return torch.library.Library(name, "DEF")  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if "Only a single TORCH_LIBRARY" not in str(error):  # that the name is taken
            raise
        return _own_library(copy + 1)


LIBRARY: Any = _own_library()
OPERATORS: Any = getattr(torch.ops, LIBRARY.ns)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
LIBRARY.define(
    f"forward({_CALL}, {OPTIONS}, bool wants_grad, bool wants_stats)"
    " -> (Tensor loss, Tensor saved, Tensor lse, Tensor z_loss, Tensor argmax, Tensor entropy)",
    tags=_TAGS,
)
LIBRARY.define(
    f"backward({RECEIVED}, {_CALL}, {OPTIONS}, Tensor saved, bool wants_target) -> (Tensor d_input, Tensor d_target)",
    tags=_TAGS,
)


def traced(call: Call, backend: str | None, wants_grad: bool) -> tuple[Tensor, Stats | None]:
    """The call as one operator in the graph that is being traced."""
    wants_stats = call.options.return_stats
    loss, _, *stats = OPERATORS.forward(*arguments(call, backend), wants_grad, wants_stats)
    return loss, Stats(*stats) if wants_stats else None


def arguments(call: Call, backend: str | None) -> tuple[Any, ...]:
    """The call as both operators take it: _CALL and OPTIONS."""
    input, target, weight, options = call
    num_items = options.num_items
    if num_items is not None and not isinstance(num_items, Tensor):
        num_items = torch.full((), num_items, dtype=torch.float64, device=input.device)
    dtype = options.dtype or input.dtype
    numbers = [
        # A product, because that is what torch.compile knows to keep symbolic.
        None if value is None or value == default else torch.ones((), dtype=torch.float64, device="cpu") * value
        for value, default in zip(options[1:5], _DEFAULTS[1:5], strict=True)
    ]
    return input, target, weight, options.ignore_index, *numbers, options.reduction, dtype, num_items, backend


def chosen(
    input: Tensor, target: Tensor, weight: Tensor | None, fields: Sequence[Any], values: bool = True
) -> tuple[Call, Backend]:
    """The call and its backend, from the operators' arguments; without `values` the numbers of the call are unknown."""
    ignore_index, *numbers, reduction, dtype, num_items, backend = fields
    known: list[Any] = [
        default if number is None or not values else number.item()
        for number, default in zip(numbers, _DEFAULTS[1:5], strict=True)
    ]
    e, k, s, L = known
    options = Options(ignore_index, e, k, s, L, reduction, dtype, num_items)
    call = Call(input, target, weight, options)
    return call, dispatch.choose(call, backend) or dispatch.BACKENDS["reference"]


def _forward(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *fields, wants_grad, wants_stats = rest
    call, backend = chosen(input, target, weight, fields)
    call = call._replace(options=call.options._replace(return_stats=wants_stats))
    loss, _, saved, stats = backend.forward(call, "recompute" if wants_grad else "loss")
    return loss, or_empty(saved, input), *(stats or [input.new_empty(0) for _ in Stats._fields])


def _backward(
    grad_output: Tensor | None,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *fields, saved, wants_target = rest
    call, backend = chosen(input, target, weight, fields)
    input, target, weight = map(_torch.with_memory, call[:3])
    call = Call(input, target, weight, call.options)
    g_loss = input.new_zeros(()) if grad_output is None else grad_output
    upstream = Upstream(*map(_torch.with_memory, (g_loss, g_lse, g_entropy)))
    dx, dt = backend.backward(call, None, saved, upstream, True, wants_target)
    return dx, or_empty(dt, input)


def or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """An operator cannot return None."""
    return like.new_empty(0) if tensor is None else tensor


def _forward_fake(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *fields, wants_grad, wants_stats = rest
    call, backend = chosen(input, target, weight, fields, values=False)
    call = call._replace(options=call.options._replace(return_stats=wants_stats))
    shape, options = call.row_shape, call.options
    loss = input.new_empty(shape if options.reduction == "none" else (), dtype=options.dtype)
    saved = input.new_empty(backend.saved_shape(call), dtype=torch.float64) if wants_grad else None
    return loss, or_empty(saved, input), *fake_stats(input, shape, call.acc, wants_stats)


def fake_stats(like: Tensor, shape: Sequence[int], acc: torch.dtype, wanted: bool) -> list[Tensor]:
    """What stands for the statistics of rows while a graph is traced; empty where they are not wanted."""
    if not wanted:
        return [like.new_empty(0) for _ in Stats._fields]
    lse, z_loss, entropy = (like.new_empty(shape, dtype=acc) for _ in range(3))
    return [*Stats(lse, z_loss, like.new_empty(shape, dtype=torch.int64), entropy)]


def _backward_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    input, target, *rest = arguments[3:]
    dx = torch.empty_like(input, memory_format=torch.contiguous_format)
    dt = torch.empty_like(target, memory_format=torch.contiguous_format) if rest[-1] else None
    return dx, or_empty(dt, input)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, target, weight, *ctx.options, _, wants_stats = inputs
    _, saved, lse, z_loss, argmax, entropy = output
    ctx.save_for_backward(input, target, weight, saved)
    ctx.wants_stats = wants_stats
    ctx.set_materialize_grads(False)  # an entropy that nobody differentiates costs nothing
    ctx.mark_non_differentiable(saved, z_loss, argmax, *(() if wants_stats else (lse, entropy)))


def _derivative(ctx: Any, grad_output: Tensor, _: Tensor, *of_stats: Tensor) -> tuple[Tensor | None, ...]:
    input, target, weight, saved = ctx.saved_tensors
    wants_target, nothing = ctx.needs_input_grad[1], [None] * (len(ctx.options) + 3)
    g_lse, g_entropy = (of_stats[0], of_stats[3]) if ctx.wants_stats else (None, None)
    received = grad_output, g_lse, g_entropy
    if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or any(map(_torch.is_transformed, received))):
        # Under a mode, but not in a graph: differentiable again.
        call = chosen(input, target, weight, ctx.options)[0]
        call = call._replace(options=call.options._replace(return_stats=ctx.wants_stats))
        return *differentiable(call, gate.again, ctx.needs_input_grad, *received), *nothing
    dx, dt = OPERATORS.backward(*received, input, target, weight, *ctx.options, saved, wants_target)
    return dx, dt if wants_target else None, *nothing


def register(kind: str, kernels: Sequence[Any], fakes: Sequence[Any], derivative: Any, save: Any, called: str) -> None:
    """Give the operators `kind`forward and `kind`backward their kernels, fakes and derivatives, in that order each."""

    def refuse(*_: Any) -> NoReturn:
        raise RuntimeError(
            f"expected one derivative of a compiled or exported fused_ce.{called}, got a second one: "
            "call it outside torch.compile for double backward"
        )

    for name, kernel, fake in zip((f"{kind}forward", f"{kind}backward"), kernels, fakes, strict=True):
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"{LIBRARY.ns}::{kind}forward", derivative, setup_context=save, lib=LIBRARY)
    torch.library.register_autograd(f"{LIBRARY.ns}::{kind}backward", refuse, lib=LIBRARY)


register("", (_forward, _backward), (_forward_fake, _backward_fake), _derivative, _save, "cross_entropy")
