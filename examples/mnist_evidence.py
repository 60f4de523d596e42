"""Two close looks: how exact each loss and gradient is, and what happens where the scratch loss becomes NaN."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mnist_training import Batch, Loss, fit, formula_run
from scratch import CrossEntropy, log_softmax, nll
from torch import Tensor

import fused_ce


@dataclass
class Exactness:
    """The errors of one cross entropy against float64 on given logits; all relative."""

    name: str
    loss: float
    grad: float  # largest error of an entry, relative to the largest entry of the gradient
    entry: float  # largest error of an entry, relative to that entry
    from_torch: float  # as `grad`, against torch in the same dtype


def compare(z: Tensor, y: Tensor) -> list[Exactness]:  # (N, C), (N,)
    """Loss, and gradient at the logits, of every cross entropy on the same logits."""
    results = {
        "scratch": _by_hand(z, y),
        "scratch log_softmax + nll": _by_autograd(lambda x, target: nll(log_softmax(x), target), z, y),
        "torch": _by_autograd(F.cross_entropy, z, y),
        "fused_ce": _by_autograd(fused_ce.cross_entropy, z, y),
    }
    true_loss, true_grad = _by_autograd(F.cross_entropy, z.double(), y)
    largest = true_grad.abs().max()
    return [
        Exactness(
            name,
            ((loss - true_loss).abs() / true_loss).item(),
            ((grad - true_grad).abs().max() / largest).item(),
            ((grad - true_grad).abs() / true_grad.abs()).max().item(),
            ((grad - results["torch"][1]).abs().max() / largest).item(),
        )
        for name, (loss, grad) in results.items()
    ]


def _by_autograd(loss: Loss, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # -> (), (N, C) in float64
    z = z.detach().clone().requires_grad_()
    value = loss(z, y)
    value.backward()
    return value.detach().double(), z.grad.double()


def _by_hand(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # -> (), (N, C) in float64
    z, loss = z.detach().clone(), CrossEntropy()
    value = loss(z, y)
    loss.bwd()
    return value.double(), z.grad.double()


@dataclass
class AtTheNaN:
    """The logits of the step whose scratch loss is NaN, and what each loss makes of them."""

    step: int
    gap: float  # the largest difference between two logits of one row
    zeros: int  # probabilities that came out as exactly 0
    scratch: float
    torch: float
    fused_ce: float


@torch.no_grad()
def look_at_nan(step: int, batches: list[Batch], lr: float, seed: int, device: str) -> AtTheNaN:
    """Train the scratch formula once more up to `step`, never resetting, and look at the logits that come then."""
    run = formula_run(False, seed, device)
    replay = [batches[i % len(batches)] for i in range(step)]
    if step > 1:
        with torch.enable_grad():
            fit(run, replay[:-1], lr)
    x, y = replay[-1]
    z, scratch = run.logits(x), CrossEntropy()
    value = scratch(z, y).item()
    gap = (z.max(-1)[0] - z.min(-1)[0]).max().item()
    zeros = int((scratch.softmax == 0).sum())
    return AtTheNaN(step, gap, zeros, value, F.cross_entropy(z, y).item(), fused_ce.cross_entropy(z, y).item())
