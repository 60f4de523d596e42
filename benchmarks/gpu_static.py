"""What the Triton kernels compile to, for devices that are not here: registers, spills, how wide they load and store.

    python benchmarks/gpu_static.py --json FILE
    python benchmarks/gpu_static.py --target sm_90 --classes 50257,128256 --kernel forward

Nothing is restated: `gpu.forward` and `gpu.backward` run on tensors without memory, and what they would have launched
goes through Triton's own specialisation to its compiler, and from there to its disassembler. No device is asked.
"""

from __future__ import annotations

import argparse
import collections
import functools
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from report import machine
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fused_ce import gpu, kernels
from fused_ce.options import Options
from fused_ce.rows import Matrix

CLASSES = (10, 1000, 4096, 32000, 50257, 65537, 128256, 151936, 262144)
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
PLAIN = Options()
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Target(NamedTuple):
    """A device to compile for, and what `gpu.plan` asks of it."""

    triton: GPUTarget
    capability: tuple[int, int] | None
    multiprocessors: int
    l2_bytes: int

    @property
    def device(self) -> gpu.Device:
        return gpu.Device(self.capability, self.multiprocessors, self.l2_bytes, gpu.has_clusters(self.capability))


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), (8, 0), 108, 40 << 20),  # A100
    "sm_90": Target(GPUTarget("cuda", 90, 32), (9, 0), 132, 50 << 20),  # H100
    "sm_100": Target(GPUTarget("cuda", 100, 32), (10, 0), 148, 126 << 20),  # B200
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), None, 304, 4 << 20),  # MI300X
}


class Driver:
    """All that compiling asks of Triton's driver."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:  # the key under which kernels are kept
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


class Launch(NamedTuple):
    schedule: str
    kernel: str
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    @property
    def passes(self) -> tuple[int, int]:
        """How often the logits are read and something of their size written."""
        if self.kernel in ("backward", "rescale"):
            return 1, 1
        if self.kernel != "forward":
            return 0, 0
        written = sum(isinstance(argument, Matrix) and argument.ptr is not None for argument in self.args[1:])
        if self.meta["STEP"]:  # a row shared between programs: its sums, then the rest
            return (1, 0) if self.meta["STEP"] == 1 else (written, written)
        return (2 if written and walked(self.meta) else 1), written


def walked(meta: dict[str, Any]) -> bool:
    """Whether the gradient takes a second reading: rows are not held in registers, or are cut elsewhere to store it."""
    return meta["PIECES"] == 0 or meta["VECTOR"] > 1


def launches(N: int, C: int, dtype: torch.dtype, target: Target, options: Options = PLAIN) -> Iterator[Launch]:
    """What a call launches, forward and backward, by each schedule."""
    input = torch.empty(N, C, dtype=dtype, device="meta")
    labels = torch.empty(N, dtype=torch.int64, device="meta")
    upstream = torch.empty((), dtype=dtype, device="meta")
    found: list[tuple[Any, ...]] = []

    def launch(kernel: str, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        found.append((kernel, grid, args, meta))

    with mock.patch.object(gpu, "_launch", launch), mock.patch.object(gpu, "device", return_value=target.device):
        for schedule in ("loss", "fused", "recompute"):
            _, grad, stats, _ = gpu.forward(input, labels, None, options, schedule)
            if schedule != "loss":
                gpu.backward(upstream, None, input, labels, None, options, grad, stats, False, False)
            yield from (Launch(schedule, *each) for each in found)
            found.clear()


def compiled(launch: Launch, target: Target, **more: Any) -> Any:
    """Triton's compiled kernel."""
    driver.set_active(Driver(target.triton))
    kernel = getattr(kernels, launch.kernel)
    return kernel.warmup(*launch.args, grid=launch.grid, **launch.meta, enable_fp_fusion=True, **more)


class Code(NamedTuple):
    """A kernel in the device's own instructions."""

    regs: int
    spill: int
    lines: list[str]

    @property
    def regions(self) -> list[list[str]]:
        """What is outside of the loops that hold no other, and each of these."""
        labels = {match[1]: i for i, line in enumerate(self.lines) if (match := re.match(LABEL, line))}
        branches = ((i, match) for i, line in enumerate(self.lines) if (match := re.search(BRANCH, line)))
        loops = {(labels[to[1]], i) for i, to in branches if labels.get(to[1], i) < i}
        inner = sorted((a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops))
        outside = [line for i, line in enumerate(self.lines) if not any(a <= i < b for a, b in inner)]
        return [outside, *(self.lines[a:b] for a, b in inner)]

    @property
    def inner_spill(self) -> int:
        """Spills that every tile of classes pays for, not just every row."""
        return sum(len(re.findall(SPILL, "\n".join(region))) for region in self.regions[1:] or self.regions)

    def per_logit(self, itemsize: int) -> dict[str, float]:
        """Exponentials and instructions of a lane for each logit: the sums over all places that read them."""
        exps = instructions = 0.0
        for i, lines in enumerate(self.regions):
            region = count(lines)
            loaded = max((int(bits) * number for bits, number in region["ldg"].items()), default=0)
            few = i == 0 and region["ex2"] < 8  # of the row, whose classes are gone through elsewhere
            if loaded and not few:
                exps += region["ex2"] * itemsize * 8 / loaded
                instructions += sum(bool(re.search(ADDRESS, line)) for line in lines) * itemsize * 8 / loaded
        return {"exps": round(exps, 2), "instructions": round(instructions, 1)}


