"""Everything about speed on a CPU in one go: cross_entropy.py on all threads and on 1, with torch's allocator as it is
and asking for huge pages, then with older instruction sets, then without a gradient; and what was aimed at beside it.

    python benchmarks/cpu_suite.py --json out.json --plot out.svg
    python benchmarks/cpu_suite.py --redraw out.json --plot out.svg        (what was measured before)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from report import BOUND, Row, plot
from rich.console import Console
from rich.table import Table

HUGE = "THP_MEM_ALLOC_ENABLE"
SHOWN = ("torch", "torch.compile", "jax+optax", "numpy", "fused_ce")  # in the plot


class Run(NamedTuple):
    """One process: torch reads its allocator's variable when it starts, and jax counts the processors."""

    title: str
    huge: bool
    options: list[str]


class Goal(NamedTuple):
    """How many times as fast as a peer, at least; how many times a copy of the logits, at most."""

    torch: float | None = None
    compiled: float | None = None
    copies: float | None = None
    peer: str = "fused_ce"
    mode: str = "fwd_bwd"


GOALS = {
    "64x10 float32": [Goal(1.05)],
    "4096x10 float32": [Goal(10, 4)],
    "50000x10 float32": [Goal(20, 4.5)],
    "2048x1000 float32": [Goal(6, 4)],
    "512x32000 float32": [Goal(13, 6, 1.4)],
    "256x50257 float32": [Goal(12, 5.5, 1.5)],
    "256x128256 float32": [
        Goal(13, 6, 1.4),
        Goal(copies=1.15, peer="fused_ce inplace"),
        Goal(copies=0.6, mode="fwd"),
    ],
    "2048x1000 bfloat16": [Goal(5, 4)],
    "256x128256 bfloat16": [Goal(10, 5.5, 2)],
}


def main(argv: list[str] | None = None) -> int:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--seconds", default="1", help="of timing for each peer on each problem [1]")
    parser.add_argument("--shapes", help="as in cross_entropy.py")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE", help="bars of the first run's ratios")
    parser.add_argument("--redraw", metavar="FILE", help="take a --json file in place of measuring")
    args = parser.parse_args(argv)
    common = ["--seconds", args.seconds, *(["--shapes", args.shapes] if args.shapes else [])]
    if args.redraw:
        outcomes = json.loads(Path(args.redraw).read_text())["runs"]
    else:
        outcomes = [outcome(run, common) for run in runs(os.cpu_count() or 1)]
    Console().print(goals(outcomes))
    if args.json:
        Path(args.json).write_text(json.dumps({"runs": outcomes}, indent=1) + "\n")
    if args.plot:
        facts, rows, yardstick = outcomes[0]["machine"], outcomes[0]["rows"], outcomes[0]["yardstick"]
        plot(args.plot, facts, [Row(**row) for row in rows if row["peer"] in SHOWN], yardstick)
    return 0


def runs(processors: int) -> list[Run]:
    older = ["--peers", "torch,fused_ce,fused_ce avx2,fused_ce base"]
    found = [
        Run(f"{threads} threads, {'huge pages' if huge else 'default allocator'}", huge, ["--threads", str(threads)])
        for threads in dict.fromkeys((processors, 1))
        for huge in (False, True)
    ]
    found.append(Run("older instruction sets", False, older))
    found.append(Run("without a gradient", False, ["--mode", "fwd", "--peers", "torch,torch.compile,fused_ce"]))
    return found


def outcome(run: Run, common: list[str]) -> dict[str, Any]:
    print(f"\n{run.title}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "out.json")
        command = [sys.executable, "-m", "benchmarks", *run.options, *common, "--json", str(file)]
        environment = {name: value for name, value in os.environ.items() if name != HUGE}
        if run.huge:
            environment[HUGE] = "1"
        # From here, so that the fused_ce beside this file is measured, wherever another is installed.
        subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[1])
        return {"title": run.title, **json.loads(file.read_text())}


def goals(outcomes: list[dict[str, Any]]) -> Table:
    """Aims beside outcomes: of the first run with a gradient, and of the one without."""
    table = Table("logits", "what", "times torch", "times torch.compile", "copies", title="measured (goal)")
    for cell, wanted in GOALS.items():
        for goal in wanted:
            run = next(run for run in outcomes if run["rows"] and run["rows"][0]["mode"] == goal.mode)
            median = {r["peer"]: r["median_s"] for r in run["rows"] if f"{r['N']}x{r['C']} {r['dtype']}" == cell}
            if median.get(goal.peer) is None:
                continue
            what = goal.peer if goal.mode == "fwd_bwd" else f"{goal.peer}, no gradient"
            columns = (("torch", goal.torch), ("torch.compile", goal.compiled), (BOUND, goal.copies))
            table.add_row(cell, what, *(against(median, goal.peer, peer, aim) for peer, aim in columns))
    return table


def against(median: dict[str, Any], mine: str, other: str, aim: float | None) -> str:
    if median.get(other) is None:
        return "-"
    slower, faster = (mine, other) if other == BOUND else (other, mine)  # a copy is a bound, a peer is to be beaten
    ratio = median[slower] / median[faster]
    if aim is None:
        return f"{ratio:.2f}"
    mark, met = ("<=", ratio <= aim) if other == BOUND else (">=", ratio >= aim)
    return f"{ratio:.2f} ({mark} {aim:g}{'' if met else ', missed'})"


if __name__ == "__main__":
    sys.exit(main())
