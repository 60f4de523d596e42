"""The autograd Function of sharded logits, once their rows' sums are known: nothing crosses between ranks here."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _torch
from ..backends import pool
from ..contract import Backend, RowSums
from .gate import class_dim
from .rows import Rows


class VocabParallel(torch.autograd.Function):
    """Cross entropy of a shard of the classes, of which other ranks hold the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,  # (N, V_local, d1..dk), padding included
        sums: Tensor,  # (8, R), of whole rows
        rows: Rows,
        backend: Backend,
    ) -> Any:
        ctx.rows, ctx.backend = rows._replace(call=rows.call._replace(input=input)), backend
        ctx.held = rows.call.classes
        ctx.save_for_backward(input, rows.call.target, rows.call.weight, sums)
        ctx.set_materialize_grads(False)
        loss = rows.loss(RowSums(*sums))
        if not rows.call.options.return_stats:
            return loss
        stats = rows.stats(RowSums(*sums))
        ctx.mark_non_differentiable(stats.z_loss, stats.argmax)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *of_stats: Tensor | None) -> Any:
        g_lse, _, _, g_entropy = of_stats or (None,) * 4
        input, target, weight, sums = map(_torch.with_memory, ctx.saved_tensors)
        rows, held = ctx.rows, ctx.held
        options = rows.call.options
        with torch.no_grad():
            whole = input.detach()
            grad = whole if options.inplace else _like(whole)
            own, into = (tensor.narrow(class_dim(whole), 0, held) for tensor in (whole, grad))
            if held < whole.shape[class_dim(whole)]:
                grad.narrow(class_dim(whole), held, whole.shape[class_dim(whole)] - held).zero_()
            call = rows.call._replace(input=own, target=target, weight=weight)
            if held:
                upstream = rows.upstream(RowSums(*sums), grad_output, g_lse, g_entropy)
                ctx.backend.finish(call, sums, upstream, into)
        if options.inplace:
            torch.autograd.graph.increment_version(input)
        if torch.is_grad_enabled():
            grad = once(grad, input, grad_output, g_lse)
        return grad, None, None, None


def once(grad: Tensor, *others: Tensor | None) -> Tensor:
    """The gradient, which depends on the others: they get no second derivative of zero."""
    return _Once.apply(grad, *others)  # type: ignore[no-any-return, no-untyped-call]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *others: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(
            "expected one derivative of a vocab-parallel cross entropy, got a second one: gather the logits (or the "
            "linear weight) and call fused_ce.cross_entropy (linear_cross_entropy) for double backward"
        )


def _like(logits: Tensor) -> Tensor:
    return pool.empty_like(logits) if logits.is_cpu else torch.empty_like(logits)
