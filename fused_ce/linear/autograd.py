"""The autograd Function of linear cross entropy: what forward makes, what backward finds, and its own derivatives."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _torch
from ..autograd import frozen
from ..contract import Backend, Stats, Upstream
from ..options import Options
from . import chunks, composite, products
from .contract import LinearCall, LinearForward, LinearGradients, Loop, Wanted

_INPUT, _LINEAR_WEIGHT, _TARGET, _LINEAR_BIAS, _WEIGHT, *_GRADIENTS = range(8)  # what is saved, in order
_NOTHING = (None,) * 9  # of the Function's arguments
_PLACES = (0, 1, 3)  # among them, of the three that get a gradient


class InOneProcess(NamedTuple):
    """The loop over rows of all classes; see `contract.Loop`."""

    backend: Backend

    def forward(self, call: LinearCall, wanted: Wanted) -> LinearForward:
        return chunks.forward(call, self.backend, wanted)

    def backward(self, call: LinearCall, wanted: Wanted, upstream: Upstream) -> LinearGradients:
        return chunks.backward(call, self.backend, wanted, upstream)

    def differentiable(
        self, call: LinearCall, g_loss: Tensor | None, g_lse: Tensor | None, g_entropy: Tensor | None, wanted: Wanted
    ) -> LinearGradients:
        return composite.gradients(call, g_loss, g_lse, g_entropy, wanted)


def with_gradient(call: LinearCall, loop: Loop) -> tuple[Tensor, Stats | None]:
    """The loss, part of autograd's graph, and the statistics if asked for."""
    outputs = _apply(*call, loop)
    return (outputs[0], Stats(*outputs[1:])) if call.options.return_stats else (outputs, None)


def is_fused(call: LinearCall) -> bool:
    """Whether forward can make gradients that backward only has to scale.

    float16 logits flush a gradient that is already divided by N to zero, unless a loss scale is known.
    """
    options = call.options
    return options.reduction != "none" and (not _is_narrow(call) or options.grad_scale is not None)


def makes_gradients(call: LinearCall) -> bool:
    """Whether forward does, here and now: hooks that free or move what is saved are to see the inputs alone."""
    return is_fused(call) and not _torch.has_hooks()


def _is_narrow(call: LinearCall) -> bool:
    return products.computed_in(call.product_dtype, call.input.device) == torch.float16


def _without_absurd_hint(call: LinearCall) -> LinearCall:
    """The call without a grad_scale that its sums cannot hold, and that no upstream gradient can therefore have."""
    hint = call.options.grad_scale
    info = torch.finfo(torch.float64 if call.product_dtype == torch.float64 else torch.float32)
    if hint is None or isinstance(hint, Tensor) or info.tiny <= hint <= info.max:
        return call
    return call._replace(options=call.options._replace(grad_scale=None))


