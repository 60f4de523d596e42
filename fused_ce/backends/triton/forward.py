"""The forward kernel: the loss, and with it the gradient or what backward makes it from."""

import triton
import triton.language as tl

from ...contract import RowSums
from .arguments import Grads
from .formula import LaneSums, Options, combine, finite, grad_factors, row_grad, row_loss, row_lse, row_stats
from .tiles import (
    RowTerms,
    Sink,
    Source,
    accumulator,
    count_rows,
    is_float32,
    load_group,
    load_scalar,
    load_tile,
    load_y,
    locate,
    offset,
    read_sums,
    row_dtype,
    store_sums,
    store_tile,
    sweep,
    tile_indices,
)


@triton.jit(do_not_specialize=["groups", "inner", "ignore_index"])
def forward(
    given,  # arguments.Given
    shared,  # arguments.Shared
    out,  # arguments.Out
    groups,  # of rows
    inner,  # size of the last row dimension
    ignore_index,
    # Annotated: a bare float arrives as float32, and float64 logits would be smoothed by 0.10000000149.
    e: tl.float64,
    k: tl.float64,
    s: tl.float64,
    L: tl.float64,
    TRAITS: tl.constexpr,
    TILING: tl.constexpr,
):
    """The losses of ROWS rows at a time, and the rest of `Out`.

    A program takes one group of rows after the other: with as many programs as groups, a row that is read twice would
    have left the cache before its second reading.
    """
    logits = given.logits
    ACC: tl.constexpr = accumulator(logits.ptr.dtype)
    ROW: tl.constexpr = row_dtype(logits.ptr.dtype, TRAITS)
    EXACT: tl.constexpr = is_float32(logits.ptr.dtype)
    ALIGN: tl.constexpr = TILING.ALIGN
    BLOCK: tl.constexpr = TILING.BLOCK
    PIECES: tl.constexpr = TILING.PIECES
    C = given.C // ALIGN * ALIGN if logits.col is None else given.C
    inner = inner // ALIGN * ALIGN if logits.inner is None else inner
    options = Options(
        C,
        C if given.shard is None else given.shard.total,
        tl.full((), e, ACC),
        tl.full((), k, ROW) if TRAITS.SCALED else None,
        tl.full((), s, ROW) if TRAITS.SOFTCAP else None,
        tl.full((), L, ROW) if TRAITS.Z_LOSS else None,
    )
    D = load_scalar(shared.norm, 0, ROW)
    ratio = D / load_scalar(shared.norm, 1, ROW)
    r, lanes = tile_indices(TILING.ROWS, BLOCK)
    for p in tl.range(tl.program_id(0), groups, tl.num_programs(0), disable_licm=True):
        group = load_group(p, r, given, C, inner, ignore_index, shared.bad, TRAITS.PROBS)
        x_at = locate(logits, given.sizes, group, ALIGN)
        t_at = locate(given.target, given.sizes, group, ALIGN) if TRAITS.PROBS else None
        # Ignored rows are not read, unless rows lie side by side: a mask with gaps would part a wide load.
        source = Source(given, x_at, t_at, group.row_mask if logits.inner is None else group.counted)
        zero, lowest = tl.zeros(r.shape, ROW), tl.full(r.shape, float("-inf"), ROW)
        if PIECES:
            z_y, q_y = zero, zero
            if not TRAITS.PROBS:
                z_y, q_y = load_y(source, group.y, zero, options)
            sums, tiles = load_sums(source, 0, lanes, group.y, z_y, q_y, options, TRAITS, TILING)
        elif TILING.STEP == 1:
            t = tl.program_id(1)
            sums, _ = load_sums(source, t * BLOCK, lanes, group.y, lowest, zero, options, TRAITS, TILING)
            at = shared.parts + (group.number * tl.num_programs(1) + t) * len(sums)
            store_sums(sums, at, 1, group.row_mask)
        else:
            # A part of no class; its z_y as in `load_sums`.
            sums = RowSums(lowest, zero, finite(lowest), zero, zero, zero, zero, tl.full(r.shape, -1, tl.int32))
            tiles = tl.cdiv(C, BLOCK)
            for t in range(0, tiles):
                if TILING.STEP == 2:
                    at = shared.parts + (group.number * tiles + t) * len(sums)
                    more = read_sums(at, 1, sums, group.row_mask)
                else:
                    more, _ = load_sums(source, t * BLOCK, lanes, group.y, lowest, zero, options, TRAITS, TILING)
                sums = combine(sums, more, TRAITS.PROBS, EXACT)
            if not TRAITS.PROBS:
                # The row knows its y, so that no tile need look whether it holds it.
                z_y, q_y = load_y(source, group.y, zero, options)
                sums = with_y(sums, z_y, q_y)
        if TILING.STEP != 1 and out.sums is not None:
            store_part(out.sums + group.number, count_rows(given, inner), group, sums, given.shard.first, TRAITS.STATS)
        elif TILING.STEP != 1:
            y = group.y
            if TRAITS.PROBS:
                y = sums.argmax
                sums = with_y(sums, sums.m, sums.q_y)  # a row of nothing but -inf is NaN
            once = group.row_mask & (tl.zeros_like(r) + tl.program_id(1) == 0)
            store_rows(out, group, once, sums, y, ratio, options, TRAITS)
            if out.grad.ptr is not None:
                if TRAITS.INPLACE:
                    tl.debug_barrier()  # no warp may still be reading these rows
                dx_at = locate(out.grad, given.sizes, group, ALIGN)
                scale = zero + load_scalar(shared.expected, 0, ROW) / D
                factors = grad_factors(sums, options, scale, ratio, zero, ACC)
                if PIECES and TILING.VECTOR == 1:
                    for t in tl.static_range(PIECES):
                        x, e_c, q = tiles[t]
                        cols = lanes + t * BLOCK
                        dx = row_grad(x, e_c, q, cols == y, factors, options, TRAITS.DENSE)
                        dx = tl.where(group.counted, dx, 0.0)  # an ignored row may hold NaN
                        mask = group.row_mask & (cols < C) if t == PIECES - 1 else group.row_mask
                        store_tile(out.grad, dx_at + offset(cols, out.grad.col, ALIGN), dx, mask)
                else:
                    sink = Sink(Grads(out.grad, out.grad), dx_at, None)
                    terms = RowTerms(y, sums.m, zero, factors, zero)
                    sweep(source, sink, group, terms, options, lanes, TRAITS.DENSE, TILING)


