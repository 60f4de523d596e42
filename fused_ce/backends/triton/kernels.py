"""The kernels of `gpu.py`: device functions, then kernels. See `reference.py` for the formula and the letters.

A program owns ROWS rows at a time, and takes their classes BLOCK at a time. A tile is `(R, B)` and a value a row
`(R, 1)`; where R is 1 they are `(B,)` and `(1,)`, because Triton spreads only one dimension over a cluster.
Everything is computed in float32 (float64 for float64 logits) and rounded once, at the store. A tensor with classes
comes as `rows.Matrix`; its None fields, and other arguments that are None, are settled when compiling. Triton 3.6 asks
that no tuple with a None in it be compared with None or taken apart in a nested way.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950216293335)  # float32(log2 e)
LOG2E_REST = tl.constexpr(1.925963033500e-08)  # log2 e - LOG2E
LN2 = tl.constexpr(0.6931471805599453)


@triton.constexpr_function
def accumulator(pointer):
    return tl.float64 if pointer.element_ty == tl.float64 else tl.float32


@triton.constexpr_function
def is_float32(pointer):
    return pointer.element_ty == tl.float32


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
def finite(m):  # (R, 1)
    """m, or 0 while every class seen is -inf: (-inf) - (-inf) would be NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


# [1] transform
@triton.jit
def transform(x, k, s, SOFTCAP: tl.constexpr):
    z = x if k is None else x * k
    if SOFTCAP:
        z = s * tanh(z / s)
    return z


# [2] transform_grad
@triton.jit
def transform_grad(x, k, s, SOFTCAP: tl.constexpr):
    if SOFTCAP:
        # 1 - (z / s)^2 as 1 / cosh^2, from x: near the cap z / s rounds to 1 and the difference is lost.
        E = exp(-2.0 * tl.abs((x if k is None else x * k) / s), True)
        slope = 4.0 * E / ((1.0 + E) * (1.0 + E))
        slope = slope if k is None else slope * k
    else:
        slope = 1.0 if k is None else k
    return slope


# [3] row_lse
@triton.jit
def row_lse(z, q, there, is_y, m, sums, DENSE: tl.constexpr, HEAT: tl.constexpr, EXACT: tl.constexpr):
    """exp(z - m), 0 for y, and what the classes other than y add to so, rest, below and heat; (R, B) each."""
    so, rest, below, heat = sums
    drop = finite(m) - z
    e_c = tl.where(is_y, 0.0, exp(-drop, EXACT))
    so += e_c
    if DENSE:
        others = there & ~is_y
        rest += tl.where(others, q, 0.0)
        below += tl.where(others, q * drop, 0.0)
    if HEAT:
        heat += tl.where(e_c == 0.0, 0.0, e_c * drop)
    return e_c, (so, rest, below, heat)


@triton.jit
def add_up(sums, zero, DENSE: tl.constexpr, HEAT: tl.constexpr):
    """(R, B) each -> (R, 1) each."""
    so, rest, below, heat = tl.sum(sums[0], -1, keep_dims=True), zero, zero, zero
    if DENSE:
        rest, below = tl.sum(sums[1], -1, keep_dims=True), tl.sum(sums[2], -1, keep_dims=True)
    if HEAT:
        heat = tl.sum(sums[3], -1, keep_dims=True)
    return so, rest, below, heat


@triton.jit
def rise(part, m, PROBS: tl.constexpr, HIGHER, EXACT: tl.constexpr):
    """The sums of a part of a row, as they are once its largest z is one of m; where it is not HIGHER, y is another."""
    m_part, so, rest, below, heat, _, q_y, _ = part
    if PROBS:
        # The largest logit of the lower part joins the others: exp(m - m) is 1.
        so, rest = tl.where(HIGHER, so, so + 1.0), tl.where(HIGHER, rest, rest + q_y)
    up, shrink = finite(m) - finite(m_part), exp(m_part - finite(m), EXACT)
    return so * shrink, rest, below + rest * up, (heat + so * up) * shrink


