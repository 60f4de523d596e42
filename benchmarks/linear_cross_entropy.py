"""Linear cross entropy beside its peers: loss and gradients of hidden states and weight, and the table of goals.

    PYTHONPATH=. python benchmarks/linear_cross_entropy.py --json out.json
    PYTHONPATH=. python benchmarks/linear_cross_entropy.py --only float16 --threads 1
    PYTHONPATH=. python benchmarks/linear_cross_entropy.py --sweep

Medians, in turns; each call frees its own gradients. With one thread, its processor time; with more, wall time. A peer
whose first call takes more than five times as long as F.linear + F.cross_entropy is not called again. The floor is the
three matrix products by torch.mm alone. Which goals count depends on the processor: fused_ce/linear/products.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from report import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fused_ce import cross_entropy, linear_cross_entropy
from fused_ce.linear import products

OURS, EAGER, FLOOR = "fused_ce", "linear + torch", "three torch.mm"
ONEDNN = bool(products.chosen())  # AMD with AVX-512, for which issue 12 has goals of its own (set on Zen 5)
PEAK = 90  # MB beyond inputs and gradients, 2048 x 768 x 50257 float32


class Case(NamedTuple):
    N: int
    H: int
    V: int
    dtype: torch.dtype = torch.float32
    ignored: float = 0.0
    times: float = 1.0  # goal: times as fast as F.linear + F.cross_entropy
    floors: float | None = None  # goal: multiples of the floor

    def __str__(self) -> str:
        ignored = f", {self.ignored:.0%} ignored" if self.ignored else ""
        return f"{self.N}x{self.H}x{self.V} {str(self.dtype).removeprefix('torch.')}{ignored}"


FLOAT32 = {"times": 1.8, "floors": 0.6} if ONEDNN else {"times": 1.1, "floors": 1.05}
CASES = (
    *(Case(*shape, **FLOAT32) for shape in ((512, 512, 32000), (512, 768, 50257), (256, 1024, 128256))),
    *(Case(1024, 1024, V, torch.bfloat16, times=1.2, floors=1.2) for V in (32000, 128256)),  # one chunk
    Case(2048, 1024, 32000, torch.bfloat16, times=1.1, floors=1.2),
    Case(256, 512, 8000, torch.float16, times=20),
    Case(512, 512, 32000, ignored=0.75, times=5),
)
SWEEP = itertools.product((16, 256, 4096), (64, 512, 2048), (100, 1000, 32000, 128256))


def peers(case: Case, quick: bool) -> dict[str, Callable[[], object]]:
    """Each makes the loss and both gradients, and lets them go."""
    torch.manual_seed(0)
    N, H, V = case[:3]
    x = torch.randn(N, H).to(case.dtype).requires_grad_()
    W = (torch.randn(V, H) / H**0.5).to(case.dtype).requires_grad_()
    y = torch.randint(V, (N,))
    y[torch.randperm(N)[: int(case.ignored * N)]] = -100
    a, b, logits = x.detach(), W.detach(), torch.empty(N, V, dtype=case.dtype)

    def step(loss: Callable[..., Any]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(x, W, y), (x, W))

    def floor() -> object:
        torch.mm(a, b.t(), out=logits)
        return torch.mm(logits, b), torch.mm(logits.t(), a)

    def composed(x: Tensor, W: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, W), y)

    found = {
        EAGER: step(composed),
        "linear + fused_ce": step(lambda x, W, y: cross_entropy(F.linear(x, W), y)),
        OURS: step(linear_cross_entropy),
    }
    if quick:
        return found
    compiled = torch.compile(composed)
    found["torch.compile"] = step(compiled)
    if hasattr(F, "linear_cross_entropy") and case.dtype != torch.float16:  # which takes minutes
        # The first is left out of 16 bits, where a chunk of 4 rows took 67 times as long as F.linear + F.cross_entropy.
        every: dict[str, dict[str, Any]] = {} if case.dtype.itemsize == 2 else {"": {}}
        for name, keywords in {**every, ", 256 rows": {"batch_chunk_size": 256, "chunking_method": None}}.items():
            options = torch.nn.LinearCrossEntropyOptions(**keywords)  # type: ignore[arg-type]
            found[f"torch chunked{name}"] = step(lambda *t, o=options: F.linear_cross_entropy(*t, options=o))
    return found | {FLOOR: floor}


def measured(calls: dict[str, Callable[[], object]], rounds: int, threads: int) -> dict[str, float]:
    """Seconds of each call: the median, or of the first call where it took too long."""
    clock = time.thread_time if threads == 1 else time.perf_counter

    def seconds(call: Callable[[], object]) -> float:
        start = clock()
        result = call()
        del result
        return clock() - start

    first = {}
    for name, call in calls.items():
        if name == "torch.compile":
            call()
        first[name] = seconds(call)
    slow = {name: taken for name, taken in first.items() if taken > 5 * first[EAGER]}
    samples: dict[str, list[float]] = {name: [] for name in calls if name not in slow}
    for _ in range(rounds):
        for name, taken in samples.items():
            taken.append(seconds(calls[name]))
    return {name: slow.get(name) or statistics.median(samples[name]) for name in calls}


def times(case: Case, rounds: int, threads: int, quick: bool = False) -> dict[str, float]:
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return measured(peers(case, quick), rounds, threads)


def accuracy(console: Console) -> None:
    """Root mean squares of errors, relative to those of float64 on the same (rounded) inputs."""

    def distance(got: Tensor, exact: Tensor) -> str:
        return f"{float((got.double() - exact).norm() / exact.norm()):.2e}"

    torch.manual_seed(1)
    for dtype, (N, H, V) in itertools.product(
        (torch.float32, torch.bfloat16, torch.float16), ((1024, 256, 4096), (512, 1024, 8000))
    ):
        if dtype == torch.float16 and H > 256:
            continue  # torch's products would take minutes
        table = Table(f"{N}x{H}x{V} {str(dtype).removeprefix('torch.')}", "rows' losses", "loss", "input", "weight")
        x, y = torch.randn(N, H).to(dtype).requires_grad_(), torch.randint(V, (N,))
        W = (torch.randn(V, H) / H**0.5).to(dtype).requires_grad_()

        def results(loss: Callable[..., Any], *factors: Tensor, y: Tensor = y) -> list[Tensor]:
            mean = loss(*factors, y, reduction="mean")
            rows = loss(*factors, y, reduction="none").detach()
            return [rows, mean.detach(), *torch.autograd.grad(mean, factors)]

        def composed(x: Tensor, W: Tensor, y: Tensor, **keywords: Any) -> Tensor:
            return F.cross_entropy(F.linear(x, W), y, **keywords)

        exact = results(composed, *(tensor.detach().double().requires_grad_() for tensor in (x, W)))
        every: dict[str, Callable[..., Any]] = {
            EAGER: composed,
            "linear + fused_ce": lambda x, W, y, **k: cross_entropy(F.linear(x, W), y, dtype=torch.float32, **k),
        }
        for rows in (16, 256, 1024):
            every[f"{OURS}, {rows} rows"] = lambda *t, rows=rows, **k: linear_cross_entropy(
                *t, chunk_rows=rows, dtype=torch.float32, **k
            )
        if hasattr(F, "linear_cross_entropy") and dtype != torch.float16:
            for rows in (16, 256):
                options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
                every[f"torch chunked, {rows} rows"] = lambda *t, o=options, **k: F.linear_cross_entropy(
                    *t, options=o, **k
                )
        for name, loss in every.items():
            table.add_row(name, *map(distance, results(loss, x, W), exact))
        console.print(table)


MEMORY = """
import os, sys, torch, torch.nn.functional as F, fused_ce
who, N, H, V = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
def run(n, V):
    x, W, y = torch.ones(n, H, requires_grad=True), torch.ones(V, H, requires_grad=True), torch.arange(n)
    for tensor in (x, W):
        tensor.grad = torch.ones_like(tensor)  # which is to be there
        tensor.grad = None
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    loss = F.cross_entropy(F.linear(x, W), y) if who == "torch" else fused_ce.linear_cross_entropy(x, W, y)
    loss.backward()
    peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return peak - before - x.grad.nbytes - W.grad.nbytes
