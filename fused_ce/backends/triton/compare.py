"""A few rows of a call in float64, and whether what a kernel gave for them is near enough."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...contract import Call, RowSums, Stats, Upstream
from ...formula import transform
from .. import reference

ROWS = 4
# Far beyond what rounding does (see docs/accuracy.md), far below what a wrong index, mask or barrier does.
RELATIVE = {torch.float32: 1e-4, torch.float64: 1e-9}
# Numbers beyond these overflow or vanish in float32, or lose so many digits before the first sum that nothing is told.
LARGEST_LOGIT, LARGEST_FACTOR, SMALLEST_FACTOR = 1e4, 1e9, 1e-20


class Exact(NamedTuple):
    """What a kernel should give for `rows`, in float64 on the CPU; r of them, in the order of the call."""

    call: Call  # the rows alone, as reduction "none", the z-loss in units of the cross entropy's divisor
    rows: Tensor  # (r,) int64
    counts: Tensor  # (r,) bool
    divisors: tuple[float, float]
    g: Tensor  # (r,), upstream gradients of the loss, divided by D
    g_lse: Tensor | None  # (r,), upstream gradients of lse
    z: Tensor  # (r, C)
    q: Tensor  # (r, C), without signs
    relative: float

    def loss_differs(self, losses: Tensor, loss: Tensor) -> str:
        """`losses`: of all rows, before their sum; `loss`: the result."""
        exact, stats = self._forward()
        lse, drop = stats.lse[:, None], stats.lse[:, None] - self.z
        terms = torch.where(self.q == 0, 0, self.q * drop).abs().sum(1)
        terms += abs(self.call.options.lse_square_scale) * lse[:, 0] ** 2
        found = differs("loss", _of_rows(losses, self.rows), exact, terms * self.relative)
        if loss.dim() == losses.dim() == 0 or loss.shape == losses.shape:
            return found
        all_rows = losses.cpu().double()
        allowed = all_rows.abs().sum() / abs(self.divisors[0]) * self.relative
        return found or differs("sum of the losses", loss, all_rows.sum() / self.divisors[0], allowed)

    def grad_differs(self, grad: Tensor) -> str:
        exact = self._backward(False)[0]
        lse = torch.logsumexp(self.z, 1, keepdim=True)
        p, options = torch.exp(self.z - lse), self.call.options
        a = self.q.sum(1, keepdim=True) + 2 * abs(options.lse_square_scale) * lse.abs()
        terms = self.g[:, None].abs() * (a * p + self.q)
        if self.g_lse is not None:
            terms = terms + self.g_lse[:, None].abs() * p
        terms = terms * abs(options.logit_scale)
        return differs("gradient", rows_of(grad, self.rows), exact, terms * self.relative + self._flushed())

    def target_grad_differs(self, grad: Tensor) -> str:
        exact = self._backward(True)[1]
        weight = 1.0 if self.call.weight is None else self.call.weight.abs()
        terms = exact.abs() + self.g[:, None].abs() * weight
        return differs("target's gradient", rows_of(grad, self.rows), exact, terms * self.relative + self._flushed())

    def stats_differ(self, stats: Stats) -> str:
        exact = self._forward()[1]
        got = Stats(*(_of_rows(value, self.rows) for value in stats))
        at = got.argmax.clamp(0, self.z.shape[1] - 1)[:, None]
        near = self.z.gather(1, at)[:, 0] >= self.z.amax(1) - self.relative * (1 + self.z.amax(1).abs())
        if not bool(torch.where(self.counts, near & (got.argmax == at[:, 0]), got.argmax == -1).all()):
            return f"argmax {got.argmax.tolist()} instead of {exact.argmax.tolist()}"
        z_loss = exact.z_loss * (self.divisors[1] / self.divisors[0])
        pairs = {"lse": (got.lse, exact.lse), "z_loss": (got.z_loss, z_loss), "entropy": (got.entropy, exact.entropy)}
        found = (differs(name, mine, its, (1 + its.abs()) * self.relative) for name, (mine, its) in pairs.items())
        return next(filter(None, found), "")

    def sums_differ(self, sums: Tensor, wants_stats: bool) -> str:
        """Of a shard, (8, R)."""
        call = self.call._replace(options=self.call.options._replace(return_stats=wants_stats))
        unsigned = call._replace(weight=None if call.weight is None else call.weight.abs())
        exact, terms = RowSums(*reference.part(call)), RowSums(*reference.part(unsigned).abs())
        got = RowSums(*sums[:, self.rows.to(sums.device)].cpu())
        here = (got.argmax - call.shard.first * self.counts).long()
        z_here = self.z.gather(1, here.clamp(0, call.classes - 1)[:, None])[:, 0]
        near = (here >= 0) & (here < call.classes) & (z_here >= exact.m - self.relative * (1 + terms.m))
        if not bool(torch.where(self.counts & wants_stats, near, got.argmax == -1).all()):
            return f"argmax {got.argmax.tolist()} instead of {exact.argmax.tolist()}"
        sizes = terms._replace(
            m=1 + terms.m, z_y=1 + terms.z_y, q_drop=terms.q_drop + terms.q_others, e_drop=terms.e_drop + terms.so
        )
        flushed = 128 * call.classes * torch.finfo(torch.float32).tiny
        found = (
            differs(name, mine, its, size.nan_to_num() * self.relative + flushed)
            for name, mine, its, size in zip(RowSums._fields[:-1], got, exact, sizes, strict=False)
        )
        return next(filter(None, found), "")

    def shard_grad_differs(self, grad: Tensor, sums: Tensor) -> str:
        """`sums`: of whole rows, (8, R)."""
        kept = RowSums(*sums[:, self.rows.to(sums.device)].cpu())
        exact = torch.empty_like(self.z)
        reference.finish(self.call, torch.stack(kept), Upstream(self.g, self.g_lse), exact)
        a, q = kept.q_y.abs() + kept.q_others.abs(), self.q
        p = torch.exp(self.z - kept.m[:, None]) / (kept.so + torch.exp(kept.z_y - kept.m))[:, None]
        terms = self.g[:, None].abs() * (a[:, None] * p + q)
        if self.g_lse is not None:
            terms = terms + self.g_lse[:, None].abs() * p
        terms = terms.nan_to_num() * abs(self.call.options.logit_scale)
        flushed = self._flushed() * max(1.0, float(a.nan_to_num().max()))
        return differs("gradient", rows_of(grad, self.rows), exact, terms * self.relative + flushed)

    def _forward(self) -> tuple[Tensor, Stats]:
        loss, _, _, stats = reference.forward(self.call, "loss")
        assert stats is not None
        return loss, stats

    def _backward(self, wants_target: bool) -> tuple[Tensor, Tensor]:
        result = reference.backward(self.call, None, None, Upstream(self.g, self.g_lse), True, wants_target)
        return result.input, result.input if result.target is None else result.target

    def _flushed(self) -> float:
        """What an exponential that is too small for the kernel's dtype may take away."""
        return torch.finfo(torch.float32).tiny * max(
            1.0, float(self.g.abs().max()) * max(1.0, float(self.q.sum(1).max()))
        )


