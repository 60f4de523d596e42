"""Registers and operands: one array a register, of all threads or, where they agree, of one value."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .code import Code
from .faults import Faults, Unknown
from .memory import FIRST
from .rounding import SINT, UINT, Array, numpy_type, split_type

Read = Callable[[], Array]
Write = Callable[[Array, Any], None]  # a value, and the threads that take it (None: all)
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid|clusterid|cluster_ctaid)\.[xyz]|%(cluster_ctarank|laneid)")


class Registers:
    """What the instructions of one kernel read and write; `special` and `values` are set by each program."""

    def __init__(self, code: Code, faults: Faults) -> None:
        self.code, self.faults = code, faults
        self.numbers: dict[str, int] = {}
        self.special: dict[str, Array] = {}
        self.values: list[Any] = []

    def clear(self) -> None:
        self.values = [None] * len(self.numbers)

    def bits(self, name: str) -> int:
        return self.code.register_bits[re.sub(r"\d+$", "", name)]

    def number(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers))

    def reader(self, text: str, type_name: str, where: object) -> Read:
        """An operand as an array of the type; `where` None: it may be a register that nobody wrote."""
        if SPECIAL.fullmatch(text):
            return lambda: self.special[text]
        if not text.startswith("%"):
            value = constant(text, type_name)
            return lambda: value
        index, dtype = self.number(text), numpy_type(type_name)
        own, bits = self.bits(text), split_type(type_name)[1]

        def read() -> Array:
            value = self.values[index]
            if value is None:
                if where is not None:
                    self.faults.add("uninit", where, f"{text} was never written")
                return np.zeros(1, dtype)
            return value if bits == 1 else (value if own == bits else value.astype(UINT[bits])).view(dtype)

        return read

    def writer(self, text: str, type_name: str) -> Write:
        if text == "_":
            return lambda value, mask: None
        (kind, _), index, own = split_type(type_name), self.number(text), self.bits(text)
        dtype = np.dtype(bool if own == 1 else UINT[own])

        def write(value: Array, mask: Any) -> None:
            if own > 1:
                if value.dtype.itemsize != dtype.itemsize:  # a register wider than the type
                    bits = value.dtype.itemsize * 8
                    value = value.view(SINT[bits]).astype(SINT[own]) if kind == "s" else value.astype(UINT[own])
                value = value.view(dtype)
            if mask is not None:
                old = self.values[index]
                value = np.where(mask, value, np.zeros(1, dtype) if old is None else old)
            self.values[index] = value

        return write

    def address(self, text: str, where: object) -> Read:  # of "[%rd1 + 8]", int64
        match = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if not match:
            raise Unknown(f"address {text}")
        offset = int(match[2] or 0)
        wide = match[1].startswith("%") and self.bits(match[1]) == 64
        read = self.reader(match[1], "u64" if wide else "u32", where)
        return lambda: read().astype(np.int64) + offset


def constant(text: str, type_name: str) -> Array:  # (1,)
    kind, bits = split_type(type_name)
    if text[:2] in ("0f", "0F", "0d", "0D"):
        value = np.array([int(text[2:], 16)], UINT[32 if text[1] in "fF" else 64])
    elif text == "global_smem":
        value = np.array([FIRST], UINT[max(bits, 32)])
    elif text in ("true", "false"):
        return np.array([text == "true"])
    elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
        if kind == "pred":
            return np.array([int(text, 0) != 0])
        value = np.array([int(text, 0) & ((1 << bits) - 1)], np.uint64).astype(UINT[bits])
    else:
        raise Unknown(f"operand {text}")
    return value.view(numpy_type(type_name))
