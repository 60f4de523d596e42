"""Loading and storing: rows, their targets, tiles of their classes, whatever the strides."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...contract import RowSums
from .formula import transform

ELSEWHERE = tl.constexpr(-2)  # y of a row whose target another shard of the classes holds


class RowGroup(NamedTuple):
    """The rows that a program takes at a time, (R, 1) each."""

    o: Any  # which rows of the outer dimensions
    i: Any  # which of the inner one
    row_mask: Any  # which rows exist
    number: Any  # of the row among all
    counted: Any  # which rows are not ignored
    y: Any  # the target, from the first class here; ELSEWHERE; -1 if no such class exists, and under probabilities


class Source(NamedTuple):
    """Where a group's logits and probabilities lie."""

    given: Any  # arguments.Given
    x_at: Any  # (R, 1)
    t_at: Any  # (R, 1), or None where the target holds class indices
    read: Any  # (R, 1), which rows are read


@triton.constexpr_function
def accumulator(pointer):
    return tl.float64 if pointer.element_ty == tl.float64 else tl.float32


@triton.constexpr_function
def is_float32(pointer):
    return pointer.element_ty == tl.float32


@triton.constexpr_function
def row_dtype(pointer, traits):
    """Of a row's values, see `formula.Options`."""
    wide = is_float32(pointer) and (traits.SCALED or traits.SOFTCAP)
    return tl.float64 if wide else accumulator(pointer)


@triton.jit
def load_scalar(numbers, i, ACC: tl.constexpr):
    """numbers[i], or 1."""
    if numbers is None:
        value = tl.full((), 1.0, ACC)
    else:
        value = tl.load(numbers + i).to(ACC)
    return value


