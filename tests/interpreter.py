"""Triton's interpreter made to round as hardware does (it truncates float32 to bfloat16), and twice as fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


@contextmanager
def like_hardware() -> Iterator[None]:
    # Each call of a device function puts NumPy's operators into the language again, for half of the time. A launch does
    # it for both modules that such functions know, so that they need not.
    patch_lang, modules = interpreter._patch_lang, SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_for_launch(fn: Callable[..., Any]) -> Any:
        return patch_lang(modules)

    def call_within_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    with (
        mock.patch.object(interpreter, "_patch_lang", patch_for_launch),
        mock.patch.object(InterpretedFunction, "__call__", call_within_launch),
        mock.patch.object(InterpreterBuilder, "cast_impl", with_rounding(InterpreterBuilder.cast_impl)),
    ):
        yield


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


def round_to_bfloat16(data: np.ndarray) -> np.ndarray:  # float32 -> the bits of bfloat16 in uint16
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), (bits >> 16) | 0x40, nearest).astype(np.uint16)