@triton.jit
def join(a, b, PROBS: tl.constexpr, EXACT: tl.constexpr):
    """The sums of two parts of a row, the first before the second."""
    higher, m = b[0] > a[0], tl.maximum(a[0], b[0])
    so, rest, below, heat = rise(a, m, PROBS, ~higher, EXACT)
    so_b, rest_b, below_b, heat_b = rise(b, m, PROBS, higher, EXACT)
    y, q_y, best = tl.where(higher, b[5], a[5]), tl.where(higher, b[6], a[6]), tl.where(higher, b[7], a[7])
    return m, so + so_b, rest + rest_b, below + below_b, heat + heat_b, y, q_y, best


# [4] row_loss
@triton.jit
def row_loss(z_y, m, lse_m, rest, below, q_y, L, DENSE: tl.constexpr):  # (R, 1) each
    """Cross entropy and z-loss."""
    loss = q_y * (lse_m + (m - z_y))
    if DENSE:
        loss += rest * lse_m + below
    lse = m + lse_m
    return loss, tl.where(L == 0.0, 0.0, L * lse * lse)  # lse^2 may overflow, and 0 * inf would be NaN


@triton.jit
def minus_m(z_y, m, so):  # (R, 1) each
    """lse - m."""
    return log1p(so + (exp(z_y - m, True) - 1.0))


# [5] row_grad
@triton.jit
def row_grad(x, e_c, q, is_y, factors, k, s, DENSE: tl.constexpr, SOFTCAP: tl.constexpr):
    """dx of one tile, (R, B); e_c: exp(z - m)."""
    p_scale, scale, dz_y = factors
    dz = p_scale * e_c
    if DENSE:
        dz -= scale * q
    dz = tl.where(is_y, dz_y, dz)
    return dz if k is None and not SOFTCAP else dz * transform_grad(x, k, s, SOFTCAP)


@triton.jit
def grad_factors(z_y, m, so, rest, q_y, scale, g_lse):  # (R, 1) each
    """What `row_grad` multiplies exp(z - m) and q by, and dz_y; rest holds the z-loss's share too."""
    e_y = exp(z_y - m, True)
    others, total = scale * rest + g_lse, so + e_y
    return (others + scale * q_y) / total, scale, others * (e_y / total) - scale * q_y * (so / total)


@triton.jit
def target_grad(z, weight, cols, there, m, lse_m, scale):
    """dt of one tile, (R, B)."""
    dt = scale * (lse_m + (m - z))
    if weight is not None:
        dt *= tl.load(weight + cols, mask=there, other=0.0).to(z.dtype)
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
    """Offsets of rows, (R, 1): o counts through the outer dimensions, i stands in the inner one."""
    at = step(i, matrix.inner, ALIGN)
    if matrix.outer is not None:
        for d in tl.static_range(len(sizes)):
            at += step(o % sizes[d], matrix.outer[d], ALIGN)
            o //= sizes[d]
    return at


