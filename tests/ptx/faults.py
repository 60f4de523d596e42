"""What was found, with one example of each."""

from __future__ import annotations

from collections import Counter


class Unknown(Exception):
    """PTX that the emulator does not know."""


class Faults(Counter[tuple[str, str]]):
    """(kind, where) -> how often."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[tuple[str, str], str] = {}

    def add(self, kind: str, where: object, what: str, times: int = 1) -> None:
        key = kind, str(where)
        self[key] += int(times)
        self.examples.setdefault(key, what)

    def lines(self) -> list[str]:
        return [f"{kind}: {n}x at {where}: {self.examples[kind, where]}" for (kind, where), n in self.items()]