class LinearCrossEntropy(torch.autograd.Function):
    """Linear cross entropy by chunks, which a loop walks over."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # (N, H)
        linear_weight: Tensor,  # (V, H)
        target: Tensor,  # (N,) or (N, V)
        linear_bias: Tensor | None,  # (V,)
        weight: Tensor | None,  # (V,)
        *rest: Any,
    ) -> Any:
        *others, loop = rest
        call = _without_absurd_hint(LinearCall(input, linear_weight, target, linear_bias, weight, *others))
        if isinstance(call.options.num_items, Tensor) or isinstance(call.options.grad_scale, Tensor):
            call = call._replace(options=frozen(call.options))
        wanted = Wanted(*(ctx.needs_input_grad[i] for i in _PLACES))
        fused = makes_gradients(call)
        loss, gradients, stats = loop.forward(call, wanted if fused else Wanted(False, False, False))
        ctx.save_for_backward(*call[:5], *gradients)
        ctx.others, ctx.loop, ctx.fused, ctx.narrow = call[5:], loop, fused, _is_narrow(call)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (input, linear_weight, linear_bias)]
        ctx.set_materialize_grads(False)
        if stats is None:
            return loss
        ctx.mark_non_differentiable(stats.z_loss, stats.argmax)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *of_stats: Tensor | None) -> Any:
        g_lse, _, _, g_entropy = of_stats or (None,) * 4
        received = grad_output, g_lse, g_entropy
        if all(g is None for g in received):
            return _NOTHING
        read = _torch.saved(ctx)
        wanted = Wanted(*(ctx.needs_input_grad[i] for i in _PLACES))
        # create_graph=True, or a transform of this backward: only differentiable operators will do.
        if torch.is_grad_enabled() or any(map(_torch.is_transformed, received)):
            return _placed(ctx.loop.differentiable(_call(ctx, read), *received, wanted))
        if ctx.fused and g_lse is None and g_entropy is None:
            assert grad_output is not None
            made = LinearGradients(*(read(i) if want else None for i, want in zip(_GRADIENTS, wanted, strict=True)))
            options, keep = ctx.others[0], _torch.keeps_graph()
            # The inputs are not read: they may have changed since.
            found = scaled(made, ctx.dtypes, grad_output, options, keep, ctx.narrow)
            if found is not None:
                return _placed(found)
        call = _call(ctx, read)
        g_loss = call.input.new_zeros(()) if grad_output is None else grad_output
        upstream = Upstream(*map(_torch.with_memory, (g_loss, g_lse, g_entropy)))
        found = ctx.loop.backward(call, wanted, upstream)
        return _placed(rounded(found, call))


_apply = _torch.apply_of(LinearCrossEntropy)


def scaled(
    made: LinearGradients,
    dtypes: list[torch.dtype | None],  # to round to
    upstream: Tensor,  # ()
    options: Options,  # whose grad_scale forward assumed
    keep: bool,  # whether they are needed again as they are
    narrow: bool,  # whether they were float16 on the way
) -> LinearGradients | None:
    """The gradients that forward made, for the upstream gradient that came, rounded once; None: forward has to run
    again.

    On a CPU alone it is known whether there is anything to do, and whether the factor will do.
    """
    ratio: float | Tensor
    if chunks.can_wait(upstream):
        expected = options.expected(upstream.dtype)
        # NaN where nothing is left of a hint to divide by.
        ratio = _torch.with_memory(upstream).item() / (expected if expected and math.isfinite(expected) else math.nan)
        # What was too small or too large for its dtype stays zero or infinite, whatever it is multiplied by.
        most = 8.0 if narrow else 2.0**64
        if not (1 / most <= math.fabs(ratio) <= most or (ratio == 0 and options.grad_scale is None)):
            return None
    else:
        ratio = upstream.double() / (1.0 if options.grad_scale is None else options.grad_scale)
    return LinearGradients(
        *(
            None if grad is None else _times(grad, ratio, dtype or grad.dtype, keep)
            for grad, dtype in zip(made, dtypes, strict=True)
        )
    )


def _times(grad: Tensor, ratio: float | Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
    if not isinstance(ratio, Tensor) and ratio == 1.0:
        return grad.to(dtype, copy=keep)
    if dtype.itemsize > grad.itemsize:  # autocast's products, for wider parameters
        grad, keep = grad.to(dtype), False
    if not isinstance(ratio, Tensor):
        return (grad * ratio if keep else grad.mul_(ratio)).to(dtype)
    ratio = ratio.to(torch.float64 if grad.dtype == torch.float64 else torch.float32)
    return torch.mul(grad, ratio, out=torch.empty_like(grad, dtype=dtype) if keep or grad.dtype != dtype else grad)


def rounded(found: LinearGradients, call: LinearCall) -> LinearGradients:
    """Each gradient in its tensor's dtype."""
    tensors = (call.input, call.linear_weight, call.linear_bias)
    return LinearGradients(
        *(None if grad is None or of is None else grad.to(of.dtype) for grad, of in zip(found, tensors, strict=True))
    )


def _call(ctx: Any, read: Any) -> LinearCall:
    """The call as forward saw it.

    Raises:
        RuntimeError: one of its tensors was changed in place or freed since.
    """
    return LinearCall(*(_torch.with_memory(read(i)) for i in range(5)), *ctx.others)


def _placed(found: LinearGradients) -> tuple[Tensor | None, ...]:
    dx, dW, db = found
    return dx, dW, None, db, *_NOTHING[4:]