@triton.jit
def load_sums(
    source,
    start,  # the first class
    lanes,  # (1, B)
    y,  # (R, 1)
    z_y,  # (R, 1); -inf for a part that does not hold y
    q_y,  # (R, 1); 0 for such a part
    options,
    TRAITS: tl.constexpr,
    TILING: tl.constexpr,
):
    """The RowSums of PIECES tiles, and what is held of each for its gradient: x, exp(z - m) and q.

    Without PIECES it is one tile, which is read again for its gradient. Under probabilities the largest class is y, and
    z_y is finite(m): where no class is above -inf, none is left out (argmax -1, q_y 0), and `put_back` adds nothing.
    Where argmax is wanted and a class is NaN, m is NaN and argmax the first such class.
    """
    logits, C = source.given.logits, options.C
    PIECES: tl.constexpr = TILING.PIECES
    KEEP: tl.constexpr = "evict_first" if PIECES else "evict_last"
    BLOCK: tl.constexpr = lanes.shape[-1]
    COUNT: tl.constexpr = PIECES if PIECES else 1
    EXACT: tl.constexpr = is_float32(logits.ptr.dtype)
    nothing = tl.zeros_like(y + lanes).to(accumulator(logits.ptr.dtype))
    tiles, highest, at = (), nothing.to(q_y.dtype) + float("-inf"), nothing.to(tl.int32) + C
    for i in tl.static_range(COUNT):
        cols = lanes + (start + i * BLOCK)
        # Every class of the pieces before the last exists, so their loads need no mask.
        col_mask = cols < C if i == COUNT - 1 else None
        x_at = source.x_at + offset(cols, logits.col, TILING.ALIGN)
        x, z, q = load_tile(source, x_at, cols, col_mask, options, TRAITS.DENSE, TILING.ALIGN, KEEP)
        tiles += ((x, z, q),)  # type: ignore[assignment]
        if TRAITS.PROBS or TRAITS.STATS:
            at = tl.where(~(z <= highest) & (highest == highest), cols, at)
            highest = tl.maximum(highest, z, tl.PropagateNan.ALL)
        else:
            highest = tl.maximum(highest, z)
    argmax = tl.zeros_like(y) - 1
    if TRAITS.PROBS or TRAITS.STATS:
        # Lanes that hold NaN count from -C on: one reduction finds the first of them, or else of the largest.
        is_nan = highest != highest
        highest = tl.where(is_nan, float("-inf"), highest)
        m = tl.max(highest, -1, keep_dims=True)
        argmax = tl.min(tl.where(is_nan, at - C, tl.where(highest == m, at, C)), -1, keep_dims=True)
        m = tl.where(argmax < 0, float("nan"), m)
        argmax = tl.where(argmax < 0, argmax + C, tl.where(argmax < C, argmax, -1))
    else:
        m = tl.max(highest, -1, keep_dims=True)
    if TRAITS.PROBS:
        y, z_y = argmax, finite(m)
        q_lanes = nothing
        for i in tl.static_range(COUNT):
            q_lanes += tl.where(lanes + (start + i * BLOCK) == y, tiles[i][2], 0.0)
        q_y = tl.sum(q_lanes, -1, keep_dims=True)
    sums, held, zero = LaneSums(nothing, nothing, nothing, nothing), (), tl.zeros_like(m)
    for i in tl.static_range(COUNT):
        x, z, q = tiles[i]
        first = start + i * BLOCK
        # Not cols == y: the compiler would keep it in registers for the gradient, where comparing again is cheaper.
        col_mask, is_y = lanes < C - first, y - lanes == first
        e_c, sums = row_lse(z, q, col_mask, is_y, m, sums, TRAITS.DENSE, TRAITS.STATS, EXACT)
        held += ((x, e_c, q),)  # type: ignore[assignment]
    so, q_others, q_drop, e_drop = tl.sum(sums.so, -1, keep_dims=True), zero, zero, zero
    if TRAITS.DENSE:
        q_others, q_drop = tl.sum(sums.q_others, -1, keep_dims=True), tl.sum(sums.q_drop, -1, keep_dims=True)
    if TRAITS.STATS:
        e_drop = tl.sum(sums.e_drop, -1, keep_dims=True)
    return RowSums(m, so, z_y, q_y, q_others, q_drop, e_drop, argmax), held


