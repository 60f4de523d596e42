"""A kernel that joins parts of rows, a program each: the Triton `combine` on its own, for test_row_sums.py."""

import triton
import triton.language as tl

from fused_ce.backends.triton.formula import combine
from fused_ce.contract import RowSums


@triton.jit
def load(parts, row):
    p = parts + row * 8 + tl.arange(0, 1)
    return RowSums(
        tl.load(p),
        tl.load(p + 1),
        tl.load(p + 2),
        tl.load(p + 3),
        tl.load(p + 4),
        tl.load(p + 5),
        tl.load(p + 6),
        tl.load(p + 7),
    )


@triton.jit
def join(a, b, out, PROBS: tl.constexpr):
    row = tl.program_id(0)
    joined = combine(load(a, row), load(b, row), PROBS, True)
    for i in tl.static_range(8):
        tl.store(out + row * 8 + i + tl.arange(0, 1), joined[i])
