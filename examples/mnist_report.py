"""The tables: loss by epoch and accuracy, exactness, seconds. Plain text when the output is not a terminal."""

from __future__ import annotations

import statistics

from mnist_answer import at_epochs, spread
from mnist_evidence import Exactness, Speed
from mnist_training import Run
from rich import box
from rich.table import Table

PAYS = 1.2  # times as fast; less is noise in a demo


def training_table(runs: list[Run]) -> Table:
    """Loss and accuracy of every run after chosen epochs, and what an epoch took."""
    table = _table("epoch")
    for run in runs:
        table.add_column(run.name, justify="right")
    losses, epochs = [at_epochs(run) for run in runs], len(runs[0].history.seconds)
    for epoch in range(epochs + 1):
        if epoch in (0, 1, 2, 3, 5, epochs) or epoch % 10 == 0:
            table.add_row(f"loss after {epoch}" if epoch else "loss untrained", *(_loss(of[epoch]) for of in losses))
    table.add_row("held-out accuracy", *(_accuracy(run) for run in runs))
    table.add_row("first NaN loss", *(f"step {n}" if (n := run.history.first_nan) else "never" for run in runs))
    table.add_row("seconds an epoch", *(f"{statistics.median(run.history.seconds):.3f}" for run in runs))
    return table


def exactness_table(rows: list[Exactness]) -> Table:
    """Errors against float64 of each loss and of its gradient at the logits."""
    table = _table("relative error of")
    for name in ("loss", "gradient", "worst entry", "gradient from torch's"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.name, *(f"{error:.1e}" for error in (row.loss, row.grad, row.entry, row.from_torch)))
    return table


def speed_table(rows: list[Speed]) -> Table:
    table = _table("logits")
    for name in ("torch", "fused_ce", "times as fast"):
        table.add_column(name, justify="right")
    for row in rows:
        seconds = (f"{value * 1e3:.3f} ms" for value in (row.torch, row.fused_ce))
        table.add_row(f"{row.N} x {row.C}", *seconds, f"{row.ratio:.1f}")
    return table


def speed_line(rows: list[Speed]) -> str:
    """Where it pays and where not, by what was just measured."""
    pays = [f"{row.N} x {row.C}" for row in rows if row.ratio > PAYS]
    not_here = [f"{row.N} x {row.C}" for row in rows if row.ratio <= PAYS]
    said = (("It pays at", pays), ("not at", not_here)) if pays else (("It does not pay at", not_here),)
    text = "; ".join(f"{words} {' and '.join(sizes)}" for words, sizes in said if sizes)
    fixed = ", where a call's fixed cost decides" if not_here and rows[0].ratio <= PAYS else ""
    return f"{text}{fixed}. docs/performance.md has more sizes."


def spread_line(runs: list[Run]) -> str:
    names = ", ".join(run.name for run in runs)
    return f"Largest difference between the curves of {names}: {spread(runs):.1e} of the loss."


def _table(first: str) -> Table:
    table = Table(box=box.MARKDOWN)
    table.add_column(first, no_wrap=True)
    return table


def _accuracy(run: Run) -> str:
    # argmax calls a row of NaN a 0, which is right for one digit in ten.
    return f"{run.history.accuracies[-1]:.1%}" if run.history.losses[-1] == run.history.losses[-1] else "NaN"


def _loss(loss: float) -> str:
    return f"{loss:.4f}" if loss == loss else "NaN"
