r"""The mathematics of fused_ce, written once, in plain PyTorch: any device, any dtype, differentiable.

`csrc/formula.inl.h` and `backends/triton/formula.py` hold the same functions, same letters, same order:

    transform, transform_grad, row_lse, combine, row_loss, row_grad

One row of logits x (C classes), class weights w (1 if none), label smoothing e, logit scale k,
softcap s, z-loss factor L (`lse_square_scale`):

    z_c   = s tanh(k x_c / s)            (k x_c without softcap)              transform
    lse   = log sum_c exp z_c                                                 row_lse, combine
    q_c   = (1 - e) w_y [c = y] + (e / C) w_c      target: class index y
    q_c   = w_c ((1 - e) t_c + e / C)              target: probabilities t
    a     = sum_c q_c
    loss  = a lse - sum_c q_c z_c + L lse^2                                   row_loss
    p_c   = exp(z_c - lse)
    H     = lse - sum_c p_c z_c                                               row_stats
    dz_c  = (a + 2 L lse + g_lse) p_c - q_c - g_H p_c (log p_c + H)
            g_lse, g_H: upstream gradients of lse and of the entropy H, where those were returned
    dx_c  = dz_c k / cosh(k x_c / s)^2   (dz_c k without softcap)             row_grad, transform_grad
    an ignored row: loss = 0 and dx = 0, whatever its logits hold

How it is computed. m is the largest z of the row, drop = m - z_c, and one class y is left out of the sums:

    so       = sum over c != y of exp(z_c - m),   e_y = exp(z_y - m)
    q_others = sum over c != y of q_c = a - q_y
    q_drop   = sum over c != y of q_c drop
    e_drop   = sum over c != y of exp(z_c - m) drop
    lse      = m + lse_m,   lse_m = log1p(so + (e_y - 1))
    loss     = q_y (lse_m + (m - z_y)) + q_others lse_m + q_drop + L lse^2
    p_y      = e_y / (so + e_y),   1 - p_y = so / (so + e_y)
    H        = lse_m + mean_drop,   mean_drop = sum of p_c drop = (e_drop + e_y (m - z_y)) / (so + e_y)
    log p_c + H = mean_drop - drop

Where y is certain (e_y = 1, so tiny), `1 + so` would round so away: log(1 + so) becomes 0 and p_y - 1
becomes 0, which is why other cross entropies lose a confident row's loss and gradient. With so kept
apart, every term of the loss is a sum of non-negative parts and nothing cancels. y is the target or,
under probability targets, the largest logit. For the same reason the softcap's slope is 1 / cosh^2
rather than the equal 1 - (z / s)^2.

The sums of a row (`RowSums`) are joined from those of its parts, whatever the parts are (blocks, tiles, shards of the
classes): `combine` brings both to the larger m, by exp(m_part - m) and, for the drops, by m - m_part.

z of logits narrower than float64 is kept in more than float32 where k or s makes it (csrc: the sum of two float32;
Triton and `operators.py`: float64), because near 30 float32 rounds it by 1e-6, and a loss is a difference of such z.

Origin of the parts: softmax minus one-hot as in Bridle (1990); label smoothing as in Szegedy et al.
(2016); softcap as in Gemma 2 (2024); the z-loss L lse^2 as in PaLM (2022); sums joined part by part as in
Milakov and Gimelshein (2018).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import RowSums, Stats
from .options import Options


# [1] transform
def transform(x: Tensor, options: Options) -> Tensor:  # (R, C) -> (R, C)
    z = x * options.logit_scale
    return z if options.softcap is None else options.softcap * torch.tanh(z / options.softcap)


# [2] transform_grad
def transform_grad(x: Tensor, options: Options) -> Tensor | float:  # (R, C) -> dz/dx
    if options.softcap is None:
        return options.logit_scale
    return options.logit_scale / torch.cosh(x * (options.logit_scale / options.softcap)) ** 2


# [3] row_lse
def row_lse(
    z: Tensor,  # (R, C), a part of the classes or all of them
    y: Tensor,  # (R,) counted from the part's first class; outside [0, C): another part holds it
    q_y: Tensor,  # (R,)
    q: Tensor | None,  # (R, C); None: no class but y has any
    wants_stats: bool = False,
) -> RowSums:
    """The sums of a part; its argmax is counted from the part's first class, as y is."""
    m = z.detach().amax(-1)
    held = (y >= 0) & (y < z.shape[-1])
    at = torch.where(held, y, 0)[:, None]

    def without_y(values: Tensor) -> Tensor:  # (R, C)
        return values.scatter(-1, at, torch.where(held[:, None], 0, values.gather(-1, at)))

    drop = finite(m)[:, None] - z
    e_c = without_y(torch.exp(-drop))
    zero = torch.zeros_like(m)
    q_others = q_drop = zero
    if q is not None:
        q = without_y(q)
        q_others = q.sum(-1)
        drop_c = without_y(drop)  # not 0 * drop, which is NaN where z_y is -inf
        q_drop = torch.where((drop_c == 0) & q.isinf(), 0, q * drop_c).sum(-1)  # a weight may be infinite
    return RowSums(
        m,
        e_c.sum(-1),
        torch.where(held, z.gather(-1, at).squeeze(-1), -torch.inf),
        torch.where(held, q_y, 0),
        q_others,
        q_drop,
        times_drop(e_c, drop).sum(-1) if wants_stats else zero,
        z.argmax(-1) if wants_stats else torch.full_like(y, -1),
    )


