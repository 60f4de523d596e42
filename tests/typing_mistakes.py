"""What type checkers must pass, and the mistakes they must report; read by tests/test_typing.py, never run.

A line that ends in "# mistake" holds one; every other line is a correct call.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ce
from fused_ce import (
    CrossEntropyLoss,
    CrossEntropyOutput,
    LinearCrossEntropyLoss,
    cross_entropy,
    linear_cross_entropy,
)


def drop_in(x: Tensor, y: Tensor, w: Tensor | None, reduction: str, smoothing: float, flag: bool) -> list[Tensor]:
    """Whatever type-checks with torch's function and module does with these."""
    losses: list[Tensor] = [
        F.cross_entropy(x, y, w, None, -100, None, reduction, smoothing),
        cross_entropy(x, y, w, None, -100, None, reduction, smoothing),
        cross_entropy(x, y),
        cross_entropy(x, y, w),
        cross_entropy(x, y, w, ignore_index=0),
        cross_entropy(input=x, target=y, weight=w, reduction="none"),
        cross_entropy(x, target=y, reduction=os.environ["REDUCTION"]),
        cross_entropy(x, y, label_smoothing=1),
        cross_entropy(x, y, size_average=False, reduce=flag),
        nn.CrossEntropyLoss(w, None, -100, None, reduction, smoothing)(x, y),
        CrossEntropyLoss(w, None, -100, None, reduction, smoothing)(x, y),
        CrossEntropyLoss()(x, y),
        CrossEntropyLoss(weight=w, ignore_index=0, reduction="sum", label_smoothing=0.1)(x, y),
        CrossEntropyLoss()(input=x, target=y),
        CrossEntropyLoss().forward(x, y),
    ]
    return [*losses, cross_entropy(x, y) / 2, CrossEntropyLoss()(x, y).detach()]


def keywords(x: Tensor, y: Tensor, flag: bool, backend: str | None, softcap: float | None) -> tuple[float, ...]:
    losses: list[Tensor] = [
        cross_entropy(x, y, dtype=torch.float32, logit_scale=0.5, softcap=30, lse_square_scale=1e-4),
        cross_entropy(x, y, softcap=softcap, backend=backend, inplace=flag),
        cross_entropy(x, y, num_items=11, grad_scale=2.0**16),
        cross_entropy(x, y, num_items=torch.tensor(11), grad_scale=torch.tensor(2.0)),
        cross_entropy(x, y, return_stats=False),
        CrossEntropyLoss(dtype=torch.float32, logit_scale=0.5, softcap=softcap, backend=backend)(x, y, 11),
        CrossEntropyLoss(lse_square_scale=1e-4, inplace=flag, return_stats=False)(x, y, num_items=11, grad_scale=2),
    ]
    output: CrossEntropyOutput = cross_entropy(x, y, softcap=30.0, return_stats=True)
    loss, lse, *others = cross_entropy(x, y, None, None, 0, return_stats=True)
    either: Tensor | CrossEntropyOutput = cross_entropy(x, y, return_stats=flag)
    also: Tensor | CrossEntropyOutput = CrossEntropyLoss(return_stats=flag)(x, y)
    of_module: CrossEntropyOutput = CrossEntropyLoss(return_stats=True)(x, y)
    sums = [tensor.sum() for tensor in (*losses, loss, lse, *others, output.lse, of_module.entropy, of_module.loss)]
    return tuple(tensor.item() for tensor in sums) + (0.0,) * (isinstance(either, Tensor) + isinstance(also, Tensor))


