"""Vocab-parallel cross entropy beside torch's loss_parallel and beside gathering the logits, on ranks of a gloo group.

    PYTHONPATH=. python benchmarks/parallel.py --json out.json
    PYTHONPATH=. python benchmarks/parallel.py --ranks 2 --only bfloat16

Loss and gradient of the mean, a thread a rank, every peer in the same processes and in turns; a call begins when all
ranks are there, and lasts until the slowest is done. Median of the rounds. Each call frees its own gradient. With more
ranks than cores, ranks wait for cores as well as for each other. "local" is the same kernels on a rank's own classes
without anyone else: what is above it is exchange, and Python on rows. Bytes are those that a rank hands to collectives.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from report import machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_ce import cross_entropy
from fused_ce.distributed import exchange, vocab_parallel_cross_entropy

OURS, REDUCED, TORCH, GATHERED, LOCAL = "one all-gather", "MAX + SUM", "loss_parallel", "gathered logits", "local"
GOAL = 5.0  # times as fast as loss_parallel, 512 x 32000


class Case(NamedTuple):
    N: int
    V: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.N}x{self.V} {str(self.dtype).removeprefix('torch.')}"


SHAPES = ((512, 32000), (64, 128256), (4096, 4096), (64, 1000))
CASES = [Case(*shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]


class Collectives(TorchDispatchMode):
    """Counts the collectives of a call and the bytes that this rank puts into them."""

    calls, bytes = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if any(issubclass(kind, torch.distributed.tensor.DTensor) for kind in types):
            return NotImplemented
        if function.namespace in ("c10d", "_c10d_functional") and "wait" not in str(function):
            tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
            self.calls += 1
            self.bytes += min(tensor.nbytes for tensor in tensors)
        return function(*arguments, **(keywords or {}))


def peers(case: Case, rank: int, ranks: int) -> dict[str, Callable[[], Tensor]]:
    """Each makes the loss and the gradient of this rank's logits, which it returns."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    N, V, dtype = case
    mesh, width = init_device_mesh("cpu", (ranks,)), V // ranks
    logits = (torch.randn(N, width, generator=torch.Generator().manual_seed(rank)) * 2).to(dtype)
    y = torch.randint(V, (N,), generator=torch.Generator().manual_seed(99))
    replicated = DTensor.from_local(y, mesh, [Replicate()], run_check=False)

    def gradient(loss: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            own = logits.detach().requires_grad_()
            loss(own).backward()
            assert own.grad is not None
            return own.grad

        return call

    def ours(most: int) -> Callable[[Tensor], Tensor]:
        def call(own: Tensor) -> Tensor:
            exchange.MOST_GATHERED = most
            return vocab_parallel_cross_entropy(own, y, vocab_size=V)

        return call

    def by_dtensor(own: Tensor) -> Tensor:
        # torch's, whatever fused_ce does with DTensors.
        return F.cross_entropy(DTensor.from_local(own, mesh, [Shard(1)], run_check=False), replicated)

    def parallel(own: Tensor) -> Tensor:
        with loss_parallel():
            return by_dtensor(own)

    def with_backward() -> Tensor:
        own = logits.detach().requires_grad_()
        with loss_parallel():
            by_dtensor(own).backward()
        assert own.grad is not None
        return own.grad

    return {
        OURS: gradient(ours(1 << 60)),
        REDUCED: gradient(ours(-1)),
        TORCH: with_backward,
        GATHERED: gradient(by_dtensor),
        LOCAL: gradient(lambda own: cross_entropy(own, y % width)),
    }


def run(rank: int, ranks: int, where: str, cases: list[Case], seconds: float, out: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=600)
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=ranks, timeout=limit)
    rows = []
    for case in cases:
        calls, counted = peers(case, rank, ranks), {}
        exact: Tensor | None = None
        for name, call in calls.items():
            call()
            with Collectives() as count:
                found = call().float()
            counted[name] = {"collectives": count.calls, "bytes_a_row": count.bytes / case.N}
            exact = found if exact is None else exact
            # loss_parallel rounds log-probabilities to 16 bits: it is timed, not trusted.
            assert name == LOCAL or float((found - exact).norm() / exact.norm()) < 2e-2, name
            del found
        samples: dict[str, list[float]] = {name: [] for name in calls}
        end, more = time.perf_counter() + seconds, torch.ones(1)
        while more:
            for name, call in calls.items():
                dist.barrier()
                start = time.perf_counter()
                call()
                samples[name].append(time.perf_counter() - start)
            more[0] = time.perf_counter() < end or len(samples[OURS]) < 5
            dist.all_reduce(more, dist.ReduceOp.MAX)
        for name, taken in samples.items():
            slowest = torch.tensor(taken, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            counted[name] |= {"median_s": statistics.median(slowest.tolist()), "best_s": float(slowest.min())}
        rows.append({"case": str(case), "ranks": ranks, "peers": counted})
    if rank == 0:
        Path(out).write_text(json.dumps(rows))
    dist.destroy_process_group()


def show(rows: list[dict[str, Any]], console: Console) -> None:
    for row in rows:
        table = Table(f"{row['case']}, {row['ranks']} ranks")
        for column in ("ms", f"x {TORCH}", "collectives", "bytes a row and rank"):
            table.add_column(column, justify="right")
        for name, found in row["peers"].items():
            ratio = row["peers"][TORCH]["median_s"] / found["median_s"]
            table.add_row(
                name,
                f"{found['median_s'] * 1e3:.2f}",
                f"{ratio:.2f}",
                str(found["collectives"]),
                f"{found['bytes_a_row']:.0f}",
            )
        console.print(table)
    for row in rows:
        ours, reduced, theirs = (row["peers"][name]["median_s"] for name in (OURS, REDUCED, TORCH))
        goal = f"goal {GOAL}" if row["case"].startswith("512x32000") else "no goal"
        console.print(
            f"{row['case']}, {row['ranks']} ranks: {theirs / ours:.1f} x {TORCH} ({goal}), "
            f"{reduced / ours:.2f} x {REDUCED} (goal 1.0)"
        )


def main(argv: list[str] | None = None) -> int:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=about)
    parser.add_argument("--ranks", type=lambda text: [*map(int, text.split(","))], default=[2, 4], help="[2,4]")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a case [10]")
    parser.add_argument("--only", default="", help="cases whose line holds this text")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    console, facts = Console(width=120, highlight=False), machine("cpu")
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    cases = [case for case in CASES if args.only in str(case)]
    rows: list[dict[str, Any]] = []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            where, out = str(Path(folder) / "store"), str(Path(folder) / "rows.json")
            multiprocessing.spawn(run, (ranks, where, cases, args.seconds, out), nprocs=ranks)
            rows += json.loads(Path(out).read_text())
    show(rows, console)
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
