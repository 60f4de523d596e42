"""What the kernels are handed, in groups: one argument each. Which fields are None is settled when compiling.

Triton compiles again for every integer of a tuple that becomes 1 or a multiple of 16, and takes a number of a tuple in
float32: the sizes that change from call to call, and e, k, s and L, are arguments of their own.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...contract import Stats
from ...options import Shard
from .rows import Matrix, Rows


class Given(NamedTuple):
    """The tensors of a call, and their sizes."""

    logits: Matrix  # (N, C, d1..dk)
    target: Matrix | Rows  # probabilities, or class indices
    weight: Tensor | None  # (C,)
    shard: Shard | None  # None: the logits hold all classes
    C: int
    sizes: tuple[int, ...] | None  # of the row dimensions before the last, innermost first


class Shared(NamedTuple):
    """What all programs of a forward pass read or write in one place."""

    norm: Tensor | None  # (2,), see `reduce.prepare`; None: no division
    expected: Tensor | None  # (), the upstream gradient that `Out.grad` is for; None: 1
    bad: Tensor | None  # (1,), see `targets.flag`
    parts: Tensor | None  # (N, tiles, 8), the `RowSums` of rows that programs share


class Out(NamedTuple):
    """What a forward pass writes, one value for each row but for the gradient; None: not asked for."""

    loss: Tensor | None  # (N, d1..dk)
    saved: Tensor | None  # (N + 1, 4), see `launch.saved_shape`
    stats: Stats | None
    grad: Matrix  # (N, C, d1..dk), of nothing if none is wanted; may be the logits
    sums: Tensor | None = None  # (8, N), the `RowSums` of a shard, which then are all that is written


class Received(NamedTuple):
    """What backward is given besides the tensors of the call."""

    saved: Tensor | None  # (N + 1, 4)
    norm: Tensor | None  # (2,)
    loss: Rows  # upstream gradients of the loss
    lse: Rows | None  # and of lse
    expected: Tensor | None  # (), the upstream gradient that the gradient is right for already; None: 1
    sums: Tensor | None = None  # (8, N), of whole rows, in place of what is saved


class Grads(NamedTuple):
    """The gradients that backward writes."""

    input: Matrix  # (N, C, d1..dk); may be the logits
    target: Matrix  # (N, C, d1..dk), of nothing if none is wanted


class Traits(NamedTuple):
    """What kind of call it is; settled when compiling."""

    DENSE: bool  # whether q is more than the class of an index
    PROBS: bool  # whether the target holds probabilities
    SCALED: bool  # whether k is not 1
    SOFTCAP: bool
    Z_LOSS: bool  # whether L is not 0
    STATS: bool  # whether statistics are asked for
    INPLACE: bool  # whether the gradient overwrites the logits
    UNLESS_EXPECTED: bool  # whether backward has nothing to do if the upstream gradient is the expected one


class Tiling(NamedTuple):
    """How the rows are cut; settled when compiling."""

    ALIGN: int  # see `rows.alignment`
    VECTOR: int  # see `tiles.sweep`
    SAME: bool
    ROWS: int  # that a program takes at a time
    BLOCK: int  # classes of a tile
    PIECES: int  # tiles that a row is held in; 0: it is read a second time for the gradient
    STEP: int  # 1 and 2 share a row between programs, a tile each: its sums into parts, then the rest