@triton.jit
def with_y(sums, z_y, q_y):  # (R, 1) each
    return RowSums(sums.m, sums.so, z_y, q_y, sums.q_others, sums.q_drop, sums.e_drop, sums.argmax)


@triton.jit
def store_part(at, rows, group, sums, first, STATS: tl.constexpr):
    """Store what `contract.Backend.part` gives of these rows; `rows`: how many there are in all."""
    e_drop, argmax = tl.zeros_like(sums.so), tl.full(sums.so.shape, -1, tl.int32)
    if STATS:
        # Where no class is above -inf, argmax is the first, as in torch.
        e_drop, argmax = sums.e_drop, tl.where(group.counted, tl.maximum(sums.argmax, 0) + first, -1)
    part = RowSums(sums.m, sums.so, sums.z_y, sums.q_y, sums.q_others, sums.q_drop, e_drop, argmax)
    numbers = ()
    for i in tl.static_range(len(sums) - 1):
        numbers += (tl.where(group.counted, part[i], 0.0),)  # type: ignore[assignment]
    numbers += (argmax,)  # type: ignore[assignment]
    store_sums(RowSums(*numbers), at, rows, group.row_mask)  # type: ignore[call-arg]


@triton.jit
def store_rows(
    out,
    group,
    mask,  # (R, 1)
    sums,
    y,  # (R, 1)
    ratio,  # (), D / count: `total` divides the z-loss by D too
    options,
    TRAITS: tl.constexpr,
):
    """Store the loss, the saved row and the statistics."""
    rows, counted = group.number, group.counted
    loss, z_loss = row_loss(sums, options, TRAITS.DENSE)
    if TRAITS.Z_LOSS:
        z_loss *= ratio
        loss += z_loss
    tl.store(out.loss + rows, tl.where(counted, loss, 0.0).to(out.loss.dtype.element_ty), mask=mask)
    if out.saved is not None:
        at = out.saved + rows * 4
        tl.store(at, sums.m.to(tl.float64), mask=mask)
        tl.store(at + 1, sums.so.to(tl.float64), mask=mask)
        tl.store(at + 2, sums.q_others.to(tl.float64), mask=mask)
        tl.store(at + 3, tl.where(counted, y, -1).to(tl.float64), mask=mask)
    if TRAITS.STATS:
        stats = row_stats(sums, options, TRAITS.DENSE)
        argmax = tl.maximum(stats.argmax, 0).to(tl.int64)  # no class is above -inf: the first, as in torch
        tl.store(out.stats.lse + rows, tl.where(counted, stats.lse, 0.0), mask=mask)
        tl.store(out.stats.z_loss + rows, tl.where(counted, stats.z_loss, 0.0), mask=mask)
        tl.store(out.stats.argmax + rows, tl.where(counted, argmax, -1), mask=mask)
        tl.store(out.stats.entropy + rows, tl.where(counted, stats.entropy, 0.0), mask=mask)
