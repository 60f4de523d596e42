"""The small kernels: divisors, sums over rows, and a gradient made right for another upstream gradient."""

import triton
import triton.language as tl

from .tiles import accumulator, load_scalar, load_target


@triton.jit(do_not_specialize=["N", "ignore_index"])
def prepare(target, weight, parts, N, C, ignore_index, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """CHUNK rows' share of (2,): the sum of w_y over the rows that are counted, and their number."""
    first = tl.program_id(0).to(tl.int64) * CHUNK
    D, count = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tl.minimum(CHUNK, N - first), BLOCK):
        rows = first + start + tl.arange(0, BLOCK)
        counted, y = load_target(target, rows, rows < N, C, ignore_index, None)
        count += tl.where(counted, 1.0, 0.0)
        if weight is not None:
            D += tl.load(weight + y, mask=counted & (y >= 0), other=0.0).to(tl.float64)
    parts += tl.program_id(0) * 2
    tl.store(parts, tl.sum(count if weight is None else D, 0))
    tl.store(parts + 1, tl.sum(count, 0))


@triton.jit(do_not_specialize=["N"])
def total(terms, norm, out, N, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Sum CHUNK rows of terms, (N, number of columns), in an order that is always the same; / D if norm is given."""
    columns, first = tl.num_programs(1), tl.program_id(0).to(tl.int64) * CHUNK
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tl.minimum(CHUNK, N - first), BLOCK):
        rows = first + start + tl.arange(0, BLOCK)
        sums += tl.load(terms + rows * columns + tl.program_id(1), mask=rows < N, other=0.0).to(tl.float64)
    value = tl.sum(sums, 0)
    if norm is not None:
        value /= tl.load(norm)
    if out.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    tl.store(out + tl.program_id(0) * columns + tl.program_id(1), value.to(out.dtype.element_ty))


@triton.jit
def rescale_grad(grad, upstream, expected, out, n, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """out = grad * upstream / expected, both (n,); in place, nothing is left to do for the expected gradient."""
    g = tl.load(upstream).to(tl.float64) / load_scalar(expected, 0, tl.float64)
    if IN_PLACE:
        if g == 1.0:
            return
    ACC: tl.constexpr = accumulator(grad.dtype)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        dx = tl.load(grad + at, mask=at < n, other=0.0).to(ACC)
        dx = tl.where(dx == 0.0, dx, dx * g.to(ACC))  # ignored rows stay 0 for an upstream gradient of inf or NaN
        tl.store(out + at, dx.to(out.dtype.element_ty), mask=at < n)
