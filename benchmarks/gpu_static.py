"""What the Triton kernels compile to, for devices that are not here: registers, spills, how wide they load and store.

    python benchmarks/gpu_static.py --json FILE
    python benchmarks/gpu_static.py --target sm_90 --classes 50257,128256 --kernel forward

Nothing is restated: what `launch` offers runs on tensors without memory, and what they would have
launched goes through Triton's own specialisation to its compiler, and from there to its disassembler. No device is
asked.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from gpu_code import figures_of
from report import machine
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fused_ce.backends.triton import kernels, plan
from fused_ce.backends.triton import launch as backend
from fused_ce.contract import Call, Upstream
from fused_ce.options import Options, Shard

CLASSES = (10, 1000, 4096, 32000, 50257, 65537, 128256, 151936, 262144)
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
PLAIN = Options()


class Target(NamedTuple):
    """A device to compile for, and what `plan.plan` asks of it."""

    triton: GPUTarget
    capability: tuple[int, int] | None
    multiprocessors: int
    l2_bytes: int

    @property
    def device(self) -> plan.Device:
        return plan.Device(self.capability, self.multiprocessors, self.l2_bytes, plan.has_clusters(self.capability))


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
        if self.kernel in ("backward", "rescale_grad"):
            return 1, 1
        if self.kernel != "forward":
            return 0, 0
        written, tiling = int(self.args[2].grad.ptr is not None), self.meta["TILING"]
        if tiling.STEP:  # a row shared between programs: its sums, then the rest
            return (1, 0) if tiling.STEP == 1 else (written, written)
        # Rows that are not held in registers, or are cut elsewhere to store their gradient, are read for it again.
        again = tiling.PIECES == 0 or tiling.VECTOR > 1
        return (2 if written and again else 1), written


def launches(N: int, C: int, dtype: torch.dtype, target: Target, options: Options = PLAIN) -> Iterator[Launch]:
    """What a call launches, forward and backward, by each schedule; and as one of four shards of the classes."""
    input = torch.empty(N, C, dtype=dtype, device="meta")
    labels = torch.empty(N, dtype=torch.int64, device="meta")
    upstream = torch.empty((), dtype=dtype, device="meta")
    found: list[tuple[Any, ...]] = []

    def launch(kernel: str, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        found.append((kernel, grid, args, meta))

    call = Call(input, labels, None, options)
    with mock.patch.object(kernels, "launch", launch), mock.patch.object(plan, "device", return_value=target.device):
        for schedule in ("loss", "fused", "recompute"):
            done = backend.forward(call, schedule)
            if schedule != "loss":
                backend.backward(call, done.grad, done.saved, Upstream(upstream), False, False)
            yield from (Launch(schedule, *each) for each in found)
            found.clear()
        call = call._replace(options=options._replace(shard=Shard(C, 4 * C)))
        sums = backend.part(call)
        backend.finish(call, sums, Upstream(sums[0], sums[0]), torch.empty_like(input))
        yield from (Launch("shard", *each) for each in found)


def compiled(launch: Launch, target: Target, **more: Any) -> Any:
    """Triton's compiled kernel."""
    driver.set_active(Driver(target.triton))
    kernel = kernels.table()[launch.kernel]
    return kernel.warmup(*launch.args, grid=launch.grid, **launch.meta, enable_fp_fusion=True, **more)


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
        "V": V if "TILING" in launch.meta else None,  # the others do not know of it
        "num_warps": num_warps,
        "num_ctas": launch.meta.get("num_ctas", 1),
        **figures,
        "reads": reads,
        "writes": writes,
        "resident_warps": resident_warps(figures["regs"], num_warps, target),
        "shared": kernel.metadata.shared,
        "grid": launch.grid,
        "meta": {name: value._asdict() if isinstance(value, tuple) else value for name, value in launch.meta.items()},
        "hash": kernel.hash,
    }


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
    every = ["forward", "backward", "rescale_grad", "prepare", "total"]
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
