"""Train the network fused_ce came from on real MNIST digits with three cross entropies, and answer a question.

    python examples/mnist_from_scratch.py
    python examples/mnist_from_scratch.py --idx DIR --epochs 5      (all 60,000 digits, from the standard IDX files)

Prints tables and the answer; writes mnist_from_scratch.png. Needs: pip install "fused_ce[demo]".
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

PICTURES = (".png", ".svg", ".pdf")


class Steps:
    """What is being done: a bar in a terminal, a line each elsewhere."""

    def __init__(self, console: Console, total: int) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        self.progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.bar = self.progress.add_task("", total=total)

    def now(self, what: str) -> None:
        """`what` begins."""
        self.progress.update(self.bar, description=what)
        if self.progress.disable:
            self.progress.console.print(f"{what} ...")

    def done(self) -> None:
        """One of `total` more."""
        self.progress.advance(self.bar)


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    # A fixed width for files and pipes, where nobody's window decides.
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 110)
    steps = Steps(console, options.epochs + 4)
    with steps.progress:
        steps.now("importing torch")
        # Not above: it takes seconds, and the bar is to be there before.
        import mnist_data
        import mnist_demo

        try:
            return mnist_demo.run(options, console, steps)
        except mnist_data.DataError as error:
            steps.progress.stop()
            print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
            return 2


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
