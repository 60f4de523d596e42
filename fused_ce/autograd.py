"""The autograd Function: which schedule runs, what is saved, and what a second derivative is made of.

It is handed a backend and a differentiable composite, and names no device.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _torch, operators
from .contract import Backend, Call, Stats, Upstream
from .options import Options

_INPUT, _TARGET, _WEIGHT, _GRAD, _SAVED = range(5)  # what is saved, in order
_NO_GRADIENTS = (None,) * 4  # of what follows the target
_LARGE = 1 << 20  # bytes of logits
_thread = threading.local()
Composite = Callable[[Call], tuple[Tensor, Stats | None]]  # the loss, differentiable to any order


def with_gradient(call: Call, backend: Backend, composite: Composite) -> tuple[Tensor, Stats | None]:
    """The loss, part of autograd's graph, and the statistics if asked for."""
    outputs = _apply(*call, backend, composite)
    loss = outputs[0] if call.options.return_stats else outputs
    if not call.input.is_leaf:
        # Saved themselves, with a hook that knows the loss, the logits would never be collected.
        _torch.save_alias(loss.grad_fn, _GRAD if loss.grad_fn.overwrote else _INPUT, call.input)
    return (loss, Stats(*outputs[1:])) if call.options.return_stats else (loss, None)


class _Waits:
    """Lives as long as a large fused gradient waits for its backward."""


def _waiting() -> _Waits | None:
    """That of this thread's last large fused gradient."""
    last = getattr(_thread, "waits", None)
    return last and last()


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
        # gradient already divided by N to zero unless a loss scale is known; 16 bits in place, which would find no
        # logits to start again from for another upstream gradient; the gradient of probabilities; and what is saved
        # through hooks, which free or move it.
        fused = options.reduction != "none" and not ctx.needs_input_grad[1]
        fused = fused and not (options.inplace and input.itemsize == 2)
        fused = fused and (input.dtype != torch.float16 or options.grad_scale is not None)
        fused = fused and not _torch.has_hooks()
        if fused and input.nbytes >= _LARGE and not options.inplace:
            # Beside the logits a gradient is a second tensor of their size: one at a time, where several losses wait.
            fused = _waiting() is None
            if fused:
                ctx.waits = _Waits()
                _thread.waits = weakref.ref(ctx.waits)
        if isinstance(options.num_items, Tensor) or isinstance(options.grad_scale, Tensor):
            options = frozen(options)
        if input.is_inference():  # which autograd does not save; it is the target that wants a gradient
            input = input.clone()
        call = Call(input, target, weight, options)
        loss, grad, saved, stats = backend.forward(call, "fused" if fused else "recompute")
        if options.inplace and fused:
            torch.autograd.graph.increment_version(input)
        ctx.version, ctx.overwrote = None, grad is input
        ctx.save_for_backward(None if grad is input else input, target, weight, grad, saved)
        ctx.options, ctx.backend, ctx.composite = options, backend, composite
        ctx.set_materialize_grads(False)
        if stats is None:
            return loss
        ctx.mark_non_differentiable(stats.z_loss, stats.argmax)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *of_stats: Tensor | None) -> Any:
        g_lse, _, _, g_entropy = of_stats or (None,) * 4
        read = _torch.saved(ctx)
        target, grad = _torch.with_memory(read(_TARGET)), _torch.with_memory(read(_GRAD))
        if ctx.overwrote:
            _check_unchanged(ctx, grad)
        # create_graph=True, or a transform of this backward: only differentiable operators will do.
        if torch.is_grad_enabled() or any(map(_torch.is_transformed, (grad_output, g_lse, g_entropy))):
            call = Call(_logits(ctx, read), target, _torch.with_memory(read(_WEIGHT)), ctx.options)
            received = grad_output, g_lse, g_entropy
            return *differentiable(call, ctx.composite, ctx.needs_input_grad, *received), *_NO_GRADIENTS
        options, backend, keep = ctx.options, ctx.backend, _torch.keeps_graph()
        if not keep:
            ctx.waits = None
        g_loss = target.new_zeros((), dtype=torch.float32) if grad_output is None else grad_output
        g_loss = _torch.with_memory(g_loss)
        dx, dt = None, None
        if g_lse is not None or g_entropy is not None:
            grad = None  # it was made for statistics without an upstream gradient
        if grad is not None:
            dx = backend.rescale(grad, target, options, g_loss, keep, exactly=not options.inplace)
        if dx is None:
            weight, saved = _torch.with_memory(read(_WEIGHT)), read(_SAVED)
            upstream = Upstream(g_loss, _torch.with_memory(g_lse), _torch.with_memory(g_entropy))
            # Read as late as here, because torch lets them be changed in place after forward.
            try:
                call = Call(_logits(ctx, read), target, weight, options)
            except RuntimeError:
                if grad is None:
                    raise
                dx = backend.rescale(grad, target, options, g_loss, keep, exactly=False)
            else:
                dx, dt = backend.backward(call, grad, saved, upstream, keep, ctx.needs_input_grad[1])
                if options.inplace:
                    torch.autograd.graph.increment_version(call.input)
        # In place it is, or shares the memory of, the logits with their graph.
        return dx.detach() if options.inplace else dx, dt, *_NO_GRADIENTS


_apply = _torch.apply_of(CrossEntropy)


def _logits(ctx: Any, read: Callable[[int], Any]) -> Tensor:  # (N, C, d1..dk)
    """The logits that forward saved.

    Raises:
        RuntimeError: they were changed in place or freed since.
    """
    input = read(_INPUT)
    _check_unchanged(ctx, input)
    return _torch.with_memory(input)  # type: ignore[no-any-return]


def _check_unchanged(ctx: Any, logits: Tensor | None) -> None:
    """What torch no longer looks after, once an alias is saved."""
    if logits is None or (ctx.version is not None and _torch.version(logits) != ctx.version):
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            + ("inplace=True wrote" if logits is None else f"someone wrote, at {tuple(logits.shape)},")
            + " over the logits. Clone them before they are changed."
        )


def frozen(options: Options) -> Options:
    """Backward reads these tensors again; a loss scaler may have changed its scale in place by then."""
    num_items, grad_scale = (
        value.detach().clone() if isinstance(value, Tensor) else value
        for value in (options.num_items, options.grad_scale)
    )
    return options._replace(num_items=num_items, grad_scale=grad_scale)


def differentiable(
    call: Call,
    composite: Composite,
    wanted: Sequence[bool],
    grad_output: Tensor | None,  # () or R
    g_lse: Tensor | None,  # R
    g_entropy: Tensor | None,  # R
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the logits and of probabilities, where wanted, out of operators that every transform takes."""
    if _torch.under_transforms():  # whose levels autograd.grad would not see
        g_loss = call.input.new_zeros(()) if grad_output is None else grad_output
        return operators.gradients(call, Upstream(g_loss, g_lse, g_entropy), wanted[1])
    inputs = [tensor for tensor, needed in zip(call[:2], wanted, strict=False) if needed]
    with torch.enable_grad():
        loss, stats = composite(call)
        pairs = [(loss, grad_output), (stats and stats.lse, g_lse), (stats and stats.entropy, g_entropy)]
        outputs, grads = zip(*((output, grad) for output, grad in pairs if grad is not None), strict=True)
        found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=True))
    return tuple(next(found) if needed else None for needed in wanted[:2])  # type: ignore[return-value]
