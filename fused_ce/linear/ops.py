"""Linear cross entropy as `torch.library` operators: what a compiled or exported graph holds in its place.

For a mean or a sum one operator gives the loss and all gradients, and backward multiplies them; for rows, or where
statistics are asked for, a second one makes the gradients from the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch, ops
from ..contract import Backend, Call, Stats, Upstream
from . import chunks, composite
from .autograd import is_fused, rounded
from .contract import LinearCall, LinearGradients, Wanted

_CALL = "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight"
_REST = f"{ops.OPTIONS}, ScalarType product_dtype, SymInt? chunk_rows"
_WANTED = "bool wants_input, bool wants_linear_weight, bool wants_linear_bias"
_GRADIENTS = "Tensor d_input, Tensor d_linear_weight, Tensor d_linear_bias"
_TAGS = (torch.Tag.pt2_compliant_tag,)
ops.LIBRARY.define(
    f"linear_forward({_CALL}, {_REST}, {_WANTED}, bool wants_stats)"
    f" -> (Tensor loss, {_GRADIENTS}, Tensor lse, Tensor z_loss, Tensor argmax, Tensor entropy)",
    tags=_TAGS,
)
ops.LIBRARY.define(f"linear_backward({ops.RECEIVED}, {_CALL}, {_REST}, {_WANTED}) -> ({_GRADIENTS})", tags=_TAGS)
_TENSORS = 5  # of _CALL
_NONE = Wanted(False, False, False)


def traced(call: LinearCall, backend: str | None, wanted: Wanted) -> tuple[Tensor, Stats | None]:
    """The call as one operator in the graph that is being traced."""
    input, linear_weight, target, linear_bias, weight, options, product_dtype, chunk_rows = call
    arguments = ops.arguments(Call(input, target, weight, options), backend)
    found = ops.OPERATORS.linear_forward(
        input, linear_weight, target, linear_bias, weight, *arguments[3:], product_dtype, chunk_rows, *wanted,
        options.return_stats,
    )  # fmt: skip
    return found[0], Stats(*found[4:]) if options.return_stats else None


def _call(tensors: Sequence[Any], rest: Sequence[Any], values: bool = True) -> tuple[LinearCall, Backend]:
    """The call and its backend, from the operators' arguments; without `values` the numbers of the call are unknown."""
    input, linear_weight, target, _, weight = tensors
    *fields, product_dtype, chunk_rows = rest
    row = input.new_zeros((), dtype=product_dtype).expand(1, linear_weight.shape[0])
    of_row = target.new_zeros(1, *target.shape[1:])  # target[:1] asks a graph whether there is one
    seen, backend = ops.chosen(row, of_row, weight, fields, values)
    return LinearCall(*tensors, seen.options, product_dtype, chunk_rows), backend  # type: ignore[call-arg]


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    *rest, wants_input, wants_weight, wants_bias, wants_stats = arguments
    call, backend = _call(rest[:_TENSORS], rest[_TENSORS:])
    call = call._replace(options=call.options._replace(return_stats=wants_stats))
    wanted = Wanted(wants_input, wants_weight, wants_bias) if _makes_gradients(call, wants_stats) else _NONE
    loss, gradients, stats = chunks.forward(call, backend, wanted)
    return loss, *_filled(gradients, call.input), *(stats or [call.input.new_empty(0) for _ in Stats._fields])


def _makes_gradients(call: LinearCall, wants_stats: bool) -> bool:
    # lse may come with a gradient of its own, and a graph cannot wait to see.
    return is_fused(call) and not wants_stats


def _filled(gradients: LinearGradients, like: Tensor) -> list[Tensor]:
    return [ops.or_empty(gradient, like) for gradient in gradients]


def _backward(
    grad_output: Tensor | None, g_lse: Tensor | None, g_entropy: Tensor | None, *arguments: Any
) -> tuple[Tensor, ...]:
    rest, wanted = arguments[:-3], Wanted(*arguments[-3:])
    call, backend = _call([_torch.with_memory(tensor) for tensor in rest[:_TENSORS]], rest[_TENSORS:])
    g_loss = call.input.new_zeros(()) if grad_output is None else grad_output
    upstream = Upstream(*map(_torch.with_memory, (g_loss, g_lse, g_entropy)))
    return tuple(_filled(rounded(chunks.backward(call, backend, wanted, upstream), call), call.input))


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *rest, wants_input, wants_weight, wants_bias, wants_stats = arguments
    call, _ = _call(rest[:_TENSORS], rest[_TENSORS:], values=False)
    input, options = call.input, call.options
    rows, acc = input.shape[:1], chunks.gradient_dtypes(call)[2]
    loss = input.new_empty(rows if options.reduction == "none" else (), dtype=options.dtype)
    wanted = (wants_input, wants_weight, wants_bias) if _makes_gradients(call, wants_stats) else _NONE
    gradients = _empty_gradients(call, wanted, chunks.gradient_dtypes(call))
    return loss, *gradients, *ops.fake_stats(input, rows, acc, wants_stats)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    rest, wanted = arguments[3:-3], arguments[-3:]
    call, _ = _call(rest[:_TENSORS], rest[_TENSORS:], values=False)
    tensors = (call.input, call.linear_weight, call.linear_bias)
    return tuple(_empty_gradients(call, wanted, [None if t is None else t.dtype for t in tensors]))


def _empty_gradients(call: LinearCall, wanted: Sequence[bool], dtypes: Sequence[torch.dtype | None]) -> list[Tensor]:
    input, linear_weight = call.input, call.linear_weight
    shapes = (input.shape, linear_weight.shape, linear_weight.shape[:1])
    return [
        input.new_empty(shape, dtype=dtype) if wants else input.new_empty(0)
        for shape, dtype, wants in zip(shapes, dtypes, wanted, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *rest, ctx.wants_input, ctx.wants_weight, ctx.wants_bias, ctx.wants_stats = inputs
    _, *gradients, lse, z_loss, argmax, entropy = output
    ctx.save_for_backward(*rest[:_TENSORS], *gradients)
    ctx.rest = rest[_TENSORS:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*gradients, z_loss, argmax, *(() if ctx.wants_stats else (lse, entropy)))


def _derivative(ctx: Any, grad_output: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, dx, dW, db = ctx.saved_tensors
    g_lse, g_entropy = (others[3], others[6]) if ctx.wants_stats else (None, None)
    received = grad_output, g_lse, g_entropy
    wanted = Wanted(ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    nothing = [None] * (len(ctx.rest) + 4)

    def placed(found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        of_input, of_weight, of_bias = (grad if want else None for grad, want in zip(found, wanted, strict=True))
        return of_input, of_weight, None, of_bias, None, *nothing

    call, _ = _call(tensors, ctx.rest, values=False)
    if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or any(map(_torch.is_transformed, received))):
        # Under a mode, but not in a graph: differentiable again.
        return placed(composite.gradients(_call(tensors, ctx.rest)[0], *received, wanted))
    if _makes_gradients(call, ctx.wants_stats):
        acc = chunks.gradient_dtypes(call)[2]
        made = [grad * grad_output.to(acc) if want else None for grad, want in zip((dx, dW, db), wanted, strict=True)]
        return placed(rounded(LinearGradients(*made), call))
    return placed(ops.OPERATORS.linear_backward(*received, *tensors, *ctx.rest, *wanted))


ops.register(
    "linear_",
    (_forward, _backward),
    (_forward_fake, _backward_fake),
    _derivative,
    _save,
    "linear_cross_entropy",
)
