"""The autograd Function: which schedule runs, what is saved, and what a second derivative is made of.

It is handed a backend and a differentiable composite, and names no device.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

Composite = Callable[[Tensor], Tensor]


class CrossEntropy(torch.autograd.Function):
    """Cross entropy by a backend's kernels; exact when differentiated again."""

    # Old style (ctx in forward) on purpose: overriding setup_context costs some 30 us per call, because
    # torch then binds the arguments through inspect.signature every time.
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # (N, C)
        target: Tensor,  # (N,)
        weight: Tensor | None,  # (C,)
        options: Any,
        backend: ModuleType,
        composite: Composite,
    ) -> Tensor:
        # float16 flushes a gradient already divided by N to zero; a row vector of upstream gradients is
        # not known yet. Both are computed in backward, from the logits.
        fused = options.reduction != "none" and input.dtype != torch.float16
        loss, grad, stats = backend.forward(input, target, weight, options, "fused" if fused else "recompute")
        ctx.save_for_backward(target, weight, grad, stats)
        # Not among the saved tensors: torch's cross entropy lets the logits be changed in place after
        # forward, and so does the fused schedule, which does not need them again.
        ctx.input, ctx.input_version = input, input._version
        ctx.options, ctx.backend, ctx.composite = options, backend, composite
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.input is None:
            raise RuntimeError(
                "Trying to backward through the graph a second time: the saved tensors have been freed. "
                "Specify retain_graph=True in the first backward."
            )
        target, weight, grad, stats = ctx.saved_tensors
        unchanged = ctx.input._version == ctx.input_version
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        # create_graph=True, or a vmap over upstream gradients: only differentiable operators will do.
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            _require(unchanged, ctx)
            result = _differentiable(ctx.input, ctx.composite, grad_output)
        else:
            _require(unchanged or grad is not None, ctx)
            result = ctx.backend.backward(
                grad_output, ctx.input if unchanged else None, target, weight, ctx.options, grad, stats, keep
            )
        if not keep:
            ctx.input = None
        return result, None, None, None, None, None


def _differentiable(input: Tensor, composite: Composite, grad_output: Tensor) -> Tensor:
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(composite(input), input, grad_output, create_graph=True)
    return grad


def _require(unchanged: bool, ctx: FunctionCtx) -> None:
    if not unchanged:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"the logits, {tuple(ctx.input.shape)}, are at version {ctx.input._version}; expected version "  # type: ignore[attr-defined]
            f"{ctx.input_version} instead. Clone them before changing them."  # type: ignore[attr-defined]
        )