@triton.jit
def offset(i, stride, ALIGN: tl.constexpr):
    if stride is None:
        at = i
    else:
        at = i.to(tl.int64) * (stride // ALIGN * ALIGN)
    return at


@triton.jit
def locate(matrix, sizes, group, ALIGN: tl.constexpr):  # (R, 1)
    """Offsets of the group's rows."""
    at = offset(group.i, matrix.inner, ALIGN)
    if matrix.outer is not None:
        o = group.o
        for d in tl.static_range(len(sizes)):
            at += offset(o % sizes[d], matrix.outer[d], ALIGN)
            o //= sizes[d]
    return at


@triton.jit
def tile_indices(ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The numbers of a program's rows, (R, 1), and of a tile's classes, (1, B)."""
    if ROWS == 1:
        r, lanes = tl.arange(0, 1), tl.arange(0, BLOCK)
    else:
        r, lanes = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    return r, lanes


@triton.jit
def load_target(target, number, row_mask, C, ignore_index, bad):
    """Which rows are counted, and their y; -1 for a class that does not exist, which is told to `bad`."""
    y = tl.load(target.ptr + number * target.step, mask=row_mask, other=0).to(tl.int64)
    counted, exists = row_mask & (y != ignore_index), (y >= 0) & (y < C)
    if bad is not None:
        tl.store(bad + tl.zeros_like(y), y, mask=counted & ~exists)
    return counted, tl.where(exists, y, -1)


@triton.jit
def load_group(p, r, given, C, inner, ignore_index, bad, PROBS: tl.constexpr):
    """RowGroup p; no row is ignored where the target holds probabilities."""
    ROWS: tl.constexpr = r.shape[0]
    if given.sizes is None:
        o, i = tl.zeros(r.shape, tl.int64), tl.full(r.shape, p, tl.int64) * ROWS + r
    else:
        groups = tl.cdiv(inner, ROWS)
        o, i = (p // groups).to(tl.int64), (p % groups).to(tl.int64) * ROWS + r
    row_mask, number = i < inner, o * inner + i
    if PROBS:
        counted, y = row_mask, tl.full(r.shape, -1, tl.int32)
    else:
        total = C if given.shard is None else given.shard.total
        counted, y = load_target(given.target, number, row_mask, total, ignore_index, bad)
        if given.shard is not None:
            here = y - given.shard.first
            y = tl.where(y < 0, y, tl.where((here >= 0) & (here < C), here, ELSEWHERE))
        y = y.to(tl.int32)  # only now: all classes may be more than it holds
    return RowGroup(o, i, row_mask, number, counted, y)


@triton.jit
def count_rows(given, inner):
    """How many rows there are in all."""
    count = inner.to(tl.int64)
    if given.sizes is not None:
        for d in tl.static_range(len(given.sizes)):
            count *= given.sizes[d]
    return count


@triton.jit
def store_sums(sums, at, step, mask):
    """The RowSums, `step` float64 from one field to the next."""
    for i in tl.static_range(len(sums)):
        tl.store(at + i * step, sums[i].to(tl.float64), mask=mask)


@triton.jit
def read_sums(at, step, like, mask):
    """The RowSums that `store_sums` left at this place, in the dtypes of `like`."""
    numbers = ()
    for i in tl.static_range(len(like)):
        value = tl.load(at + i * step, mask=mask, other=0.0)
        numbers += (value.to(like[i].dtype),)  # type: ignore[assignment]
    return RowSums(*numbers)  # type: ignore[call-arg]


@triton.jit
def load_y(source, y, z_y, options):  # (R, 1) each
    """z_y, unless it is known, and q_y; -inf and 0 from another shard. Class -1 is never read: its z_y is NaN."""
    logits, target = source.given.logits, source.given.target
    ACC: tl.constexpr = accumulator(logits.ptr.dtype)
    exists = source.read & (y >= 0)
    if source.t_at is not None:
        t_y = tl.load(target.ptr + source.t_at + offset(y, target.col, 1), mask=exists, other=0.0).to(ACC)
    else:
        t_y = tl.full(y.shape, 1.0, ACC)
        x_y = tl.load(logits.ptr + source.x_at + offset(y, logits.col, 1), mask=exists, other=float("nan")).to(ACC)
        z_y = transform(x_y, options)
    q_y = (1.0 - options.e) * t_y + options.e / options.total
    if source.given.weight is not None:
        q_y *= tl.load(source.given.weight + y, mask=exists, other=1.0).to(ACC)
    if source.given.shard is not None:
        z_y, q_y = tl.where(y == ELSEWHERE, float("-inf"), z_y), tl.where(y == ELSEWHERE, 0.0, q_y)
    return z_y, q_y


@triton.jit
def load_x(source, x_at, col_mask, KEEP: tl.constexpr):  # (R, B) each
    """Logits; col_mask: which of their classes exist, None if all do. KEEP: how long they stay in the cache."""
    logits = source.given.logits
    mask = source.read if col_mask is None else source.read & col_mask
    x = tl.load(logits.ptr + x_at, mask=mask, other=0.0, eviction_policy=KEEP)
    return x.to(accumulator(logits.ptr.dtype))


@triton.jit
def load_z_and_q(
    source,
    x,  # (R, B)
    cols,  # (R, B), which classes
    col_mask,  # (R, B), which of them exist; None if all do
    options,
    DENSE: tl.constexpr,
    ALIGN: tl.constexpr,
    KEEP: tl.constexpr,
):
    """z and q of one tile, (R, B); q without the share of a class index."""
    target, weight = source.given.target, source.given.weight
    ACC: tl.constexpr = x.dtype
    mask = source.read if col_mask is None else source.read & col_mask
    z = transform(x, options)
    if col_mask is not None:
        # Only now: a lane filled with -inf before the softcap would become -s and be summed.
        z = tl.where(col_mask, z, float("-inf"))
    q = tl.zeros(x.shape, ACC)
    if source.t_at is not None:
        t_at = source.t_at + offset(cols, target.col, ALIGN)
        q = tl.load(target.ptr + t_at, mask=mask, other=0.0, eviction_policy=KEEP).to(ACC)
    if DENSE:
        q = (1.0 - options.e) * q + options.e / options.total
        if weight is not None:
            w = tl.load(weight + cols) if col_mask is None else tl.load(weight + cols, mask=col_mask, other=0.0)
            q *= w.to(ACC)
    return z, q


@triton.jit
def store_tile(matrix, at, values, mask):  # (R, B) each
    if matrix.ptr.dtype.element_ty != tl.float64:
        values = values.to(tl.float32)  # float64 has no way of its own to 16 bits
    tl.store(matrix.ptr + at, values.to(matrix.ptr.dtype.element_ty), mask=mask, cache_modifier=".cs")
