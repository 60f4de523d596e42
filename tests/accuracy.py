"""Distances from an exact result, in the units that matter: ULP and relative, never absolute."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel computes in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of `dtype` at the float64 values `exact`; it stops shrinking at the smallest normal number."""
    info = torch.finfo(dtype)
    smallest = torch.tensor(info.tiny, dtype=torch.float64)
    exponent = torch.frexp(exact.abs().clamp(min=smallest)).exponent - 1
    return torch.ldexp(torch.full_like(exact, info.eps), exponent)


def same_kind(got: Tensor, exact: Tensor) -> bool:
    """Whether NaN, inf and -inf stand in the same places, once `exact` is rounded to the dtype of `got`."""
    exact = exact.to(got.dtype)
    return torch.equal(got.isnan(), exact.isnan()) and all(
        torch.equal(got == infinity, exact == infinity) for infinity in (torch.inf, -torch.inf)
    )


def relative_error(got: Tensor, exact: Tensor, terms: Tensor | None = None, flush: float = 0.0) -> float:
    """Largest relative error before the one rounding that a 16-bit result needs; inf where only one is not finite.

    `terms` is what the error is relative to where a result is a difference (|exact| if None). An error of
    `flush` is free: an exponential below the smallest normal number may become zero.
    """
    if not same_kind(got, exact):
        return torch.inf
    rounding = ulp(exact, got.dtype) / 2 if got.dtype in HALF else torch.zeros_like(exact)
    error = (got.double() - exact).abs() - rounding - flush
    wrong = (error > 0) & exact.isfinite() & got.isfinite()
    return float((error / (exact.abs() if terms is None else terms))[wrong].max()) if wrong.any() else 0.0


def bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: equal bits compare equal, NaN too."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return tensor.detach().contiguous().view(integer)
