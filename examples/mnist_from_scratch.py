"""Train the network fused_ce came from on real MNIST digits with three cross entropies, and answer a question.

    python examples/mnist_from_scratch.py
    python examples/mnist_from_scratch.py --idx DIR --epochs 5      (all 60,000 digits, from the standard IDX files)

Prints tables and the answer; writes mnist_from_scratch.png. Needs: pip install "fused_ce[demo]".
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mnist_answer
import mnist_data
import mnist_plot
import mnist_report
import torch
from mnist_data import Digits
from mnist_evidence import compare, look_at_nan
from mnist_training import Run, batches_of, formula_run, three_runs, train
from rich.console import Console
from rich.progress import Progress

import fused_ce
from fused_ce.backends import dispatch
from fused_ce.contract import Call
from fused_ce.options import Options

COMPARED_ON = 1000  # digits whose gradients are compared
PICTURES = (".png", ".svg", ".pdf")


def main(arguments: list[str] | None = None) -> int:
    began, options = time.perf_counter(), _parse(arguments)
    # A fixed width for files and pipes, where nobody's window decides.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)
    digits, held_out = options.digits.to(options.device), options.held_out.to(options.device)
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

    _train(console, reset + posted, digits, held_out, options)

    console.print("1. Gradients reset every step")
    console.print(mnist_report.training_table(reset))
    console.print(mnist_report.spread_line(reset))
    console.print("\n2. Gradients never reset, as posted")
    console.print(mnist_report.training_table(posted))
    console.print(mnist_report.spread_line(posted[:3]))
    console.print(
        "\nSeconds are medians over the epochs, the runs taking turns. Indicative only: one cross entropy here is "
        f"{options.batch_size} x 10 logits, where the fixed cost of a call decides. fused_ce pays where there are "
        "thousands of rows or of classes: docs/performance.md."
    )
    with torch.no_grad():
        z, y = reset[1].logits(digits.x[:COMPARED_ON]), digits.y[:COMPARED_ON]
    console.print(
        f"\n3. Errors against float64 at the logits of {len(y):,} training digits, weights of torch's run in 1:\n"
        "of the loss; of the gradient, relative to its largest entry; of its worst entry, relative to that entry."
    )
    console.print(mnist_report.exactness_table(compare(z, y)))

    step = posted[-1].history.first_nan
    batches = batches_of(digits, options.batch_size)
    nan = None if step is None else look_at_nan(step, batches, options.lr, options.seed, options.device)
    console.print(f'\n"{mnist_answer.QUESTION}"')
    for sentence in mnist_answer.answer(reset, posted, nan):
        console.print(f"- {sentence}")
    mnist_plot.draw(reset, posted, settings, options.out)
    console.print(f"\nWrote {options.out} ({time.perf_counter() - began:.0f} seconds in all).", soft_wrap=True)
    return 0


def _train(console: Console, runs: list[Run], digits: Digits, held_out: Digits, options: argparse.Namespace) -> None:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("training", total=options.epochs)
        for epoch in train(runs, digits, held_out, options.epochs, options.lr, options.batch_size):
            progress.update(bar, completed=epoch)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=_positive(int), default=20, help="default 20")
    parser.add_argument("--lr", type=_positive(float), default=0.01, help="default 0.01")
    parser.add_argument("--batch-size", type=_positive(int), default=50, help="default 50")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the split of the 5,000 digits")
    parser.add_argument("--idx", type=Path, metavar="DIR", help="folder of the four MNIST IDX files, plain or .gz")
    parser.add_argument("--out", type=Path, metavar="PATH", default=Path("mnist_from_scratch.png"), help="the picture")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    if not options.out.parent.is_dir():
        parser.error(f"expected --out in a folder that exists, got {options.out}; make {options.out.parent} first")
    if options.out.suffix not in PICTURES:
        parser.error(f"expected --out to end in one of {', '.join(PICTURES)}, got {options.out}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA GPU for --device cuda; torch sees none here. Leave --device out.")
    try:
        read = mnist_data.from_idx(options.idx) if options.idx else mnist_data.bundled(options.seed)
    except mnist_data.DataError as error:
        parser.error(str(error))
    options.digits, options.held_out = read
    return options


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        number = kind(text)
        if not 0 < number < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
        return number

    parse.__name__ = f"positive {kind.__name__}"  # argparse names it in its own errors
    return parse


if __name__ == "__main__":
    raise SystemExit(main())
