"""What a random call should give, and how far from it a result may be: NumPy, in a wider type, by another formula.

Nothing here comes from `fused_ce`: p_c = exp(-n_c) and 1 - p_c = -expm1(-n_c) of n_c = -log p_c, and no class is left
out of the sums but the largest, whose exponential is 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from fuzz_calls import Drawn
from torch import Tensor

Array = np.ndarray[Any, Any]


class Exact(NamedTuple):
    """A value, and the error that it allows before the one rounding to the result's dtype."""

    value: Array
    bound: Array


class Answers(NamedTuple):
    loss: Exact
    grad: Exact  # (R, C)
    d_target: Exact  # (R, C)
    lse: Exact  # (R,) as the next two
    z_loss: Exact
    entropy: Exact
    z: Array  # (R, C)
    counted: Array  # (R,) rows that are not ignored
    coarse_loss: Array  # () or (R,) the absolute error of an ordinary log_softmax in float64
    coarse_grad: Array  # (R, C)


def as_rows(tensor: Tensor, like: Any = np.float64) -> Array:
    """(N, C, d1..dk) or (C) -> (R, C)."""
    array = tensor.detach().resolve_neg().double().numpy().astype(like)
    C = array.shape[0 if array.ndim == 1 else 1]
    return np.moveaxis(array, 0 if array.ndim == 1 else 1, -1).reshape(-1, C)


def answers(call: Drawn, slack: float, strict: bool) -> Answers:
    """All that the call returns; `slack` multiplies every bound, `strict` holds losses of float32 to 4 ULP."""
    with np.errstate(all="ignore"):
        return _answers(call, slack, strict)


