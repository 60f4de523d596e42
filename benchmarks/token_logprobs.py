"""token_logprobs beside TRL's helpers: time of forward and backward, error against float64. Needs trl.

    PYTHONPATH=. python benchmarks/token_logprobs.py --json out.json

Medians, in turns; with one thread, its processor time. Temperature 0.7.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fused_ce.integrations import trl as ours

SHAPES = ((256, 32000), (128, 151936))
TEMPERATURE = 0.7


def calls(logits: Tensor, index: Tensor) -> dict[str, Callable[[], list[Tensor]]]:
    """What gives log-probabilities, and with entropies: of TRL and ours."""
    theirs = ours._THEIRS

    def of(function: Callable[..., object], *more: object) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            found = function(logits[None], index[None], *more)
            logps, *rest = found if isinstance(found, tuple) else (found,)  # type: ignore[assignment]
            return [logps, *rest, *torch.autograd.grad(logps.sum(), logits)]

        return run

    single, both = "selective_log_softmax", "selective_log_softmax_and_entropy"
    return {
        "TRL": of(theirs[single], TEMPERATURE),
        "fused_ce": of(ours.selective_log_softmax, TEMPERATURE),
        "TRL, entropy": of(theirs[both], False, TEMPERATURE),
        "fused_ce, entropy": of(ours.selective_log_softmax_and_entropy, False, TEMPERATURE),
    }


def measured(rows: int, classes: int, dtype: torch.dtype, rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds, and the largest error of a log-probability, of each."""
    torch.manual_seed(0)
    logits, index = torch.randn(rows, classes).mul(3).to(dtype).requires_grad_(), torch.randint(classes, (rows,))
    with torch.no_grad():
        exact = (logits.double() / TEMPERATURE).log_softmax(-1).gather(-1, index[:, None])[:, 0]
    functions, samples = calls(logits, index), {}
    errors = {name: float((call()[0][0].double() - exact).abs().max().detach()) for name, call in functions.items()}
    for _ in range(rounds):
        for name, call in functions.items():
            start = time.thread_time()
            result = call()
            del result
            samples.setdefault(name, []).append(time.thread_time() - start)
    return {name: (statistics.median(taken), errors[name]) for name, taken in samples.items()}


def main(argv: list[str] | None = None) -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    table = Table("rows x classes", "dtype", "TRL, ms", "fused_ce, ms", "times", "with entropy", "", "times", "errors")
    rows = []
    for N, V in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            found = measured(N, V, dtype, args.rounds)
            (a, error), (b, ours_error), (c, _), (d, _) = found.values()
            cells = [
                f"{1e3 * a:.3g}",
                f"{1e3 * b:.3g}",
                f"{a / b:.2f}",
                f"{1e3 * c:.3g}",
                f"{1e3 * d:.3g}",
                f"{c / d:.2f}",
            ]
            table.add_row(f"{N} x {V}", str(dtype), *cells, f"{error:.0e} -> {ours_error:.0e}")
            rows.append({"case": f"{N}x{V} {dtype}", "seconds_and_errors": found})
    Console().print(table, machine("cpu"))
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine("cpu"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
