"""The backward kernel: the gradients, from the logits and what forward saved of their rows, or sums of whole rows."""

import triton
import triton.language as tl

from ...contract import RowSums
from .formula import Options, grad_factors, minus_m, put_back
from .tiles import (
    ELSEWHERE,
    RowTerms,
    Sink,
    Source,
    accumulator,
    count_rows,
    is_float32,
    load_group,
    load_scalar,
    load_y,
    locate,
    read_sums,
    row_dtype,
    sweep,
    tile_indices,
)


@triton.jit(do_not_specialize=["groups", "inner", "ignore_index"])
def backward(
    given,  # arguments.Given
    received,  # arguments.Received
    grads,  # arguments.Grads
    groups,  # of rows
    inner,  # size of the last row dimension
    ignore_index,
    e: tl.float64,
    k: tl.float64,
    s: tl.float64,
    L: tl.float64,
    TRAITS: tl.constexpr,
    TILING: tl.constexpr,
):
    """The gradients of ROWS rows at a time.

    A program takes many groups of rows: where the upstream gradient is the expected one, few programs start and leave.
    """
    logits, saved = given.logits, received.saved
    ACC: tl.constexpr = accumulator(logits.ptr.dtype)
    ROW: tl.constexpr = row_dtype(logits.ptr.dtype, TRAITS)
    ALIGN: tl.constexpr = TILING.ALIGN
    if TRAITS.UNLESS_EXPECTED:
        if tl.load(received.loss.ptr).to(tl.float64) == load_scalar(received.expected, 0, tl.float64):
            return
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
    D = load_scalar(received.norm, 0, ROW)
    ratio = D / load_scalar(received.norm, 1, ROW)
    r, lanes = tile_indices(TILING.ROWS, TILING.BLOCK)
    for p in range(tl.program_id(0), groups, tl.num_programs(0)):
        group = load_group(p, r, given, C, inner, ignore_index, None, TRAITS.PROBS)
        rows, row_mask, y = group.number, group.row_mask, group.y
        x_at, dx_at = locate(logits, given.sizes, group, ALIGN), locate(grads.input, given.sizes, group, ALIGN)
        t_at = locate(given.target, given.sizes, group, ALIGN) if TRAITS.PROBS else None
        dt_at = None if grads.target.ptr is None else locate(grads.target, given.sizes, group, ALIGN)
        source = Source(given, x_at, t_at, row_mask if logits.inner is None else group.counted)
        zero = tl.zeros(r.shape, ROW)
        if received.sums is not None:
            like = RowSums(zero, zero, zero, zero, zero, zero, zero, y)
            sums = read_sums(received.sums + rows, count_rows(given, inner), like, row_mask)
            sums = put_back(sums, y == ELSEWHERE, is_float32(logits.ptr.dtype))
        else:
            m = tl.load(saved + rows * 4, mask=row_mask, other=0.0).to(ROW)
            so = tl.load(saved + rows * 4 + 1, mask=row_mask, other=0.0).to(ROW)
            q_others = tl.load(saved + rows * 4 + 2, mask=row_mask, other=0.0).to(ROW)
            if TRAITS.PROBS:
                y = tl.load(saved + rows * 4 + 3, mask=row_mask, other=1.0).to(tl.int32)
            z_y, q_y = load_y(source, y, m, options)
            sums = RowSums(m, so, z_y, q_y, q_others, zero, zero, y)
        scale = tl.load(received.loss.ptr + rows * received.loss.step, mask=row_mask, other=0.0).to(ROW) / D
        g_lse = zero
        if received.lse is not None:
            g_lse = tl.load(received.lse.ptr + rows * received.lse.step, mask=row_mask, other=0.0).to(ROW)
        factors = grad_factors(sums, options, scale, ratio, g_lse, ACC)
        if TRAITS.INPLACE:
            tl.debug_barrier()  # no warp may still be reading y's logit
        terms = RowTerms(y, sums.m, minus_m(sums), factors, (1.0 - options.e) * scale)
        sweep(source, Sink(grads, dx_at, dt_at), group, terms, options, lanes, TRAITS.DENSE, TILING)