def _answers(call: Drawn, slack: float, strict: bool) -> Answers:
    input, target, options = call.input, call.target, call.keywords
    double = input.dtype == torch.float64
    real = np.longdouble if double else np.float64
    info = np.finfo(np.float64 if double else np.float32)
    # The contract promises no ULP of float64: 511 equal logits of 1000 lose 20, by the shift of their exponentials.
    eps, tiny = float(info.eps) * slack * (8 if double else 1), float(info.tiny)
    e, k, s, L = (options[name] for name in ("label_smoothing", "logit_scale", "softcap", "lse_square_scale"))
    x = as_rows(input, real)
    R, C = x.shape
    each = np.arange(R)
    probs = target.is_floating_point()
    y = np.zeros(R, dtype=np.int64) if probs else target.reshape(-1).long().numpy()
    counted = np.full(R, True) if probs else y != options["ignore_index"]
    x = np.where(counted[:, None], x, 0)
    u = x * real(k) if s is None else x * real(k) / real(s)
    z = u if s is None else real(s) * np.tanh(u)
    slope = real(k) if s is None else real(k) / np.cosh(u) ** 2

    m, top = z.max(1), z.argmax(1)
    # Two float32 hold z, where it is not the logits themselves; what is lost of a large one is lost of its exponential.
    widest = np.abs(np.where(np.isfinite(z), z, 0)).max(1)
    held = 0 * widest if (s is None and k in (1.0, -1.0)) or double else 2.0**-46 * widest
    drop = m[:, None] - z
    e_c = np.exp(-drop)
    spread = np.where(e_c > 0, e_c * drop, 0)  # of which the top's is 0
    e_c[each, top] -= 1
    lse_m = np.log1p(e_c.sum(1))
    n = drop + lse_m[:, None]
    p, r = np.exp(-n), -np.expm1(-n)
    lse = m + lse_m
    entropy = lse_m + spread.sum(1) / (1 + e_c.sum(1))
    # A difference of two logits is rounded, and where the top is all but certain the rest is the exponential of one.
    rest = np.where(e_c.sum(1) > 0, spread.sum(1) / e_c.sum(1), 0)
    least = 750 if double else 110  # beyond it an exponential is 0
    rest = np.minimum(np.nan_to_num(rest, nan=0, posinf=0), least)
    # And where all are shifted near m, in float64 by a number that float64 itself rounds.
    sum_rest = rest + double * widest / 8
    far = np.minimum(np.nan_to_num(drop, nan=0, posinf=0), least)
    # float64 has no wider type to make z in: a relative error of z is an absolute one of its exponential.
    moved = double * (3 * widest if s is not None else widest if k not in (1.0, -1.0) else np.zeros(R))

    w = np.ones(C, real) if call.weight is None else call.weight.double().numpy().astype(real)
    y = top if probs else np.where(counted, y, 0)
    onehot = np.zeros((R, C), bool)
    onehot[each, y] = True
    if probs:
        q = w * ((1 - real(e)) * as_rows(target, real) + real(e) / C)
    else:  # no 0 * w, which is NaN where the weight is infinite
        q = np.where(onehot, (real(e) / C + (1 - real(e))) * w, real(e) / C * w if e > 0 else 0)
    part = np.where(onehot | probs | (e > 0), q * n, 0)  # a class that has no share may hold -inf
    size = np.abs(part).sum(1)
    a = np.abs(q).sum(1)
    loss, z_loss = part.sum(1), L * lse**2 if L else np.zeros(R, real)
    z_size = np.where(counted, np.abs(L) * (2 * np.abs(lse) * (np.abs(m) + lse_m) + lse**2), 0) if L else np.zeros(R)
    z_bound = eps * (4 * z_size + 4 * np.abs(L * lse) * moved) if L else np.zeros(R)
    loss_bound = eps * (4 * size + a * (sum_rest * lse_m / 2 + 2 * moved)) + 4 * tiny * (1 + a)

    D: Any = 1.0
    count: Any = 1.0
    if options["reduction"] == "mean":
        D = count = real(counted.sum()) if options["num_items"] is None else real(float(options["num_items"]))
        if options["num_items"] is None and not probs and call.weight is not None:
            D = np.where(counted, w[y], 0).sum()
    loss, z_loss, loss_bound, z_bound = (np.where(counted, part, 0) for part in (loss, z_loss, loss_bound, z_bound))
    if options["reduction"] == "none":
        total, bound = loss + z_loss, loss_bound + z_bound + eps * (np.abs(loss) + np.abs(z_loss))
    else:
        total = np.asarray(loss.sum() / D + (z_loss.sum() / count if L else 0))
        bound = loss_bound.sum() / np.abs(D) + z_bound.sum() / np.abs(count) + 2 * eps * np.abs(total)
        # Losses of float64 are added in float64 itself, by 16 sums; those of float32 in float64.
        bound = bound + double * eps * (4 + R / 16) * (
            np.abs(loss).sum() / np.abs(D) + np.abs(z_loss).sum() / np.abs(count)
        )

    if strict and not double:
        # 3.5 ULP, and then the rounding; of the parts, where a negative z-loss or lse = m + log(..) cancels. What is
        # flushed: exponentials below the least normal number are 0, shares q below it are rounded in steps of 2^-149.
        steps = np.where(q * n > 0, np.nan_to_num(n, posinf=0), 0).sum(1) * 2.0**-149 if probs or e > 0 else 0
        flushed_loss = np.where(counted, 4 * tiny * a + 2.0**-149 + steps, 0)
        if options["reduction"] == "none":
            size = np.abs(loss) + z_size
        else:
            size, flushed_loss = np.abs(loss).sum() / D + z_size.sum() / count, flushed_loss.sum() / D
        # Probabilities: 8.5 and the rounding, as the contract says; 8.4 in all was met once in 70,000 calls.
        bound = (8.5 if probs else 3.5) * np.spacing(size.astype(np.float32)).astype(np.float64) + flushed_loss
        bound = bound + size * (held.max(initial=0) if options["reduction"] != "none" else held)

    up = np.broadcast_to(call.upstream.double().numpy().astype(real).reshape(-1), R)
    g = np.zeros(R, real) if call.g_lse is None else call.g_lse.double().numpy().astype(real).reshape(-1)
    scale = up / D if D != 0 else np.full(R, np.nan)  # P7: NaN, where torch mixes inf, -inf and NaN
    z_scale = (up / count if count != 0 else np.full(R, np.nan)) * 2 * L if L else np.zeros(R, real)
    others = np.where(np.isinf(q), np.inf if C > 1 else 0, q.sum(1)[:, None] - q)
    others[each, y] = np.where(onehot, 0, q).sum(1)
    dz = scale[:, None] * (others * p - q * r) + (z_scale * lse + g)[:, None] * p
    z_terms = np.abs(z_scale) * (np.abs(m) + lse_m) + np.abs(g)
    terms = np.where(onehot, (np.abs(others) + 0 * a[:, None]) * p + np.abs(q) * r, a[:, None] * p + np.abs(q))
    terms = np.abs(scale)[:, None] * terms + z_terms[:, None] * p
    relative = 16 + np.where(onehot, np.maximum(far, rest[:, None]), far) + 4 * moved[:, None] + 2 * held[:, None] / eps
    relative = relative + (0 if s is None else 2 * np.abs(u) + 4)
    flushed = 4 * tiny * (1 + np.abs(up) + (np.abs(scale) * a + z_terms) * max(1.0, abs(k)))
    # An upstream gradient of float64 may be subnormal in float32, and come back to size by weights.
    step = 0 if double else 2.0**-149
    flushed = flushed + step * (a / np.abs(D) + np.abs(2 * L * lse * D / count)) * max(1.0, abs(k))
    row = counted[:, None]
    grad = Exact(
        np.where(row, dz * slope, 0), np.where(row, eps * relative * terms * np.abs(slope) + flushed[:, None], 0)
    )
    dt = (1 - real(e)) * scale[:, None] * w * n
    dt_bound = eps * (
        8 * np.abs(dt) + np.abs((1 - e) * scale[:, None] * w) * ((sum_rest * lse_m / 2 + 2 * moved)[:, None])
    )
    # What is made of z and of a weight may be subnormal.
    dt_bound = dt_bound + np.abs((1 - e) * scale * held)[:, None] * w
    dt_bound = dt_bound + step * (1 + np.nan_to_num(n, posinf=0)) * (1 + w)
    dt_bound = dt_bound + flushed[:, None] * w
    # Where the target is not the top, the top's exponential of 1 is in the sum.
    lse_bound = eps * (4 * (np.abs(m) + lse_m) + 2 * moved + (y != top))
    # Each p of the entropy moves by the rounding of its logit.
    h_bound = eps * ((16 + rest) * entropy + 4 * moved * (1 + entropy)) + 16 * tiny
    stats = [Exact(np.where(counted, v, 0), np.where(counted, b, 0)) for v, b in ((lse, lse_bound), (entropy, h_bound))]
    z_total = z_loss if options["reduction"] == "none" else np.asarray(z_loss.sum() / count)
    z_error = z_bound if options["reduction"] == "none" else z_bound.sum() / np.abs(count) + 2 * eps * np.abs(z_total)
    z_exact = Exact(z_total, z_error + 4 * tiny)
    coarse = np.where(counted, a * (1 + widest) * 1e-11, 0)
    coarse_loss = coarse if options["reduction"] == "none" else np.asarray(coarse.sum() / np.abs(D))
    coarse_grad = (coarse * np.abs(scale))[:, None] * np.abs(slope) * np.ones((R, C))
    parts = Exact(total, bound), grad, Exact(dt, dt_bound), stats[0], z_exact, stats[1]
    return Answers(*parts, z, counted, coarse_loss, coarse_grad)
