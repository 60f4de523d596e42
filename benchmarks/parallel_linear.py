"""Linear heads of sharded vocabularies on gloo ranks: loss and gradients of hidden states and weight, in turns.

    PYTHONPATH=. python benchmarks/parallel_linear.py
    PYTHONPATH=. python benchmarks/parallel_linear.py --ranks 4 --rounds 9

Each rank has one thread. A peer's logits of all rows and this rank's classes are a product; then
`vocab_parallel_cross_entropy`, or all ranks gather the weight's rows of the others and call `linear_cross_entropy`.
The gradient of the hidden states is added up over the ranks by each. Medians of wall time, rank 0's, ranks in step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from report import cpu_name
from torch import Tensor

from fused_ce import linear_cross_entropy
from fused_ce.distributed import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy

OURS = "vocab_parallel_linear_cross_entropy"
SHAPE = (512, 1024, 32000)  # N, H, V


def peers(x: Tensor, W: Tensor, y: Tensor, V: int) -> dict[str, Callable[[], object]]:
    """Each makes the loss and both gradients, and lets them go."""

    def added(grad: Tensor) -> Tensor:
        grad = grad.float()
        dist.all_reduce(grad)
        return grad.to(x.dtype)

    def ours() -> object:
        return torch.autograd.grad(vocab_parallel_linear_cross_entropy(x, W, y, vocab_size=V), (x, W))

    def by_logits() -> object:
        dx, dW = torch.autograd.grad(vocab_parallel_cross_entropy(F.linear(x, W), y, vocab_size=V), (x, W))
        return added(dx), dW

    def by_gathering() -> object:
        whole = W.new_empty(V, W.shape[1])
        dist.all_gather_into_tensor(whole, W.detach())
        whole.requires_grad_()
        dx, dW = torch.autograd.grad(linear_cross_entropy(x, whole, y), (x, whole))
        return dx, dW[dist.get_rank() * len(W) :][: len(W)].clone()

    return {OURS: ours, "matmul + vocab_parallel_cross_entropy": by_logits, "gathered weight": by_gathering}


def measured(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            dist.barrier()
            start = time.perf_counter()
            result = call()
            dist.barrier()
            del result
            if i:  # the first warms up
                samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def _rank(rank: int, arguments: Any, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=arguments.ranks)
    N, H, V = SHAPE
    if rank == 0:
        print(f"{cpu_name()}, {arguments.ranks} ranks of a thread, {N} x {H} x {V}")
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        x, y = torch.randn(N, H).to(dtype).requires_grad_(), torch.randint(V, (N,))
        W = (torch.randn(V, H) / H**0.5).to(dtype).chunk(arguments.ranks)[rank].clone().requires_grad_()
        found = measured(peers(x, W, y, V), arguments.rounds)
        if rank == 0:
            for name, seconds in found.items():
                times = seconds / found[OURS]
                print(f"{str(dtype).removeprefix('torch.')}  {name:40} {seconds * 1e3:9.1f} ms  {times:5.2f} x ours")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (arguments, f"{folder}/ranks"), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