run(600, 7000)
fused_ce.empty_cache()
print(run(N, V) / 1e6)
"""


def peak(who: str, N: int, H: int, V: int) -> float:
    """MB of resident memory beyond inputs and gradients, in a process of its own."""
    command = [sys.executable, "-c", MEMORY, who, *map(str, (N, H, V))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def outcome(reached: bool) -> str:
    return "met" if reached else "missed"


def goals(cases: list[Case], args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for threads, case in itertools.product(args.threads, cases):
        found = times(case, args.rounds, threads)
        table = Table(f"{case}, {threads} thread{'s' * (threads > 1)}")
        for name in ("ms", "GFLOP/s", f"x {EAGER}", "floors"):
            table.add_column(name, justify="right")
        work = 6 * case.N * case.H * case.V
        for name, taken in found.items():
            ratio, floors = found[EAGER] / taken, taken / found[FLOOR]
            table.add_row(name, f"{taken * 1e3:.1f}", f"{work / taken / 1e9:.0f}", f"{ratio:.2f}", f"{floors:.2f}")
        console.print(table)
        rows.append({"case": str(case), "threads": threads, "seconds": found, "goals": (case.times, case.floors)})
    table = Table("case", "threads", f"goal: x {EAGER}", "is", "goal: floors", "is", "outcome")
    for case, row in zip(list(cases) * len(args.threads), rows, strict=True):
        found = row["seconds"]
        ratio, floors = found[EAGER] / found[OURS], found[OURS] / found[FLOOR]
        reached = ratio >= case.times, case.floors is None or floors <= case.floors
        row["outcome"] = ", ".join(map(outcome, reached[: 1 if case.floors is None else 2]))
        goal = "" if case.floors is None else f"{case.floors}"
        table.add_row(
            str(case), str(row["threads"]), f"{case.times}", f"{ratio:.2f}", goal, f"{floors:.2f}", row["outcome"]
        )
    console.print(table)
    return rows


def sweep(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Whether any size is slower than F.linear + F.cross_entropy."""
    rows: list[dict[str, Any]] = []
    table = Table("N x H x V, float32", "threads", f"x {EAGER}", "linear + fused_ce", "ms")
    for threads, (N, H, V) in itertools.product(args.threads, SWEEP):
        work = N * H * V
        if args.only in str(Case(N, H, V)) and work <= args.most:
            found = times(Case(N, H, V), max(3, min(300, int(3e9 / work))), threads, quick=True)
            ratios = [found[EAGER] / found[name] for name in (OURS, "linear + fused_ce")]
            rows.append({"case": f"{N}x{H}x{V}", "threads": threads, "ratio": ratios[0], "seconds": found})
            table.add_row(f"{N}x{H}x{V}", str(threads), *(f"{r:.2f}" for r in ratios), f"{found[OURS] * 1e3:.3f}")
    console.print(table)
    console.print(f"{sum(row['ratio'] < 0.95 for row in rows)} of {len(rows)} below 0.95")
    return rows


