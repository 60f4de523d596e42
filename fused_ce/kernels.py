"""The kernels of `gpu.py`: device functions, then kernels. See `reference.py` for the formula and the letters.

A program owns a tile of ROWS rows and walks the classes BLOCK at a time; a value a row is `(R,)`, a tile `(R, B)`.
Everything is computed in float32 (float64 for float64 logits) and rounded once, at the store.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950216293335)  # float32(log2 e)
LOG2E_REST = tl.constexpr(1.925963033500e-08)  # log2 e - LOG2E
LN2 = tl.constexpr(0.6931471805599453)


@triton.constexpr_function
def accumulator(pointer):
    return tl.float64 if pointer.element_ty == tl.float64 else tl.float32


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
def log1p(u):
    # Kahan: log(v) / (v - 1) hardly changes with v, so it matters little that v is not exactly 1 + u.
    v = 1.0 + u
    return tl.where(v == 1.0, u, tl.log(v) * (u / tl.where(v == 1.0, 1.0, v - 1.0)))


@triton.jit
def tanh(v):
    # Near 0, 1 - E cancels: there Lambert's continued fraction v / (1 + v^2 / (3 + v^2 / (5 + ...))), cut after seven
    # levels, where it is a ratio of sums of positive terms and exact to the last bits of a float64.
    a, n, E = tl.abs(v), v * v, exp(-2.0 * tl.abs(v), True)
    near = a < 0.5
    top = tl.where(near, a * (135135.0 + n * (17325.0 + n * (378.0 + n))), 1.0 - E)
    bottom = tl.where(near, 135135.0 + n * (62370.0 + n * (3150.0 + n * 28.0)), 1.0 + E)
    return tl.where(v < 0.0, -top, top) / bottom


@triton.jit
def finite(m):  # (R,)
    """m, or 0 while every class seen is -inf: (-inf) - (-inf) would be NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


# [1] transform
@triton.jit
def transform(x, k, s, SOFTCAP: tl.constexpr):
    z = x * k
    if SOFTCAP:
        z = s * tanh(z / s)
    return z


