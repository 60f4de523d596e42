"""Linear(784, 50), ReLU, Linear(50, 10), trained by the loop as posted, once for each cross entropy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from mnist_data import Digits
from scratch import CrossEntropy, Linear, ReLU
from torch import Tensor

import fused_ce

Loss = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]

SAMPLES_PER_EPOCH = 8
MEASURED_ON = 4000  # training digits the loss is measured on, for every curve alike


class Run:
    """One network, one cross entropy, one history. All runs of one seed begin with the same weights."""

    def __init__(self, name: str, loss: Loss, by_hand: bool, reset: bool, seed: int, device: str) -> None:
        self.name, self.loss, self.by_hand, self.reset = name, loss, by_hand, reset
        generator = torch.Generator().manual_seed(seed)
        linears = Linear(784, 50, generator), Linear(50, 10, generator)
        self.layers = (linears[0], ReLU(), linears[1])
        for linear in linears:
            linear.w = linear.w.to(device).requires_grad_(not by_hand)
            linear.b = linear.b.to(device).requires_grad_(not by_hand)
        self.history = History()

    @property
    def parameters(self) -> list[Tensor]:
        return [p for layer in self.layers if isinstance(layer, Linear) for p in (layer.w, layer.b)]

    def logits(self, x: Tensor) -> Tensor:  # (N, 784) -> (N, 10)
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, loss: Tensor) -> None:
        if not self.by_hand:
            loss.backward()
            return
        for part in (self.loss, *reversed(self.layers)):
            part.bwd()


@dataclass
class History:
    """What was seen while training; the lists begin before the first step."""

    epochs: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # on the training digits, by one ruler
    accuracies: list[float] = field(default_factory=list)  # on the digits held out
    seconds: list[float] = field(default_factory=list)  # an epoch, measuring left out
    printed: list[float] = field(default_factory=list)  # each step's own loss, as the loop would print it

    @property
    def first_nan(self) -> int | None:
        """The first step (counted from 1) whose own loss is NaN."""
        return next((step for step, loss in enumerate(self.printed, 1) if loss != loss), None)


def three_runs(reset: bool, seed: int, device: str) -> list[Run]:
    return [
        Run("scratch", CrossEntropy(), True, reset, seed, device),
        Run("torch", F.cross_entropy, False, reset, seed, device),
        Run("fused_ce", fused_ce.cross_entropy, False, reset, seed, device),
    ]


def formula_run(reset: bool, seed: int, device: str) -> Run:
    """The scratch formula with autograd in place of its own `bwd`."""
    return Run("scratch formula, autograd", CrossEntropy(), False, reset, seed, device)


def batches_of(digits: Digits, size: int) -> list[Batch]:
    return list(zip(digits.x.split(size), digits.y.split(size), strict=True))


def fit(run: Run, batches: list[Batch], lr: float) -> Tensor:  # -> (steps,) each step's own loss
    """The loop as posted, which never resets a gradient; `run.reset` adds the missing line."""
    losses = []
    for x, y in batches:
        loss = run.loss(run.logits(x), y)
        run.backward(loss)
        with torch.no_grad():
            for p in run.parameters:
                p -= lr * p.grad
        if run.reset:
            for p in run.parameters:
                p.grad = None
        losses.append(loss.detach())
    return torch.stack(losses)


def train(runs: list[Run], digits: Digits, held_out: Digits, epochs: int, lr: float, batch_size: int) -> Iterator[int]:
    """Train all runs, a piece of an epoch each in turn so that a busy machine slows them alike; yields each epoch."""
    batches = batches_of(digits, batch_size)
    ruler = Digits(digits.x[:MEASURED_ON], digits.y[:MEASURED_ON])
    size = -(-len(batches) // min(SAMPLES_PER_EPOCH, len(batches)))
    for run in runs:
        _measure(run, 0.0, ruler, held_out)
    for epoch in range(epochs):
        seconds = dict.fromkeys(runs, 0.0)
        for start in range(0, len(batches), size):
            piece = batches[start : start + size]
            for run in runs:
                began = time.perf_counter()
                printed = fit(run, piece, lr).tolist()  # .tolist() waits for the device
                seconds[run] += time.perf_counter() - began
                run.history.printed += printed
                _measure(run, epoch + (start + len(piece)) / len(batches), ruler, held_out)
        for run in runs:
            run.history.seconds.append(seconds[run])
        yield epoch + 1


@torch.no_grad()
def _measure(run: Run, epoch: float, digits: Digits, held_out: Digits) -> None:
    run.history.epochs.append(epoch)
    run.history.losses.append(F.cross_entropy(run.logits(digits.x).double(), digits.y).item())
    run.history.accuracies.append((run.logits(held_out.x).argmax(-1) == held_out.y).double().mean().item())
