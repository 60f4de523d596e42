"""Whether any call is slower than torch's: shapes, layouts, targets, options, dtypes, with and without a gradient.

    python benchmarks/never_slower.py --threads 1,2 --json out.json
    FUSED_CE_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/never_slower.py

Least times in turns, sorted by how many times as fast fused_ce is. What is below the bar is timed again for longer, and
the exit status is 1 if any of that stays below.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from report import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import interleaved
from torch import Tensor

from fused_ce import cross_entropy

BAR = 0.95  # times torch's speed: what is above may be noise

FLAT = "1x10 8x2 32x10 64x10 128x2 256x100 1000x300 1024x257 64x1000 256x1000 2048x1000 4096x10 4096x128 50000x10"
FLAT += " 200000x2 20000x40 1x1000 1x50257 1x262144 2x32000 3x1000000 4x128256 8x50257 32x5000 64x32000 512x32000"
DEEP = "4x2x128x128 8x3x64x64 4x19x64x64 2x150x64x64 2x19x256x256 1x20x32x32x32 8x10x7x7 1x1000x8x8 2x8000x64 1x50257x7"
ONE = "10 1000 50257"
# Where every option is tried.
SOME = "64x10 256x100 1000x300 2048x1000 50000x10 1x50257 8x50257 64x32000 4x2x128x128 4x19x64x64 2x150x64x64 2x8000x64"

OPTIONS: dict[str, dict[str, Any]] = {
    "probabilities": {"probs": True},
    "probabilities that want a gradient": {"probs": True, "target_grad": True},
    "half ignored": {"ignored": 0.5},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "weight, smoothing": {"weight": True, "label_smoothing": 0.1},
    "none": {"reduction": "none"},
    "probabilities, none": {"probs": True, "reduction": "none"},
    "weight, none": {"weight": True, "reduction": "none"},
    "sum": {"reduction": "sum"},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16 probabilities": {"dtype": torch.bfloat16, "probs": True},
    "bfloat16 none": {"dtype": torch.bfloat16, "reduction": "none"},
    "float16": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "no gradient": {"grad": False},
    "no gradient, none": {"grad": False, "reduction": "none"},
    "no gradient, bfloat16": {"grad": False, "dtype": torch.bfloat16},
}


class Case(NamedTuple):
    shape: tuple[int, ...]  # (C), (N, C) or (N, C, d1..dk)
    layout: str = "contiguous"
    option: str = "plain"

    def __str__(self) -> str:
        layout = "" if self.layout == "contiguous" else f", {self.layout}"
        return f"{'x'.join(map(str, self.shape))}{layout}: {self.option}"


def cases() -> Iterator[Case]:
    def shapes(text: str) -> list[tuple[int, ...]]:
        return [tuple(map(int, shape.split("x"))) for shape in text.split()]

    yield from (Case(shape) for shape in shapes(f"{ONE} {FLAT} {DEEP}"))
    yield from (Case(shape, "contiguous", option) for shape, option in itertools.product(shapes(SOME), OPTIONS))
    flat = shapes("8x2 64x10 256x100 1000x300 4096x10 2048x1000 8x50257 64x32000 1x262144")
    layouts = ["transposed", "every second class", "every second row", "columns of more"]
    yield from (Case(shape, layout) for shape, layout in itertools.product(flat, layouts))
    yield from (Case(shape, "transposed", "probabilities") for shape in flat)
    yield from (Case(shape, "transposed", "no gradient") for shape in flat)
    yield from (Case(shape, "classes last") for shape in shapes(DEEP))
    yield from (Case(shape, "classes last", "bfloat16") for shape in shapes("4x19x64x64 2x8000x64"))


def laid_out(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> Tensor:
    """Random numbers of this shape, whose classes and rows lie as `layout` says."""
    first, classes, *rest = shape if len(shape) > 1 else (1, *shape)
    if layout == "transposed":
        return torch.randn(classes, first).to(dtype).t()
    if layout == "every second class":
        return torch.randn(first, 2 * classes).to(dtype)[:, ::2]
    if layout == "every second row":
        return torch.randn(2 * first, classes).to(dtype)[::2]
    if layout == "columns of more":
        return torch.randn(first, classes + 7).to(dtype)[:, 3:-4]
    if layout == "classes last":
        return torch.randn(first, *rest, classes).to(dtype).movedim(-1, 1)
    return torch.randn(shape).to(dtype)


def calls(case: Case) -> tuple[Callable[[], object], Callable[[], object]]:
    """fused_ce's call and torch's, on the same tensors."""
    options = dict(OPTIONS.get(case.option, {}))
    shape, dtype = case.shape, options.pop("dtype", torch.float32)
    probs, ignored, wanted = options.pop("probs", False), options.pop("ignored", 0.0), options.pop("grad", True)
    target_grad = options.pop("target_grad", False)
    torch.manual_seed(0)
    x = laid_out(shape, case.layout, dtype).requires_grad_(wanted)
    rows, classes = (shape[:1] + shape[2:], shape[1]) if len(shape) > 1 else ((), shape[0])
    target = torch.randint(classes, rows)
    if probs:
        target = laid_out(shape, case.layout, torch.float32).softmax(1).to(dtype)
        target.requires_grad_(target_grad)
    elif ignored:
        target[torch.rand(rows) < ignored] = -100
    if options.pop("weight", False):
        options["weight"] = torch.rand(classes).to(dtype)
    upstream = torch.rand(rows).to(dtype) if options.get("reduction") == "none" else None
    inputs = [x, target] if target_grad else [x]

    def call(function: Callable[..., Tensor]) -> object:
        loss = function(x, target, **options)
        return torch.autograd.grad(loss, inputs, upstream) if wanted else loss

    return lambda: call(cross_entropy), lambda: call(F.cross_entropy)


def ratio(case: Case, seconds: float) -> tuple[float, float, float]:
    """How many times as fast fused_ce is, and both least times in seconds."""
    ours, theirs = calls(case)
    timings = interleaved({"ours": (nothing, ours), "theirs": (nothing, theirs)}, "cpu", seconds)
    return timings["theirs"].best / timings["ours"].best, timings["ours"].best, timings["theirs"].best


def nothing() -> None:
    pass


def main(argv: list[str] | None = None) -> int:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--threads", default=str(torch.get_num_threads()), help="of a call, with commas [all]")
    parser.add_argument("--seconds", type=float, default=0.1, help="of timing for each call [0.1]")
    parser.add_argument("--only", default="", help="cases whose line holds this text")
    parser.add_argument("--worst", type=int, default=40, help="cases to print [40]")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    found = []
    for threads in map(int, args.threads.split(",")):
        torch.set_num_threads(threads)
        chosen = [case for case in cases() if args.only in str(case)]
        for case in track(chosen, f"{threads} threads", console=Console(stderr=True)):
            measured = ratio(case, args.seconds)
            if measured[0] < BAR:
                measured = max(measured, ratio(case, 5 * args.seconds))
            found.append((*measured, threads, str(case)))
    found.sort()
    below = sum(case[0] < BAR for case in found)
    table = Table("times torch", "us", "torch, us", "threads", "call")
    for times, ours, theirs, threads, case in found[: args.worst]:
        table.add_row(f"{times:.2f}", f"{ours * 1e6:.1f}", f"{theirs * 1e6:.1f}", str(threads), case)
    facts = {**machine("cpu"), "torch_capability": torch.backends.cpu.get_cpu_capability()}
    console = Console()
    console.print(table)
    middle = found[len(found) // 2][0] if found else float("nan")
    console.print(f"{facts['cpu']}, {facts['instruction_set']} (torch {facts['torch_capability']}), {facts['date']}")
    console.print(f"{below} of {len(found)} calls below {BAR}; median {middle:.2f}")
    if args.json:
        rows = [dict(zip(("ratio", "seconds", "torch_seconds", "threads", "call"), row, strict=True)) for row in found]
        Path(args.json).write_text(json.dumps({"machine": facts, "bar": BAR, "calls": rows}, indent=1) + "\n")
    return below > 0


if __name__ == "__main__":
    sys.exit(main())
