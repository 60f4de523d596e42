"""A whole training step (forward, backward, SGD) with each way of computing the loss, and the memory it takes.

    PYTHONPATH=. python benchmarks/training_step.py --json out.json
    PYTHONPATH=. python benchmarks/training_step.py --only 50257 --rounds 5

Medians, in turns. With one thread its processor time, with more wall time. Memory: how far the resident set of a fresh
process grows in three steps, gradients of parameters included: of the head's and the embedding's (V, 256) too, which no
loss can save, and which are as much as 256 tokens' logits each. "HF" casts the logits to float32 first, as transformers
does; "linear" never makes them whole (`fused_ce.linear_cross_entropy`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from report import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fused_ce import cross_entropy, linear_cross_entropy

WAYS = ("torch", "HF", "fused_ce", "in place", "linear")
WIDTH = 256


class Goal(NamedTuple):
    """Ratios of issue 14."""

    way: str
    against: str
    times: float  # as fast
    memory: float = 0.0  # share of it, at most; 0: any


class Case(NamedTuple):
    name: str
    goals: tuple[Goal, ...]
    classes: int
    rows: int = 512  # tokens
    dtype: torch.dtype = torch.float32


# Few tokens in bfloat16: a processor without AVX-512 takes 12 s for one of torch's products of 128 x 50257.
CASES = (
    Case("language model", (Goal("fused_ce", "torch", 1.2), Goal("linear", "torch", 1.2, 0.5)), 50257, 1024),
    Case("MNIST MLP", (Goal("fused_ce", "torch", 1),), 10, 64),
    Case("segmentation", (Goal("fused_ce", "torch", 1),), 19, 2),
    Case("language model", (Goal("fused_ce", "HF", 2), Goal("linear", "HF", 1, 0.5)), 50257, 128, torch.bfloat16),
    Case("language model", (Goal("fused_ce", "torch", 1.2), Goal("linear", "torch", 1.2, 0.5)), 128256, 1024),
    Case("language model", (Goal("fused_ce", "HF", 2), Goal("linear", "HF", 1, 0.5)), 128256, 128, torch.bfloat16),
)


def label(case: Case) -> str:
    return f"{case.name}, {case.rows} x {case.classes}, {str(case.dtype).removeprefix('torch.')}"


class LanguageModel(nn.Module):
    """Two layers and a head that shares the embedding's weight."""

    def __init__(self, classes: int, length: int) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(classes, WIDTH), nn.Embedding(length, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B * T, H)
        x = self.embedding(ids) + self.places.weight
        return self.layers(x, mask=self.mask.to(x.dtype), is_causal=True).flatten(0, 1)


def steps(case: Case) -> dict[str, Callable[[], object]]:
    """A step by each way, on one model."""
    torch.manual_seed(0)
    if case.name == "language model":
        model: nn.Module = LanguageModel(case.classes, 128).to(case.dtype)
        x, y = (torch.randint(case.classes, (case.rows // 128, 128)) for _ in range(2))
        y, weight, ignore = y.flatten(), model.embedding.weight, -100
    elif case.name == "segmentation":
        head = nn.Upsample(scale_factor=4, mode="bilinear", align_corners=False)
        convolutions = (nn.Conv2d(3, 32, 3, 4, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU())
        model = nn.Sequential(*convolutions, nn.Conv2d(64, case.classes, 1), head)
        x, y, weight, ignore = torch.randn(2, 3, 256, 256), torch.randint(19, (2, 256, 256)), None, 255
        y[:, :8] = ignore
    else:
        model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, case.classes))
        x, y, weight, ignore = torch.randn(case.rows, 784), torch.randint(case.classes, (case.rows,)), None, -100
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    dtype = None if case.dtype == torch.float32 else torch.float32

    def logits(x: Tensor) -> Tensor:
        return model(x) if weight is None else F.linear(model(x), weight)

    def step(loss: Callable[[], Tensor]) -> Callable[[], object]:
        def run() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        return run

    found = {
        "torch": step(lambda: F.cross_entropy(logits(x), y, ignore_index=ignore)),
        "fused_ce": step(lambda: cross_entropy(logits(x), y, ignore_index=ignore, dtype=dtype)),
        "in place": step(lambda: cross_entropy(logits(x), y, ignore_index=ignore, dtype=dtype, inplace=True)),
    }
    if dtype is not None:
        found["HF"] = step(lambda: F.cross_entropy(logits(x).float(), y, ignore_index=ignore))
    if weight is not None:
        found["linear"] = step(lambda: linear_cross_entropy(model(x), weight, y, dtype=dtype))
    return {way: found[way] for way in WAYS if way in found}


def seconds(case: Case, rounds: int, threads: int) -> dict[str, float]:
    clock = time.thread_time if threads == 1 else time.perf_counter
    calls = steps(case)
    samples: dict[str, list[float]] = {way: [] for way in calls}
    for i in range(rounds + 1):
        for way, call in calls.items():
            start = clock()
            call()
            samples[way].append(clock() - start)
            if i == 0:
                samples[way].clear()
    return {way: statistics.median(taken) for way, taken in samples.items()}


def growth(case: Case, way: str) -> float:
    """MiB, of this process: call it in a fresh one."""
    call = steps(case)[way]
    Path("/proc/self/clear_refs").write_text("5")  # the peak until now, which is the parent's too
    before = peak()
    for _ in range(3):
        call()
    return (peak() - before) / 1024


def peak() -> int:
    """KiB that were resident at most."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def in_a_fresh_process(case: Case, way: str, threads: int) -> float:
    command = [sys.executable, __file__, "--memory", str(CASES.index(case)), way, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def outcome(goal: Goal, taken: dict[str, float], memory: dict[str, float]) -> str:
    times, share = taken[goal.against] / taken[goal.way], memory[goal.way] / memory[goal.against]
    met = times >= goal.times and (not goal.memory or share <= goal.memory)
    wanted = f"{goal.times:g}" + (f", memory {goal.memory:g}" if goal.memory else "")
    return f"{goal.way} / {goal.against}: {times:.2f}, memory {share:.2f} (goal {wanted}: {'met' if met else 'missed'})"


def main(argv: list[str] | None = None) -> None:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose line holds this text")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.memory:
        print(growth(CASES[int(args.memory[0])], args.memory[1]))
        return
    console, rows, facts = Console(), [], {**machine("cpu"), "threads": args.threads}
    for case in CASES:
        if args.only not in label(case):
            continue
        taken = seconds(case, args.rounds if case.name == "language model" else 30 * args.rounds, args.threads)
        memory = {way: in_a_fresh_process(case, way, args.threads) for way in taken}
        outcomes = [outcome(goal, taken, memory) for goal in case.goals]
        table = Table(label(case), *taken)
        table.add_row("ms", *(f"{value * 1e3:.3g}" for value in taken.values()))
        table.add_row("times torch", *(f"{taken['torch'] / value:.2f}" for value in taken.values()))
        table.add_row("MiB", *(f"{memory[way]:.0f}" for way in taken))
        console.print(table, *outcomes, sep="\n")
        rows.append({"case": label(case), "seconds": taken, "mib": memory, "outcomes": outcomes})
        if args.json:  # after each, since all take minutes
            Path(args.json).write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    console.print(facts)


if __name__ == "__main__":
    main()
