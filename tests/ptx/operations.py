"""Instructions that only compute: the function, the types of its sources, the type of its result."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .faults import Unknown
from .rounding import (
    FLOAT,
    SINT,
    UINT,
    Array,
    compare,
    divide,
    flushed,
    fma16,
    fma32,
    fma64,
    from_bf16,
    numpy_type,
    remainder,
    shift,
    split_type,
    to_bf16,
    to_int,
)

Function = Callable[..., Array]
FLOATING = ("add", "sub", "mul", "fma", "neg", "abs", "min", "max")
ARITY = {"neg": 1, "abs": 1, "not": 1, "fma": 3, "selp": 3, "mad": 3, "bfe": 3}
MODIFIERS = {"rn", "ftz", "lo", "hi", "wide", "full", "approx", "NaN"}


class Operation(NamedTuple):
    run: Function
    sources: tuple[str, ...]
    result: str


def operation(op: str, noise: bool) -> Operation:
    """`noise`: approximate instructions are off by 2^-22.5."""
    base, *mods = op.split(".")
    name = mods[-1]
    if base in FLOATING and name in ("f32x2", "f16x2", "bf16x2"):
        return _packed(base, mods)
    if base in ("add", "sub", "fma") and name in ("bf16", "f16") and mods[-2] == "f32":
        return _mixed(base, mods)
    if base == "cvt":
        return _convert(op, mods)
    if base == "setp":
        test = compare(mods[0], split_type(name)[0] in ("f", "bf"))
        return Operation(_through_float32(test) if name == "bf16" else test, (name, name), "pred")
    if not set(mods[:-1]) <= MODIFIERS:
        raise Unknown(op)
    if base in ("ex2", "lg2", "rcp", "sqrt", "div") and name.startswith("f"):
        return _elementary(op, base, mods, noise)
    kind, bits = split_type(name)
    run: Function | None = None
    if base == "selp":
        return Operation(lambda a, b, p: np.where(p, a, b), (name, name, "pred"), name)
    if kind in ("f", "bf") and base in FLOATING:
        run = _floating(base, mods, kind, bits)
    elif base in ("and", "or", "xor", "not"):
        run = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert}[base]
    elif base in ("shl", "shr"):
        return Operation(shift(base == "shl"), (name, "u32"), name)
    elif base == "bfe" and name == "u32":
        run = _extract_unsigned
    elif base == "bfe" and name == "s32":
        run = _extract_signed
    elif base in ("mul", "mad") and "wide" in mods:
        return _wide(base, kind, bits)
    elif base == "mul" and "hi" in mods and bits == 32:
        whole, half = numpy_type(f"{kind}64"), numpy_type(name)
        run = lambda a, b: ((a.astype(whole) * b.astype(whole)) >> whole(32)).astype(half)  # noqa: E731
    elif base == "mad" and "lo" in mods:
        run = lambda a, b, c: a * b + c  # noqa: E731
    elif base in ("add", "sub", "neg", "abs", "min", "max", "div", "rem") or (base == "mul" and "lo" in mods):
        run = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": np.abs}.get(base)
        run = run or {"min": np.minimum, "max": np.maximum, "div": divide, "rem": remainder}[base]
    if run is None:
        raise Unknown(op)
    return Operation(run, (name,) * ARITY.get(base, 2), name)


def _floating(base: str, mods: list[str], kind: str, bits: int) -> Function:
    ufuncs: dict[str, Function] = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative}
    ufuncs |= {"abs": np.abs, "min": np.fmin, "max": np.fmax, "fma": fma32 if kind == "bf" else _FMA[bits]}
    if "NaN" in mods:
        ufuncs |= {"min": np.minimum, "max": np.maximum}
    run = ufuncs[base]
    if kind == "bf":
        in_float32 = _through_float32(run)
        return lambda *x: to_bf16(in_float32(*x))
    if "ftz" in mods:
        return lambda *x: flushed(run(*map(flushed, x)))
    return run


_FMA = {16: fma16, 32: fma32, 64: fma64}


def _through_float32(run: Function) -> Function:
    return lambda *x: run(*map(from_bf16, x))


def _packed(base: str, mods: list[str]) -> Operation:
    """Two numbers in one register."""
    part = mods[-1][:-2]
    run, sources, _ = operation(".".join([base, *mods[:-1], part]), False)
    whole = "b64" if part == "f32" else "b32"

    def both(*values: Array) -> Array:
        n = max(map(len, values))
        given = [np.ascontiguousarray(np.broadcast_to(v, n)).view(numpy_type(part)).ravel() for v in values]
        return np.ascontiguousarray(run(*given)).view(numpy_type(whole))

    return Operation(both, (whole,) * len(sources), whole)


def _mixed(base: str, mods: list[str]) -> Operation:
    """From sm_100 on: one narrow operand, two of fma, to a float32 result."""
    run, sources, result = operation(".".join([base, *mods[:-1]]), False)
    widen = from_bf16 if mods[-1] == "bf16" else lambda a: a.astype(np.float32)
    narrow = 2 if base == "fma" else 1
    types = (mods[-1],) * narrow + sources[narrow:]
    return Operation(lambda *x: run(*map(widen, x[:narrow]), *x[narrow:]), types, result)


def _wide(base: str, kind: str, bits: int) -> Operation:
    name, wide = f"{kind}{bits}", f"{kind}{2 * bits}"
    dtype = numpy_type(wide)
    if base == "mul":
        return Operation(lambda a, b: a.astype(dtype) * b.astype(dtype), (name, name), wide)
    return Operation(lambda a, b, c: a.astype(dtype) * b.astype(dtype) + c, (name, name, wide), wide)


def _extract_unsigned(a: Array, start: Array, n: Array) -> Array:
    return (a >> start) & ((np.uint32(1) << n) - np.uint32(1))


def _extract_signed(a: Array, start: Array, n: Array) -> Array:
    return (a << (np.int32(32) - n - start)) >> (np.int32(32) - n)


def _elementary(op: str, base: str, mods: list[str], noise: bool) -> Operation:
    name = mods[-1]
    run: Function
    if base == "div":
        run = np.divide
        if "full" in mods or "approx" in mods:
            run = lambda a, b: _moved(q := a / b, q.astype(np.float64) * b == a, noise)  # noqa: E731
        return Operation(run, (name, name), name)
    if op == "ex2.approx.ftz.f32":  # of 0 it is 1, by PTX's own table
        run = lambda a: flushed(_moved(np.exp2(_wide_of(a)).astype(np.float32), flushed(a) == 0, noise))  # noqa: E731
    elif op in ("lg2.approx.f32", "lg2.approx.ftz.f32"):
        run = lambda a: _moved(np.log2(a.astype(np.float64)).astype(np.float32), a == 1, noise)  # noqa: E731
    elif op == "rcp.approx.ftz.f64":  # the upper halves alone
        run = lambda a: _upper(1.0 / _upper(flushed(a)))  # noqa: E731
    elif "approx" in mods or "full" in mods:
        raise Unknown(op)
    elif base in ("rcp", "sqrt"):
        run = np.reciprocal if base == "rcp" else np.sqrt
    else:
        raise Unknown(op)
    return Operation(run, (name,), name)


def _wide_of(a: Array) -> Array:
    return flushed(a).astype(np.float64)


def _upper(a: Array) -> Array:
    return (a.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def _moved(x: Array, exact: Array, noise: bool) -> Array:
    """Off by 2^-22.5, up or down by its own bits: threads that compute one thing must agree."""
    if not noise:
        return x
    up = (x.view(np.uint32) * np.uint32(2654435761) >> np.uint32(31)).astype(np.float64) * 2 - 1
    return np.where(exact, x, (x.astype(np.float64) * (1.0 + up * 2.0**-22.5)).astype(x.dtype))


def _convert(op: str, mods: list[str]) -> Operation:
    source, target = mods[-1], mods[-2]
    (source_kind, _), (kind, bits) = split_type(source), split_type(target)
    if target == "bf16":
        if source != "f32":
            raise Unknown(op)
        return Operation(to_bf16, (source,), target)
    if source == "bf16":
        dtype = FLOAT[bits]
        return Operation(lambda a: from_bf16(a).astype(dtype), (source,), target)
    if source_kind == "f" and kind in "us":
        if "rzi" not in mods:
            raise Unknown(op)
        whole = (SINT if kind == "s" else UINT)[bits]
        return Operation(lambda a: to_int(a, whole), (source,), target)
    if re.search(r"\.(rz|rm|rp|rni)\b", op):
        raise Unknown(op)
    dtype = numpy_type(target)
    return Operation(lambda a: a.astype(dtype), (source,), target)


def unpacked(op: str) -> Any:
    """How cvt.rn.{f16,bf16}x2.f32 makes one half: float32 -> bits."""
    halves: dict[str, Function] = {"cvt.rn.bf16x2.f32": to_bf16}
    halves["cvt.rn.f16x2.f32"] = lambda a: a.astype(np.float16).view(np.uint16)
    return halves.get(op)