def sample(
    call: Call,
    divisors: tuple[float, float],  # of the cross entropy and of the z-loss
    upstream: Tensor,  # () or R
    g_lse: Tensor | None,  # R
) -> Exact | None:
    """Up to ROWS rows of the call, an ignored one among them if there is any; None where nothing can be told."""
    _, _, weight, options = call
    D, count = divisors
    rows, counts = _candidates(call)
    g = _of_rows(upstream, rows).double() / D
    of_lse = None if g_lse is None else _of_rows(g_lse, rows).double()
    x, w = rows_of(call.input, rows).double(), None if weight is None else weight.cpu().double()
    t = rows_of(call.target, rows).double() if call.has_probs else _of_rows(call.target, rows).long()
    z, q = _z_and_q(x, t, w, call)
    kx = torch.where(x == -torch.inf, 0, x * options.logit_scale)
    usable = (kx.abs().amax(1) <= LARGEST_LOGIT) & (x > -torch.inf).any(1) & (q.amax(1) <= LARGEST_FACTOR)
    factors = [g, *(numbers for numbers in (of_lse, w) if numbers is not None)]
    for numbers in factors:
        size = numbers.abs()
        fine = (size == 0) | ((size >= SMALLEST_FACTOR) & (size <= LARGEST_FACTOR))
        usable &= fine.all() if numbers is w else fine
    kept = torch.cat([(usable & counts).nonzero()[: ROWS - 1, 0], (usable & ~counts).nonzero()[:1, 0]])
    if not counts[kept].any():
        return None
    alone = options._replace(
        reduction="none",
        dtype=None,
        num_items=None,
        grad_scale=None,
        inplace=False,
        return_stats=True,
        lse_square_scale=options.lse_square_scale * D / count,
    )
    # A scaled logit is rounded before the largest is taken from it.
    plain = options.logit_scale == 1 and options.softcap is None
    rounding = 0.0 if plain else 8 * torch.finfo(call.acc).eps * float(kx[kept].abs().max())
    return Exact(
        Call(x[kept], t[kept], w, alone),
        rows[kept],
        counts[kept],
        divisors,
        g[kept],
        None if of_lse is None else of_lse[kept],
        z[kept],
        q[kept],
        RELATIVE[call.acc] + rounding,
    )