def finite(m: Tensor) -> Tensor:  # (R,)
    """m, or 0 where every class is -inf: (-inf) - (-inf) would be NaN."""
    return torch.where(m == -torch.inf, 0, m)


def times_drop(e_c: Tensor, drop: Tensor) -> Tensor:
    """e_c drop, and 0 with a derivative of 0 where a class has no part in the sums and drop may be infinite."""
    return e_c * torch.where(e_c == 0, 0, drop)


def rescale(part: RowSums, m: Tensor) -> RowSums:  # (R,)
    """The sums of a part as they are relative to the m of the whole row."""
    rise, shrink = finite(m) - finite(part.m), torch.exp(part.m - finite(m))
    return part._replace(
        m=m,
        so=part.so * shrink,
        q_drop=part.q_drop + part.q_others * rise,
        e_drop=(part.e_drop + part.so * rise) * shrink,
    )


def put_back(sums: RowSums, where: Tensor) -> RowSums:  # (R,)
    """y joins the other classes, in these rows: where the row's y is another part's."""
    y_drop = finite(sums.m) - sums.z_y
    e_y = torch.exp(-y_drop)
    return sums._replace(
        so=torch.where(where, sums.so + e_y, sums.so),
        z_y=torch.where(where, -torch.inf, sums.z_y),
        q_y=torch.where(where, 0, sums.q_y),
        q_others=torch.where(where, sums.q_others + sums.q_y, sums.q_others),
        q_drop=torch.where(where, sums.q_drop + sums.q_y * y_drop, sums.q_drop),
        e_drop=torch.where(where, sums.e_drop + times_drop(e_y, y_drop), sums.e_drop),
    )


def combine(a: RowSums, b: RowSums, probs: bool = False) -> RowSums:
    """The sums of two parts of a row, in order; `probs`: each left out its own largest class rather than a common y."""
    higher, m = b.m > a.m, torch.maximum(a.m, b.m)
    if probs:
        a, b = put_back(a, higher), put_back(b, ~higher)
    a, b = rescale(a, m), rescale(b, m)
    return RowSums(
        m,
        a.so + b.so,
        torch.maximum(a.z_y, b.z_y),
        a.q_y + b.q_y,
        a.q_others + b.q_others,
        a.q_drop + b.q_drop,
        a.e_drop + b.e_drop,
        torch.where(higher, b.argmax, a.argmax),
    )


