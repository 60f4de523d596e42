"""The formula as device functions: the functions, order and letters of `fused_ce/formula.py`, which explains them.

A tile of logits is (R, B) and a value of a row (R, 1), for R rows and B classes; where R is 1 they are (B,) and (1,),
because Triton spreads only one dimension over a cluster. Triton 3.6 asks that no function return a tuple with a None
in it, and that no such tuple be compared with None or taken apart in a nested way.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...contract import RowSums, Stats
from .math import exp, exp_minus, log1p, tanh


class Options(NamedTuple):
    """The numbers of a call; None where one would change nothing.

    e is in the dtype of the logits' arithmetic, k, s and L in that of a row's values: it is float64 where a scale or a
    softcap makes z of float32 logits, which near 30 would be rounded by 1e-6, and a loss is a difference of such z.
    """

    C: Any  # int, of the logits at hand
    total: Any  # int, of all shards of the classes
    e: Any
    k: Any  # None: 1
    s: Any  # None: no softcap
    L: Any  # None: 0


class LaneSums(NamedTuple):
    """The sums of `RowSums` before they are added up, (R, B) each: a lane sums what it meets of every tile."""

    so: Any
    q_others: Any
    q_drop: Any
    e_drop: Any


class GradFactors(NamedTuple):
    """What a row's gradient is made of besides exp(z - m) and q, (R, 1) each, in the dtype of the tiles."""

    p_scale: Any  # of exp(z - m)
    scale: Any  # of q
    dz_y: Any


# [1] transform
@triton.jit
def transform(x, options):  # (R, B) -> (R, B)
    z = x if options.k is None else x * options.k
    if options.s is not None:
        z = options.s * tanh(z / options.s)
    return z


# [2] transform_grad
@triton.jit
def transform_grad(x, options):  # (R, B) -> dz/dx
    if options.s is not None:
        # 1 - (z / s)^2 as 1 / cosh^2, from x: near the cap z / s rounds to 1 and the difference is lost.
        u = ((x if options.k is None else x * options.k) / options.s).to(x.dtype)
        E = exp(-2.0 * tl.abs(u), True)
        slope = 4.0 * E / ((1.0 + E) * (1.0 + E))
        slope = slope if options.k is None else slope * options.k.to(x.dtype)
    else:
        slope = 1.0 if options.k is None else options.k.to(x.dtype)
    return slope


