"""python -m ptx: each case on one of the targets, by turns; every second with --noise and --order 1; `make ptx`.

python -m ptx --every                                        each case on each target: hours
python -m ptx --target sm_90 --dtype bf16 --only inplace     some of them
python -m ptx --drawn 200 --seed 1                           calls of tests/fuzz_calls.py instead
python -m ptx --every --noise --order 1                      approximate instructions off, programs shuffled
python -m ptx --mutants                                      broken PTX: each must be reported
python -m ptx --counts                                       instructions a logit of the forward kernel
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from .cases import Case, cases, drawn_cases, found_in, shared_cases
from .counts import counts
from .launch import Emulator
from .mutants import BASES, SHARE, missed
from .runs import WORST

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64}


def main() -> int:
    args = parse()
    torch.set_num_threads(1)
    if args.mutants:
        found = [line for base in (SHARE if args.share else BASES) for line in missed(*base, each=not args.share)]
        print(*found, f"{len(found)} missed", sep="\n")
        return bool(found)
    if args.counts:
        for name in args.dtype if args.dtype != list(DTYPES) else ["bf16"]:
            for line in counts(args.target, DTYPES[name], args.classes):
                print(line, flush=True)
        return 0
    return run(args)


def run(args: argparse.Namespace) -> int:
    begin, number, wrong = time.perf_counter(), 0, 0
    emulators: dict[Any, Emulator] = {}
    for target, case, rough in chosen(args):
        noise, order = args.noise or rough, 1 if rough and args.order is None else args.order
        key = target, case.few, noise, order
        emulator = emulators.setdefault(key, Emulator(target, noise, order=order, few=case.few))
        start = spent()
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
            how = f"{target} {case}{', rough' if rough else ''}"
            print(f"{how}: {len(faults) or 'no'} faults; {what}; {spent() - start:.2f} s")
            print(*(f"    {fault[:300]}\n" for fault in faults[:6]), sep="", end="", flush=True)
    wall = time.perf_counter() - begin
    for (dtype, name), error in sorted(WORST.items(), key=str):
        print(f"plain calls, {str(dtype)[6:]}: {name} off by {error:.2f} ULP at most")
    print(f"{number} cases, {wall:.0f} s, {spent():.0f} s of the processor: {wrong} with faults")
    return bool(wrong)


def spent() -> float:
    """Seconds of the processor, with those of compilers that were started."""
    return sum(os.times()[:4])


def chosen(args: argparse.Namespace) -> Iterator[tuple[str, Case, bool]]:
    """With the target of each, and whether it is run with noise and in another order."""
    if args.share:
        yield from ((target, case, False) for target, case in shared_cases())
        return
    dtypes = [DTYPES[name] for name in args.dtype]
    for n, case in enumerate(drawn_cases(args.seed, args.drawn) if args.drawn else cases(dtypes)):
        # By a number that words, classes and dtype share in: the same words meet every target.
        turn = n + zlib.crc32(str(case.C).encode()) + dtypes.index(case.dtype) if not args.drawn else n
        for k, target in enumerate(args.target):
            wanted = args.only in case.words and case.C in (args.classes or [case.C])
            if wanted and (args.every or args.drawn or turn % len(args.target) == k):
                yield target, case, not args.every and turn // len(args.target) % 2 == 1


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
    parser.add_argument("--every", action="store_true", help="each case on each target")
    parser.add_argument("--share", action="store_true", help="the few that `make test` runs")
    parser.add_argument("--drawn", type=int, default=0, help="so many random calls instead")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--noise", action="store_true", help="approximate instructions off by 2^-22.5")
    parser.add_argument("--order", type=int, help="programs in an order of this seed")
    parser.add_argument("--mutants", action="store_true", help="broken PTX instead")
    parser.add_argument("--counts", action="store_true", help="instructions a logit, of bf16 unless --dtype says more")
    parser.add_argument("--raises", action="store_true", help="stop at the first exception")
    parser.add_argument("--verbose", action="store_true", help="a line for each case")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