# [4] row_loss
def row_loss(sums: RowSums, options: Options) -> tuple[Tensor, Tensor]:  # (R,) cross entropy, (R,) z-loss
    m, lse_m = sums.m, minus_m(sums)
    loss = sums.q_y * (lse_m + (m - sums.z_y)) + (sums.q_others * lse_m + sums.q_drop)
    # Not 0 * lse^2, which is NaN where the square overflows.
    L = options.lse_square_scale
    return loss, L * (m + lse_m) ** 2 if L else torch.zeros_like(loss)


def minus_m(sums: RowSums) -> Tensor:  # (R,)
    """lse - m."""
    return torch.log1p(sums.so + (torch.exp(sums.z_y - sums.m) - 1))


# [5] row_grad
def row_grad(
    x: Tensor,  # (R, C)
    z: Tensor,  # (R, C)
    y: Tensor,  # (R,) counted from the part's first class; outside [0, C): another part holds it
    q: Tensor | None,  # (R, C); None: no class but y has any
    sums: RowSums,  # of the whole row; its y put back where another part holds it
    options: Options,
    scale: Tensor,  # (R,) upstream gradient of the cross entropy
    z_scale: Tensor,  # (R,) upstream gradient of the z-loss
    g_lse: Tensor | float = 0.0,  # (R,) upstream gradient of lse, where lse was returned
    g_entropy: Tensor | None = None,  # (R,) and of the entropy; the sums then hold e_drop
) -> Tensor:  # (R, C) dx
    held = (y >= 0) & (y < z.shape[-1])
    e_y = torch.exp(sums.z_y - sums.m)
    total = sums.so + e_y
    z_part = z_scale * 2 * options.lse_square_scale * (sums.m + minus_m(sums)) + g_lse
    others = scale * sums.q_others + z_part
    dz = (others + scale * sums.q_y)[:, None] * torch.exp(z - sums.m[:, None]) / total[:, None]
    if q is not None:
        dz = dz - scale[:, None] * q
    dz_y = others * (e_y / total) - scale * sums.q_y * (sums.so / total)
    if g_entropy is not None:
        drop, y_drop, mean = sums.m[:, None] - z, sums.m - sums.z_y, mean_drop(sums)
        p, p_y = torch.exp(-drop) / total[:, None], e_y / total
        dz = dz + g_entropy[:, None] * (times_drop(p, drop) - p * mean[:, None])
        dz_y = dz_y + g_entropy * (times_drop(p_y, y_drop) - p_y * mean)
    at = torch.where(held, y, 0)[:, None]
    dz_at = torch.where(held[:, None], dz_y[:, None], dz.gather(-1, at))
    return dz.scatter(-1, at, dz_at) * transform_grad(x, options)


def target_grad(
    z: Tensor,  # (R, C)
    sums: RowSums,
    weight: Tensor | None,  # (C,)
    options: Options,
    scale: Tensor,  # (R,)
) -> Tensor:  # (R, C) gradient of probabilities
    minus_log_p = minus_m(sums)[:, None] + (sums.m[:, None] - z)
    dt = (scale * (1 - options.smoothing))[:, None] * minus_log_p
    return dt if weight is None else dt * weight


def row_stats(sums: RowSums, options: Options) -> Stats:  # (R,) each
    lse_m = minus_m(sums)
    _, z_loss = row_loss(sums, options)
    return Stats(sums.m + lse_m, z_loss, sums.argmax, lse_m + mean_drop(sums))


def mean_drop(sums: RowSums) -> Tensor:  # (R,)
    """Sum of p_c drop."""
    e_y = torch.exp(sums.z_y - sums.m)
    return (sums.e_drop + times_drop(e_y, sums.m - sums.z_y)) / (sums.so + e_y)
