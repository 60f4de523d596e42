"""The kernels of `gpu.py`: device functions, then kernels. See `reference.py` for the formula and the letters.

A program owns a tile of ROWS rows and walks the classes BLOCK at a time; a value a row is `(R,)`, a tile `(R, B)`.
Everything is computed in float32 (float64 for float64 logits) and rounded once, at the store. A tensor with classes
comes as `rows.Matrix`; its None fields, and other arguments that are None, are settled when compiling.
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
def row_lse(z, q, start, C, sums, DENSE: tl.constexpr, PROBS: tl.constexpr, EXTRAS: tl.constexpr, EXACT: tl.constexpr):
    """Fold one more tile into a row's sums; all but m and best are over the classes other than y."""
    m, so, rest, below, heat, y, q_y, best = sums
    cols = start + tl.arange(0, z.shape[1])
    if PROBS or EXTRAS:
        top, at = tl.max(z, 1, return_indices=True)
        best = tl.where(top > m, start + at, best)
    else:
        top = tl.max(z, 1)
    if PROBS:
        # y moves on to the largest logit so far, and the one before joins the others: exp(m - m) is 1.
        so, rest, y = tl.where(top > m, so + 1.0, so), tl.where(top > m, rest + q_y, rest), best
    is_y = cols[None, :] == y[:, None]
    m_new = tl.maximum(m, top)
    m_ref = finite(m_new)
    rise, shrink = m_ref - finite(m), exp(m - m_ref, EXACT)
    drop = m_ref[:, None] - z
    e_c = tl.where(is_y, 0.0, exp(-drop, EXACT))
    if EXTRAS:
        heat = (heat + so * rise) * shrink + tl.sum(tl.where(e_c == 0.0, 0.0, e_c * drop), 1)
    if DENSE:
        others = (cols < C)[None, :] & (cols[None, :] != y[:, None])
        below += rest * rise + tl.sum(tl.where(others, q * drop, 0.0), 1)
        rest += tl.sum(tl.where(others, q, 0.0), 1)
        if PROBS:
            q_y = tl.where(top > m, tl.sum(tl.where(is_y, q, 0.0), 1), q_y)
    return m_new, so * shrink + tl.sum(e_c, 1), rest, below, heat, y, q_y, best


# [4] row_loss
@triton.jit
def row_loss(z_y, m, lse_m, rest, below, q_y, L, DENSE: tl.constexpr):  # (R,) each
    """Cross entropy and z-loss."""
    loss = q_y * (lse_m + (m - z_y))
    if DENSE:
        loss += rest * lse_m + below
    lse = m + lse_m
    return loss, tl.where(L == 0.0, 0.0, L * lse * lse)  # lse^2 may overflow, and 0 * inf would be NaN


@triton.jit
def minus_m(z_y, m, so):  # (R,) each
    """lse - m."""
    return log1p(so + (exp(z_y - m, True) - 1.0))


