"""What passes between a user's call of linear cross entropy and the loop over its chunks, in types.

Letters: N rows, H features, V classes; K is the logits' shape of one row of a K-dimensional loss.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..contract import Call, Forward, Gradients, Schedule, Stats, Upstream
from ..options import Options


class LinearCall(NamedTuple):
    """One call as the loop sees it, its shapes judged and its leading dimensions flattened."""

    input: Tensor  # (N, H), hidden states
    linear_weight: Tensor  # (V, H)
    target: Tensor  # (N,) class indices, or (N, V) probabilities
    linear_bias: Tensor | None  # (V,)
    weight: Tensor | None  # (V,) class weights
    options: Options  # `dtype` is that of the loss, or None: `product_dtype`
    product_dtype: torch.dtype  # what autocast makes of the input's dtype
    chunk_rows: int | None  # None: what the products want

    @property
    def has_probs(self) -> bool:
        """Whether the target holds probabilities."""
        return self.target.is_floating_point()


class Wanted(NamedTuple):
    """Which gradients are to be made."""

    input: bool
    linear_weight: bool
    linear_bias: bool


class LinearGradients(NamedTuple):
    """Gradients, each None where it was not wanted; those of the weight and bias may be wider than they are."""

    input: Tensor | None  # (N, H)
    linear_weight: Tensor | None  # (V, H)
    linear_bias: Tensor | None  # (V,)


class LinearForward(NamedTuple):
    """What the loop's forward gives."""

    loss: Tensor  # () or (N,)
    gradients: LinearGradients  # for an upstream gradient of `options.grad_scale`
    stats: Stats | None  # (N,) each, with `options.return_stats`


class Kernels(Protocol):
    """What the loop asks of a backend."""

    def forward(self, call: Call, schedule: Schedule) -> Forward: ...

    def backward(
        self, call: Call, grad: Tensor | None, saved: Tensor | None, upstream: Upstream, keep: bool, wants_target: bool
    ) -> Gradients: ...


class Loop(Protocol):
    """What walks over the rows of a call: in one process, or in each of those that share the classes."""

    def forward(self, call: LinearCall, wanted: Wanted) -> LinearForward:
        """The loss, the statistics if asked for, and the gradients wanted."""
        ...

    def backward(self, call: LinearCall, wanted: Wanted, upstream: Upstream) -> LinearGradients:
        """The gradients wanted for these upstream gradients, from the inputs alone."""
        ...

    def differentiable(
        self, call: LinearCall, g_loss: Tensor | None, g_lse: Tensor | None, g_entropy: Tensor | None, wanted: Wanted
    ) -> LinearGradients:
        """The same for a backward that is itself differentiated or vectorised, each in its tensor's dtype."""
        ...
