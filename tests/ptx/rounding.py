"""Arithmetic of PTX that NumPy does not have, on arrays: fused, flushed, bfloat16, saturating, C's division."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .faults import Unknown

Array = np.ndarray[Any, Any]
UINT = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SINT = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}


def split_type(name: str) -> tuple[str, int]:
    """("f", 32) of "f32"."""
    if name == "pred":
        return "pred", 1
    match = re.fullmatch(r"(bf|[busf])(8|16|32|64)", name)
    if not match:
        raise Unknown(f"type {name}")
    return match[1], int(match[2])


def numpy_type(name: str) -> Any:
    kind, bits = split_type(name)
    if kind == "pred":
        return np.bool_
    return np.uint16 if kind == "bf" else {"f": FLOAT, "s": SINT}.get(kind, UINT)[bits]


def flushed(x: Array) -> Array:
    """Subnormal numbers as zeros of their sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """Rounded once: the product is exact in float64, the sum rounded to odd there, and then to float32."""
    p, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    s = p + c
    rest = _rest(p, c, s)
    inexact = np.isfinite(s) & np.isfinite(rest) & (rest != 0)
    if inexact.any():
        inexact &= (s.view(np.uint64) & np.uint64(1)) == 0
        s = np.where(inexact, np.nextafter(s, np.where(rest > 0, np.inf, -np.inf)), s)
    return s.astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """By Dekker's product and Knuth's sum: exact but for ties that the second rounding may break the other way."""
    p = a * b
    (ah, al), (bh, bl) = _halves(a), _halves(b)
    low = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    s = p + c
    more = low + _rest(p, c, s)
    return np.where(np.isfinite(more), s + more, s)


def fma16(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float16)


def _halves(a: Array) -> tuple[Array, Array]:
    high = a * 134217729.0
    high = high - (high - a)
    return high, a - high


def _rest(p: Array, c: Array, s: Array) -> Array:
    """What rounding took from s = p + c."""
    t = s - p
    return (p - (s - t)) + (c - t)


def to_bf16(x: Array) -> Array:  # float32 -> bits
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(bits: Array) -> Array:  # -> float32
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def shift(left: bool) -> Callable[[Array, Array], Array]:
    """A shift by more than there are bits leaves 0, or the sign."""

    def run(a: Array, n: Array) -> Array:
        width = a.dtype.itemsize * 8
        far = n >= width
        by = np.where(far, 0, n).astype(a.dtype)
        if left:
            return np.where(far, a.dtype.type(0), a << by)
        return np.where(far, a >> a.dtype.type(width - 1) if a.dtype.kind == "i" else a.dtype.type(0), a >> by)

    return run


def to_int(x: Array, dtype: Any) -> Array:
    info = np.iinfo(dtype)
    return np.trunc(np.where(np.isnan(x), 0.0, np.clip(x, float(info.min), float(info.max)))).astype(dtype)


def compare(how: str, is_float: bool) -> Callable[[Array, Array], Array]:
    ufuncs = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
    ufuncs |= {"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal}

    def nan(a: Array, b: Array) -> Array:
        return np.isnan(a) | np.isnan(b)

    if not is_float:
        return ufuncs[how]
    if how == "nan":
        return nan
    if how == "num":
        return lambda a, b: ~nan(a, b)
    if how in ("ne", *ufuncs):
        return (lambda a, b: (a != b) & ~nan(a, b)) if how == "ne" else ufuncs[how]
    ordered = ufuncs[how[:-1]]  # "ltu" and the like are true of NaN
    return lambda a, b: ordered(a, b) | nan(a, b)


def divide(a: Array, b: Array) -> Array:
    """Of integers, towards 0."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = np.abs(a.astype(np.int64)) // np.abs(safe.astype(np.int64))
    return (np.sign(a).astype(np.int64) * np.sign(safe).astype(np.int64) * quotient).astype(a.dtype)


def remainder(a: Array, b: Array) -> Array:
    safe = np.where(b == 0, b.dtype.type(1), b)
    return a % safe if a.dtype.kind == "u" else np.fmod(a, safe)