@triton.jit
def shape(ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The numbers of a program's rows, (R, 1), and of a tile's classes, (1, B)."""
    if ROWS == 1:
        r, lanes = tl.arange(0, 1), tl.arange(0, BLOCK)
    else:
        r, lanes = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :]
    return r, lanes


@triton.jit
def load_target(target, rows, there, C, ignore_index, bad):
    """Which rows count, and their y; -1 for a class that does not exist, which is told to `bad`."""
    y = tl.load(target.ptr + rows * target.step, mask=there, other=0).to(tl.int64)
    live, exists = there & (y != ignore_index), (y >= 0) & (y < C)
    if bad is not None:
        tl.store(bad + tl.zeros_like(y), y, mask=live & ~exists)
    return live, tl.where(exists, y, -1).to(tl.int32)


@triton.jit
def load_rows(p, r, target, sizes, inner, C, ignore_index, bad, PROBS: tl.constexpr):
    """Bundle p of rows: see `locate`, which exist, their number, which count, and y; probabilities name none."""
    ROWS: tl.constexpr = r.shape[0]
    if sizes is None:
        o, i = tl.zeros(r.shape, tl.int64), tl.full(r.shape, p, tl.int64) * ROWS + r
    else:
        bundles = tl.cdiv(inner, ROWS)
        o, i = (p // bundles).to(tl.int64), (p % bundles).to(tl.int64) * ROWS + r
    there, rows = i < inner, o * inner + i
    if PROBS:
        live, y = there, tl.full(r.shape, -1, tl.int32)
    else:
        live, y = load_target(target, rows, there, C, ignore_index, bad)
    return o, i, there, rows, live, y


@triton.jit
def load_y(tensors, x_at, y, z_y, scalars, SOFTCAP: tl.constexpr):
    """z_y, unless it is known, and q_y. Class -1 is never read: its z_y is NaN."""
    logits, target, t_at, weight, read = tensors
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
def load_tile(
    tensors,
    x_at,
    cols,
    there,
    scalars,
    DENSE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGN: tl.constexpr,
    KEEP: tl.constexpr,
):
    """x, z and q of one tile, (R, B); q without the share of a class index.

    x_at: where; cols: which classes; there: which of them exist, None if all do; KEEP: how long in the cache.
    """
    logits, target, t_at, weight, read = tensors
    ACC: tl.constexpr = accumulator(logits.ptr.dtype)
    C, e, k, s = scalars
    mask = read if there is None else read & there
    x = tl.load(logits.ptr + x_at, mask=mask, other=0.0, eviction_policy=KEEP).to(ACC)
    z = transform(x, k, s, SOFTCAP)
    if there is not None:
        # Only now: a lane filled with -inf before the softcap would become -s and be summed.
        z = tl.where(there, z, float("-inf"))
    q = tl.zeros(x.shape, ACC)
    if t_at is not None:
        t_at += step(cols, target.col, ALIGN)
        q = tl.load(target.ptr + t_at, mask=mask, other=0.0, eviction_policy=KEEP).to(ACC)
    if DENSE:
        q = (1.0 - e) * q + e / C
        if weight is not None:
            w = tl.load(weight + cols) if there is None else tl.load(weight + cols, mask=there, other=0.0)
            q *= w.to(ACC)
    return x, z, q


@triton.jit
def store_tile(matrix, at, values, mask):
    if matrix.ptr.dtype.element_ty != tl.float64:
        values = values.to(tl.float32)  # float64 has no way of its own to 16 bits
    tl.store(matrix.ptr + at, values.to(matrix.ptr.dtype.element_ty), mask=mask, cache_modifier=".cs")


@triton.jit
def store_grad(
    tensors, grads, x_at, at, cols, there, row, scalars, DENSE: tl.constexpr, SOFTCAP: tl.constexpr, ALIGN: tl.constexpr
):
    """The gradients of one tile, from the logits."""
    grad, d_target, dt_at, dt_scale = grads
    exists, live, y, m, lse_m, factors = row
    _, _, k, s = scalars
    x, z, q = load_tile(tensors, x_at, cols, there, scalars, DENSE, SOFTCAP, ALIGN, "evict_first")
    e_c = exp(z - finite(m), is_float32(tensors[0].ptr.dtype))
    dx = row_grad(x, e_c, q, cols == y, factors, k, s, DENSE, SOFTCAP)
    store_tile(grad, at, tl.where(live, dx, 0.0), exists & there)  # an ignored row may hold NaN
    if dt_at is not None:
        dt = target_grad(z, tensors[3], cols, there, m, lse_m, dt_scale)
        store_tile(d_target, dt_at + step(cols, d_target.col, ALIGN), dt, exists & there)


@triton.jit
def sweep(
    tensors,
    grads,
    x_at,
    at,
    row,
    scalars,
    lanes,
    DENSE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIGN: tl.constexpr,
    VECTOR: tl.constexpr,
    SAME: tl.constexpr,
):
    """This program's share of the gradients of whole rows, from the end: what was read last is still in the cache.

    Rows that begin anywhere (VECTOR > 1) are cut at the boundaries of VECTOR values in memory, which then move as
    one; what is left at both edges moves apart. SAME: the logits are cut where the gradient is.
    """
    C, x_col, dx_col = scalars[0], tensors[0].col, grads[0].col
    BLOCK: tl.constexpr = lanes.shape[-1]
    tiles = tl.cdiv(C + (VECTOR - 1), BLOCK)
    if VECTOR == 1:
        for i in range(tl.program_id(1), tiles, tl.num_programs(1)):
            cols = lanes + (tiles - 1 - i) * BLOCK
            x, dx = x_at + step(cols, x_col, ALIGN), at + step(cols, dx_col, ALIGN)
            store_grad(tensors, grads, x, dx, cols, cols < C, row, scalars, DENSE, SOFTCAP, ALIGN)
    else:
        before = (at % VECTOR).to(tl.int32)  # values between the boundary and the row
        whole = (C + before) // VECTOR
        x_cut, cut = x_at // VECTOR * VECTOR if SAME else x_at - before, at // VECTOR * VECTOR
        for i in range(tl.program_id(1), tiles, tl.num_programs(1)):
            place = lanes + (tiles - 1 - i) * BLOCK
            there = (place // VECTOR >= tl.minimum(before, 1)) & (place // VECTOR < whole)
            x, dx, cols = x_cut + place, cut + place, place - before
            store_grad(tensors, grads, x, dx, cols, there, row, scalars, DENSE, SOFTCAP, ALIGN)
        if tl.program_id(1) == 0:
            _, edge = shape(at.shape[0], 2 * VECTOR)
            cols = tl.where(edge < VECTOR, edge, whole * VECTOR - before + edge - VECTOR)
            there = tl.where(edge < VECTOR, (edge < VECTOR - before) & (before > 0), cols < C)
            store_grad(tensors, grads, x_at + cols, at + cols, cols, there, row, scalars, DENSE, SOFTCAP, ALIGN)


@triton.jit
def load_scalar(numbers, i, ACC: tl.constexpr):
    """numbers[i], or 1."""
    if numbers is None:
        value = tl.full((), 1.0, ACC)
    else:
        value = tl.load(numbers + i).to(ACC)
    return value


@triton.jit
def store_rows(out, rows, there, live, sums, z_y, D, count, L, DENSE: tl.constexpr, PROBS: tl.constexpr):
    """What there is one of a row. -> rest with the z-loss's share."""
    m, so, rest, below, heat, y, q_y, best = sums
    lse_m = minus_m(z_y, m, so)
    loss, z_loss = row_loss(z_y, m, lse_m, rest, below, q_y, L, DENSE)
    rest += 2.0 * L * (D / count) * (m + lse_m)
    loss += z_loss * (D / count)  # `total` divides both by D
    tl.store(out.loss + rows, tl.where(live, loss, 0.0).to(out.loss.dtype.element_ty), mask=there)
    if out.stats is not None:
        tl.store(out.stats + rows * 4, m.to(tl.float64), mask=there)
        tl.store(out.stats + rows * 4 + 1, so.to(tl.float64), mask=there)
        tl.store(out.stats + rows * 4 + 2, rest.to(tl.float64), mask=there)
        tl.store(out.stats + rows * 4 + 3, (y if PROBS else tl.zeros_like(m) + D).to(tl.float64), mask=there)
    if out.extras is not None:
        e_y = exp(z_y - m, True)
        entropy = lse_m + (heat + tl.where(e_y == 0.0, 0.0, e_y * (m - z_y))) / (so + e_y)
        tl.store(out.extras.lse + rows, tl.where(live, m + lse_m, 0.0), mask=there)
        tl.store(out.extras.z_loss + rows, tl.where(live, z_loss, 0.0), mask=there)
        tl.store(out.extras.argmax + rows, tl.where(live, tl.maximum(best, 0), -1).to(tl.int64), mask=there)
        tl.store(out.extras.entropy + rows, tl.where(live, entropy, 0.0), mask=there)
    return rest


@triton.jit
def load_part(
    tensors,
    x_at,
    start,
    lanes,
    y,
    q_y,
    scalars,
    DENSE: tl.constexpr,
    PROBS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAT: tl.constexpr,
    ALIGN: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The sums of PIECES tiles from the class `start` on, and what to hold of each: x, exp(z - m) and q.

    No PIECES: of one tile, which is read again for its gradient.
    """
    C = scalars[0]
    KEEP: tl.constexpr = "evict_first" if PIECES else "evict_last"
    BLOCK: tl.constexpr = lanes.shape[-1]
    COUNT: tl.constexpr = PIECES if PIECES else 1
    EXACT: tl.constexpr = is_float32(tensors[0].ptr.dtype)
    nothing = tl.zeros_like(y + lanes).to(q_y.dtype)
    tiles, highest, at = (), nothing + float("-inf"), nothing.to(tl.int32) - 1
    for i in tl.static_range(COUNT):
        cols = lanes + (start + i * BLOCK)
        # All classes of the pieces before the last exist.
        there = cols < C if i == COUNT - 1 else None
        at_cols = x_at + step(cols, tensors[0].col, ALIGN)
        x, z, q = load_tile(tensors, at_cols, cols, there, scalars, DENSE, SOFTCAP, ALIGN, KEEP)
        tiles += ((x, z, q),)  # type: ignore[assignment]
        if PROBS or HEAT:
            at = tl.where(z > highest, cols, at)
        highest = tl.maximum(highest, z)
    m, best = tl.max(highest, -1, keep_dims=True), y
    if PROBS or HEAT:
        best = tl.min(tl.where(highest == m, at, C), -1, keep_dims=True)
        best = tl.where(best < C, best, -1)  # NaN equals nothing
    if PROBS:
        y = best
        q_lanes = nothing
        for i in tl.static_range(COUNT):
            q_lanes += tl.where(lanes + (start + i * BLOCK) == y, tiles[i][2], 0.0)
        q_y = tl.sum(q_lanes, -1, keep_dims=True)
    sums, held = (nothing, nothing, nothing, nothing), ()
    for i in tl.static_range(COUNT):
        x, z, q = tiles[i]
        first = start + i * BLOCK
        # Not cols == y: that would be kept for the gradient, at the cost of what compares again.
        e_c, sums = row_lse(z, q, lanes < C - first, y - lanes == first, m, sums, DENSE, HEAT, EXACT)
        held += ((x, e_c, q),)  # type: ignore[assignment]
    so, rest, below, heat = add_up(sums, tl.zeros_like(m), DENSE, HEAT)
    return (m, so, rest, below, heat, y, q_y, best), held


@triton.jit
def store_part(parts, at, sums, there):
    for i in tl.static_range(len(sums)):
        tl.store(parts + at * len(sums) + i, sums[i].to(tl.float64), mask=there)


@triton.jit
def read_part(parts, at, like, there):
    sums = ()
    for i in tl.static_range(len(like)):
        value = tl.load(parts + at * len(like) + i, mask=there, other=0.0)
        sums += (value.to(like[i].dtype),)  # type: ignore[assignment]
    return sums


@triton.jit(do_not_specialize=["bundles", "inner", "ignore_index"])
def forward(
    logits,  # Matrix (N, C, d1..dk)
    target,  # Rows of class indices, or Matrix of probabilities
    weight,  # (C,) or None
    norm,  # (2,), see `prepare`; None: no division
    expected,  # (), the upstream gradient that grad is for; None: 1
    bad,  # (1,), see `gpu.check_targets`
    parts,  # (N, tiles, 8) or None
    out,  # loss, stats and extras, by the number of the row
    grad,  # Matrix, of nothing if none is wanted; may be the logits
    sizes,  # of the outer row dimensions, or None
    bundles,
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
    SCALED: tl.constexpr,  # whether k is not 1
    SOFTCAP: tl.constexpr,
    INPLACE: tl.constexpr,
    ALIGN: tl.constexpr,  # see `rows.alignment`
    VECTOR: tl.constexpr,  # see `sweep`
    SAME: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,  # that a row is held in; 0: it is read a second time for the gradient
    STEP: tl.constexpr,  # 1 and 2 share a row between programs, a tile each: its sums into parts, then the rest
):
    """Everything of ROWS rows at a time. Fewer programs than rows keep what is read twice in the cache."""
    ACC: tl.constexpr = accumulator(logits.ptr.dtype)
    EXACT: tl.constexpr = is_float32(logits.ptr.dtype)
    HEAT: tl.constexpr = out.extras is not None
    C = C // ALIGN * ALIGN if logits.col is None else C
    inner = inner // ALIGN * ALIGN if logits.inner is None else inner
    e, s, L = tl.full((), e, ACC), tl.full((), s, ACC), tl.full((), L, ACC)
    scalars = C, e, tl.full((), k, ACC) if SCALED else None, s
    D, count = load_scalar(norm, 0, ACC), load_scalar(norm, 1, ACC)
    r, lanes = shape(ROWS, BLOCK)
    for p in tl.range(tl.program_id(0), bundles, tl.num_programs(0), disable_licm=True):
        o, i, there, rows, live, y = load_rows(p, r, target, sizes, inner, C, ignore_index, bad, PROBS)
        x_at, t_at = locate(logits, sizes, o, i, ALIGN), locate(target, sizes, o, i, ALIGN) if PROBS else None
        # Ignored rows are not read, unless rows lie side by side: a mask with gaps would part a wide load.
        read, zero = there if logits.inner is None else live, tl.zeros(r.shape, ACC)
        tensors = logits, target, t_at, weight, read
        z_y, q_y = zero, zero
        if not PROBS:
            z_y, q_y = load_y(tensors, x_at, y, zero, scalars, SOFTCAP)
        if PIECES:
            sums, tiles = load_part(
                tensors, x_at, 0, lanes, y, q_y, scalars, DENSE, PROBS, SOFTCAP, HEAT, ALIGN, PIECES
            )
        elif STEP == 1:
            t = tl.program_id(1)
            sums, _ = load_part(tensors, x_at, t * BLOCK, lanes, y, q_y, scalars, DENSE, PROBS, SOFTCAP, HEAT, ALIGN, 0)
            store_part(parts, rows * tl.num_programs(1) + t, sums, there)
        else:
            sums = zero + float("-inf"), zero, zero, zero, zero, y, q_y, tl.full(r.shape, -1, tl.int32)
            tiles = tl.cdiv(C, BLOCK)
            for t in range(0, tiles):
                if STEP == 2:
                    more = read_part(parts, rows * tiles + t, sums, there)
                else:
                    more, _ = load_part(
                        tensors, x_at, t * BLOCK, lanes, y, q_y, scalars, DENSE, PROBS, SOFTCAP, HEAT, ALIGN, 0
                    )
                sums = join(sums, more, PROBS, EXACT)
        if STEP != 1:
            m, so, rest, _, _, y, q_y, _ = sums
            if PROBS:
                z_y = m
            once = there & (tl.zeros_like(r) + tl.program_id(1) == 0)
            rest = store_rows(out, rows, once, live, sums, z_y, D, count, L, DENSE, PROBS)
            if grad.ptr is not None:
                if INPLACE:
                    tl.debug_barrier()  # no warp may still be reading these rows
                at = locate(grad, sizes, o, i, ALIGN)
                factors = grad_factors(z_y, m, so, rest, q_y, zero + load_scalar(expected, 0, ACC) / D, zero)
                if PIECES and VECTOR == 1:
                    for t in tl.static_range(PIECES):
                        x, e_c, q = tiles[t]
                        cols = lanes + t * BLOCK
                        dx = row_grad(x, e_c, q, cols == y, factors, scalars[2], s, DENSE, SOFTCAP)
                        dx = tl.where(live, dx, 0.0)  # an ignored row may hold NaN
                        mask = there & (cols < C) if t == PIECES - 1 else there
                        store_tile(grad, at + step(cols, grad.col, ALIGN), dx, mask)
                else:
                    row = there, live, y, m, zero, factors
                    grads = grad, grad, None, zero
                    sweep(tensors, grads, x_at, at, row, scalars, lanes, DENSE, SOFTCAP, ALIGN, VECTOR, SAME)


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
    d_target,  # Matrix, of nothing if none is wanted
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
    SCALED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    INPLACE: tl.constexpr,
    ALIGN: tl.constexpr,
    VECTOR: tl.constexpr,
    SAME: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNLESS_EXPECTED: tl.constexpr,
):
    """The gradients, from logits and stats. A program takes many rows: leaving early must not cost N launches."""
    ACC: tl.constexpr = accumulator(logits.ptr.dtype)
    if UNLESS_EXPECTED:
        if tl.load(upstream.ptr).to(tl.float64) == load_scalar(expected, 0, tl.float64):
            return
    C = C // ALIGN * ALIGN if logits.col is None else C
    inner = inner // ALIGN * ALIGN if logits.inner is None else inner
    e, s = tl.full((), e, ACC), tl.full((), s, ACC)
    scalars = C, e, tl.full((), k, ACC) if SCALED else None, s
    D = load_scalar(norm, 0, ACC)
    r, lanes = shape(ROWS, BLOCK)
    for p in range(tl.program_id(0), bundles, tl.num_programs(0)):
        o, i, there, rows, live, y = load_rows(p, r, target, sizes, inner, C, ignore_index, None, PROBS)
        x_at, t_at = locate(logits, sizes, o, i, ALIGN), locate(target, sizes, o, i, ALIGN) if PROBS else None
        read, at = there if logits.inner is None else live, locate(grad, sizes, o, i, ALIGN)
        tensors = logits, target, t_at, weight, read
        m = tl.load(stats + rows * 4, mask=there, other=0.0).to(ACC)
        so = tl.load(stats + rows * 4 + 1, mask=there, other=0.0).to(ACC)
        rest = tl.load(stats + rows * 4 + 2, mask=there, other=0.0).to(ACC)
        y_or_D = tl.load(stats + rows * 4 + 3, mask=there, other=1.0)
        g = tl.load(upstream.ptr + rows * upstream.step, mask=there, other=0.0).to(ACC)
        of_lse = tl.zeros(r.shape, ACC)
        if g_lse is not None:
            of_lse = tl.load(g_lse.ptr + rows * g_lse.step, mask=there, other=0.0).to(ACC)
        if PROBS:
            y, scale = y_or_D.to(tl.int32), g / D
        else:
            scale = g / y_or_D.to(ACC)
        z_y, q_y = load_y(tensors, x_at, y, m, scalars, SOFTCAP)
        factors = grad_factors(z_y, m, so, rest, q_y, scale, of_lse)
        if INPLACE:
            tl.debug_barrier()
        dt_scale, row = (1.0 - e) * scale, (there, live, y, m, minus_m(z_y, m, so), factors)
        grads = grad, d_target, None if d_target.ptr is None else locate(d_target, sizes, o, i, ALIGN), dt_scale
        sweep(tensors, grads, x_at, at, row, scalars, lanes, DENSE, SOFTCAP, ALIGN, VECTOR, SAME)


@triton.jit(do_not_specialize=["N", "ignore_index"])
def prepare(target, weight, parts, N, C, ignore_index, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """CHUNK rows' share of (2,): the sum of w_y over the rows that count, and their number."""
    first = tl.program_id(0).to(tl.int64) * CHUNK
    D, count = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tl.minimum(CHUNK, N - first), BLOCK):
        rows = first + start + tl.arange(0, BLOCK)
        live, y = load_target(target, rows, rows < N, C, ignore_index, None)
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
