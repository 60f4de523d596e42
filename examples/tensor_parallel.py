"""A language model whose head is sharded over two ranks: the loss curve of one process, half the logits on each.

    python examples/tensor_parallel.py                              # starts its two ranks itself
    torchrun --nproc-per-node 2 examples/tensor_parallel.py         # or is one of those that torchrun starts

torch's `parallelize_module` gives every rank the head's rows of its own words. The logits are then a DTensor, sharded
by words, and `fused_ce.cross_entropy` takes it as it is: no rank ever holds the logits of all words, and 48 bytes a row
travel between them. The text is the source of Python's standard library, as in language_model.py.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from language_model import CONTEXT, Text, read
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fused_ce

RANKS, FEATURES, BATCH = 2, 64, 256


class Model(nn.Module):
    """Words to features, a hidden layer, and a head with one row a word."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, FEATURES)
        self.hidden = nn.Linear(CONTEXT * FEATURES, FEATURES)
        self.head = nn.Linear(FEATURES, vocabulary, bias=False)

    def forward(self, words: Tensor) -> Tensor:  # (N, CONTEXT) -> (N, vocabulary)
        return self.head(F.gelu(self.hidden(self.embedding(words).flatten(1))))


def train(model: Model, text: Text, steps: int) -> tuple[list[float], Tensor]:
    """The loss of each step, and the last logits."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, foreach=False)
    choose = torch.Generator().manual_seed(1)
    curve = []
    for _ in range(steps):
        starts = torch.randint(len(text.words) - CONTEXT, (BATCH,), generator=choose)
        windows = text.words[starts[:, None] + torch.arange(CONTEXT + 1)]
        logits = model(windows[:, :-1])
        loss = fused_ce.cross_entropy(logits, windows[:, -1], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve, logits.detach()


def build(vocabulary: int) -> Model:
    torch.manual_seed(0)
    return Model(vocabulary)


def run(rank: int, where: str, vocabulary: int, steps: int, files: int) -> None:
    """One of the ranks; `where` is the file that they meet at, "" if torchrun brought them together."""
    if where:
        dist.init_process_group("gloo", init_method=f"file://{where}", rank=rank, world_size=RANKS)
    else:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    text, ranks = read(vocabulary, files), dist.get_world_size()
    model = build(vocabulary)
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, init_device_mesh("cpu", (ranks,)), {"head": head})
    curve, logits = train(model, text, steps)
    if rank == 0:
        alone, whole = train(build(vocabulary), text, steps)
        report(curve, alone, ranks, logits.to_local(), whole)
    dist.barrier()
    dist.destroy_process_group()


def report(curve: list[float], alone: list[float], ranks: int, own: Tensor, whole: Tensor) -> None:
    print(f"{'':>16}{'one process':>16}{f'{ranks} ranks':>16}")
    for step in sorted({0, *range(0, len(curve), max(1, len(curve) // 8)), len(curve) - 1}):
        print(f"{f'loss at step {step}':>16}{alone[step]:16.6f}{curve[step]:16.6f}")
    print(
        f"{'logits of a rank':>16}{f'{whole.shape[0]} x {whole.shape[1]}':>16}{f'{own.shape[0]} x {own.shape[1]}':>16}"
    )
    furthest = max(abs(a / b - 1) for a, b in zip(curve, alone, strict=True))
    print(f"furthest apart: {furthest:.1e} of the loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="[40]")
    parser.add_argument("--vocabulary", type=int, default=2001, help="[2001, which two ranks cannot share evenly]")
    parser.add_argument("--files", type=int, default=20, help="modules of the standard library to read [20]")
    args = parser.parse_args()
    numbers = args.vocabulary, args.steps, args.files
    if "RANK" in os.environ:
        run(int(os.environ["RANK"]), "", *numbers)
        return
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run, (str(Path(folder) / "store"), *numbers), nprocs=RANKS)


if __name__ == "__main__":
    main()
