"""PTX broken on purpose, one place at a time: each must be reported, or shown to change nothing.

Two kinds change nothing. A predicate may go where the accesses that it held back find what was found anyway: a store
leaves the same bytes in the same cells, and a load may give NaN to the threads that were held back. And a barrier of
`tl.debug_barrier` may go where a reduction's lie between the same accesses: rows of one warp have no other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .cases import case, found_in
from .code import Code
from .launch import Emulator

bf16, f32 = torch.bfloat16, torch.float32
BASES = (  # target, dtype, classes, words, kernel
    ("sm_90", bf16, 1000, "fused inplace few ignored weight z", "forward"),  # one warp a row
    ("sm_90", bf16, 32000, "fused inplace few ignored weight z", "forward"),  # a cluster of 2
    ("sm_90", bf16, 50257, "fused inplace few ignored weight z", "forward"),  # of 4, and rows that begin anywhere
    ("sm_80", bf16, 50257, "fused inplace few ignored weight z", "forward"),  # walked
    ("sm_80", bf16, 4099, "inplace few none ignored", "backward"),
    ("sm_80", f32, 10, "bad few none rows130", "forward"),
    ("sm_80", f32, 10, "fused inplace few ignored weight z rows130", "forward"),
)
SHARE = (BASES[0], BASES[1], BASES[-1])
OFFSET = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(\d+))?\s*\]")
ACCESS = re.compile(r"(@!?%p\d+ )?(ld|st)\.(global|shared)")


class Mutant(NamedTuple):
    kind: str
    line: int
    text: str
    ptx: str
    source: str  # where the line comes from, "forward.py:116"


def mutants(ptx: str) -> Iterator[Mutant]:
    lines, source = ptx.splitlines(), ""
    for n, line in enumerate(lines):
        code, _, comment = line.partition("//")
        code, where = code.strip(), re.search(r"(\w+\.py:\d+):\d+", comment)
        source = where[1] if where and code.startswith(".loc") else source

        def broken(kind: str, *new: str, n: int = n, code: str = code, source: str = source) -> Mutant:
            count = 2 if kind == "no cluster barrier" else 1
            return Mutant(kind, n + 1, code, "\n".join([*lines[:n], " ".join(new), *lines[n + count :]]), source)

        if code.startswith("bar.sync"):
            yield broken("no bar.sync")
        elif code.startswith("barrier.cluster.arrive"):
            yield broken("no cluster barrier")
        elif code.startswith("barrier.cluster.wait"):
            yield broken("no cluster wait")
        elif ACCESS.match(code):
            width = "wide" if ".v4.b32" in code else "narrow"
            moved = OFFSET.sub(lambda m: f"[{m[1]}+{int(m[2] or 0) + 8}]", code, count=1)
            yield broken(f"{width} access 8 bytes off", moved)
            if code.startswith("@"):
                yield broken("no predicate", code.partition(" ")[2], *held_back(code))


def held_back(code: str) -> list[str]:
    """NaN for the threads that the predicate of a load held back."""
    load = re.match(r"@(!?)(%p\d+) ld\.\S*b(\d+) \{? ?([^}\[]*?) ?\}?, \[", code)
    if not load:
        return []
    negated, bits = "" if load[1] else "!", int(load[3])
    return [f"@{negated}{load[2]} mov.b{bits} {name.strip()}, {(1 << bits) - 1};" for name in load[4].split(",")]


def missed(target: str, dtype: torch.dtype, C: int, words: str, kernel: str, each: bool = True) -> Iterator[str]:
    """The mutants of the kernel that nobody sees, in words; how the others were seen is printed.

    Not `each`: the first and the last of a kind.
    """
    base, emulator = case(words, C, dtype), Emulator(target, few="few" in words)
    assert found_in(base, emulator) == []
    digests = emulator.digests
    code = next(code for code in emulator.codes if code.name == kernel)
    outcomes = {i.line: i.outcomes for block in code.blocks for i in block}
    chosen = list(mutants(code.ptx))
    if not each:
        kinds = {mutant.kind: mutant for mutant in chosen}
        chosen = [*{mutant.kind: mutant for mutant in chosen[::-1]}.values(), *kinds.values()]
    table: dict[str, Counter[str]] = {}
    for mutant in chosen:
        seen = outcomes[mutant.line]
        if "off" in mutant.kind and seen == {False}:
            how = "not made"  # by this call
        else:
            emulator = Emulator(target, few=base.few, mutate=replaced(code, mutant))
            try:
                faults = found_in(base, emulator)
                how = ", ".join(sorted({fault.split(":")[0].split(" at ")[0] for fault in faults}))
            except Exception as error:
                how = type(error).__name__
            same = emulator.digests == digests
            if not how and mutant.kind == "no predicate" and (same or held_back(mutant.text)):
                how = "changes nothing" if False in seen else "never false"
            elif not how and same and mutant.kind == "no bar.sync" and "debug_barrier" in source_line(mutant):
                how = "changes nothing"
        table.setdefault(mutant.kind, Counter())[how or "missed"] += 1
        # A program of one row is launched for none that does not exist: what asks whether its row does is true.
        if not how or (how == "never false" and "rows130" in words):
            yield f"{target} {base}, {mutant.kind}, line {mutant.line}: {mutant.text}, {how}"
    print(f"{target} {base}, {kernel}:")
    for kind, counts in table.items():
        print(f"    {kind} {counts.total()}: " + "; ".join(f"{n} {how}" for how, n in counts.most_common()), flush=True)


def replaced(code: Code, mutant: Mutant):  # type: ignore[no-untyped-def]
    return lambda kernel, ptx: mutant.ptx if ptx == code.ptx else ptx


def source_line(mutant: Mutant) -> str:
    """What stands there in the kernels' own files."""
    from fused_ce.backends.triton import forward

    name, _, number = mutant.source.partition(":")
    file = forward.__file__.replace("forward.py", name)
    with open(file) as lines:
        return list(lines)[int(number) - 1]
