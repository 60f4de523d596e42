"""A shard of the classes, where others hold the rest: its sums, and its gradient from the sums of whole rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import Call, RowSums, Upstream
from ...options import Options
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
    return _part(_sums_alone(call, call.options.return_stats), None)


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


def finish(call: Call, sums: Tensor, upstream: Upstream, into: Tensor) -> None:
    """See `contract.Backend`."""
    # The kernels do not differentiate the entropy yet.
    if upstream.entropy is not None or self_check.declines(call.input.device):
        reference.finish(call, sums, upstream, into)
        return
    upstream = Upstream(readable(upstream.loss), None if upstream.lse is None else readable(upstream.lse))
    _finish(_sums_alone(call, False), readable(sums).contiguous(), upstream, into, None)


def _finish(call: Call, sums: Tensor, upstream: Upstream, into: Tensor, like: Cut | None) -> None:
    """As `_part`; the sums side by side in memory."""
    if call.input.numel() == 0:
        return
    sizes, views = matrices(call.input, None, into)
    plan = cut(call, sizes, views, held=False)
    if like is not None:
        plan = plan.as_in(like)
    elif variant := self_check.unsettled("finish", call, plan, views, upstream.loss.dtype, upstream.lse is None):

        def run(few: Call, sums: Tensor, upstream: Upstream, into: Tensor) -> None:
            _finish(few, sums, upstream, into, plan)

        if not self_check.finish_is_right(variant, call, sums, upstream, into, run):
            reference.finish(call, sums, upstream, into)
            return
    lse = None if upstream.lse is None else rows(upstream.lse)
    received = Received(None, None, rows(upstream.loss), lse, None, sums)
    kernels.run_backward(call, plan, sizes, views, received, Grads(views[2] or NOTHING, NOTHING))


def _sums_alone(call: Call, wants_stats: bool) -> Call:
    """The call without the options that have no say here: each of their values would be a variant of the kernels.

    Nor has `inplace`: the program that writes a gradient has read its logit, and no other does.
    """
    plain = Options(*call.options[:4])
    return call._replace(options=plain._replace(reduction="none", return_stats=wants_stats, shard=call.shard))