def disassembled(kernel: Any) -> Code:
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        regs, spill = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "vgpr_spill_count"))
        return Code(regs, spill, text.splitlines())
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, text = (
            subprocess.run([TOOLS / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return Code(int(re.search(r"\bREG:(\d+)", usage)[1]), len(re.findall(SPILL, text)), text.splitlines())


INSTRUCTIONS = {
    "ldg": r"\bLDG(?:STS)?\.E[.\w]*|\b(?:global|buffer|flat)_load_\w+",
    "stg": r"\bSTG\.E[.\w]*|\b(?:global|buffer|flat)_store_\w+",
    "ex2": r"\bMUFU\.EX2\b|\bv_exp_f32",
    "barriers": r"\bBAR\.SYNC|\bBAR\.RED|\bUCGABAR_WAIT|\bs_barrier",
}
LABEL, BRANCH, SPILL = r"^(\.L[\w.]+):", r"\bBRA\b.*`\((\.L[\w.]+)\)", r"\b(?:LDL|STL)\b"  # NVIDIA's
ADDRESS = r"/\*[0-9a-f]{4,}\*/"


def width(instruction: str) -> int:
    """How many bits one lane moves."""
    for bits, names in ((256, ".256"), (128, ".128 dwordx4"), (96, "dwordx3"), (64, ".64 dwordx2"), (32, "dword")):
        if any(name in instruction for name in names.split()):
            return bits
    if re.search(r"\.[US]16|short", instruction):
        return 16
    return 8 if re.search(r"\.[US]8|byte", instruction) else 32


def count(lines: list[str]) -> dict[str, Any]:
    text = "\n".join(lines)
    found: dict[str, Any] = {name: re.findall(pattern, text) for name, pattern in INSTRUCTIONS.items()}
    for name in ("ldg", "stg"):
        widths = collections.Counter(map(width, found[name]))
        found[name] = {str(bits): widths[bits] for bits in sorted(widths, reverse=True)}
    return found | {name: len(found[name]) for name in ("ex2", "barriers")}


@functools.cache
def resident_warps(regs: int, num_warps: int, target: str) -> int | None:
    """Warps that the registers of one of NVIDIA's multiprocessors have room for."""
    if TARGETS[target].capability is None:
        return None
    programs = 65536 // (-(-regs // 8) * 8 * 32 * num_warps)
    return min(64 // num_warps, programs) * num_warps


def row(launch: Launch, target: str, dtype: str, N: int, V: int) -> dict[str, Any]:
    kernel = compiled(launch, TARGETS[target])
    figures, num_warps = figures_of(kernel, DTYPES[dtype].itemsize), kernel.metadata.num_warps
    reads, writes = launch.passes
    return {
        "schedule": launch.schedule,
        "kernel": launch.kernel,
        "target": target,
        "dtype": dtype,
        "N": N,
        "V": V if "ROWS" in launch.meta else None,  # the others do not know of it
        "num_warps": num_warps,
        "num_ctas": launch.meta.get("num_ctas", 1),
        **figures,
        "reads": reads,
        "writes": writes,
        "resident_warps": resident_warps(figures["regs"], num_warps, target),
        "shared": kernel.metadata.shared,
        "grid": launch.grid,
        "meta": launch.meta,
        "hash": kernel.hash,
    }


FIGURES: dict[str, dict[str, Any]] = {}


def figures_of(kernel: Any, itemsize: int) -> dict[str, Any]:
    if kernel.hash not in FIGURES:
        code = disassembled(kernel)
        figures = {"regs": code.regs, "spill": code.spill, **count(code.lines)}
        # Not of AMD's code, whose loops are no stretches of lines.
        inner = {"inner_spill": code.spill, "exps": None, "instructions": None}
        if "cubin" in kernel.asm:
            inner = {"inner_spill": code.inner_spill, **code.per_logit(itemsize)}
        FIGURES[kernel.hash] = figures | inner
    return FIGURES[kernel.hash]


def rows_of(job: tuple[str, str, int], N: int, names: list[str]) -> list[dict[str, Any]]:
    target, dtype, V = job
    calls = launches(N, V, DTYPES[dtype], TARGETS[target])
    return [row(launch, target, dtype, N, V) for launch in calls if launch.kernel in names]


# The byte model: how often loss and gradient go over the logits if the upstream gradient is the expected one, and if
# not. The peers' are counted from their code.
PASSES = {
    "fused_ce, a row held": (2, 4),
    "fused_ce, a row walked": (3, 5),  # 2 and 4 as far as the cache serves the second reading
    "torch.compile, quack, flash-attn": (3, 3),
    "Liger": (3, 5),
    "torch eager": (9, 9),
}
BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "B200": 8.0e12}  # bytes/s, from the data sheets


def floors(N: int, V: int, dtype: str) -> dict[str, Any]:
    """For each number of passes the bytes, and the microseconds they take at full bandwidth."""
    size = N * V * DTYPES[dtype].itemsize
    counts = sorted({n for pair in PASSES.values() for n in pair})
    us = {name: {n: n * size / speed * 1e6 for n in counts} for name, speed in BANDWIDTH.items()}
    return {"N": N, "V": V, "dtype": dtype, "gb": {n: n * size / 1e9 for n in counts}, "floor_us": us}


def main() -> int:
    args = parse()
    jobs = list(itertools.product(args.target, args.dtype, args.classes))
    work = functools.partial(rows_of, N=args.rows, names=args.kernel)
    # Not forked: torch has threads.
    with ProcessPoolExecutor(min(2, len(jobs)), multiprocessing.get_context("spawn")) as pool:
        found = list(itertools.chain(*pool.map(work, jobs)))
    rows = list({(row["hash"], row["dtype"], row["V"]): row for row in found[::-1]}.values())[::-1]  # each once
    model = [floors(args.rows, V, dtype) for dtype, V in itertools.product(args.dtype, args.classes)]
    if args.json:
        content = {"machine": machine("cpu"), "rows": rows, "passes": PASSES, "model": model}
        Path(args.json).write_text(json.dumps(content, indent=1, default=str) + "\n")
    show(rows, model)
    return 0


def parse() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    about, _, epilog = __doc__.partition("\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=epilog, formatter_class=form)
    every = ["forward", "backward", "rescale", "prepare", "total"]
    parser.add_argument("--kernel", type=names, default=every, help=f"of {', '.join(every)}, with commas")
    parser.add_argument("--target", type=names, default=list(TARGETS), help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--dtype", type=names, default=list(DTYPES), help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--classes", type=lambda text: [int(C) for C in text.split(",")], default=CLASSES)
    parser.add_argument("--rows", metavar="N", type=int, default=8192, help="few rows are shared between programs")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    return args


def show(rows: list[dict[str, Any]], model: list[dict[str, Any]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 170)
    first = ("kernel", "schedule", "target", "dtype", "V", "num_warps", "num_ctas", "regs", "spill")
    last = ("loads", "stores", "ex2", "barriers", "exps", "instrs a logit", "passes", "warps an SM")
    table = Table(*first, *last, title=f"Triton {triton.__version__}, N = {model[0]['N']}", box=SIMPLE, padding=0)
    for row in rows:
        widths = (" ".join(f"{n}x{bits}" for bits, n in row[way].items()) for way in ("ldg", "stg"))
        passes = f"{row['reads']}R+{row['writes']}W"
        counts = (row[name] for name in ("ex2", "barriers", "exps", "instructions"))
        end = *widths, *counts, passes, row["resident_warps"]
        table.add_row(*("" if cell is None else str(cell) for cell in (*(row[name] for name in first), *end)))
    for column in table.columns:
        column.no_wrap = True
    console.print(table)
    for name, (expected, other) in PASSES.items():
        console.print(f"passes over the logits: {name}: {expected}, {other} for another upstream gradient")
    counts = list(model[0]["gb"])
    speeds = ", ".join(f"{name} {speed / 1e12} TB/s" for name, speed in BANDWIDTH.items())
    title = f"floor of N = {model[0]['N']} in us: {speeds}"
    table = Table("dtype", "V", "GB a pass", *(f"{n} passes" for n in counts), title=title, box=SIMPLE)
    for line in model:
        us = (" / ".join(f"{us[n]:.{int(us[n] < 10)}f}" for us in line["floor_us"].values()) for n in counts)
        table.add_row(line["dtype"], str(line["V"]), f"{line['gb'][counts[0]] / counts[0]:.3g}", *us)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
