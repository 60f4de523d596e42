"""Elementary functions, to the last bits that the formula needs."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950216293335)  # float32(log2 e)
LOG2E_REST = tl.constexpr(1.925963033500e-08)  # log2 e - LOG2E
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(d, EXACT: tl.constexpr):
    if d.dtype == tl.float64:
        p = tl.exp(d)
    else:
        t = d * LOG2E
        p = tl.exp2(t)
        if EXACT:
            # Rounding t costs a relative 2e-6 at d = -80: float32 results would show it, 16-bit ones cannot.
            rest = tl.where(d > -150.0, tl.fma(d, LOG2E, -t) + d * LOG2E_REST, 0.0)  # (-inf) - (-inf) would be NaN
            p = tl.fma(p, rest * LN2, p)
    return p


@triton.jit
def exp_minus(z, m, ACC: tl.constexpr, EXACT: tl.constexpr):
    """exp(z - m) in ACC, of numbers of that dtype or of float64."""
    d = z - m
    high = d.to(ACC)
    p = exp(high, EXACT)
    if EXACT:
        # Rounding z - m would cost a relative |z - m| 2^-24: what was rounded off is given back, found by Knuth's
        # two-sum where z is no wider than the result.
        if d.dtype == ACC:
            minus_m = d - z
            low = (z - (d - minus_m)) - (m + minus_m)
        else:
            low = (d - high.to(d.dtype)).to(ACC)
        p = tl.fma(p, tl.where(high > -150.0, low, 0.0), p)  # (-inf) - (-inf) would be NaN
    return p


@triton.jit
def log1p(u):
    # Kahan: log(v) / (v - 1) hardly changes with v, so it matters little that v is not exactly 1 + u.
    v = 1.0 + u
    return tl.where(v == 1.0, u, tl.log(v) * (u / tl.where(v == 1.0, 1.0, v - 1.0)))


@triton.jit
def tanh(v):
    # Near 0, 1 - E cancels. Lambert's continued fraction v / (1 + v^2 / (3 + v^2 / (5 + ...))) takes its place there:
    # cut after seven levels it is a ratio of sums of positive terms, exact to the last bits of a float64.
    a, n, E = tl.abs(v), v * v, exp(-2.0 * tl.abs(v), True)
    near = a < 0.5
    top = tl.where(near, a * (135135.0 + n * (17325.0 + n * (378.0 + n))), 1.0 - E)
    bottom = tl.where(near, 135135.0 + n * (62370.0 + n * (3150.0 + n * 28.0)), 1.0 + E)
    return tl.where(v < 0.0, -top, top) / bottom
