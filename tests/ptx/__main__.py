"""python -m ptx: all cases on all targets; `make ptx`.

python -m ptx --target sm_90 --dtype bf16 --only inplace    some of them
python -m ptx --drawn 200 --seed 1                           calls of tests/fuzz_calls.py instead
python -m ptx --noise --order 1                              approximate instructions off, programs shuffled
python -m ptx --mutants                                      broken PTX: each must be reported
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator

import torch

from .cases import Case, cases, drawn_cases, found_in, shared_cases
from .launch import Emulator
from .mutants import BASES, SHARE, missed

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}


def main() -> int:
    args = parse()
    torch.set_num_threads(1)
    if args.mutants:
        found = [line for base in (SHARE if args.share else BASES) for line in missed(*base, each=not args.share)]
        print(*found, f"{len(found)} missed", sep="\n")
        return bool(found)
    begin, number, wrong = time.perf_counter(), 0, 0
    emulators: dict[tuple[str, bool], Emulator] = {}
    for target, case in chosen(args):
        emulator = emulators.setdefault(
            (target, case.few), Emulator(target, args.noise, order=args.order, few=case.few)
        )
        start = time.perf_counter()
        try:
            faults = found_in(case, emulator)
        except Exception as error:
            if args.raises:
                raise
            faults = [f"{type(error).__name__}: {error}"]
        number, wrong = number + 1, wrong + bool(faults)
        if faults or args.verbose:
            counts: Counter[str] = Counter()
            for one in emulator.launches:
                counts[f"{one.kernel} {one.warps}x{one.ctas}"] += one.executed
            what = ", ".join(f"{name} {n}" for name, n in counts.items())
            print(f"{target} {case}: {len(faults) or 'no'} faults; {what}; {time.perf_counter() - start:.2f} s")
            print(*(f"    {fault[:300]}\n" for fault in faults[:6]), sep="", end="", flush=True)
    print(f"{number} cases, {time.perf_counter() - begin:.0f} s: {wrong} with faults")
    return bool(wrong)


def chosen(args: argparse.Namespace) -> Iterator[tuple[str, Case]]:
    """With the target of each."""
    if args.share:
        yield from shared_cases()
        return
    for target in args.target:
        every = drawn_cases(args.seed, args.drawn) if args.drawn else cases([DTYPES[name] for name in args.dtype])
        for case in every:
            if args.only in case.words and case.C in (args.classes or [case.C]):
                yield target, case


def parse() -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    about, _, epilog = __doc__.partition("\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m ptx", description=about, epilog=epilog, formatter_class=form)
    parser.add_argument("--target", type=names, default=["sm_80", "sm_90", "sm_100"], help="with commas")
    parser.add_argument("--dtype", type=names, default=list(DTYPES), help=f"of {', '.join(DTYPES)}, with commas")
    parser.add_argument("--classes", type=lambda text: [int(C) for C in text.split(",")], help="these alone")
    parser.add_argument("--only", default="", help="cases with this in their words")
    parser.add_argument("--share", action="store_true", help="the few that `make test` runs")
    parser.add_argument("--drawn", type=int, default=0, help="so many random calls instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--noise", action="store_true", help="approximate instructions off by 2^-22.5")
    parser.add_argument("--order", type=int, help="programs in an order of this seed")
    parser.add_argument("--mutants", action="store_true", help="broken PTX instead")
    parser.add_argument("--raises", action="store_true", help="stop at the first exception")
    parser.add_argument("--verbose", action="store_true", help="a line for each case")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
