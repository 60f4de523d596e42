"""What a compiled Triton kernel is made of: registers, spills and instructions, read out of its own disassembly."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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
