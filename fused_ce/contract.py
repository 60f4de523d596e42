"""What passes between a user's call and a backend, in types, and the Protocol that every backend answers to.

Letters and formulas stand in `formula.py`. R: the rows of a call, (N, d1..dk) of logits (N, C, d1..dk).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .options import Options, Shard

# "loss": the loss alone. "fused": loss and gradient in one pass, for an upstream gradient of `options.grad_scale`, into
# the logits' own memory with `options.inplace`. "recompute": the loss, and what backward makes the gradient from.
Schedule = Literal["loss", "fused", "recompute"]


class Call(NamedTuple):
    """One call as a backend sees it, its shapes judged; `options.dtype` is that of the loss (None: the input's)."""

    input: Tensor  # (N, C, d1..dk) or (C), the logits
    target: Tensor  # (N, d1..dk) or () class indices, or probabilities of the input's shape
    weight: Tensor | None  # (C,); under `options.shard` that of all classes, as class indices are
    options: Options

    @property
    def row_shape(self) -> torch.Size:
        return row_shape(self.input) if self.has_probs else self.target.shape

    @property
    def rows(self) -> int:
        """How many."""
        return self.input.numel() // self.classes if self.has_probs else self.target.numel()

    @property
    def classes(self) -> int:
        return self.input.shape[1 if self.input.dim() > 1 else 0]

    @property
    def shard(self) -> Shard:
        """Which of all classes they are."""
        return self.options.shard or Shard(0, self.classes)

    @property
    def has_probs(self) -> bool:
        """Whether the target holds probabilities."""
        return self.target.is_floating_point()

    @property
    def acc(self) -> torch.dtype:
        """What a kernel computes in, and the dtype of the statistics of a row."""
        return torch.float64 if self.input.dtype == torch.float64 else torch.float32


class Stats(NamedTuple):
    """What a row can tell besides its loss, R each; an ignored row holds 0 and argmax -1."""

    lse: Tensor
    z_loss: Tensor
    argmax: Tensor  # int64
    entropy: Tensor


class Forward(NamedTuple):
    """What a backend's forward gives."""

    loss: Tensor  # () or R
    grad: Tensor | None  # the input's shape; schedule "fused"
    saved: Tensor | None  # `Backend.saved_shape`, float64: what backward needs; None where it would not be read
    stats: Stats | None  # with `options.return_stats`


class Upstream(NamedTuple):
    """The upstream gradients that backward is given."""

    loss: Tensor  # () or R
    lse: Tensor | None = None  # R, of `Stats.lse`
    entropy: Tensor | None = None  # R, of `Stats.entropy`


class Gradients(NamedTuple):
    input: Tensor  # contiguous, of the input's shape and dtype
    target: Tensor | None = None  # of probabilities, where they want one


class RowSums(NamedTuple):
    """What a part of a row's classes leaves, (R,) each; `formula.combine` joins the parts of a row.

    One class y is left out of the sums: the target, which one part holds, or, under probabilities, the part's largest.
    """

    m: Tensor  # the largest z; -inf where the part holds none above that
    so: Tensor  # sum of exp(z_c - m) over the classes other than y
    z_y: Tensor  # z of y; -inf where another part holds it
    q_y: Tensor  # q of y; 0 where another part holds it
    q_others: Tensor  # sum of q_c over the classes other than y
    q_drop: Tensor  # sum of q_c (m - z_c) over them
    e_drop: Tensor  # sum of exp(z_c - m) (m - z_c) over them, for the entropy; 0 where no statistics are asked for
    argmax: Tensor  # the class of the largest z, the first of equals, counted over the whole row; -1 without statistics


class Backend(Protocol):
    """An implementation: a module with these functions, or an object with these methods, in `dispatch.BACKENDS`."""

    def unsupported(self, call: Call) -> list[str]:
        """Why it cannot take the call, in words; empty where it can."""
        ...

    def saved_shape(self, call: Call) -> tuple[int, ...]:
        """The shape of `Forward.saved` under schedule "recompute"; its layout is the backend's own."""
        ...

    def forward(self, call: Call, schedule: Schedule) -> Forward:
        """The loss, and what the schedule adds to it.

        Raises:
            IndexError: a target out of range, before anything is written (a GPU cannot know in time).
        """
        ...

    def backward(
        self, call: Call, grad: Tensor | None, saved: Tensor | None, upstream: Upstream, keep: bool, wants_target: bool
    ) -> Gradients:
        """The gradients for these upstream gradients, from what forward gave; `keep`: grad is needed again."""
        ...

    def part(self, call: Call) -> Tensor:
        """The sums of the classes that a call of `options.shard` holds, (8, R) float64: the fields of `RowSums`.

        Class indices only. An ignored row, whose logits are not read, holds 0 everywhere and argmax -1. e_drop and
        argmax (counted over all classes) are made with `options.return_stats`, and else 0 and -1.

        Raises:
            IndexError: a target outside of all classes (a GPU cannot know in time: NaN in its row).
        """
        ...

    def finish(self, call: Call, sums: Tensor, upstream: Upstream, into: Tensor) -> None:
        """The gradient of these logits, from the sums of whole rows (8, R), as `part` gives those of a part.

        The upstream gradients are those of the rows: that of the cross entropy divided already, and that of the z-loss
        within that of lse; the reduction and the z-loss of the options have no say. `into` has the logits' shape and
        dtype, and may be the logits.
        """
        ...

    def rescale(
        self, grad: Tensor, target: Tensor, options: Options, upstream: Tensor, keep: bool, exactly: bool
    ) -> Tensor | None:
        """A fused gradient made right for another upstream gradient without the logits, which costs a rounding.

        `exactly`: None where only the logits can give it within what `backward` promises: 16 bits would be rounded
        twice, and what 32 or 64 bits rounded as too small must not be made large.
        """
        ...


def row_shape(input: Tensor) -> torch.Size:
    """(N, d1..dk) of (N, C, d1..dk); () of (C)."""
    return input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]  # pyright: ignore[reportReturnType]