# [5] row_grad
@triton.jit
def row_grad(x, z, q, is_y, m, factors, k, s, DENSE: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """dx of one tile, (R, B)."""
    p_scale, scale, dz_y = factors
    dz = p_scale[:, None] * exp(z - finite(m)[:, None], EXACT)
    if DENSE:
        dz -= scale[:, None] * q
    return tl.where(is_y, dz_y[:, None], dz) * transform_grad(x, k, s, SOFTCAP)


@triton.jit
def grad_factors(z_y, m, so, rest, q_y, scale, g_lse):  # (R,) each
    """What `row_grad` multiplies exp(z - m) and q by, and dz_y; rest holds the z-loss's share too."""
    e_y = exp(z_y - m, True)
    others, total = scale * rest + g_lse, so + e_y
    return (others + scale * q_y) / total, scale, others * (e_y / total) - scale * q_y * (so / total)


@triton.jit
def target_grad(z, weight, cols, m, lse_m, scale, C):
    """dt of one tile, (R, B)."""
    dt = scale[:, None] * (lse_m[:, None] + (m[:, None] - z))
    if weight is not None:
        dt *= tl.load(weight + cols, mask=cols < C, other=0.0).to(z.dtype)[None, :]
    return dt


@triton.jit
def step(i, stride, ALIGN: tl.constexpr):
    if stride is None:
        at = i
    else:
        at = i.to(tl.int64) * (stride // ALIGN * ALIGN)
    return at


@triton.jit
def locate(matrix, sizes, o, i, ALIGN: tl.constexpr):
    """Offsets of rows, (R,): o counts through the outer dimensions, i stands in the inner one."""
    at = step(i, matrix.inner, ALIGN)
    if matrix.outer is not None:
        for d in tl.static_range(len(sizes)):
            at += step(o % sizes[d], matrix.outer[d], ALIGN)
            o //= sizes[d]
    return at


@triton.jit
def load_target(target, rows, there, C, ignore_index):
    """Which rows count, and their y; -1 for a class that does not exist."""
    y = tl.load(target.ptr + rows * target.step, mask=there, other=0).to(tl.int64)
    return there & (y != ignore_index), tl.where((y >= 0) & (y < C), y, -1).to(tl.int32)


@triton.jit
def load_rows(p, target, inner, C, ignore_index, PROBS: tl.constexpr, ROWS: tl.constexpr):
    """Bundle p of ROWS rows: see `locate`, which exist, their number, which count, and y; probabilities name none."""
    bundles = tl.cdiv(inner, ROWS)
    o, i = (p // bundles).to(tl.int64), (p % bundles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there, rows = i < inner, o * inner + i
    if PROBS:
        live, y = there, tl.full((ROWS,), -1, tl.int32)
    else:
        live, y = load_target(target, rows, there, C, ignore_index)
    return o, i, there, rows, live, y


@triton.jit
def load_y(tensors, y, z_y, scalars, SOFTCAP: tl.constexpr):
    """z_y, unless it is known, and q_y. Class -1 is never read: its z_y is NaN."""
    logits, x_at, target, t_at, weight, read = tensors
    ACC: tl.constexpr = accumulator(logits.ptr.dtype)
    C, e, k, s = scalars
    known = read & (y >= 0)
    if t_at is not None:
        t_y = tl.load(target.ptr + t_at + step(y, target.col, 1), mask=known, other=0.0).to(ACC)
    else:
        t_y = tl.full(y.shape, 1.0, ACC)
        x_y = tl.load(logits.ptr + x_at + step(y, logits.col, 1), mask=known, other=float("nan")).to(ACC)
        z_y = transform(x_y, k, s, SOFTCAP)
    q_y = (1.0 - e) * t_y + e / C
    if weight is not None:
        q_y *= tl.load(weight + y, mask=known, other=1.0).to(ACC)
    return z_y, q_y


@triton.jit
def load_tile(tensors, cols, scalars, DENSE: tl.constexpr, SOFTCAP: tl.constexpr, ALIGN: tl.constexpr):
    """x, z and q of one tile, (R, B); q without the share of a class index, and nothing yet where there is no class."""
    logits, x_at, target, t_at, weight, read = tensors
    ACC: tl.constexpr = accumulator(logits.ptr.dtype)
    C, e, k, s = scalars
    there = read[:, None] & (cols < C)[None, :]
    x = tl.load(logits.ptr + x_at[:, None] + step(cols, logits.col, ALIGN)[None, :], mask=there, other=0.0).to(ACC)
    # Only now: a lane filled with -inf before the softcap would become -s and be summed.
    z = tl.where(there, transform(x, k, s, SOFTCAP), float("-inf"))
    q = tl.zeros((1, 1), ACC)
    if t_at is not None:
        q = tl.load(target.ptr + t_at[:, None] + step(cols, target.col, ALIGN)[None, :], mask=there, other=0.0).to(ACC)
    if DENSE:
        q = (1.0 - e) * q + e / C
        if weight is not None:
            q *= tl.load(weight + cols, mask=cols < C, other=0.0).to(ACC)[None, :]
    return x, z, q


@triton.jit
def store_tile(matrix, at, values, there, cols, C, ALIGN: tl.constexpr):
    at = at[:, None] + step(cols, matrix.col, ALIGN)[None, :]
    there = there[:, None] & (cols < C)[None, :]
    if matrix.ptr.dtype.element_ty != tl.float64:
        values = values.to(tl.float32)  # float64 has no way of its own to 16 bits
    tl.store(matrix.ptr + at, values.to(matrix.ptr.dtype.element_ty), mask=there, cache_modifier=".cs")


@triton.jit
def load_scalar(numbers, i, ACC: tl.constexpr):
    """numbers[i], or 1."""
    if numbers is None:
        value = tl.full((), 1.0, ACC)
    else:
        value = tl.load(numbers + i).to(ACC)
    return value


@triton.jit(do_not_specialize=["inner", "ignore_index"])
def forward(
    logits,  # Matrix (N, C, d1..dk)
    target,  # Rows of class indices, or Matrix of probabilities
    weight,  # (C,) or None
    norm,  # (2,), see `prepare`; None: no division
    expected,  # (), the upstream gradient that grad is for; None: 1
    out,  # loss, stats and extras, by the number of the row
    grad,  # Matrix or None; may be the logits
    sizes,  # of the outer row dimensions, or None
    inner,
    C,
    ignore_index,
    # Annotated: a bare float arrives as float32, and float64 logits would be smoothed by 0.10000000149.
    e: tl.float64,
    k: tl.float64,
    s: tl.float64,
    L: tl.float64,
    DENSE: tl.constexpr,  # whether q is more than the class of an index
    PROBS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INPLACE: tl.constexpr,
    ALIGN: tl.constexpr,  # see `rows.alignment`
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    MANY: tl.constexpr,  # whether C > BLOCK
):
    """Everything of ROWS rows. The tile read last is still in registers when its gradient is due."""
    ACC: tl.constexpr = accumulator(logits.ptr.dtype)
    EXACT: tl.constexpr = logits.ptr.dtype.element_ty == tl.float32
    C = C // ALIGN * ALIGN if logits.col is None else C
    inner = inner // ALIGN * ALIGN if logits.inner is None else inner
    e, k, s, L = tl.full((), e, ACC), tl.full((), k, ACC), tl.full((), s, ACC), tl.full((), L, ACC)
    scalars = C, e, k, s
    D, count = load_scalar(norm, 0, ACC), load_scalar(norm, 1, ACC)
    o, i, there, rows, live, y = load_rows(tl.program_id(0), target, inner, C, ignore_index, PROBS, ROWS)
    x_at, t_at = locate(logits, sizes, o, i, ALIGN), locate(target, sizes, o, i, ALIGN) if PROBS else None
    # Ignored rows are not read, unless rows lie side by side: a mask with gaps would part a wide load.
    read, zero = there if logits.inner is None else live, tl.zeros((ROWS,), ACC)
    tensors = logits, x_at, target, t_at, weight, read
    z_y, q_y = zero, zero
    if not PROBS:
        z_y, q_y = load_y(tensors, y, zero, scalars, SOFTCAP)

    sums = zero + float("-inf"), zero, zero, zero, zero, y, q_y, tl.full((ROWS,), -1, tl.int32)
    last = (C - 1) // BLOCK * BLOCK if MANY else 0
    for start in range(0, last, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x, z, q = load_tile(tensors, cols, scalars, DENSE, SOFTCAP, ALIGN)
        sums = row_lse(z, q, start, C, sums, DENSE, PROBS, out.extras is not None, EXACT)
    cols = last + tl.arange(0, BLOCK)
    x, z, q = load_tile(tensors, cols, scalars, DENSE, SOFTCAP, ALIGN)
    sums = row_lse(z, q, last, C, sums, DENSE, PROBS, out.extras is not None, EXACT)
    m, so, rest, below, heat, y, q_y, best = sums
    if PROBS:
        z_y = m

    lse_m = minus_m(z_y, m, so)
    loss, z_loss = row_loss(z_y, m, lse_m, rest, below, q_y, L, DENSE)
    rest += 2.0 * L * (D / count) * (m + lse_m)
    loss += z_loss * (D / count)  # `total` divides both by D
    tl.store(out.loss + rows, tl.where(live, loss, 0.0).to(out.loss.dtype.element_ty), mask=there)
    if out.stats is not None:
        tl.store(out.stats + rows * 4, m.to(tl.float64), mask=there)
        tl.store(out.stats + rows * 4 + 1, so.to(tl.float64), mask=there)
        tl.store(out.stats + rows * 4 + 2, rest.to(tl.float64), mask=there)
        tl.store(out.stats + rows * 4 + 3, (y if PROBS else zero + D).to(tl.float64), mask=there)
    if out.extras is not None:
        e_y = exp(z_y - m, True)
        entropy = lse_m + (heat + tl.where(e_y == 0.0, 0.0, e_y * (m - z_y))) / (so + e_y)
        tl.store(out.extras.lse + rows, tl.where(live, m + lse_m, 0.0), mask=there)
        tl.store(out.extras.z_loss + rows, tl.where(live, z_loss, 0.0), mask=there)
        tl.store(out.extras.argmax + rows, tl.where(live, tl.maximum(best, 0), -1).to(tl.int64), mask=there)
        tl.store(out.extras.entropy + rows, tl.where(live, entropy, 0.0), mask=there)
    if grad is not None:
        if INPLACE:
            tl.debug_barrier()  # no warp may still be reading these rows
        at = locate(grad, sizes, o, i, ALIGN)
        factors = grad_factors(z_y, m, so, rest, q_y, zero + load_scalar(expected, 0, ACC) / D, zero)
        dx = row_grad(x, z, q, cols[None, :] == y[:, None], m, factors, k, s, DENSE, SOFTCAP, EXACT)
        store_tile(grad, at, tl.where(live[:, None], dx, 0.0), there, cols, C, ALIGN)  # an ignored row may hold NaN
        for done in range(0, last, BLOCK):  # backwards, because the tiles read last are the ones still in the cache
            cols = last - BLOCK - done + tl.arange(0, BLOCK)
            x, z, q = load_tile(tensors, cols, scalars, DENSE, SOFTCAP, ALIGN)
            dx = row_grad(x, z, q, cols[None, :] == y[:, None], m, factors, k, s, DENSE, SOFTCAP, EXACT)
            store_tile(grad, at, tl.where(live[:, None], dx, 0.0), there, cols, C, ALIGN)


@triton.jit(do_not_specialize=["bundles", "inner", "ignore_index"])
def backward(
    logits,  # Matrix (N, C, d1..dk)
    target,  # Rows of class indices, or Matrix of probabilities
    weight,  # (C,) or None
    norm,  # (2,); None: divisors are in the stats, or there are none
    upstream,  # Rows, of the loss
    g_lse,  # Rows, of lse, or None
    expected,  # (), grad is right already for this upstream gradient; None: 1
    stats,  # (N, 4)
    grad,  # Matrix; may be the logits
    d_target,  # Matrix or None
    sizes,  # of the outer row dimensions, or None
    bundles,
    inner,
    C,
    ignore_index,
    e: tl.float64,
    k: tl.float64,
    s: tl.float64,
    DENSE: tl.constexpr,
    PROBS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INPLACE: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNLESS_EXPECTED: tl.constexpr,
):
    """The gradients, from logits and stats. A program takes many rows: leaving early must not cost N launches."""
    ACC: tl.constexpr = accumulator(logits.ptr.dtype)
    if UNLESS_EXPECTED:
        if tl.load(upstream.ptr).to(tl.float64) == load_scalar(expected, 0, tl.float64):
            return
    EXACT: tl.constexpr = logits.ptr.dtype.element_ty == tl.float32
    C = C // ALIGN * ALIGN if logits.col is None else C
    inner = inner // ALIGN * ALIGN if logits.inner is None else inner
    e, k, s = tl.full((), e, ACC), tl.full((), k, ACC), tl.full((), s, ACC)
    scalars = C, e, k, s
    D = load_scalar(norm, 0, ACC)
    for p in range(tl.program_id(0), bundles, tl.num_programs(0)):
        o, i, there, rows, live, y = load_rows(p, target, inner, C, ignore_index, PROBS, ROWS)
        x_at, t_at = locate(logits, sizes, o, i, ALIGN), locate(target, sizes, o, i, ALIGN) if PROBS else None
        read, at = there if logits.inner is None else live, locate(grad, sizes, o, i, ALIGN)
        tensors = logits, x_at, target, t_at, weight, read
        m = tl.load(stats + rows * 4, mask=there, other=0.0).to(ACC)
        so = tl.load(stats + rows * 4 + 1, mask=there, other=0.0).to(ACC)
        rest = tl.load(stats + rows * 4 + 2, mask=there, other=0.0).to(ACC)
        y_or_D = tl.load(stats + rows * 4 + 3, mask=there, other=1.0)
        g = tl.load(upstream.ptr + rows * upstream.step, mask=there, other=0.0).to(ACC)
        of_lse = tl.zeros((ROWS,), ACC)
        if g_lse is not None:
            of_lse = tl.load(g_lse.ptr + rows * g_lse.step, mask=there, other=0.0).to(ACC)
        if PROBS:
            y, scale = y_or_D.to(tl.int32), g / D
        else:
            scale = g / y_or_D.to(ACC)
        z_y, q_y = load_y(tensors, y, m, scalars, SOFTCAP)
        factors = grad_factors(z_y, m, so, rest, q_y, scale, of_lse)
        if INPLACE:
            tl.debug_barrier()
        for start in range(tl.program_id(1) * BLOCK, C, tl.num_programs(1) * BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x, z, q = load_tile(tensors, cols, scalars, DENSE, SOFTCAP, ALIGN)
            dx = row_grad(x, z, q, cols[None, :] == y[:, None], m, factors, k, s, DENSE, SOFTCAP, EXACT)
            store_tile(grad, at, tl.where(live[:, None], dx, 0.0), there, cols, C, ALIGN)
            if d_target is not None:
                dt = target_grad(z, weight, cols, m, minus_m(z_y, m, so), (1.0 - e) * scale, C)
                store_tile(d_target, locate(d_target, sizes, o, i, ALIGN), dt, there, cols, C, ALIGN)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def prepare(target, weight, parts, N, C, ignore_index, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """CHUNK rows' share of (2,): the sum of w_y over the rows that count, and their number."""
    first = tl.program_id(0).to(tl.int64) * CHUNK
    D, count = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tl.minimum(CHUNK, N - first), BLOCK):
        rows = first + start + tl.arange(0, BLOCK)
        live, y = load_target(target, rows, rows < N, C, ignore_index)
        count += tl.where(live, 1.0, 0.0)
        if weight is not None:
            D += tl.load(weight + y, mask=live & (y >= 0), other=0.0).to(tl.float64)
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
def rescale(grad, upstream, expected, out, n, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """out = grad * upstream / expected, both (n,); in place, the expected gradient costs one read of it."""
    g = tl.load(upstream).to(tl.float64) / load_scalar(expected, 0, tl.float64)
    if IN_PLACE:
        if g == 1.0:
            return
    ACC: tl.constexpr = accumulator(grad.dtype)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        dx = tl.load(grad + at, mask=at < n, other=0.0).to(ACC) * g.to(ACC)
        tl.store(out + at, dx.to(out.dtype.element_ty), mask=at < n)
