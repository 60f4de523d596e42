"""A call cut into shards of its classes by hand, and put together again: what ranks of a group do, in one process."""

from __future__ import annotations

import zlib
from functools import reduce
from itertools import pairwise

import torch
from oracle import double
from torch import Tensor

from fused_ce import formula, operators
from fused_ce.contract import Backend, Call, RowSums, Upstream
from fused_ce.options import Shard


def cuts(C: int) -> list[tuple[int, ...]]:
    """Borders of shards: even, one class at either end, uneven; fewer where there are not so many classes."""
    wanted = ((0, C // 2, C), (0, 1, C - 1, C), (0, C // 3, C // 3 + 1, C))
    return sorted({tuple(sorted(set(borders))) for borders in wanted})


def a_cut(C: int, name: str) -> tuple[int, ...]:
    """One of them, the same for the same name."""
    every = cuts(C)
    return every[zlib.crc32(name.encode()) % len(every)]


def shards(call: Call, borders: tuple[int, ...]) -> list[Call]:
    """The calls of the shards, on views of the logits."""
    dim, C = min(call.input.dim() - 1, 1), call.classes
    return [
        call._replace(
            input=call.input.narrow(dim, first, end - first), options=call.options._replace(shard=Shard(first, C))
        )
        for first, end in pairwise(borders)
    ]


def joined(parts: list[Tensor]) -> RowSums:  # (8, R) each
    return reduce(formula.combine, (RowSums(*part.cpu()) for part in parts))


def assembled(backend: Backend, call: Call, borders: tuple[int, ...], upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    """Loss and gradient, for an upstream gradient of the loss."""
    of_shards, options = shards(call, borders), call.options
    parts = [backend.part(shard) for shard in of_shards]
    assert all(part.shape == (8, call.rows) and part.dtype == torch.float64 for part in parts)
    sums = joined(parts)
    exact = Call(double(call.input), call.target.cpu(), double(call.weight), options._replace(dtype=None))
    rows = operators.rows_of(exact)
    D, count = (torch.as_tensor(divisor).double().cpu() for divisor in operators.divisors(exact, rows))
    loss, z_loss = (torch.where(rows.counted, rows_of, 0) for rows_of in formula.row_loss(sums, options))
    total = loss / D + z_loss / count if options.reduction == "none" else loss.sum() / D + z_loss.sum() / count
    lse = sums.m + formula.minus_m(sums)
    g, of_lse = (upstream / D).to(call.acc), 2 * options.lse_square_scale * lse * upstream / count
    device = call.input.device
    given = Upstream(g.to(device), of_lse.to(device, call.acc) if options.lse_square_scale else None)
    stacked = torch.stack(tuple(sums)).to(device)
    grad = torch.full_like(call.input, torch.nan, memory_format=torch.contiguous_format)
    for shard, into in zip(of_shards, shards(call._replace(input=grad), borders), strict=True):
        backend.finish(shard, stacked, given, into.input)
    total = total.reshape(call.row_shape) if options.reduction == "none" else total
    return total.to(options.dtype or call.input.dtype), grad
