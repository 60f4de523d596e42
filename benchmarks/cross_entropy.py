"""Loss and gradient of fused_ce against its peers: checked against float64 first, then timed in turns.

    python benchmarks/cross_entropy.py --quick
    python benchmarks/cross_entropy.py --shapes 4096x32000 --dtype bfloat16 --threads 1 --json out.json

Torch's gradients come in fresh memory, which costs page faults; THP_MEM_ALLOC_ENABLE=1 in the environment lets torch
ask for large pages, as fused_ce always does. cpu_suite.py runs this with and without it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys

import torch
from exact import errors, wrong
from peers import PEERS, USUAL, Peer, Problem, Unable
from report import BOUND, Row, machine, plot, save_json, show
from timing import interleaved

SHAPES = {
    "cpu": "64x10,4096x10,50000x10,2048x1000,512x32000,256x50257,256x128256",
    "cuda": "8192x32000,8192x50257,8192x128256,4096x4096,65536x1000",
}
QUICK = {"cpu": "64x10,2048x1000,256x32000", "cuda": "4096x32000,65536x1000"}
DTYPES = {"f32": "float32", "f64": "float64", "bf16": "bfloat16", "f16": "float16"}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        limit_threads(args.threads)
    facts, rows = machine(args.device), []
    stopped = False
    try:
        for (N, C), dtype in itertools.product(args.shapes, args.dtype):
            print(f"{N}x{C} {dtype} ...", file=sys.stderr, flush=True)
            rows += measure(N, C, dtype, args)
            if args.json:  # each time: a limit on the time may end this without a word
                save_json(args.json, facts, rows, args.peers[0])
    except KeyboardInterrupt:  # what was measured until then is worth having
        stopped = True
    outcome = facts, rows, args.peers[0]
    show(*outcome)
    if args.plot:
        plot(args.plot, *outcome)
    return int(stopped)


def parse(argv: list[str] | None) -> argparse.Namespace:
    about, _, epilog = __doc__.partition("\n")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=epilog, formatter_class=form)
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--shapes", type=shapes, help="NxC[,NxC...]: N rows of C classes")
    parser.add_argument("--dtype", type=dtypes, help=f"of {', '.join(DTYPES)}, with commas [f32,bf16]")
    parser.add_argument("--mode", choices=["fwd_bwd", "fwd"], default="fwd_bwd", help="with or without the gradient")
    parser.add_argument("--reduction", choices=["mean", "sum", "none"], default="mean")
    parser.add_argument("--upstream", type=float, default=1.0, help="gradient of the mean or sum [1]")
    parser.add_argument(
        "--peers",
        type=peers,
        help=f"of {', '.join(PEERS)}, with commas; the first is the yardstick [what suits the device]",
    )
    parser.add_argument("--threads", type=int, help="and processors to run on [all]")
    parser.add_argument("--seconds", type=float, help="of timing for each peer on each problem [1]")
    parser.add_argument("--quick", action="store_true", help="few shapes, float32, short: under a minute")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE", help="bars of the ratios (needs matplotlib)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    args.peers = args.peers or USUAL[args.device]
    args.shapes = args.shapes or shapes((QUICK if args.quick else SHAPES)[args.device])
    args.dtype = args.dtype or (["float32"] if args.quick else ["float32", "bfloat16"])
    args.seconds = args.seconds if args.seconds is not None else 0.3 if args.quick else 1.0
    return args


def limit_threads(count: int) -> None:
    """For everyone: some peers (jax) start as many threads as there are processors."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    torch.set_num_threads(count)


def measure(N: int, C: int, dtype: str, args: argparse.Namespace) -> list[Row]:
    """Check every peer on one problem, then time those that are right, and a copy of the logits as the bound."""
    problem = make_problem(N, C, dtype, args)
    size = problem.input.numel() * problem.input.itemsize
    names = [*args.peers, BOUND]
    rows = {name: Row(N, C, dtype, args.mode, args.reduction, name, args.upstream) for name in names}
    copy, logits = torch.empty_like(problem.input), problem.input.detach()
    able = {BOUND: Peer(lambda: (copy.copy_(logits), None), 1, 1)}
    for name in args.peers:
        row = rows[name]
        try:
            peer = PEERS[name](problem)
            row.loss_error_ulp, row.grad_error_ulp = errors(problem, *peer.run())
        except Exception as error:  # of a stranger's code: whatever it is, the others go on
            kind = "" if isinstance(error, Unable) else f"{type(error).__name__}: "
            row.status, row.reason = "skipped", kind + str(error).strip().partition("\n")[0]
            continue
        row.reason = wrong(problem, row.loss_error_ulp, row.grad_error_ulp)
        row.status = "refused" if row.reason else "timed"
        if not row.reason:
            able[name] = peer
    calls = {name: (peer.before, peer.run) for name, peer in able.items()}
    timings = interleaved(calls, args.device, args.seconds)
    for name, timing in timings.items():
        row, peer = rows[name], able[name]
        row.backend, row.schedule = peer.backend, peer.schedule
        row.bytes = (peer.reads + peer.writes) * size
        row.median_s, row.best_s, row.spread, row.rounds = timing
        row.gb_per_s = row.bytes / timing.median / 1e9
        row.of_bound = timings[BOUND].median / timing.median
        if name != BOUND and args.peers[0] in timings:
            row.ratio = timings[args.peers[0]].median / timing.median
    return list(rows.values())


def make_problem(N: int, C: int, dtype: str, args: argparse.Namespace) -> Problem:
    seed = torch.Generator(args.device).manual_seed(0)
    input = torch.randn(N, C, generator=seed, device=args.device).to(getattr(torch, dtype))
    target = torch.randint(C, (N,), generator=seed, device=args.device)
    backward = args.mode == "fwd_bwd"
    upstream = None
    if backward and args.reduction == "none":
        upstream = torch.rand(N, generator=seed, device=args.device).to(input.dtype)
    elif backward and args.upstream != 1:
        upstream = torch.full((), args.upstream, dtype=input.dtype, device=args.device)
    return Problem(input.requires_grad_(backward), target, upstream, args.reduction)


def shapes(text: str) -> list[tuple[int, int]]:
    pairs = [tuple(int(n) for n in shape.split("x")) for shape in text.split(",")]
    if any(len(pair) != 2 or min(pair) < 1 for pair in pairs):
        raise ValueError
    return pairs


def dtypes(text: str) -> list[str]:
    names = [DTYPES.get(name, name) for name in text.split(",")]
    if not set(names) <= set(DTYPES.values()):
        raise ValueError
    return names


def peers(text: str) -> list[str]:
    names = text.split(",")
    if unknown := set(names) - set(PEERS):
        raise argparse.ArgumentTypeError(f"no such peer: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
