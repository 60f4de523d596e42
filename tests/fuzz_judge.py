"""How far a fuzzed result may be from the exact one, and what is known to be further."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from fuzz_calls import Drawn
from fuzz_exact import Answers, Exact, as_rows
from torch import Tensor

# What no backend promises, by the name that each is looked up under.
LIMITS = (
    # A difference of logits is rounded to float32, so each p of the entropy moves; the losses alone take it back.
    "entropy where the target is not the top",
    # Probabilities of float64 make a float64 loss of narrower logits, whose sums stay in float32's range.
    "sums beyond float32 of a float64 loss",
    # Its sums and factors are float32 throughout, and the quotient of two numbers near either end is not.
    "weights near the ends of float32 on Triton",
    # An upstream gradient divided by such weights is below float32, and times them it comes back to size.
    "subnormal upstream of large weights",
    # The scale 1 / D of an infinite D is 0, and with it goes the z-loss, which has a divisor of its own.
    "infinite weights beside a z-loss",
    # w t is 0 in float32, and 0 times the infinite distance of a logit of -inf is NaN.
    "weights of 1e-37 beside logits of -inf",
    # Made for a grad_scale above the upstream gradient that came: what overflowed stays infinite.
    "a gradient that overflows under grad_scale",
    # A sum of weights of 1e30 times logits of 1e38 is beyond float32.
    "extreme logits under weights near the ends of float32",
)


def is_beyond_limits(call: Drawn, backend: str) -> bool:
    """Whether nothing is promised of the call's numbers, by its weights."""
    weights, values, double = call.notes["weight"], call.notes["values"], call.input.dtype == torch.float64
    ends = weights in ("1e-37", "1e30") and not double
    met = {
        "weights near the ends of float32 on Triton": ends and backend == "triton",
        "infinite weights beside a z-loss": weights == "inf" and call.keywords["lse_square_scale"],
        "weights of 1e-37 beside logits of -inf": weights == "1e-37" and values == "-inf" and not double,
        "extreme logits under weights near the ends of float32": (ends or weights == "inf") and values == "extreme",
    }
    return any(met[name] for name in LIMITS if name in met)


def differs(name: str, got: Tensor, exact: Exact, torchs: Tensor | None = None, where: Any = None) -> Iterator[str]:
    """Whether each number lies between the exact value less its bound and that plus its bound, both of them rounded.

    `torchs` is for logits whose float32 sums overflow: then torch's result, or one no further from exact, will do.
    """
    value = np.asarray(exact.value, np.float64)
    truly = np.isfinite(value)
    bound = np.where(truly, np.nan_to_num(np.asarray(exact.bound, np.float64), nan=np.inf), 0)
    if torchs is not None:  # a square next to the largest number may overflow by a rounding
        bound = np.where(np.abs(value) > torch.finfo(got.dtype).max / 4, np.inf, bound)
    with np.errstate(all="ignore"):
        low, high = (torch.from_numpy(np.asarray(end)).to(got.dtype) for end in (value - bound, value + bound))
    good = ((got >= low) & (got <= high)) | (got.isnan() & low.isnan())
    if where is not None:
        good = good | ~torch.from_numpy(where)
    if torchs is not None and not good.all():
        torchs = torchs if got.dim() < 2 else torch.from_numpy(as_rows(torchs))
        torchs = torchs.to(got.dtype).reshape(got.shape)
        error, torch_error = ((one.double() - torch.from_numpy(value)).abs() for one in (got, torchs))
        alike = ~torchs.isfinite() & (~got.isfinite() | torch.from_numpy(np.asarray(truly)))
        good = good | (error <= torch_error) | alike
    if good.all():
        return
    at = tuple(int(i) for i in (~good).nonzero()[0])
    result, truth, allowed = got[at].item(), float(value[at]), float(bound[at])
    off = abs(result - truth) / allowed if allowed else float("inf")
    many = f"{int((~good).sum())} of {tuple(got.shape)}"
    yield f"{name} at {at}, {many}: {result!r}, exact {truth!r}, {off:.2f} bounds"


def gradient_faults(call: Drawn, grad: Tensor, exact: Answers, reference: Any) -> Iterator[str]:
    got = torch.from_numpy(as_rows(grad)).to(grad.dtype)
    finite = torch.broadcast_to(call.upstream.isfinite().reshape(-1), (len(exact.counted),)).numpy()
    if got[torch.from_numpy(exact.counted & ~finite)].isfinite().any():
        yield "gradient: finite under an upstream gradient that is not"
    expected = 1.0 if call.keywords["grad_scale"] is None else float(call.keywords["grad_scale"])
    overflows = call.notes["values"] == "extreme" and call.keywords["lse_square_scale"] and expected > 1
    if overflows and "a gradient that overflows under grad_scale" in LIMITS:
        return
    ends = call.notes["weight"] == "1e30" and call.notes["upstream"] == "subnormal" and grad.dtype != torch.float64
    if ends and "subnormal upstream of large weights" in LIMITS:
        return
    where = np.array(np.broadcast_to(finite[:, None] | ~exact.counted[:, None], got.shape))
    yield from differs("gradient", got, exact.grad, None if reference is None else reference[1], where)


def stats_faults(call: Drawn, stats: Any, exact: Answers) -> Iterator[str]:
    for name in ("lse", "entropy", "z_loss"):
        got, truth = getattr(stats, name).detach(), getattr(exact, name)
        if name == "entropy" and "entropy where the target is not the top" in LIMITS:
            eps = (1000 if got.dtype == torch.float64 else 100) * torch.finfo(got.dtype).eps
            truth = truth._replace(bound=truth.bound + np.where(exact.counted, eps, 0))
        yield from differs(name, got.reshape(truth.value.shape), truth)
    argmax, z = stats.argmax.reshape(-1).numpy(), exact.z
    if (argmax[~exact.counted] != -1).any():
        yield "argmax of an ignored row"
    best = z.argmax(1)
    each = np.arange(len(z))[exact.counted]
    if not ((argmax[each] >= 0) & (argmax[each] < z.shape[1])).all():
        yield "argmax out of range"
        return
    same = argmax[each] == best[each]
    if call.keywords["softcap"] is not None or call.keywords["logit_scale"] != 1.0:  # rounding may make z equal
        eps = 4 * (2.3e-16 if call.input.dtype == torch.float64 else 1.2e-7) * np.abs(z[each, best[each]])
        same = same | (z[each, best[each]] - z[each, argmax[each]] <= eps)
    if not same.all():
        yield f"argmax {argmax[each][~same][:3]}, not {best[each][~same][:3]}"
    label = as_rows(call.target).argmax(1) if call.target.is_floating_point() else call.target.reshape(-1).numpy()
    if (stats.correct.reshape(-1).numpy() != ((argmax == label) & exact.counted)).any():
        yield "correct is not (argmax == target)"
