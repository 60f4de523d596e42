"""The autograd Function: which schedule runs, what is saved, and what a second derivative is made of.

It is handed a backend and a differentiable composite, and names no device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _torch
from .contract import Backend, Call, Stats, Upstream
from .options import Options

Composite = Callable[[Call], tuple[Tensor, Stats | None]]  # the loss, differentiable to any order


def with_gradient(call: Call, backend: Backend, composite: Composite) -> tuple[Tensor, Stats | None]:
    """The loss, part of autograd's graph, and the statistics if asked for."""
    outputs = CrossEntropy.apply(*call, backend, composite)  # type: ignore[no-untyped-call]
    return (outputs[0], Stats(*outputs[1:])) if call.options.return_stats else (outputs, None)


class CrossEntropy(torch.autograd.Function):
    """Cross entropy by a backend's kernels; exact when differentiated again."""

    # Old style (ctx in forward) on purpose: overriding setup_context costs some 30 us per call, because
    # torch then binds the arguments through inspect.signature every time.
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # (N, C, d1..dk)
        target: Tensor,  # (N, d1..dk) or the input's shape
        weight: Tensor | None,  # (C,)
        options: Options,
        backend: Backend,
        composite: Composite,
    ) -> Any:
        # Made in backward instead: rows whose upstream gradients are not known yet; float16, which flushes a
        # gradient already divided by N to zero unless a loss scale is known; the gradient of probabilities.
        fused = options.reduction != "none" and not ctx.needs_input_grad[1]
        fused = fused and (input.dtype != torch.float16 or options.grad_scale is not None)
        # Not among the saved tensors: torch's cross entropy lets the logits be changed in place after
        # forward, and so does the fused schedule, which does not need them again.
        ctx.input, ctx.version = input, _torch.version(input)
        if isinstance(options.num_items, Tensor) or isinstance(options.grad_scale, Tensor):
            options = _frozen(options)
        call = Call(input, target, weight, options)
        loss, grad, saved, stats = backend.forward(call, "fused" if fused else "recompute")
        if options.inplace and fused:
            torch.autograd.graph.increment_version(input)
        ctx.save_for_backward(target, weight, grad, saved)
        ctx.options, ctx.backend, ctx.composite = options, backend, composite
        ctx.set_materialize_grads(False)
        if stats is None:
            return loss
        ctx.mark_non_differentiable(stats.z_loss, stats.argmax, stats.entropy)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, g_lse: Tensor | None = None, *_: None) -> Any:
        if ctx.input is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time: the saved tensors have been freed. "
                "Specify retain_graph=True in the first backward."
            )
        target, weight, grad, saved = ctx.saved_tensors
        call = Call(ctx.input, target, weight, ctx.options)
        keep = _torch.keeps_graph()
        unchanged = _torch.version(call.input) == ctx.version
        # create_graph=True, or a vmap over upstream gradients: only differentiable operators will do.
        composite = torch.is_grad_enabled() or _torch.is_batched(grad_output) or _torch.is_batched(g_lse)
        if g_lse is not None:
            grad = None  # it was made for an lse without an upstream gradient
        if not unchanged and (composite or grad is None):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                f"logits, {tuple(call.input.shape)}, are at version {_torch.version(call.input)}; expected version "
                f"{ctx.version} instead. Clone them before changing them."
            )
        dt = None
        if composite:
            dx, dt = _differentiable(ctx, call, grad_output, g_lse)
        else:
            upstream = Upstream(call.input.new_zeros(()) if grad_output is None else grad_output, g_lse)
            if unchanged:
                dx, dt = ctx.backend.backward(call, grad, saved, upstream, keep, ctx.needs_input_grad[1])
            else:
                dx = ctx.backend.rescale(grad, ctx.options, upstream.loss, keep)
            if ctx.options.inplace:
                dx = dx.detach()  # it is, or shares the memory of, the logits with their graph
                if grad is None:
                    torch.autograd.graph.increment_version(call.input)
        if not keep:
            ctx.input = None
        return dx, dt, None, None, None, None


def _frozen(options: Options) -> Options:
    """Backward reads these tensors again; a loss scaler may have changed its scale in place by then."""
    num_items, grad_scale = (
        value.detach().clone() if isinstance(value, Tensor) else value
        for value in (options.num_items, options.grad_scale)
    )
    return options._replace(num_items=num_items, grad_scale=grad_scale)


def _differentiable(
    ctx: Any, call: Call, grad_output: Tensor | None, g_lse: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    wanted = [tensor for tensor, needed in zip(call[:2], ctx.needs_input_grad, strict=False) if needed]
    with torch.enable_grad():
        loss, stats = ctx.composite(call)
        pairs = [(loss, grad_output), (stats and stats.lse, g_lse)]
        outputs, grads = zip(*((output, grad) for output, grad in pairs if grad is not None), strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad[:2])  # type: ignore[return-value]
