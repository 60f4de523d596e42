"""The autograd Function: which schedule runs, what is saved, and what a second derivative is made of.

It is handed a backend and a differentiable composite, and names no device.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# (input, target, weight, options) -> loss, extras; differentiable to any order
Composite = Callable[[Tensor, Tensor, Tensor | None, Any], tuple[Tensor, Any]]


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
        options: Any,
        backend: ModuleType,
        composite: Composite,
    ) -> Any:
        # Made in backward instead: rows whose upstream gradients are not known yet; float16, which flushes a
        # gradient already divided by N to zero unless a loss scale is known; the gradient of probabilities.
        fused = options.reduction != "none" and not ctx.needs_input_grad[1]
        fused = fused and (input.dtype != torch.float16 or options.grad_scale is not None)
        # Not among the saved tensors: torch's cross entropy lets the logits be changed in place after
        # forward, and so does the fused schedule, which does not need them again.
        ctx.input, ctx.version = input, _version(input)
        if isinstance(options.num_items, Tensor) or isinstance(options.grad_scale, Tensor):
            options = _frozen(options)
        loss, grad, stats, extras = backend.forward(input, target, weight, options, "fused" if fused else "recompute")
        if options.inplace and fused:
            torch.autograd.graph.increment_version(input)
        ctx.save_for_backward(target, weight, grad, stats)
        ctx.options, ctx.backend, ctx.composite = options, backend, composite
        ctx.set_materialize_grads(False)
        if extras is None:
            return loss
        ctx.mark_non_differentiable(extras.z_loss, extras.argmax, extras.entropy)
        return loss, *extras

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, g_lse: Tensor | None = None, *_: None) -> Any:
        if ctx.input is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time: the saved tensors have been freed. "
                "Specify retain_graph=True in the first backward."
            )
        target, weight, grad, stats = ctx.saved_tensors
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        unchanged = _version(ctx.input) == ctx.version
        # create_graph=True, or a vmap over upstream gradients: only differentiable operators will do.
        composite = torch.is_grad_enabled() or _is_batched(grad_output) or _is_batched(g_lse)
        if not unchanged and (composite or grad is None or g_lse is not None):
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                f"logits, {tuple(ctx.input.shape)}, are at version {_version(ctx.input)}; expected version "
                f"{ctx.version} instead. Clone them before changing them."
            )
        if composite:
            dx, dt = _differentiable(ctx, target, weight, grad_output, g_lse)
        else:
            if g_lse is not None:
                grad = None
            if grad_output is None:
                grad_output = ctx.input.new_zeros(())
            dx, dt = ctx.backend.backward(
                grad_output,
                g_lse,
                ctx.input if unchanged else None,
                target,
                weight,
                ctx.options,
                grad,
                stats,
                keep,
                ctx.needs_input_grad[1],
            )
            if ctx.options.inplace:
                dx = dx.detach()  # it is, or shares the memory of, the logits with their graph
                if grad is None:
                    torch.autograd.graph.increment_version(ctx.input)
        if not keep:
            ctx.input = None
        return dx, dt, None, None, None, None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _frozen(options: Any) -> Any:
    """Backward reads these tensors again; a loss scaler may have changed its scale in place by then."""
    tensors = {name: getattr(options, name) for name in ("num_items", "grad_scale")}
    return options._replace(**{name: t.detach().clone() for name, t in tensors.items() if isinstance(t, Tensor)})


def _is_batched(grad: Tensor | None) -> bool:
    """Whether a vmap over upstream gradients (is_grads_batched, or torch.func's) is at work."""
    if grad is None:
        return False
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(grad) or functorch.is_functorch_wrapped_tensor(grad)


def _differentiable(
    ctx: Any, target: Tensor, weight: Tensor | None, grad_output: Tensor | None, g_lse: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    wanted = [tensor for tensor, needed in zip((ctx.input, target), ctx.needs_input_grad, strict=False) if needed]
    with torch.enable_grad():
        loss, extras = ctx.composite(ctx.input, target, weight, ctx.options)
        pairs = [(loss, grad_output), (extras and extras.lse, g_lse)]
        outputs, grads = zip(*((output, grad) for output, grad in pairs if grad is not None), strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
    return tuple(next(found) if needed else None for needed in ctx.needs_input_grad[:2])  # type: ignore[return-value]
