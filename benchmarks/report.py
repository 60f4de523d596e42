"""Where and when the figures were taken, and the figures: as a table, as JSON, as bars."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fused_ce.backends import cpu

BOUND = "copy_ (bound)"
LEGEND = """\
median, spread: of rounds in turns; the spread is between the quartiles, as a share of the median
x {yardstick}: ratio of medians, above 1 is faster
schedule, MB: passes over the logits (R read, W write), times N * C * itemsize
of copy_: time of a copy_ of the logits into memory already in use, over this time
ULP: largest error against float64, in units of the last digit"""


@dataclasses.dataclass
class Row:
    """One peer on one problem. What was not measured is None."""

    N: int
    C: int
    dtype: str
    mode: str
    reduction: str
    peer: str
    upstream: float = 1.0  # gradient of the mean or sum
    status: str = "timed"  # or "refused": its values are wrong; or "skipped": it cannot run here
    reason: str = ""
    backend: str = ""
    loss_error_ulp: float | None = None
    grad_error_ulp: float | None = None
    schedule: str = ""  # passes over the logits, such as 1R+1W
    bytes: int | None = None  # (reads + writes) * N * C * itemsize
    median_s: float | None = None
    best_s: float | None = None
    spread: float | None = None  # between the quartiles, as a share of the median
    rounds: int | None = None
    gb_per_s: float | None = None  # bytes / median_s
    ratio: float | None = None  # median of the yardstick / this median
    of_bound: float | None = None  # median of copy_ / this median

    @property
    def cell(self) -> str:
        return f"{self.N}x{self.C} {self.dtype}"


def machine(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "instruction_set": cpu._C.isa() if cpu._C else "none: the C++ kernels are not built",
        "huge_pages": huge_pages(),
        "python": platform.python_version(),
    }
    facts |= {package: version(package) for package in ("torch", "triton", "fused_ce")}
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        facts["driver"] = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def commit() -> str:
    """Of the fused_ce that was imported, which need not be the one beside this file."""
    here = str(Path(cpu.__file__).parent)
    described = output("git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    return described or os.environ.get("COMMIT", "none")


def output(*command: str) -> str:
    """What the command prints; empty if it cannot."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def huge_pages() -> str:
    """New memory in 4 KiB pages costs more than the kernels; torch asks for large ones only if this variable is 1."""
    system = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    mode = system.read_text().split("[")[1].split("]")[0] if system.exists() else "unknown"
    return f"{mode}, THP_MEM_ALLOC_ENABLE={os.environ.get('THP_MEM_ALLOC_ENABLE', 'unset')}"


def show(facts: dict[str, Any], rows: list[Row], yardstick: str) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 150  # a file or a pipe has no width; 80 would fold the table
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    console.print(table(rows, yardstick))
    console.print(LEGEND.format(yardstick=yardstick))
    for row in rows:
        if row.status != "timed":
            console.print(f"{row.status}: {row.peer} on {row.cell}: {row.reason}")
    if facts["load"] > facts["cores"] / 2:
        busy = f"Warning: load {facts['load']} on {facts['cores']} cores at the start"
        console.print(f"{busy}: run again when idle (wide spreads say the same).")


def table(rows: list[Row], yardstick: str) -> Table:
    result = Table("logits", "peer")
    for name in ("median", "spread", f"x {yardstick}", "schedule", "MB", "GB/s", "of copy_", "loss ULP", "grad ULP"):
        result.add_column(name, justify="right")
    for cell, group in itertools.groupby(rows, lambda row: row.cell):
        result.add_section()
        for i, row in enumerate(group):
            peer = row.peer + (f" ({row.backend})" if row.backend else "")
            result.add_row("" if i else cell, peer, *(figures(row) if row.status == "timed" else [row.status]))
    return result


def figures(row: Row) -> list[str]:
    return [
        duration(row.median_s),
        f"{row.spread:.0%}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
        row.schedule,
        f"{row.bytes / 1e6:.4g}",
        f"{row.gb_per_s:.3g}",
        f"{row.of_bound:.0%}",
        "" if row.loss_error_ulp is None else f"{row.loss_error_ulp:.3g}",
        "" if row.grad_error_ulp is None else f"{row.grad_error_ulp:.3g}",
    ]


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def save_json(path: str, facts: dict[str, Any], rows: list[Row], yardstick: str) -> None:
    content = {"machine": facts, "yardstick": yardstick, "rows": [dataclasses.asdict(row) for row in rows]}
    Path(path).write_text(json.dumps(content, indent=1, allow_nan=True) + "\n")


def caption(facts: dict[str, Any]) -> str:
    """Where and when, in a line under a picture."""
    where = facts.get("gpu", f"{facts['cpu']}, {facts['instruction_set']}, {facts['threads']} threads")
    return f"{where}, torch {facts['torch']}, {facts['date']}, commit {facts['commit']}, load {facts['load']}"


def missing(rows: list[Row]) -> str:
    """Who was to be there and is not, in a line under a picture."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.status != "timed":
            found.setdefault(row.peer, []).append(row.dtype)
    dtypes = {row.dtype for row in rows}
    return "not measured: " + "; ".join(
        peer if set(of) == dtypes else f"{peer} in {', '.join(dict.fromkeys(of))}" for peer, of in found.items()
    )


def plot(path: str, facts: dict[str, Any], rows: list[Row], yardstick: str) -> None:
    """Bars of the ratios, a panel for each dtype."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    shapes = list(dict.fromkeys(f"{row.N} x {row.C}" for row in rows))
    peers = list(dict.fromkeys(row.peer for row in rows if row.ratio is not None and row.peer != yardstick))
    colors = dict(zip(peers, ("#4a90d9", "#9aa5b1", "#7a3fa0", "#e0652b", "#2a9d5c", "#c0a020"), strict=False))
    if "fused_ce" in peers:
        colors["fused_ce"] = "#e0652b"
    figure = Figure(figsize=(max(6, 1.5 + 1.2 * len(shapes)), 0.8 + 2.7 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), squeeze=False)[:, 0]
    width = 0.84 / len(peers)
    for axes, dtype in zip(panels, dtypes, strict=True):
        for i, peer in enumerate(peers):
            bars = {f"{r.N} x {r.C}": r.ratio for r in rows if (r.peer, r.dtype) == (peer, dtype) and r.ratio}
            at = [shapes.index(shape) + (i + 0.5) * width - 0.42 for shape in bars]
            drawn = axes.bar(at, list(bars.values()), width, label=peer, color=colors.get(peer))
            axes.bar_label(drawn, fmt="%.1f", fontsize=8, padding=1.5, bbox={"color": "white", "pad": 0.3})
        axes.axhline(1, color="black", linewidth=0.8, label=f"{yardstick}: 1")
        axes.set_xticks(range(len(shapes)), shapes)
        axes.set_title(dtype, loc="left", fontsize="medium")
        axes.set_ylabel(f"times as fast as {yardstick}")
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("logits: rows x classes")
    panels[0].legend(frameon=False, loc="upper left", ncols=2, fontsize="small")
    modes = {"fwd_bwd": "loss and gradient", "fwd": "loss alone"}
    lines = [", ".join(modes[mode] for mode in dict.fromkeys(row.mode for row in rows)), caption(facts)]
    if any(row.status != "timed" for row in rows):
        lines.append(missing(rows))
    figure.suptitle("\n".join(lines), fontsize="small")
    figure.savefig(path, dpi=150)