# [2] transform_grad
@triton.jit
def transform_grad(x, k, s, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        # 1 - (z / s)^2 as 1 / cosh^2, from x: near the cap z / s rounds to 1 and the difference is lost.
        E = exp(-2.0 * tl.abs(x * k / s), True)
        slope = k * (4.0 * E / ((1.0 + E) * (1.0 + E)))
    else:
        slope = k
    return slope


# [3] row_lse
@triton.jit
def row_lse(z, is_y, m, so, EXACT: tl.constexpr):  # (R, B), (R, B), (R,), (R,)
    """Fold one more tile into m and so."""
    m_new = tl.maximum(m, tl.max(z, 1))
    m_ref = finite(m_new)
    others = tl.sum(tl.where(is_y, 0.0, exp(z - m_ref[:, None], EXACT)), 1)
    return m_new, so * exp(m - m_ref, EXACT) + others


# [4] row_loss
@triton.jit
def row_loss(z_y, m, so, w_y, W, gap, C, e, L, SMOOTHING: tl.constexpr):  # (R,) each
    """Cross entropy and z-loss; W is the sum of w_c, gap that of w_c (m - z_c)."""
    lse_m = log1p(so + (exp(z_y - m, True) - 1.0))
    loss = w_y * (lse_m + (m - z_y))
    if SMOOTHING:
        loss = (1.0 - e) * loss + e / C * (W * lse_m + gap)
    lse = m + lse_m
    return loss, tl.where(L == 0.0, 0.0, L * lse * lse)  # lse^2 may overflow, and 0 * inf would be NaN


# [5] row_grad
@triton.jit
def row_grad(x, z, w, is_y, m, factors, k, s, SMOOTHING: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """dx of one tile, (R, B)."""
    p_scale, q_scale, dz_y = factors
    dz = p_scale[:, None] * exp(z - finite(m)[:, None], EXACT)
    if SMOOTHING:
        dz -= q_scale[:, None] * w
    return tl.where(is_y, dz_y[:, None], dz) * transform_grad(x, k, s, SOFTCAP)


@triton.jit
def grad_factors(z_y, m, so, w_y, W, C, e, L, scale, z_scale, SMOOTHING: tl.constexpr):  # (R,) each
    """What `row_grad` multiplies exp(z - m) and w by, and dz_y; (z_)scale: upstream gradient of the cross entropy
    (z-loss)."""
    e_y = exp(z_y - m, True)
    z_part = z_scale * 2.0 * L * (m + log1p(so + (e_y - 1.0)))
    q_scale = scale * e / C
    q_y, rest = scale * w_y, 0.0 * scale  # times scale; rest is a - q_y
    if SMOOTHING:
        q_y, rest = scale * (1.0 - e) * w_y + q_scale * w_y, q_scale * (W - w_y)
    p_scale = (rest + q_y + z_part) / (so + e_y)
    return p_scale, q_scale, (rest + z_part) * (e_y / (so + e_y)) - q_y * (so / (so + e_y))


@triton.jit
def load_labels(logits, target, weight, rows, N, C, ignore_index, k, s, SOFTCAP: tl.constexpr):
    """Which rows count, and their y, z_y and w_y. A class that does not exist is never read: its z_y is NaN."""
    ACC: tl.constexpr = accumulator(logits.ptr.dtype)
    y = tl.load(target.ptr + rows * target.step, mask=rows < N, other=0).to(tl.int64)
    live = (rows < N) & (y != ignore_index)
    known = live & (y >= 0) & (y < C)
    y = tl.where(known, y, 0)
    x_y = tl.load(logits.ptr + rows * logits.row + y * logits.col, mask=known, other=float("nan")).to(ACC)
    if weight is None:
        w_y = tl.full(rows.shape, 1.0, ACC)
    else:
        w_y = tl.load(weight + y, mask=known, other=1.0).to(ACC)
    return live, y, transform(x_y, k, s, SOFTCAP), w_y


@triton.jit
def load_tile(logits, weight, rows, live, cols, C, k, s, SOFTCAP: tl.constexpr, ALIGN: tl.constexpr):
    """x and z, (R, B), and w, (1, B)."""
    ACC: tl.constexpr = accumulator(logits.ptr.dtype)
    there = live[:, None] & (cols < C)[None, :]
    at = rows[:, None] * (logits.row // ALIGN * ALIGN) + cols[None, :].to(tl.int64) * logits.col
    x = tl.load(logits.ptr + at, mask=there, other=0.0).to(ACC)
    # Only now: a lane filled with -inf before the softcap would become -s and be summed.
    z = tl.where(there, transform(x, k, s, SOFTCAP), float("-inf"))
    if weight is None:
        w = tl.where(cols < C, tl.full(cols.shape, 1.0, ACC), 0.0)
    else:
        w = tl.load(weight + cols, mask=cols < C, other=0.0).to(ACC)
    return x, z, w[None, :]


@triton.jit
def store_tile(grad, dx, rows, live, cols, N, C):
    there = (rows < N)[:, None] & (cols < C)[None, :]
    dx = tl.where(live[:, None], dx, 0.0)  # an ignored row may hold NaN
    tl.store(grad + rows[:, None] * C + cols[None, :], dx.to(grad.dtype.element_ty), mask=there, cache_modifier=".cs")


@triton.jit
def fold(z, w, cols, y, C, m, so, seen, gap, SMOOTHING: tl.constexpr, EXACT: tl.constexpr):
    m_new, so = row_lse(z, cols[None, :] == y[:, None], m, so, EXACT)
    if SMOOTHING:
        terms = tl.where((cols < C)[None, :], w * (finite(m_new)[:, None] - z), 0.0)
        gap += seen * (finite(m_new) - finite(m)) + tl.sum(terms, 1)
        seen += tl.sum(w, 1)
    return m_new, so, seen, gap


@triton.jit
def divisor(norm, i, ACC: tl.constexpr):
    if norm is None:
        value = tl.full((), 1.0, ACC)
    else:
        value = tl.load(norm + i).to(ACC)
    return value


@triton.jit
def weight_sum(weight, norm, C, SMOOTHING: tl.constexpr, ACC: tl.constexpr):
    if weight is None or not SMOOTHING:
        value = tl.full((), C, ACC)
    else:
        value = tl.load(norm + 2).to(ACC)
    return value


@triton.jit(do_not_specialize=["N", "ignore_index"])
def forward(
    logits,  # ptr, row and col strides: (N, C)
    target,  # ptr, step: (N,)
    weight,  # (C,) or None
    norm,  # (3,), see `prepare`; None: no division
    out,  # loss (N,), stats (N, 2) or None, grad (N, C) or None
    N,
    C,
    ignore_index,
    # Annotated: a bare float arrives as float32, and float64 logits would be smoothed by 0.10000000149.
    e: tl.float64,
    k: tl.float64,
    s: tl.float64,
    L: tl.float64,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGN: tl.constexpr,  # divides C and the row stride: says how wide a load may be
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MANY: tl.constexpr,  # whether C > BLOCK
):
    """Loss, stats and gradient of ROWS rows. The tile read last is still in registers when its gradient is due."""
    ACC: tl.constexpr = accumulator(logits.ptr.dtype)
    EXACT: tl.constexpr = logits.ptr.dtype.element_ty == tl.float32
    C = C // ALIGN * ALIGN
    e, k, s, L = tl.full((), e, ACC), tl.full((), k, ACC), tl.full((), s, ACC), tl.full((), L, ACC)
    D, count, W = divisor(norm, 0, ACC), divisor(norm, 1, ACC), weight_sum(weight, norm, C, SMOOTHING, ACC)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live, y, z_y, w_y = load_labels(logits, target, weight, rows, N, C, ignore_index, k, s, SOFTCAP)

    m, so = tl.full((ROWS,), float("-inf"), ACC), tl.zeros((ROWS,), ACC)
    seen, gap = tl.zeros((1,), ACC), tl.zeros((ROWS,), ACC)  # sums of w_c and of w_c (m - z_c), so far
    last = (C - 1) // BLOCK * BLOCK if MANY else 0
    for start in range(0, last, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x, z, w = load_tile(logits, weight, rows, live, cols, C, k, s, SOFTCAP, ALIGN)
        m, so, seen, gap = fold(z, w, cols, y, C, m, so, seen, gap, SMOOTHING, EXACT)
    cols = last + tl.arange(0, BLOCK)
    x, z, w = load_tile(logits, weight, rows, live, cols, C, k, s, SOFTCAP, ALIGN)
    m, so, seen, gap = fold(z, w, cols, y, C, m, so, seen, gap, SMOOTHING, EXACT)

    loss, z_loss = row_loss(z_y, m, so, w_y, W, gap, C, e, L, SMOOTHING)
    loss += z_loss * (D / count)  # `total` divides both by D
    tl.store(out.loss + rows, tl.where(live, loss, 0.0).to(out.loss.dtype.element_ty), mask=rows < N)
    if out.stats is not None:
        tl.store(out.stats + rows * 2, m, mask=rows < N)
        tl.store(out.stats + rows * 2 + 1, so, mask=rows < N)
    if out.grad is not None:
        scale, z_scale = tl.full((ROWS,), 1.0 / D, ACC), tl.full((ROWS,), 1.0 / count, ACC)
        factors = grad_factors(z_y, m, so, w_y, W, C, e, L, scale, z_scale, SMOOTHING)
        dx = row_grad(x, z, w, cols[None, :] == y[:, None], m, factors, k, s, SMOOTHING, SOFTCAP, EXACT)
        store_tile(out.grad, dx, rows, live, cols, N, C)
        for done in range(0, last, BLOCK):  # backwards, because the tiles read last are the ones still in the cache
            cols = last - BLOCK - done + tl.arange(0, BLOCK)
            x, z, w = load_tile(logits, weight, rows, live, cols, C, k, s, SOFTCAP, ALIGN)
            dx = row_grad(x, z, w, cols[None, :] == y[:, None], m, factors, k, s, SMOOTHING, SOFTCAP, EXACT)
            store_tile(out.grad, dx, rows, live, cols, N, C)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def backward(
    logits,  # ptr, row and col strides: (N, C)
    target,  # ptr, step: (N,)
    weight,  # (C,) or None
    norm,  # (3,) or None
    upstream,  # ptr, step: (N,); a step of 0 is one value for all rows
    stats,  # (N, 2)
    grad,  # (N, C)
    N,
    C,
    ignore_index,
    e: tl.float64,
    k: tl.float64,
    s: tl.float64,
    L: tl.float64,
    SMOOTHING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNLESS_ONE: tl.constexpr,  # grad is right already if the upstream gradient is 1
):
    """The gradient, from logits and stats. A program takes many rows: leaving early must not cost N launches of one."""
    if UNLESS_ONE:
        if tl.load(upstream.ptr) == 1.0:
            return
    ACC: tl.constexpr = accumulator(logits.ptr.dtype)
    EXACT: tl.constexpr = logits.ptr.dtype.element_ty == tl.float32
    C = C // ALIGN * ALIGN
    e, k, s, L = tl.full((), e, ACC), tl.full((), k, ACC), tl.full((), s, ACC), tl.full((), L, ACC)
    D, count, W = divisor(norm, 0, ACC), divisor(norm, 1, ACC), weight_sum(weight, norm, C, SMOOTHING, ACC)
    for first in range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS):
        rows = tl.full((), first, tl.int64) + tl.arange(0, ROWS)
        live, y, z_y, w_y = load_labels(logits, target, weight, rows, N, C, ignore_index, k, s, SOFTCAP)
        m = tl.load(stats + rows * 2, mask=live, other=0.0)
        so = tl.load(stats + rows * 2 + 1, mask=live, other=0.0)
        g = tl.load(upstream.ptr + rows * upstream.step, mask=live, other=0.0).to(ACC)
        factors = grad_factors(z_y, m, so, w_y, W, C, e, L, g / D, g / count, SMOOTHING)
        for start in range(tl.program_id(1) * BLOCK, C, tl.num_programs(1) * BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x, z, w = load_tile(logits, weight, rows, live, cols, C, k, s, SOFTCAP, ALIGN)
            dx = row_grad(x, z, w, cols[None, :] == y[:, None], m, factors, k, s, SMOOTHING, SOFTCAP, EXACT)
            store_tile(grad, dx, rows, live, cols, N, C)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def prepare(target, weight, parts, N, C, ignore_index, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """CHUNK rows' share of (3,): the sum of w_y over rows that count, their number, the sum of the class weights."""
    first = tl.program_id(0).to(tl.int64) * CHUNK
    D, count, W = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tl.minimum(CHUNK, N - first), BLOCK):
        rows = first + start + tl.arange(0, BLOCK)
        y = tl.load(target.ptr + rows * target.step, mask=rows < N, other=0).to(tl.int64)
        live = (rows < N) & (y != ignore_index)
        count += tl.where(live, 1.0, 0.0)
        if weight is not None:
            D += tl.load(weight + y, mask=live & (y >= 0) & (y < C), other=0.0).to(tl.float64)
    if weight is not None and tl.program_id(0) == 0:
        for col in range(0, C, BLOCK):
            cols = col + tl.arange(0, BLOCK)
            W += tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float64)
    parts += tl.program_id(0) * 3
    tl.store(parts, tl.sum(count if weight is None else D, 0))
    tl.store(parts + 1, tl.sum(count, 0))
    tl.store(parts + 2, tl.sum(W, 0))


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
def rescale(grad, upstream, out, n, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """out = grad * upstream, both (n,); in place, an upstream gradient of 1 costs one read of it."""
    g = tl.load(upstream)
    if IN_PLACE:
        if g == 1.0:
            return
    ACC: tl.constexpr = accumulator(grad.dtype)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        dx = tl.load(grad + at, mask=at < n, other=0.0).to(ACC) * g.to(ACC)
        tl.store(out + at, dx.to(out.dtype.element_ty), mask=at < n)
