"""Peak memory of loss and gradients against the size of a vocabulary, from hidden states, each in its own process.

    python benchmarks/memory.py --json out.json --plot out.svg
    python benchmarks/memory.py --redraw out.json --plot out.svg        (what was measured before)

Resident memory beyond inputs and their gradients, which everyone needs. Linux: it is read from /proc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import caption, machine
from rich.console import Console
from rich.table import Table

PEERS = {
    "F.linear + F.cross_entropy": "F.cross_entropy(F.linear(x, W), y)",
    "F.linear + fused_ce": "fused_ce.cross_entropy(F.linear(x, W), y)",
    "F.linear + fused_ce, inplace": "fused_ce.cross_entropy(F.linear(x, W), y, inplace=True)",
    "fused_ce.linear_cross_entropy": "fused_ce.linear_cross_entropy(x, W, y)",
}
VOCABULARIES = [8192, 16384, 32768, 65536, 131072]

PROGRAM = """
import os, sys, torch, torch.nn.functional as F, fused_ce
N, H, V = map(int, sys.argv[1:])
torch.set_num_threads(1)
def run(V):
    x, W, y = torch.ones(N, H, requires_grad=True), torch.ones(V, H, requires_grad=True), torch.arange(N)
    for tensor in (x, W):
        tensor.grad = torch.ones_like(tensor)  # its pages are there, so that they count in what is held before
        tensor.grad = None
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    LOSS.backward()
    peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return peak - before - x.grad.nbytes - W.grad.nbytes
run(5000)  # what a first call brings along: threads, scratch, code
fused_ce.empty_cache()
print(run(V) / 1e6)
"""


def main(argv: list[str] | None = None) -> int:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--rows", type=int, default=1024, help="[1024]")
    parser.add_argument("--features", type=int, default=128, help="[128]")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=VOCABULARIES, help=f"{VOCABULARIES}")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    parser.add_argument("--redraw", metavar="FILE", help="take a --json file in place of measuring")
    args = parser.parse_args(argv)
    if args.redraw:
        found = json.loads(Path(args.redraw).read_text())
    else:
        found = {"machine": machine("cpu"), "N": args.rows, "H": args.features, "vocabularies": args.vocabularies}
        found["MB"] = {
            name: [peak(loss, args.rows, args.features, V) for V in args.vocabularies] for name, loss in PEERS.items()
        }
    table = Table("MB beyond inputs and gradients", *(f"V = {V}" for V in found["vocabularies"]))
    for name, values in found["MB"].items():
        table.add_row(name, *(f"{value:.0f}" for value in values))
    Console().print(table)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    if args.plot:
        plot(args.plot, found)
    return 0


def peak(loss: str, N: int, H: int, V: int) -> float:
    """MB."""
    command = [sys.executable, "-c", PROGRAM.replace("LOSS", loss), *map(str, (N, H, V))]
    # From here, so that the fused_ce beside this file is measured, wherever another is installed.
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return float(run.stdout)


def plot(path: str, found: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes, sizes = figure.subplots(), found["vocabularies"]
    for name, values in found["MB"].items():
        (line,) = axes.plot(sizes, values, marker="o", markersize=4, linewidth=2)
        axes.annotate(f"{name}: {values[-1]:.0f} MB", (sizes[-1], values[-1]), (8, 0), textcoords="offset points",
                      color=line.get_color(), va="center")  # fmt: skip
    axes.set_xlim(0, sizes[-1] * 1.02)
    axes.set_ylim(bottom=0)
    axes.set_xticks(sizes[1:], [f"{V // 1024} k" for V in sizes[1:]])
    axes.set_xlabel("classes of the vocabulary, k = 1024")
    axes.set_ylabel("peak memory, MB")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    rows = f"{found['N']} rows, {found['H']} features, float32; inputs and their gradients not counted"
    figure.suptitle(f"{rows}\n{caption(found['machine'])}", fontsize="small")
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
