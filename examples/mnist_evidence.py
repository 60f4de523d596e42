"""Three close looks: how exact each loss and gradient is, where the scratch loss becomes NaN, and how fast on what."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mnist_training import Batch, Loss, fit, formula_run
from scratch import CrossEntropy, log_softmax, nll
from torch import Tensor

import fused_ce

SECONDS_TIMED = 1.0  # a size


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


@dataclass
class Speed:
    """Median seconds of loss and gradient, torch and fused_ce in turns."""

    N: int
    C: int
    torch: float
    fused_ce: float

    @property
    def ratio(self) -> float:
        return self.torch / self.fused_ce


def speeds(batch_size: int, device: str) -> list[Speed]:
    """On this demo's own logits' size, on many rows, and on a vocabulary."""
    return [_speed(N, C, device) for N, C in ((batch_size, 10), (20000, 10), (128, 32000))]


def _speed(N: int, C: int, device: str) -> Speed:
    z, y = torch.randn(N, C, device=device, requires_grad=True), torch.randint(C, (N,), device=device)
    seconds: dict[str, list[float]] = {"torch": [], "fused_ce": []}
    until = time.perf_counter() + SECONDS_TIMED
    while time.perf_counter() < until or len(seconds["torch"]) < 3:
        for name, loss in (("torch", F.cross_entropy), ("fused_ce", fused_ce.cross_entropy)):
            began = time.perf_counter()
            loss(z, y).backward()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
            z.grad = None
    return Speed(N, C, *(statistics.median(of) for of in seconds.values()))
