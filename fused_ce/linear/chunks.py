"""The loop of linear cross entropy: chunk after chunk, its logits in a buffer that then holds their gradient.

    logits = x W^T + b        the backend turns them into dlogits, in place
    dx = dlogits W            dW = sum over chunks of dlogits^T x            db = sum of dlogits

It is handed a backend, and the logits of a chunk are an ordinary call of its contract. The divisor of a mean is known
before the first chunk, so that each chunk's loss and gradient are final.

On a CPU, ignored rows are left out before the products; elsewhere that would wait for the device, and their features
become 0, so that what they hold reaches nothing. Sums over chunks are float32 (float64 for float64). Products are
written into memory that is there (`out=`), which autocast leaves alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _torch
from ..backends import pool
from ..contract import Call, Stats, Upstream
from ..options import Options
from . import products
from .contract import Kernels, LinearCall, LinearForward, LinearGradients, Wanted

# Rows of a chunk. float32 products reach their speed at 256; the weight gradient of a 16-bit chunk is rounded, then
# added to a float32 sum of V x H numbers, which more rows share; on a GPU that traffic hides from some 930 rows on.
_ROWS, _ROWS_OF_16_BITS, _ROWS_ON_A_GPU = 256, 1024, 2048
_LOGITS = 1 << 22  # of a chunk, at least: of few classes, 256 rows would cost more in Python than in products


class Chunk(NamedTuple):
    rows: slice | Tensor  # of the whole call
    x: Tensor  # (n, H), in the dtype of the products
    call: Call  # of logits (n, V)


class Plan(NamedTuple):
    """What all chunks of a call share."""

    kept: Tensor | None  # rows that are not ignored; None: all rows are taken
    taken: int  # how many
    options: Options
    weight: Tensor | None  # (V,) class weights
    W: Tensor  # (V, H), in the dtype of the products
    bias: Tensor | None  # (V,)
    masked: bool  # whether ignored rows are taken, as zeros

    @property
    def acc(self) -> torch.dtype:
        return torch.float64 if self.W.dtype == torch.float64 else torch.float32


def forward(call: LinearCall, backend: Kernels, wanted: Wanted) -> LinearForward:
    """The loss, the statistics if asked for, and the gradients wanted, for an upstream gradient of grad_scale.

    Raises:
        IndexError: a target out of range (CPU).
    """
    return _torch.in_any_process(lambda: _forward(call, backend, wanted))


def backward(call: LinearCall, backend: Kernels, wanted: Wanted, upstream: Upstream) -> LinearGradients:
    """The gradients wanted for these upstream gradients, from the inputs alone."""
    return _torch.in_any_process(lambda: _backward(call, backend, wanted, upstream))


def _forward(call: LinearCall, backend: Kernels, wanted: Wanted) -> LinearForward:
    plan, options = _plan(call), call.options
    N, dtype, none = len(call.input), options.dtype or call.product_dtype, options.reduction == "none"
    loss = call.input.new_zeros(N if none else (), dtype=dtype if none else torch.float64)
    stats = _no_stats(loss, N, plan.acc) if options.return_stats else None
    gradients = _empty(call, plan, wanted)
    schedule = "fused" if any(wanted) else "loss"
    for i, chunk in enumerate(_chunks(call, plan)):
        result = backend.forward(chunk.call, schedule)  # type: ignore[arg-type]
        if none:
            loss[chunk.rows] = result.loss.to(dtype)
        else:
            loss += result.loss
        if stats is not None and result.stats is not None:
            for whole, part in zip(stats, result.stats, strict=True):
                whole[chunk.rows] = part
        if result.grad is not None:
            _add(gradients, result.grad, chunk, plan, first=i == 0)
    if plan.taken == 0 and options.reduction == "mean" and options.num_items is None:
        loss.fill_(math.nan)  # a mean over nothing
    return LinearForward(loss.to(dtype), gradients, stats)


def _backward(call: LinearCall, backend: Kernels, wanted: Wanted, upstream: Upstream) -> LinearGradients:
    wants_stats = upstream.entropy is not None
    plan = _plan(call._replace(options=call.options._replace(return_stats=wants_stats, grad_scale=None)))
    gradients = _empty(call, plan, wanted)
    for i, chunk in enumerate(_chunks(call, plan)):
        saved = backend.forward(chunk.call, "recompute").saved
        of_rows = Upstream(*(g if g is None or g.dim() == 0 else g[chunk.rows] for g in upstream))  # type: ignore[arg-type]
        _add(gradients, backend.backward(chunk.call, None, saved, of_rows, False, False).input, chunk, plan, i == 0)
    return gradients


def can_wait(tensor: Tensor) -> bool:
    """Whether Python may look at numbers: on a GPU it would wait for all that was launched before."""
    return tensor.is_cpu


def gradient_dtypes(call: LinearCall) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of the gradients that `forward` makes: those of input, weight and bias."""
    dtype = products.computed_in(call.product_dtype, call.input.device)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    # Out of float16 that was widened, float32: a gradient divided by many rows is too small for float16. The product of
    # an only chunk is rounded once as it is.
    if dtype == acc:  # in which case a graph is not bound to how many rows there are
        return acc, acc, acc
    # Of a shard of the classes the input's gradient is one term of a sum.
    of_input = call.input.dtype if call.options.shard is None else acc
    return of_input, (dtype if call.input.shape[0] <= _most_rows(call) else acc), acc


def _most_rows(call: LinearCall) -> int:
    if call.chunk_rows is not None:
        return call.chunk_rows
    return most_rows(call.input, call.product_dtype, call.linear_weight.shape[0])


