"""What is run, and whether what came is right by `fuzz_exact`, which shares nothing with fused_ce.

A new kernel is a row of CASES, and a function in RUNS if the public functions do not launch it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from fuzz_calls import Drawn, draw
from fuzz_judge import is_beyond_limits

from fused_ce import check_targets

from .calls import call_of
from .launch import Emulator
from .runs import RUNS, public

EVERYWHERE = ("plain", "upstream", "none", "loss", "few", "fused inplace", "ignored", "stats")
SHORT = (  # 10 and 1000 classes, and rows that begin anywhere: 4099 and 50257
    "few upstream",
    "inplace",
    "inplace ignored none",
    "inplace few",
    "inplace rows9",
    "fused inplace ignored few",
    "fused inplace sliced",
    "fused inplace shifted rows9",
    "sliced",
    "sliced none",
    "shifted few",
    "ignored inf",
    "bad none",
    "few bad none rows9",
    "smooth weight",
    "smooth weight few",
    "weight ignored",
    "softcap",
    "softcap few none",
    "scaled z",
    "stats few",
    "stats lse",
    "stats lse inplace few none",
    "probs",
    "probs few",
    "probs target",
    "smooth weight softcap scaled z stats",
    "smooth weight softcap scaled z stats fused inplace ignored",
    "turned",
    "turned few rows9 none",
    "far",
    "far few none",
    "far fused inplace",
    "checked inplace none",
    "checked smooth stats",
)
LONG = ("inplace ignored none", "sliced", "smooth weight", "probs")
PIXELS = (
    (19, "pixels"),
    (19, "pixels none ignored"),
    (19, "pixels inplace"),
    (19, "pixels fused inplace ignored"),
    (19, "pixels stats smooth weight"),
    (19, "pixels probs target"),
    (150, "lines"),
    (1000, "lines"),
    (1000, "lines inplace none"),
    (10, "rows130 inplace none"),
)
LINEAR = ((131, "linear"), (1000, "linear ignored weight"), (4099, "linear smooth ignored"), (131, "linear none"))
SHARE = (  # target, dtype, classes, words: what `make test` runs
    ("sm_90", torch.bfloat16, 1000, "fused inplace"),
    ("sm_90", torch.bfloat16, 4099, "inplace few none rows9"),
    ("sm_90", torch.bfloat16, 50257, "fused inplace ignored"),
    ("sm_90", torch.bfloat16, 128256, "fused inplace"),
    ("sm_90", torch.float32, 1000, "smooth weight softcap scaled z stats"),
    ("sm_80", torch.bfloat16, 50257, "fused inplace few ignored"),
    ("sm_80", torch.bfloat16, 50257, "loss"),
    ("sm_100", torch.float32, 19, "pixels inplace"),
    ("sm_100", torch.float32, 10, "probs target"),
)
SHARDS = (
    (10, "shards none"),
    (1000, "shards weight ignored few"),
    (4099, "shards smooth inplace none"),
    (50257, "shards inplace ignored none"),  # rows of both shards begin anywhere
    (50257, "shards rows9 few"),
    (4099, "shards stats ignored"),
    (50257, "shards stats inf few none"),
    (1000, "shards far none"),
    (4099, "checked shards inplace smooth none"),
    (1000, "checked shards stats"),
)
HALF = ("plain", "none", "fused inplace", "few", "inplace rows9", "smooth weight softcap scaled z stats", "probs")


class Case(NamedTuple):
    """`words`: see `calls`; `run` says what is wrong with the numbers, within an Emulator."""

    words: str
    C: int
    dtype: torch.dtype
    run: Callable[[], Iterator[str]]

    def __str__(self) -> str:
        return f"{str(self.dtype)[6:]} {self.C} {self.words}"

    @property
    def few(self) -> bool:
        return "few" in self.words.split()


def case(words: str, C: int, dtype: torch.dtype) -> Case:
    each = words.split()
    runs = RUNS[next((word for word in each if word in RUNS), "public")]
    return Case(words, C, dtype, lambda: runs(call_of(each, C, dtype)))


def cases(dtypes: list[torch.dtype]) -> Iterator[Case]:
    """bfloat16 and float32 take all of them; the code of float16 differs from bfloat16's by a conversion."""
    table = [(C, words) for C in (10, 1000, 4099, 50257) for words in (*EVERYWHERE, *SHORT)]
    table += [(C, words) for C in (32000, 128256) for words in (*EVERYWHERE, *LONG)]
    table += [*PIXELS, *LINEAR, *SHARDS]
    for dtype in dtypes:
        for C, words in table:
            whole = dtype in (torch.bfloat16, torch.float32)
            if whole or words in HALF or (C, words) in (*PIXELS, *LINEAR, *SHARDS):
                yield case(words, C, dtype)


def shared_cases() -> Iterator[tuple[str, Case]]:
    for target, dtype, C, words in SHARE:
        yield target, case(words, C, dtype)


def drawn_cases(seed: int, number: int) -> Iterator[Case]:
    """Calls of the fuzzer, but for those that torch would run or of which nothing is promised."""
    for index in range(number):
        call = draw(seed, index, "triton")
        if is_promised(call):
            yield Case(f"drawn {seed} {index}", call.input.shape[-1], call.input.dtype, lambda call=call: public(call))


def is_promised(call: Drawn) -> bool:
    notes, keywords = call.notes, call.keywords
    extreme = notes["values"] == "extreme" or notes["weight"] in ("inf", "1e-37", "1e30") or notes["upstream"] == "nan"
    both = call.weight is not None and keywords["label_smoothing"] > 0
    torchs = call.input.is_neg() or (call.target.dtype == torch.uint8 and both)
    return not (extreme or torchs or is_beyond_limits(call, "triton") or not call.input.numel())


def found_in(case: Case, emulator: Emulator) -> list[str]:
    """All that is wrong with a case, in words."""
    emulator.faults.clear()
    emulator.launches.clear()
    emulator.digests.clear()
    with emulator:
        found = list(case.run())
        try:
            check_targets()
        except IndexError as error:
            found.append(f"a target that nobody gave: {error}")
    found += emulator.faults.lines()
    return found if emulator.launches else [*found, "nothing was launched"]