def main(argv: list[str] | None = None) -> int:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--threads", type=lambda text: [*map(int, text.split(","))], default=[1, 2], help="[1,2]")
    parser.add_argument("--rounds", type=int, default=3, help="[3]")
    parser.add_argument("--only", default="", help="cases whose line holds this text")
    parser.add_argument("--sweep", action="store_true", help="whether any size is slower, instead of the goals")
    parser.add_argument("--most", type=float, default=2e10, help="of a sweep, N * H * V [2e10]")
    parser.add_argument("--accuracy", action="store_true", help="errors against float64, and no times")
    parser.add_argument("--memory", action="store_true", help="the peak beyond inputs and gradients alone")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    console, facts = Console(width=140, highlight=False), machine("cpu")
    facts["products"] = f"oneDNN: {', '.join(products.chosen()) or 'none'} {products.why_not()}".strip()
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    content: dict[str, Any] = {"machine": facts}
    if args.accuracy:
        accuracy(console)
        return 0
    if args.sweep:
        content["sweep"] = sweep(args, console)
    elif not args.memory:
        content["rows"] = goals([case for case in CASES if args.only in str(case)], args, console)
    if args.memory or not (args.sweep or args.only):
        ours, theirs = (peak(who, 2048, 768, 50257) for who in ("fused_ce", "torch"))
        content["peak_MB"] = {"fused_ce": ours, "torch": theirs, "goal": PEAK}
        console.print(
            f"Peak beyond inputs and gradients, 2048x768x50257 float32: {ours:.0f} MB (goal {PEAK}: "
            f"{outcome(ours <= PEAK)}), {EAGER} {theirs:.0f} MB"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