def most_rows(input: Tensor, product_dtype: torch.dtype, classes: int) -> int:  # (N, H)
    """Rows of a chunk, where the call does not say."""
    if not can_wait(input):
        return _ROWS_ON_A_GPU
    narrow = products.computed_in(product_dtype, input.device).itemsize == 2
    return max(_ROWS_OF_16_BITS if narrow else _ROWS, _LOGITS // max(1, classes))


def chunk_size(call: LinearCall, taken: int) -> int:
    """Chunks of one size, so that the last is not a small rest."""
    return max(1, math.ceil(taken / max(1, math.ceil(taken / _most_rows(call)))))


def _plan(call: LinearCall) -> Plan:
    counted = None if call.has_probs else call.target.long() != call.options.ignore_index  # a uint8 of 156 equals -100
    kept, masked, count = None, counted is not None, len(call.input)
    if counted is not None and can_wait(call.input):
        masked, count = False, int(counted.sum())
        kept = None if count == len(counted) else counted.nonzero().squeeze(1)
    dtype = products.computed_in(call.product_dtype, call.input.device)
    W, bias = call.linear_weight.to(dtype), None if call.linear_bias is None else call.linear_bias.to(dtype)
    options, weight = _with_divisor(call, counted, count)
    acc = torch.float64 if torch.float64 in (dtype, options.dtype) else torch.float32
    return Plan(kept, count, options._replace(dtype=acc, inplace=True), weight, W, bias, masked)


def _with_divisor(call: LinearCall, counted: Tensor | None, count: int) -> tuple[Options, Tensor | None]:
    """Options and class weights for the chunks, with the mean's divisor, that of all rows, as their num_items."""
    options, weight, target = call.options, call.weight, call.target
    if options.reduction != "mean" or options.num_items is not None:
        return options, weight
    rows = count if can_wait(call.input) or counted is None else counted.sum()
    if weight is None or counted is None:
        return options._replace(num_items=rows), weight
    y = torch.where(counted, target.long(), 0)
    if can_wait(call.input) and not bool(((y >= 0) & (y < len(weight))).all()):
        return options._replace(num_items=rows), weight  # the backend will say so, in torch's words
    acc = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = torch.where(counted, weight.double()[y.clamp(0, len(weight) - 1)], 0).sum()
    if not options.lse_square_scale:
        return options._replace(num_items=total), weight
    # The z-loss is divided by the count alone. One number divides both, and the class weights take what differs.
    return options._replace(num_items=rows), (weight.double() * (rows / total)).to(acc)


def _chunks(call: LinearCall, plan: Plan) -> Iterator[Chunk]:
    """Each holds the same memory; it is overwritten by the next."""
    dtype, (V, H) = plan.W.dtype, plan.W.shape
    size = chunk_size(call, plan.taken)
    logits, gathered = _memory((size, V), plan.W), None
    if plan.kept is not None:
        gathered = call.input.new_empty((size, H))
    for start in range(0, plan.taken, size):
        rows: slice | Tensor = slice(start, min(start + size, plan.taken))
        n = rows.stop - rows.start  # type: ignore[union-attr]
        if gathered is not None:
            assert plan.kept is not None
            rows = plan.kept[rows]
            x = torch.index_select(call.input, 0, rows, out=gathered[:n])
        else:
            x = call.input[rows]
        target = call.target[rows]
        if plan.masked:
            x = torch.where((target.long() != call.options.ignore_index)[:, None], x, 0)
        x = x.to(dtype)
        yield Chunk(rows, x, Call(products.logits(x, plan.W, plan.bias, logits[:n]), target, plan.weight, plan.options))


def _empty(call: LinearCall, plan: Plan, wanted: Wanted) -> LinearGradients:
    """Memory for the gradients, zero where no chunk writes."""
    dx = dW = db = None
    of_input, of_weight, of_bias = gradient_dtypes(call)
    if wanted.input:
        dx = _memory(call.input.shape, plan.W, of_input)
        if plan.kept is not None:
            dx.zero_()
    if wanted.linear_weight:
        dW = _memory(call.linear_weight.shape, plan.W, of_weight)
        if plan.taken == 0:
            dW.zero_()
    if wanted.linear_bias:
        db = plan.W.new_zeros(len(plan.W), dtype=of_bias)
    return LinearGradients(dx, dW, db)


def _add(gradients: LinearGradients, g: Tensor, chunk: Chunk, plan: Plan, first: bool) -> None:  # g: (n, V)
    dx, dW, db = gradients
    if dx is not None:
        if isinstance(chunk.rows, slice):
            products.input_grad(g, plan.W, dx[chunk.rows])
        else:
            dx[chunk.rows] = products.input_grad(g, plan.W, g.new_empty(chunk.x.shape)).to(dx.dtype)
    if dW is not None:
        products.add_weight_grad(dW, g, chunk.x, first)
    if db is not None:
        products.add_bias_grad(db, g)


def _no_stats(like: Tensor, N: int, acc: torch.dtype) -> Stats:
    lse, z_loss, entropy = (like.new_zeros(N, dtype=acc) for _ in range(3))
    return Stats(lse, z_loss, like.new_full((N,), -1, dtype=torch.int64), entropy)


def _memory(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised; on a CPU large memory is the pool's, for torch's allocator would map it anew on every call."""
    dtype = dtype or like.dtype
    return pool.empty(shape, dtype) if like.is_cpu else like.new_empty(shape, dtype=dtype)