def divisors_of(call: Call) -> tuple[float, float]:
    """What torch divides the cross entropy and the z-loss of a call by."""
    _, target, weight, options = call
    if options.reduction != "mean":
        return 1.0, 1.0
    if options.num_items is not None:
        return float(options.num_items), float(options.num_items)
    if call.has_probs:
        return float(call.row_shape.numel()), float(call.row_shape.numel())
    labels = target.cpu().reshape(-1).long()
    labels = labels[labels != options.ignore_index]
    if weight is None:
        return float(len(labels)), float(len(labels))
    exist = labels[(labels >= 0) & (labels < call.classes)]
    return float(weight.cpu().double()[exist].sum()), float(len(labels))


def _candidates(call: Call) -> tuple[Tensor, Tensor]:  # (r,) int64, (r,) bool
    """Rows from all over the call whose targets exist, and which of them count: at most 8 that do, and one ignored."""
    R = call.row_shape.numel()
    rows = torch.linspace(0, R - 1, min(R, 64), dtype=torch.float64, device="cpu").long()
    if call.has_probs:
        counted, ignored = rows, rows[:0]
    else:
        labels = _of_rows(call.target, rows).long()
        counts = labels != call.options.ignore_index
        counted, ignored = rows[counts & (labels >= 0) & (labels < call.shard.total)], rows[~counts][:1]
    counted = counted[:: max(1, len(counted) // 8)][:8]
    rows = torch.cat([counted, ignored])
    return rows, torch.arange(len(rows), device="cpu") < len(counted)


def _z_and_q(x: Tensor, t: Tensor, w: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:  # (r, C) each
    """What `formula.py` calls z, and the sizes of its q."""
    e, C, (first, total) = call.options.smoothing, call.classes, call.shard
    q = t.abs() if call.has_probs else (torch.arange(first, first + C, device="cpu") == t[:, None]).double()
    return transform(x, call.options), ((1 - e) * q + e / total) * (1.0 if w is None else w[first : first + C].abs())


def _of_rows(values: Tensor, rows: Tensor) -> Tensor:  # () or R -> (r,) on the CPU
    return values.cpu().expand(len(rows)) if values.dim() == 0 else values.reshape(-1)[rows.to(values.device)].cpu()


def rows_of(tensor: Tensor, rows: Tensor) -> Tensor:  # (N, C, d1..dk) or (C) -> (r, C) on the CPU
    if tensor.dim() == 1:
        return tensor.cpu()[None].expand(len(rows), -1)
    moved = tensor.movedim(1, -1)
    at = torch.unravel_index(rows.to(tensor.device), moved.shape[:-1])
    return moved[at].cpu()


def differs(name: str, got: Tensor, exact: Tensor, allowed: Tensor) -> str:
    """What to report of a result that is further from exact than allowed and two units of its last digit; or ""."""
    dtype, got = got.dtype, got.cpu().double()
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.tiny)).exponent - 1
    allowed = allowed + 2 * torch.ldexp(torch.full_like(exact, info.eps), exponent)
    right = (got - exact).abs() <= allowed
    right |= (got == exact.to(dtype).double()) | (got.isnan() & exact.isnan())
    if bool(right.all()):
        return ""
    at = int((~right).flatten().nonzero()[0])
    wrong = int((~right).sum())
    return f"{name} {got.flatten()[at]:.9g} instead of {exact.flatten()[at]:.9g}, {wrong} of {right.numel()} wrong"
