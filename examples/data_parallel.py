"""The mean over data ranks: three ways to count the tokens, and which of them gives one process's gradient.

    python examples/data_parallel.py

Two ranks train one model with DistributedDataParallel (or, with --fsdp, fully_shard) on batches that have different
numbers of tokens that count. Both wrappers average gradients over the ranks. A mean over each rank's own tokens is
therefore an average of averages; right is the sum over all ranks' tokens, divided by their number, times the ranks
that the wrapper divides by.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, multiprocessing, nn
from torch.distributed.fsdp import fully_shard

import fused_ce

RANKS, VOCABULARY, TOKENS = 2, 1000, 64
COUNTED = (48, 8)  # tokens of each rank that are not padding


class Batch(NamedTuple):
    features: Tensor  # (TOKENS, 32)
    target: Tensor  # (TOKENS,)


def batch_of(rank: int) -> Batch:
    seed = torch.Generator().manual_seed(rank)
    target = torch.randint(VOCABULARY, (TOKENS,), generator=seed)
    target[COUNTED[rank] :] = -100
    return Batch(torch.randn(TOKENS, 32, generator=seed), target)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, VOCABULARY))


def gradients(of: nn.Module) -> Tensor:
    found = [parameter.grad for parameter in of.parameters()]
    whole = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in found if grad is not None]
    return torch.cat([grad.flatten() for grad in whole])


def of_one_process() -> Tensor:
    """The gradient of the mean over the tokens of both batches."""
    one, batches = model(), [batch_of(rank) for rank in range(RANKS)]
    logits = one(torch.cat([batch.features for batch in batches]))
    fused_ce.cross_entropy(logits, torch.cat([batch.target for batch in batches])).backward()
    return gradients(one)


def run(rank: int, where: str, sharded: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=RANKS)
    batch, exact, errors = batch_of(rank), of_one_process(), {}
    counted = (batch.target != -100).sum()
    dist.all_reduce(counted)  # over the ranks that hold other rows: once a step, of one number
    for name, num_items in (
        ("a mean over the rank's own tokens", None),
        ("num_items: the tokens of all ranks", counted),
        ("num_items: the tokens of all ranks / ranks", counted / RANKS),
    ):
        wrapped = model()
        if sharded:
            fully_shard(wrapped)
        else:
            wrapped = nn.parallel.DistributedDataParallel(wrapped)
        loss = fused_ce.cross_entropy(wrapped(batch.features), batch.target, num_items=num_items)
        loss.backward()
        errors[name] = float((gradients(wrapped) - exact).norm() / exact.norm())
    if rank == 0:
        wrapper = "FSDP2" if sharded else "DDP"
        table = Table(f"{wrapper}, {RANKS} ranks, {COUNTED[0]} and {COUNTED[1]} tokens that count", "gradient's error")
        for name, error in errors.items():
            table.add_row(name, f"{error:.1e}")
        Console().print(table)
    assert errors["num_items: the tokens of all ranks / ranks"] < 1e-6
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdp", action="store_true", help="fully_shard instead of DistributedDataParallel")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run, (str(Path(folder) / "store"), args.fsdp), nprocs=RANKS)


if __name__ == "__main__":
    main()
