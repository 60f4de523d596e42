"""Models that torch parallelizes, with `fused_ce.cross_entropy` of their DTensors: the gradients of one process."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dtensors import mesh_of
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from fused_ce import cross_entropy

B, S, V = 4, 4, 24


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(V, 8), nn.LayerNorm(8), nn.Linear(8, V, bias=False)

    def forward(self, words: Tensor) -> Tensor:  # (B, S) -> (B, S, V)
        return self.head(self.norm(self.embedding(words)))


def head(**inputs: Any) -> ColwiseParallel:
    return ColwiseParallel(output_layouts=Shard(-1), use_local_output=False, **inputs)


def tensor_parallel(model: nn.Module, x: Tensor, y: Tensor, rank: int, size: int) -> Tensor:
    parallelize_module(model, mesh_of(size), {"head": head()})
    return cross_entropy(model(x).view(-1, V), y.view(-1))


def sequence_parallel(model: nn.Module, x: Tensor, y: Tensor, rank: int, size: int) -> Tensor:
    embedding = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
    plan = {"embedding": embedding, "norm": SequenceParallel(), "head": head(input_layouts=Shard(1))}
    parallelize_module(model, mesh_of(size), plan)
    return cross_entropy(model(x).view(-1, V), y.view(-1))


def fsdp(model: nn.Module, x: Tensor, y: Tensor, rank: int, size: int) -> Tensor:
    fully_shard(model, mesh=mesh_of(size))
    logits = model(x.chunk(size)[rank]).view(-1, V)
    logits, target = (
        DTensor.from_local(own, mesh_of(size), [Shard(0)]) for own in (logits, y.chunk(size)[rank].view(-1))
    )
    return cross_entropy(logits, target) * size  # FSDP averages gradients over its ranks


def fsdp_of_tensor_parallel(model: nn.Module, x: Tensor, y: Tensor, rank: int, size: int) -> Tensor:
    mesh, batches = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp")), size // 2
    parallelize_module(model, mesh["tp"], {"head": head()})
    fully_shard(model, mesh=mesh["dp"])
    own = rank // 2
    counted = (y >= 0).sum()
    target = y.chunk(batches)[own].view(-1)
    return cross_entropy(model(x.chunk(batches)[own]).view(-1, V), target, num_items=counted / batches)


def build() -> tuple[Model, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x, y = Model(), torch.randint(V, (B, S)), torch.randint(V, (B, S))
    return model, x, y.index_fill(0, torch.tensor(0), -100)


def run_model(rank: int, size: int, parallel: Any) -> list[Tensor]:
    model, x, y = build()
    parallel(model, x, y, rank, size).backward()
    grads = [parameter.grad for parameter in model.parameters()]
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads]


@pytest.mark.parametrize("parallel", [tensor_parallel, sequence_parallel, fsdp, fsdp_of_tensor_parallel])
def test_gradients_of_parallel_models(ranks: Ranks, parallel: Any) -> None:
    model, x, y = build()
    model = deepcopy(model).double()
    F.cross_entropy(model(x).view(-1, V), y.view(-1)).backward()
    for grads in ranks(run_model, parallel):
        for grad, parameter in zip(grads, model.parameters(), strict=True):
            # Sums of products in float32: an element is as exact as the largest of them.
            assert (grad - parameter.grad).abs().max() <= 2e-6 * parameter.grad.abs().max()
