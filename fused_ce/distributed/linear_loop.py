"""The loop of a linear head of which this rank has some of the classes: that of `linear/chunks.py`, with other kernels.

A chunk's logits are this rank's columns, and one exchange a chunk gives the sums of whole rows. The gradient of the
hidden states is a sum over the ranks, added up once, after the last chunk, in float32; where forward makes it, forward
adds it up, so that backward needs nobody.

On a CPU all ranks hear of what went wrong on one of them before the first chunk, in the exchange of each, and after the
last. On a GPU nobody looks: a rank that fails sends NaN into all that the others still wait for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import _torch
from ..backends import reference
from ..contract import Backend, Call, Forward, Gradients, RowSums, Schedule, Upstream
from ..linear import chunks
from ..linear.autograd import makes_gradients, rounded
from ..linear.contract import LinearCall, LinearForward, LinearGradients, Wanted
from ..linear.functional import requires_grad
from ..options import Shard
from . import exchange, status
from .autograd import once
from .layout import Ranks
from .linear_gate import Given
from .rows import rows_of
from .sums import part_of

T = TypeVar("T")


class ShardedLoop(NamedTuple):
    """See `linear.contract.Loop`."""

    backend: Backend
    ranks: Ranks
    reduces: bool  # whether the ranks' terms of the input's gradient are added up

    def forward(self, call: LinearCall, wanted: Wanted) -> LinearForward:
        kernels = _Sharded(self, call, wanted)
        found = kernels.together(lambda: chunks.forward(call, kernels, wanted))
        return found._replace(gradients=self._added(found.gradients))

    def backward(self, call: LinearCall, wanted: Wanted, upstream: Upstream) -> LinearGradients:
        call = call._replace(options=call.options._replace(return_stats=upstream.entropy is not None))
        kernels = _Sharded(self, call, wanted)
        return self._added(kernels.together(lambda: chunks.backward(call, kernels, wanted, upstream)))

    def differentiable(
        self, call: LinearCall, g_loss: Tensor | None, g_lse: Tensor | None, g_entropy: Tensor | None, wanted: Wanted
    ) -> LinearGradients:
        """Each gradient, out of which there is no further one.

        Raises:
            RuntimeError: backward is vectorised.
        """
        if any(map(_torch.is_transformed, (g_loss, g_lse, g_entropy))):
            raise RuntimeError(
                "expected one backward at a time of a vocab-parallel linear cross entropy, got it under torch.func or "
                "is_grads_batched=True; call backward in a loop"
            )
        with torch.no_grad():
            upstream = call.input.new_zeros(()) if g_loss is None else _torch.with_memory(g_loss)
            of_stats = map(_torch.with_memory, (g_lse, g_entropy))
            found = rounded(self.backward(call, wanted, Upstream(upstream, *of_stats)), call)
        of = (call.input, call.linear_weight, call.linear_bias, g_loss, g_lse, g_entropy)
        return LinearGradients(*(None if grad is None else once(grad, *of) for grad in found))

    def _added(self, found: LinearGradients) -> LinearGradients:
        if found.input is None or not self.reduces:
            return found
        return found._replace(input=exchange.add_up(found.input, self.ranks))


def refuse(given: Given, error: Exception, ranks: Ranks, reduces: bool) -> None:
    """Tell the other ranks of a call that was refused here."""
    input = given.input
    if not isinstance(input, Tensor) or input.dim() < 1 or chunks.can_wait(input):
        exchange.tell(status.of_error(error), ranks)
        return
    rows = given.chunk_rows if isinstance(given.chunk_rows, int) and given.chunk_rows > 0 else None
    call = LinearCall(
        input.reshape(-1, input.shape[-1]), *given[1:5], given.options._replace(shard=Shard(0, 1)), input.dtype, rows
    )
    loop = ShardedLoop(reference, ranks, reduces)
    _Sharded(loop, call, Wanted(makes_gradients(call) and requires_grad(input), False, False)).fail(error)


class _Sharded:
    """The kernels of a call's chunks, whose other classes other ranks hold; and what these still wait for."""

    def __init__(self, loop: ShardedLoop, call: LinearCall, wanted: Wanted) -> None:
        self.loop, self.call, self.wanted = loop, call, wanted
        self.begun = False
        self.done = 0  # rows whose sums were exchanged
        self.heard = False  # whether all ranks raise what is raised now

    def together(self, work: Callable[[], T]) -> T:
        """What all ranks do, each with chunks of the same rows.

        Raises:
            whatever is wrong here or, on a CPU, on another rank.
        """
        try:
            self.status = self._status()
            self._agree(self.status)
            self.begun = True
            found = work()
            self._agree(status.Status())
        except Exception as error:
            if not self.heard:
                self.fail(error)
            raise
        return found

    def forward(self, call: Call, schedule: Schedule) -> Forward:
        rows = rows_of(call)
        part = part_of(rows, self.loop.backend)
        self.heard = True
        sums = exchange.exchange(part, self.status, rows, self.loop.ranks)
        self.heard = False
        self.done += len(call.input)
        loss, stats = rows.loss(sums), rows.stats(sums) if call.options.return_stats else None
        joined, hint = torch.stack(sums), call.options.grad_scale
        grad = None
        if schedule == "fused":
            upstream = torch.as_tensor(1.0 if hint is None else hint, dtype=torch.float64, device=loss.device)
            grad = self.backward(call, None, joined, Upstream(upstream), False, False).input
        return Forward(loss, grad, joined, stats)

    def backward(
        self, call: Call, grad: Tensor | None, saved: Tensor | None, upstream: Upstream, keep: bool, wants_target: bool
    ) -> Gradients:
        assert saved is not None  # (8, n)
        if call.classes:
            given = rows_of(call).upstream(RowSums(*saved), *upstream)
            self.loop.backend.finish(call, saved, given, call.input)
        return Gradients(call.input)

    def _status(self) -> status.Status:
        call = self.call
        logits = call.input.new_empty(0, dtype=call.product_dtype)
        mine = status.of_call(Call(logits, call.target, call.weight, call.options), len(call.linear_weight))
        features, hint = call.input.shape[1], call.options.grad_scale
        return mine._replace(others=status.checksum(features, call.chunk_rows, hint, self.loop.reduces, *self.wanted))

    def _agree(self, mine: status.Status) -> None:
        if chunks.can_wait(self.call.input):
            self.heard = True
            status.check(exchange.tell(mine, self.loop.ranks))
            self.heard = False

    def fail(self, error: Exception) -> None:
        """Take part in what the other ranks are on their way into; on a GPU, in all of it."""
        x, options, ranks, taken = self.call.input, self.call.options, self.loop.ranks, len(self.call.input)
        if waits := chunks.can_wait(x):
            if self.begun:
                taken = int((self.call.target.long() != options.ignore_index).sum())
            if not self.begun or self.done == taken:
                exchange.tell(status.of_error(error), ranks)
                return
        size = chunks.chunk_size(self.call, taken)
        for start in range(self.done, taken, size):
            exchange.fail(error, min(size, taken - start), x.device, options.return_stats, ranks)
            if waits:
                return
        if self.wanted.input and self.loop.reduces:
            dtype = chunks.gradient_dtypes(self.call)[0]
            exchange.add_up(x.new_full(x.shape, math.nan, dtype=dtype), ranks)