# [3] row_lse
@triton.jit
def row_lse(
    z,  # (R, B)
    q,  # (R, B)
    col_mask,  # (R, B)
    is_y,  # (R, B)
    m,  # (R, 1)
    sums,  # LaneSums of the tiles before
    DENSE: tl.constexpr,
    STATS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """exp(z - m) of one tile, 0 for y, and the sums with this tile's classes other than y."""
    so, q_others, q_drop, e_drop = sums.so, sums.q_others, sums.q_drop, sums.e_drop
    drop = (finite(m) - z).to(q.dtype)
    e_c = tl.where(is_y, 0.0, exp_minus(z, finite(m), q.dtype, EXACT))
    so += e_c
    if DENSE:
        others = col_mask & ~is_y
        q_others += tl.where(others, q, 0.0)
        q_drop += tl.where(others, q * drop, 0.0)
    if STATS:
        e_drop += tl.where(e_c == 0.0, 0.0, e_c * drop)
    return e_c, LaneSums(so, q_others, q_drop, e_drop)


@triton.jit
def finite(m):  # (R, 1)
    """m, or 0 while every class seen is -inf: (-inf) - (-inf) would be NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def rescale(part, m, EXACT: tl.constexpr):  # (R, 1) each
    """The sums of a part as they are relative to the m of the whole row."""
    rise, shrink = finite(m) - finite(part.m), exp(part.m - finite(m), EXACT)
    return RowSums(
        m,
        part.so * shrink,
        part.z_y,
        part.q_y,
        part.q_others,
        part.q_drop + part.q_others * rise,
        (part.e_drop + part.so * rise) * shrink,
        part.argmax,
    )


@triton.jit
def put_back(sums, where, EXACT: tl.constexpr):  # (R, 1) each
    """y joins the other classes, in these rows: where the row's y is another part's."""
    y_drop = finite(sums.m) - sums.z_y
    return RowSums(
        sums.m,
        tl.where(where, sums.so + exp(-y_drop, EXACT), sums.so),
        tl.where(where, float("-inf"), sums.z_y),
        tl.where(where, 0.0, sums.q_y),
        tl.where(where, sums.q_others + sums.q_y, sums.q_others),
        tl.where(where, sums.q_drop + sums.q_y * y_drop, sums.q_drop),
        sums.e_drop,
        sums.argmax,
    )


@triton.jit
def combine(a, b, PROBS: tl.constexpr, EXACT: tl.constexpr):
    """The sums of two parts of a row, the first before the second; PROBS: each left out a largest class of its own.

    As in torch's argmax, NaN is above every number, and of two the first is taken.
    """
    higher, m = ~(b.m <= a.m) & (a.m == a.m), tl.maximum(a.m, b.m, tl.PropagateNan.ALL)
    if PROBS:
        a, b = put_back(a, higher, EXACT), put_back(b, ~higher, EXACT)
    a, b = rescale(a, m, EXACT), rescale(b, m, EXACT)
    return RowSums(
        m,
        a.so + b.so,
        tl.maximum(a.z_y, b.z_y, tl.PropagateNan.ALL),  # a target's NaN, or of a class that does not exist
        a.q_y + b.q_y,
        a.q_others + b.q_others,
        a.q_drop + b.q_drop,
        a.e_drop + b.e_drop,
        tl.where(higher, b.argmax, a.argmax),
    )


# [4] row_loss
@triton.jit
def row_loss(sums, options, DENSE: tl.constexpr):  # (R, 1) each
    """Cross entropy and z-loss."""
    m, lse_m = sums.m, minus_m(sums)
    loss = sums.q_y * (lse_m + (m - sums.z_y))
    if DENSE:
        loss += sums.q_others * lse_m + sums.q_drop
    z_loss = tl.zeros_like(loss)
    if options.L is not None:
        z_loss = options.L * (m + lse_m) * (m + lse_m)
    return loss, z_loss


@triton.jit
def minus_m(sums):  # (R, 1)
    """lse - m."""
    return log1p(sums.so + (exp(sums.z_y - sums.m, True) - 1.0))


# [5] row_grad
@triton.jit
def row_grad(
    x,  # (R, B)
    e_c,  # (R, B), exp(z - m)
    q,  # (R, B)
    is_y,  # (R, B)
    factors,  # GradFactors
    options,
    DENSE: tl.constexpr,
):  # (R, B) dx
    dz = factors.p_scale * e_c
    if DENSE:
        dz -= factors.scale * q
    dz = tl.where(is_y, factors.dz_y, dz)
    return dz if options.k is None and options.s is None else dz * transform_grad(x, options)


@triton.jit
def grad_factors(
    sums,  # RowSums, (R, 1) each
    options,
    scale,  # (R, 1), upstream gradient of the cross entropy
    ratio,  # (), that of the z-loss in units of scale; None without z-loss
    g_lse,  # (R, 1), upstream gradient of lse
    ACC: tl.constexpr,
):
    e_y, a_others = exp(sums.z_y - sums.m, True), sums.q_others
    if options.L is not None:
        a_others += 2.0 * options.L * ratio * (sums.m + minus_m(sums))
    others, total = scale * a_others + g_lse, sums.so + e_y
    dz_y = others * (e_y / total) - scale * sums.q_y * (sums.so / total)
    return GradFactors(((others + scale * sums.q_y) / total).to(ACC), scale.to(ACC), dz_y.to(ACC))


@triton.jit
def target_grad(
    z,  # (R, B)
    m,  # (R, 1)
    lse_m,  # (R, 1)
    w,  # (R, B), the classes' weights, or None
    scale,  # (R, 1), that of the loss times 1 - e
):  # (R, B) gradient of probabilities
    dt = scale * (lse_m + (m - z))
    return dt if w is None else dt * w


@triton.jit
def row_stats(sums, options, DENSE: tl.constexpr):  # (R, 1) each
    lse_m, e_y = minus_m(sums), exp(sums.z_y - sums.m, True)
    _, z_loss = row_loss(sums, options, DENSE)
    y_drop = tl.where(e_y == 0.0, 0.0, e_y * (sums.m - sums.z_y))
    return Stats(sums.m + lse_m, z_loss, sums.argmax, lse_m + (sums.e_drop + y_drop) / (sums.so + e_y))
