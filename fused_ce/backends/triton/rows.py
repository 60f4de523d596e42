"""The rows of a tensor (N, C, d1..dk), and how the kernels walk them: no tensor is copied for its strides' sake."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Matrix(NamedTuple):
    """A value for each row and class, as one kernel argument. None in place of a stride of 1: known when compiling."""

    ptr: Tensor | None  # (N, C, d1..dk) or (C)
    outer: tuple[int, ...] | None  # strides of the row dimensions before the last, innermost first
    inner: int | None  # of the last row dimension
    col: int | None  # of the classes


NOTHING = Matrix(None, None, None, None)


class Rows(NamedTuple):
    """One value a row, as one kernel argument; a step of 0 is one value for all rows."""

    ptr: Tensor  # (N, d1..dk) or ()
    step: int


def matrices(*tensors: Tensor | None) -> tuple[list[int], list[Matrix | None]]:
    """Sizes of the row dimensions that are left once merged, and each tensor along them.

    Dimensions merge where they lie one after the other in every tensor: most calls come down to one or two.
    """
    given = [tensor if tensor.dim() > 1 else tensor[None] for tensor in tensors if tensor is not None]
    dims = [d for d in range(given[0].dim()) if d != 1]
    sizes, strides = _merged([given[0].shape[d] for d in dims], [[t.stride(d) for t in given] for d in dims])
    views = iter(
        Matrix(tensor, tuple(outer[::-1]) or None, _unless_1(inner), _unless_1(tensor.stride(1)))
        for tensor, (*outer, inner) in zip(given, zip(*strides, strict=True), strict=True)
    )
    return sizes, [None if tensor is None else next(views) for tensor in tensors]


def rows(tensor: Tensor) -> Rows:
    """One value a row (or one for all), by the number of the row; small, so copied if not evenly spaced."""
    if tensor.dim() == 0:
        return Rows(tensor, 0)
    sizes, strides = _merged(tensor.shape, [[stride] for stride in tensor.stride()])
    return Rows(tensor, strides[0][0]) if len(sizes) == 1 else Rows(tensor.contiguous(), 1)


def alignment(C: int, inner: int, matrices: Sequence[Matrix | None]) -> int:
    """A power of two that divides all strides, and the length of what lies side by side in the first matrix.

    It says how wide a load may be; Triton itself sees no less than a divisor of 16.
    """
    of_all = [(*(matrix.outer or ()), matrix.inner, matrix.col) for matrix in matrices if matrix is not None]
    strides = [stride for of_one in of_all for stride in of_one if stride is not None]
    first = matrices[0]
    assert first is not None
    lengths = [length for length, stride in ((C, first.col), (inner, first.inner)) if stride is None]
    return math.gcd(16, *strides, *lengths)


def congruent(a: Matrix, b: Matrix, divisor: int) -> bool:
    """Whether every row begins at the same place in both, counted from a multiple of divisor."""
    one, other = (
        [1 if stride is None else stride for stride in (*(matrix.outer or ()), matrix.inner)] for matrix in (a, b)
    )
    return all((mine - its) % divisor == 0 for mine, its in zip(one, other, strict=True))


def _merged(sizes: Sequence[int], strides: Sequence[list[int]]) -> tuple[list[int], list[list[int]]]:
    """`strides`: for each dimension that of each tensor."""
    merged_sizes: list[int] = []
    merged: list[list[int]] = []
    for size, now in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1] == [stride * size for stride in now]:
            merged_sizes[-1] *= size
            merged[-1] = now
        else:
            merged_sizes.append(size)
            merged.append(now)
    if not merged:
        return [1], [[0] * len(strides[0])]
    return merged_sizes, merged


def _unless_1(stride: int) -> int | None:
    return None if stride == 1 else stride
