"""The text of a kernel as instructions, in blocks that threads enter at the top, and where branches meet again."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .faults import Unknown

LEAVES = ("ret", "exit")


@dataclass
class Instruction:
    line: int
    text: str
    predicate: str | None
    negated: bool
    op: str
    operands: list[str]
    target: int = -1  # of a branch, a block
    outcomes: set[bool] = field(default_factory=set)  # that the predicate had

    def __str__(self) -> str:
        return f"line {self.line} `{self.text}`"


class Code:
    """One kernel."""

    def __init__(self, ptx: str) -> None:
        self.ptx = ptx
        entry = re.search(r"\.entry (\w+)", ptx)
        assert entry, "no kernel"
        self.name, head = entry[1], ptx[entry.start() :]
        params = re.finditer(r"\.param \.[usbf](\d+)[^,\n]*? (\w+_param_\d+)", head)
        self.params = [(match[2], int(match[1])) for match in params]  # and their bits
        self.threads, self.ctas = self._directive("reqntid"), self._directive("reqnctapercluster")
        declared = re.finditer(r"\.reg \.(?:b(\d+)|pred)\s+(%[a-z]+)<", head)
        self.register_bits = {match[2]: int(match[1] or 1) for match in declared}
        lines, labels = self._read(ptx.count("\n", 0, entry.start()))
        self.blocks, self.next = _blocks(lines, labels)
        self.joins = _joins(self.next)

    def _directive(self, name: str) -> int:
        match = re.search(rf"\.{name} (\d+)", self.ptx)
        return int(match[1]) if match else 1

    def _read(self, first: int) -> tuple[list[Instruction], dict[str, int]]:
        lines: list[Instruction] = []
        labels: dict[str, int] = {}
        inside = False
        for number, whole in enumerate(self.ptx.splitlines(), 1):
            line = whole.split("//")[0].strip()
            if number <= first or not line or line.startswith("."):
                continue
            if match := re.fullmatch(r"\{ \.reg \.b\d+ tmp; (.*;) \}", line):  # half of a register that nobody wants
                line = re.sub(r"\btmp\b", "_", match[1])
            if line in "{}":
                if inside and line == "{":
                    raise Unknown(f"line {number}: a block within the kernel")
                if line == "}":
                    break
                inside = True
            elif inside and line.endswith(":"):
                labels[line[:-1]] = len(lines)
            elif inside:
                lines += [_instruction(number, text.strip()) for text in line.split(";") if text.strip()]
        return lines, labels


def _instruction(number: int, text: str) -> Instruction:
    match = re.match(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)$", text, re.S)
    if not match:
        raise Unknown(text)
    operands = [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", match[4]) if part.strip()]
    return Instruction(number, text, match[2], bool(match[1]), match[3], operands)


def _blocks(lines: list[Instruction], labels: dict[str, int]) -> tuple[list[list[Instruction]], list[list[int]]]:
    starts = {0} | {labels[i.operands[0]] for i in lines if i.op.startswith("bra")}
    starts |= {n + 1 for n, i in enumerate(lines) if i.op.split(".")[0] in ("bra", "trap", *LEAVES)}
    order = sorted(start for start in starts if start < len(lines))
    number = {start: b for b, start in enumerate(order)}
    blocks = [lines[a:b] for a, b in zip(order, [*order[1:], len(lines)], strict=True)]
    successors = []
    for b, block in enumerate(blocks):
        last = block[-1]
        if last.op in LEAVES:
            if last.predicate:
                raise Unknown(last.text)
            successors.append([len(blocks)])
        elif last.op.startswith("bra"):
            last.target = number[labels[last.operands[0]]]
            successors.append([last.target, b + 1] if last.predicate else [last.target])
        else:
            successors.append([b + 1])
    return blocks, successors


def _joins(successors: list[list[int]]) -> list[int]:
    """For each block the nearest that all its threads come to: its first postdominator."""
    end = len(successors)
    after = [set(range(end + 1)) for _ in range(end)] + [{end}]
    changed = True
    while changed:
        changed = False
        for b in range(end - 1, -1, -1):
            new = {b} | set.intersection(*(after[n] for n in successors[b]))
            if new != after[b]:
                after[b], changed = new, True
    return [next((x for x in after[b] - {b} if after[x] == after[b] - {b}), end) for b in range(end)]
