"""A kernel that joins parts of rows, all in one program: the Triton `combine` on its own, for test_row_sums.py."""

import triton
import triton.language as tl

from fused_ce.backends.triton.formula import combine
from fused_ce.contract import RowSums


@triton.jit
def load(parts, at, mask):
    numbers = ()
    for i in tl.static_range(8):
        numbers += (tl.load(parts + at * 8 + i, mask=mask, other=0.0),)  # type: ignore[assignment]
    return RowSums(*numbers)


@triton.jit
def join(a, b, out, R, PROBS: tl.constexpr, LANES: tl.constexpr):
    at = tl.arange(0, LANES)
    joined = combine(load(a, at, at < R), load(b, at, at < R), PROBS, True)
    for i in tl.static_range(8):
        tl.store(out + at * 8 + i, joined[i], mask=at < R)
