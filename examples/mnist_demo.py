"""What `mnist_from_scratch.py` does once torch is there: reads, trains, compares, answers, draws."""

from __future__ import annotations

import argparse
import time
from typing import Protocol

import mnist_answer
import mnist_data
import mnist_plot
import mnist_report
import torch
from mnist_evidence import AtTheNaN, compare, look_at_nan, speeds
from mnist_training import Batch, Run, batches_of, formula_run, three_runs, train
from rich.console import Console

import fused_ce
from fused_ce.backends import dispatch
from fused_ce.contract import Call
from fused_ce.options import Options

COMPARED_ON = 1000  # digits whose gradients are compared


class Steps(Protocol):
    def now(self, what: str) -> None: ...
    def done(self) -> None: ...


def run(options: argparse.Namespace, console: Console, steps: Steps) -> int:
    """
    Raises:
        mnist_data.DataError: the digits cannot be read, or there is no GPU to train on.
    """
    began = time.perf_counter()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise mnist_data.DataError("expected a CUDA GPU for --device cuda; torch sees none here. Leave --device out.")
    steps.done()
    steps.now("reading the digits")
    read = mnist_data.from_idx(options.idx) if options.idx else mnist_data.bundled(options.seed)
    digits, held_out = (part.to(options.device) for part in read)
    steps.done()
    torch.set_num_threads(1)  # matrices this small gain nothing from a second thread, and wait for it when others run

    reset = three_runs(True, options.seed, options.device)
    posted = [*three_runs(False, options.seed, options.device), formula_run(False, options.seed, options.device)]
    settings = (
        f"Linear(784, 50), ReLU, Linear(50, 10) on {len(digits.y):,} MNIST digits, {len(held_out.y):,} held out; SGD, "
        f"lr {options.lr:g}, batches of {options.batch_size}, {options.epochs} epochs, seed {options.seed}"
    )
    with torch.no_grad():
        chosen = dispatch.choose(Call(reset[0].logits(digits.x[:2]), digits.y[:2], None, Options()), None)
    runs = f"its {dispatch.name_of(chosen)} kernels" if chosen else "torch's own operators"
    console.print(f"{settings}.\nfused_ce {fused_ce.__version__} runs {runs}; torch {torch.__version__}.\n")

    steps.now(f"training {len(reset + posted)} networks, {options.epochs} epochs")
    for _ in train(reset + posted, digits, held_out, options.epochs, options.lr, options.batch_size):
        steps.done()
    steps.now("comparing gradients with float64")
    with torch.no_grad():
        z, y = reset[1].logits(digits.x[:COMPARED_ON]), digits.y[:COMPARED_ON]
    exactness = compare(z, y)
    nan = _at_the_nan(posted[-1], batches_of(digits, options.batch_size), options)
    steps.done()
    steps.now("timing torch and fused_ce, larger logits too")
    timed = speeds(options.batch_size, options.device)
    steps.done()
    steps.now("drawing")
    mnist_plot.draw(reset, posted, settings, options.out)

    _tables(console, reset, posted)
    console.print(
        f"\n3. Errors against float64 at the logits of {len(y):,} training digits, weights of torch's run in 1:\n"
        "of the loss; of the gradient, relative to its largest entry; of its worst entry, relative to that entry."
    )
    console.print(mnist_report.exactness_table(exactness))
    console.print("\n4. Where fused_ce pays: loss and gradient, random logits, one thread, just measured")
    console.print(mnist_report.speed_table(timed))
    console.print(mnist_report.speed_line(timed))
    console.print(f'\n"{mnist_answer.QUESTION}"')
    for sentence in mnist_answer.answer(reset, posted, nan):
        console.print(f"- {sentence}")
    console.print(f"\nWrote {options.out} ({time.perf_counter() - began:.0f} seconds in all).", soft_wrap=True)
    return 0


def _tables(console: Console, reset: list[Run], posted: list[Run]) -> None:
    console.print("1. Gradients reset every step")
    console.print(mnist_report.training_table(reset))
    console.print(mnist_report.spread_line(reset))
    console.print("\n2. Gradients never reset, as posted")
    console.print(mnist_report.training_table(posted))
    console.print(mnist_report.spread_line(posted[:3]))


def _at_the_nan(run: Run, batches: list[Batch], options: argparse.Namespace) -> AtTheNaN | None:
    step = run.history.first_nan
    return None if step is None else look_at_nan(step, batches, options.lr, options.seed, options.device)