def linear(x: Tensor, w: Tensor, y: Tensor, flag: bool) -> list[Tensor]:
    """Linear cross entropy: what torch's takes, and our keywords."""
    output: CrossEntropyOutput = linear_cross_entropy(x, w, y, return_stats=True, softcap=30.0)
    either: Tensor | CrossEntropyOutput = linear_cross_entropy(x, w, y, return_stats=flag)
    of_module: CrossEntropyOutput = LinearCrossEntropyLoss(8, 5, return_stats=True)(x, y)
    losses: list[Tensor] = [
        F.linear_cross_entropy(x, w, y, linear_bias=None, ignore_index=None, label_smoothing=0.1),
        linear_cross_entropy(x, w, y, linear_bias=None, ignore_index=None, label_smoothing=0.1),
        linear_cross_entropy(x, w, y, options=nn.LinearCrossEntropyOptions(batch_chunk_size=8), reduction="sum"),
        linear_cross_entropy(x, w, y, weight=w, dtype=torch.float32, num_items=3, grad_scale=2.0, chunk_rows=128),
        nn.LinearCrossEntropyLoss(8, 5, bias=True, dtype=torch.float32)(x, y),
        LinearCrossEntropyLoss(8, 5, bias=True, dtype=torch.float32)(x, y),
        LinearCrossEntropyLoss(8, 5, loss_dtype=torch.float32, chunk_rows=128)(x, y, num_items=3),
    ]
    return [*losses, output.lse, of_module.loss, either if isinstance(either, Tensor) else either.loss]


def chosen(own: bool) -> nn.CrossEntropyLoss:
    return CrossEntropyLoss() if own else nn.CrossEntropyLoss()


def annotated(criterion: CrossEntropyLoss, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss: Tensor = criterion(x, y) + module(x, y)
    return loss


class Smoothed(CrossEntropyLoss):
    def __init__(self) -> None:
        super().__init__(label_smoothing=0.1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = CrossEntropyLoss(ignore_index=0)
        self.smoothed = Smoothed()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.criterion(x, y) + self.smoothed(x, y)


def mistakes(x: Tensor, y: Tensor, flag: bool) -> None:
    cross_entropy(x, y, labelsmoothing=0.1)  # mistake
    cross_entropy(x, y, ignore_idx=0)  # mistake
    cross_entropy(x, y, softcap="30")  # mistake
    cross_entropy(x, y, weight=3)  # mistake
    cross_entropy(x, y, return_stats=True).item()  # mistake
    cross_entropy(x)  # mistake
    cross_entropy(x, y, backend=1)  # mistake
    cross_entropy(x, y, ignore_index="x")  # mistake
    cross_entropy(x, y, inplace="yes")  # mistake
    print(cross_entropy(x, y).lse)  # mistake
    print(cross_entropy(x, y, return_stats=flag).lse)  # mistake
    cross_entropy(x, y, None, None, -100, None, "mean", 0.0, torch.float32)  # mistake
    cross_entropy(x, y, dtype="float32")  # mistake
    cross_entropy(x, y, num_items="7")  # mistake
    cross_entropy(x, y, reduction=None)  # mistake
    cross_entropy(x.tolist(), [0, 1])  # mistake
    print(cross_entropy(x, y, return_stats=True).logsumexp)  # mistake
    CrossEntropyLoss(soft_cap=30.0)  # mistake
    CrossEntropyLoss(num_items=3)  # mistake
    CrossEntropyLoss(reduction=1)  # mistake
    CrossEntropyLoss()(x)  # mistake
    CrossEntropyLoss()(x, y, weight=x)  # mistake
    print(CrossEntropyLoss()(x, y).lse)  # mistake
    CrossEntropyLoss(return_stats=True)(x, y).item()  # mistake
    fused_ce.cross_entropy_loss(x, y)  # mistake
    fused_ce.check_targets(x)  # mistake
    linear_cross_entropy(x, y)  # mistake
    linear_cross_entropy(x, x, y, x)  # mistake
    linear_cross_entropy(x, x, y, bias=x)  # mistake
    linear_cross_entropy(x, x, y, chunk_rows="8")  # mistake
    print(linear_cross_entropy(x, x, y).lse)  # mistake
    LinearCrossEntropyLoss(8)  # mistake
    LinearCrossEntropyLoss(8, 5)(x)  # mistake
