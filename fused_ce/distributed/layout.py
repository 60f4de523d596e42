"""Which rank of a group holds which classes."""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ..options import Shard


class Ranks(NamedTuple):
    """The ranks that share a vocabulary."""

    group: ProcessGroup | None
    rank: int  # of this process
    size: int


class Layout(NamedTuple):
    """What one rank holds: of its columns of logits, the first `held` are classes and the rest is padding."""

    shard: Shard
    held: int


def ranks_of(group: ProcessGroup | None) -> Ranks:
    """The group (None: the default one); a process without a group is a group of its own.

    Raises:
        ValueError: this process is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if group is not None:
            raise ValueError("expected torch.distributed.init_process_group() before a group is used; call it first")
        return Ranks(None, 0, 1)
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("expected a group that this process is in; create it on every rank, and call only inside")
    return Ranks(group, rank, dist.get_world_size(group))


def locate(columns: int, vocab_start: int | None, vocab_size: int | None, ranks: Ranks) -> Layout:
    """The shard of a rank that has this many columns of logits.

    Without a start, shards follow each other in the order of the ranks: all of one width, the last of which may be
    padding (Megatron), or of ceil(vocab_size / ranks) with fewer at the end (DTensor).

    Raises:
        ValueError: a start or size that no shard can have.
    """
    total = ranks.size * columns if vocab_size is None else vocab_size
    for name, value in (("vocab_size", total), ("vocab_start", vocab_start)):
        if value is not None and (type(value) is not int or value < 0):
            raise ValueError(f"{name} must be a number of classes from 0 on, or None, got {value!r}")
    if total == 0:
        raise ValueError("expected at least one class, got none on any rank; pass vocab_size")
    first = vocab_start
    if first is None:
        first = min(total, ranks.rank * max(columns, -(-total // ranks.size)))
    return Layout(Shard(first, total), max(0, min(columns, total - first)))
