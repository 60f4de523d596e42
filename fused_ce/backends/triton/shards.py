"""A shard of the classes, where others hold the rest: its sums, and its gradient from the sums of whole rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import Call, RowSums, Upstream
from .. import reference
from . import kernels, self_check
from .arguments import Grads, Out, Received
from .plan import Cut, cut
from .readable import readable
from .rows import NOTHING, matrices, rows


def part(call: Call) -> Tensor:
    """See `contract.Backend`."""
    if self_check.declines(call.input.device):
        return reference.part(call)
    return _part(_sums_alone(call, inplace=False), None)


def _part(call: Call, like: Cut | None) -> Tensor:
    """By the variant of `like`, for `self_check`, without a look at it."""
    sums = call.input.new_empty((len(RowSums._fields), call.rows), dtype=torch.float64)
    if sums.numel():
        sizes, views = matrices(call.input, None, None)
        plan = cut(call, sizes, views, held=True)
        if like is not None:
            plan = plan.as_in(like)
        elif variant := self_check.unsettled("part", call, plan, views):
            if not self_check.part_is_right(variant, call, lambda few: _part(few, plan)):
                return reference.part(call)
        kernels.run_forward(call, plan, sizes, views, None, Out(None, None, None, NOTHING, sums))
    return sums


def finish(call: Call, sums: Tensor, upstream: Upstream) -> Tensor:
    """See `contract.Backend`."""
    if self_check.declines(call.input.device):
        return reference.finish(call, sums, upstream)
    upstream = Upstream(readable(upstream.loss), None if upstream.lse is None else readable(upstream.lse))
    return _finish(_sums_alone(call, return_stats=False), readable(sums).contiguous(), upstream, None)


def _finish(call: Call, sums: Tensor, upstream: Upstream, like: Cut | None) -> Tensor:
    """As `_part`; the sums side by side in memory."""
    input = call.input
    dx = input if call.options.inplace else input.new_empty(input.shape)
    if input.numel():
        sizes, views = matrices(input, None, dx)
        plan = cut(call, sizes, views, held=False)
        if like is not None:
            plan = plan.as_in(like)
        elif variant := self_check.unsettled("finish", call, plan, views, upstream.loss.dtype, upstream.lse is None):

            def run(few: Call, sums: Tensor, upstream: Upstream) -> Tensor:
                return _finish(few, sums, upstream, plan)

            if not self_check.finish_is_right(variant, call, sums, upstream, run):
                return reference.finish(call, sums, upstream)
        received = Received(
            None, None, rows(upstream.loss), None if upstream.lse is None else rows(upstream.lse), None, sums
        )
        kernels.run_backward(call, plan, sizes, views, received, Grads(views[2] or NOTHING, NOTHING))
    return dx


def _sums_alone(call: Call, **more: bool) -> Call:
    """The call without the options that have no say here: each of their values would be a variant of the kernels."""
    options = call.options._replace(reduction="none", dtype=None, lse_square_scale=0.0, num_items=None, grad_scale=None)
    return call._replace(options=options._replace(**more))
