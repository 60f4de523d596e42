"""The gradients of whole rows, tile after tile; those of rows that begin anywhere, and their edges."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .formula import finite, row_grad, target_grad
from .math import exp_minus
from .tiles import is_float32, load_x, load_z_and_q, offset, store_tile, tile_indices


class Sink(NamedTuple):
    """Where a group's gradients go."""

    grads: Any  # arguments.Grads
    dx_at: Any  # (R, 1)
    dt_at: Any  # (R, 1), or None where the target wants no gradient


class RowTerms(NamedTuple):
    """What the gradients of a row are made from besides its logits, (R, 1) each."""

    y: Any
    m: Any
    lse_m: Any
    factors: Any  # GradFactors
    dt_scale: Any


@triton.jit
def store_grads(
    source,
    sink,
    x,  # (R, B)
    dx_at,  # (R, B)
    cols,  # (R, B), which classes
    col_mask,  # (R, B), which of them exist
    group,
    terms,  # RowTerms
    options,
    DENSE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The gradients of one tile, from the logits."""
    logits, weight = source.given.logits, source.given.weight
    z, q = load_z_and_q(source, x, cols, col_mask, options, DENSE, ALIGN, "evict_first")
    e_c, mask = exp_minus(z, finite(terms.m), q.dtype, is_float32(logits.ptr.dtype)), group.row_mask & col_mask
    dx = row_grad(x, e_c, q, cols == terms.y, terms.factors, options, DENSE)
    store_tile(sink.grads.input, dx_at, tl.where(group.counted, dx, 0.0), mask)  # an ignored row may hold NaN
    if sink.dt_at is not None:
        w = None if weight is None else tl.load(weight + cols, mask=col_mask, other=0.0).to(z.dtype)
        dt = target_grad(z, terms.m, terms.lse_m, w, terms.dt_scale)
        store_tile(sink.grads.target, sink.dt_at + offset(cols, sink.grads.target.col, ALIGN), dt, mask)


@triton.jit
def values_before(at, VECTOR: tl.constexpr):
    """How many values lie between this place and the last one where VECTOR values fill 16 bytes of memory."""
    return (at % VECTOR).to(tl.int32)


@triton.jit
def edge_classes(C, dx_at, VECTOR: tl.constexpr):  # (R, 2 VECTOR) each
    """The classes at both edges of a row that `sweep` stores on their own, and which of them there are."""
    before = values_before(dx_at, VECTOR)
    _, edge = tile_indices(dx_at.shape[0], 2 * VECTOR)
    cols = tl.where(edge < VECTOR, edge, (C + before) // VECTOR * VECTOR - before + edge - VECTOR)
    return cols, tl.where(edge < VECTOR, (edge < VECTOR - before) & (before > 0), cols < C)


@triton.jit
def load_edges(source, dx_at, options, TILING: tl.constexpr):  # (R, 2 VECTOR), or None
    """The logits of both edges. All threads load a small tile and one stores it: in place, a barrier between.

    Of programs that share a row the first stores the edges, and no other may read them.
    """
    if TILING.VECTOR > 1:
        cols, col_mask = edge_classes(options.C, dx_at, TILING.VECTOR)
        col_mask &= tl.zeros_like(cols) + tl.program_id(1) == 0
        x = load_x(source, source.x_at + cols, col_mask, "evict_last")
    else:
        x = None
    return x


@triton.jit
def sweep(
    source,
    sink,
    edges,  # of `load_edges`
    group,
    terms,
    options,
    lanes,
    DENSE: tl.constexpr,
    TILING: tl.constexpr,
):
    """Store this program's share of the gradients of whole rows, last tile first: it may still be in the cache.

    Rows that begin anywhere (VECTOR > 1) are cut where VECTOR values of the gradient fill 16 bytes of memory, so that
    one instruction stores them; the few values at both edges are stored on their own. SAME: the logits are cut at the
    same places.
    """
    C, x_col, dx_col = options.C, source.given.logits.col, sink.grads.input.col
    x_at, dx_at = source.x_at, sink.dx_at
    ALIGN: tl.constexpr = TILING.ALIGN
    VECTOR: tl.constexpr = TILING.VECTOR
    BLOCK: tl.constexpr = lanes.shape[-1]
    tiles = tl.cdiv(C + (VECTOR - 1), BLOCK)
    if VECTOR == 1:
        for t in range(tl.program_id(1), tiles, tl.num_programs(1)):
            cols = lanes + (tiles - 1 - t) * BLOCK
            x = load_x(source, x_at + offset(cols, x_col, ALIGN), cols < C, "evict_first")
            dx = dx_at + offset(cols, dx_col, ALIGN)
            store_grads(source, sink, x, dx, cols, cols < C, group, terms, options, DENSE, ALIGN)
    else:
        before = values_before(dx_at, VECTOR)
        whole = (C + before) // VECTOR
        x_cut, cut = x_at // VECTOR * VECTOR if TILING.SAME else x_at - before, dx_at // VECTOR * VECTOR
        for t in range(tl.program_id(1), tiles, tl.num_programs(1)):
            place = lanes + (tiles - 1 - t) * BLOCK
            col_mask = (place // VECTOR >= tl.minimum(before, 1)) & (place // VECTOR < whole)
            x, cols = load_x(source, x_cut + place, col_mask, "evict_first"), place - before
            store_grads(source, sink, x, cut + place, cols, col_mask, group, terms, options, DENSE, ALIGN)
        if tl.program_id(1) == 0:
            cols, col_mask = edge_classes(C, dx_at, VECTOR)
            store_grads(source, sink, edges, dx_at + cols, cols, col_mask, group, terms, options, DENSE, ALIGN)
