"""Triton's interpreter made to round as hardware does: it truncates float32 to bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def with_rounding(original: Callable[..., Any]) -> Callable[..., Any]:
    """`InterpreterBuilder.cast_impl`, but float32 to bfloat16 goes to the nearest, ties to even."""

    def cast(self: Any, source: Any, to: Any) -> Any:
        pair = (source.dtype.scalar, to.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(round_to_bfloat16(source.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        return original(self, source, to)

    return cast


def round_like_hardware() -> None:
    """For the rest of the process."""
    InterpreterBuilder.cast_impl = with_rounding(InterpreterBuilder.cast_impl)


def round_to_bfloat16(data: np.ndarray) -> np.ndarray:  # float32 -> the bits of bfloat16 in uint16
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), (bits >> 16) | 0x40, nearest).astype(np.uint16)
