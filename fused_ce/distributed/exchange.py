"""The sums of whole rows out of those of the ranks' shards: what crosses between the ranks, and how often.

Two ways, by the bytes that a rank receives. One all-gather, after which every rank joins what all of them sent; or,
where that would take longer than to wait twice, reductions: of m, then of the sums relative to it (and of the argmax).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..contract import RowSums
from ..formula import rescale
from .layout import Ranks
from .rows import Rows
from .status import LENGTH, Status, check, of_error, shards

# What a rank sends of a row, in float64 whatever the logits are: ranks that were not called alike must still exchange
# the same number of bytes, or the engine aborts the process (gloo) or waits for ever (NCCL) before anyone can say so.
# q_y and q_others are known to all ranks.
SENT = ("m", "so", "z_y", "q_drop", "e_drop", "argmax")
ROW_BYTES = len(SENT) * 8
# That a rank receives. Beyond, reductions are faster by the model of docs/distributed.md: latency times bandwidth.
MOST_GATHERED = 4 << 20
# As torch 2.13 calls what it warns of by its old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def exchange(part: Tensor, mine: Status, rows: Rows, ranks: Ranks) -> RowSums:  # (8, R), of this rank's shard
    """The sums of whole rows, with the same bits on every rank.

    Raises:
        what `check` raises, on every rank. On a GPU, which would have to be waited for, nothing: where a rank
        failed, all losses are NaN.
    """
    numbers = mine.numbers(part.device)
    if gathers(part.shape[1], ranks):
        return _gathered(RowSums(*part), numbers, rows, ranks)
    return _reduced(RowSums(*part), numbers, rows, ranks)


def gathers(R: int, ranks: Ranks) -> bool:
    return (ranks.size - 1) * R * ROW_BYTES <= MOST_GATHERED


def gather(numbers: Tensor, ranks: Ranks) -> Tensor:  # (n,) -> (P, n)
    if ranks.size == 1:
        return numbers[None]
    everything = numbers.new_empty(ranks.size * len(numbers))
    _all_gather(everything, numbers, group=ranks.group)
    return everything.view(ranks.size, -1)


def fail(error: BaseException, R: int, device: torch.device, wants_stats: bool, ranks: Ranks) -> None:
    """Take part in what the other ranks are on their way into, so that they hear of the error."""
    numbers = of_error(error).numbers(device)
    nan = numbers.new_full((R,), math.nan)
    if gathers(R, ranks):
        _gather([nan] * len(SENT), numbers, ranks)
        return
    _highest(nan, numbers, ranks)
    if not numbers.is_cpu:  # where nobody has read what went wrong
        _reduce(nan.expand(4, R).contiguous(), ranks)
        if wants_stats:
            _reduce(nan.clone(), ranks, dist.ReduceOp.MAX)


def tell(mine: Status, ranks: Ranks) -> Tensor:
    """Tell all ranks, on a CPU, how this one fares; what they all told, for `status.check`, (P, LENGTH)."""
    return gather(mine.numbers(torch.device("cpu")), ranks)


def add_up(term: Tensor, ranks: Ranks) -> Tensor:
    """The sum of all ranks' terms, in the memory of this rank's."""
    return _reduce(term, ranks)


def _gathered(part: RowSums, numbers: Tensor, rows: Rows, ranks: Ranks) -> RowSums:
    sums, told = _gather([getattr(part, name) for name in SENT], numbers, ranks)
    _check(told)
    m, so, z_y, q_drop, e_drop, argmax = sums.unbind(1)  # (P, R) each
    whole = m.amax(0)
    q_others = rows.q_others(*shards(told))
    parts = rescale(RowSums(m, so, z_y, rows.q_y, q_others, q_drop, e_drop, argmax), whole)
    so, q_drop, e_drop = (sums.sum(0) for sums in (parts.so, parts.q_drop, parts.e_drop))
    return _whole(rows, whole, so, z_y.amax(0), q_drop, e_drop, _first(m, whole, argmax).amin(0))


def _reduced(part: RowSums, numbers: Tensor, rows: Rows, ranks: Ranks) -> RowSums:
    whole, told = _highest(torch.where(part.m.isnan(), math.inf, part.m), numbers, ranks)  # NaN may lose a maximum
    _check(told)
    first, held = rows.call.shard.first, rows.call.classes
    mine = rescale(part._replace(q_others=rows.q_others(first, held)), whole)
    # A sum of which all but one are 0: a maximum could not tell a target of -inf from none. (NaN: a bad one, on a GPU.)
    z_y = torch.where((first <= rows.y) & (rows.y < first + held) | part.z_y.isnan(), part.z_y, 0)
    sums = _reduce(torch.stack([mine.so, z_y, mine.q_drop, mine.e_drop]), ranks)
    argmax = part.argmax
    if rows.call.options.return_stats:
        argmax = -_reduce(-_first(part.m, whole, argmax), ranks, dist.ReduceOp.MAX)
    so, z_y, q_drop, e_drop = sums
    return _whole(rows, whole, so, z_y, q_drop, e_drop, argmax)


def _whole(rows: Rows, m: Tensor, so: Tensor, z_y: Tensor, q_drop: Tensor, e_drop: Tensor, argmax: Tensor) -> RowSums:
    q_others = rows.q_others(0, rows.call.shard.total)
    return RowSums(m, so, z_y, rows.q_y, q_others.reshape_as(m), q_drop, e_drop, argmax)


def _gather(columns: list[Tensor], numbers: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:  # (R,) each, (LENGTH,)
    """(P, 6, R) and (P, LENGTH)."""
    sent = torch.cat([*columns, numbers])
    sums, told = torch.split(gather(sent, ranks), [len(sent) - LENGTH, LENGTH], 1)
    return sums.reshape(ranks.size, len(columns), len(columns[0])), told


def _highest(m: Tensor, numbers: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:  # (R,), (LENGTH,)
    """(R,) and (P, LENGTH)."""
    slots = numbers.new_full((ranks.size, LENGTH), -math.inf)
    slots[ranks.rank] = numbers
    highest = _reduce(torch.cat([m, slots.view(-1)]), ranks, dist.ReduceOp.MAX)
    return highest[: len(m)], highest[len(m) :].view_as(slots)


def _reduce(numbers: Tensor, ranks: Ranks, how: Any = dist.ReduceOp.SUM) -> Tensor:
    if ranks.size > 1:
        dist.all_reduce(numbers, how, group=ranks.group)
    return numbers


def _first(m: Tensor, whole: Tensor, argmax: Tensor) -> Tensor:
    """Infinite where another part has a larger class; a NaN is the largest, as in torch."""
    return torch.where((m == whole) | m.isnan(), argmax, math.inf)


def _check(told: Tensor) -> None:  # (P, LENGTH)
    if told.is_cpu:
        check(told)
