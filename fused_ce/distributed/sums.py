"""From a rank's call to the sums of whole rows: judge it, sum the shard, exchange; and fail together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..contract import Backend, RowSums, row_shape
from ..options import Options
from .exchange import exchange, fail
from .gate import judge
from .layout import Ranks, locate
from .rows import Rows, rows_of
from .status import of_call


def sums_of(
    input: Tensor,  # (N, V_local, d1..dk), padding included
    target: Tensor,  # (N, d1..dk)
    weight: Tensor | None,  # (V,)
    options: Options,
    vocab_start: int | None,
    vocab_size: int | None,
    ranks: Ranks,
    name: str | None,  # of the backend
) -> tuple[Rows, RowSums, Backend]:
    """The rows of a call, their sums over all ranks, and the backend that finishes.

    Raises:
        whatever is wrong here or, on a CPU, on another rank.
    """
    if not isinstance(input, Tensor) or input.dim() < 1:
        # Not even the number of rows is known: the others wait until the engine's timeout.
        raise TypeError(f"expected logits (N, V_local), (V_local) or (N, V_local, d1..dk), got {input!r}")
    try:
        columns = input.shape[1 if input.dim() > 1 else 0]
        layout = locate(columns, vocab_start, vocab_size, ranks)
        call, backend = judge(input, target, weight, options, layout, name)
        with torch.no_grad():
            rows = rows_of(call)
            part = part_of(rows, backend)
            mine = of_call(call, layout.held)
    except Exception as error:
        fail(error, math.prod(row_shape(input)), input.device, bool(options.return_stats), ranks)
        raise
    return rows, exchange(part, mine, rows, ranks), backend


def part_of(rows: Rows, backend: Backend) -> Tensor:
    """This rank's (8, R), of no class too: the sums of ignored rows are the same on every rank."""
    if rows.call.classes:
        return backend.part(rows.call)
    sums = RowSums(*rows.w_y.new_zeros(len(RowSums._fields), len(rows.y)))
    lowest = sums.m.masked_fill(rows.counted, -math.inf)
    argmax = torch.full_like(lowest, -1).masked_fill(rows.counted, math.inf)
    return torch.stack(sums._replace(m=lowest, z_y=lowest, argmax=argmax))
