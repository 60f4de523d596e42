"""What a rank tells the others beside its sums, so that all of them raise where one has to: none waits for it in vain.

A status is LENGTH numbers: how the rank fared, what it was called with, and in whose words it failed.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import Call

LENGTH = 192
_FINE = -1
# What a rank raises is raised on all of them, as far as it is one of these.
_ERRORS = (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError, MemoryError)


class Status(NamedTuple):
    """One rank's; the numbers of a call that failed may be 0."""

    error: int = _FINE  # which of _ERRORS
    first: int = 0
    held: int = 0
    total: int = 0
    options: int = 0  # a checksum
    tensors: int = 0  # likewise, of shapes and dtypes
    targets: int = 0  # likewise, of their values
    others: int = 0  # likewise, of what a linear head has besides
    words: str = ""

    def numbers(self, device: torch.device) -> Tensor:  # (LENGTH,), each exact in float64
        *fields, words = self
        if device.type != "cpu":
            # To bring a list there would wait for the device; and nobody reads more than `shards`.
            there = torch.zeros(LENGTH, dtype=torch.float64, device=device)
            for name in ("first", "held"):
                there[self._fields.index(name)].fill_(getattr(self, name))
            return there
        told = [*map(float, fields), *map(float, map(ord, words))][:LENGTH]
        return torch.tensor(told + [0.0] * (LENGTH - len(told)), dtype=torch.float64)


def of_call(call: Call, held: int) -> Status:
    """Of a call that nothing was wrong with. On a GPU no values are compared, which would wait for it."""
    input, target, weight, options = call
    fields = options._replace(grad_scale=None, shard=None, inplace=False)
    targets = 0
    if target.is_cpu:
        places = torch.arange(1, target.numel() + 1)
        targets = int((target.reshape(-1).long() * places).sum()) % (1 << 40)
    return Status(
        first=call.shard.first,
        held=held,
        total=call.shard.total,
        options=checksum(*fields, None if weight is None else weight.sum() if weight.is_cpu else True),
        tensors=checksum(tuple(target.shape), input.dtype),
        targets=targets,
    )


def checksum(*values: object) -> int:
    return zlib.crc32(repr([_plain(value) for value in values]).encode())


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return float(value) if value.is_cpu else None
    return float(value) if isinstance(value, (int, float)) else value  # 0 and 0.0 ask for the same


def of_error(error: BaseException) -> Status:
    kind = next((i for i, known in reversed([*enumerate(_ERRORS)]) if isinstance(error, known)), 0)
    words = str(error) if isinstance(error, _ERRORS) else f"{type(error).__name__}: {error}"
    return Status(error=kind, words=words.partition("\n")[0])


def check(numbers: Tensor) -> None:  # (P, LENGTH)
    """Raise what has to be raised, the same on every rank.

    Raises:
        RuntimeError, IndexError, ValueError, TypeError, NotImplementedError, MemoryError: a rank failed, in its words.
        RuntimeError: the ranks were not called alike.
        ValueError: their shards are not the vocabulary.
    """
    everyone = [read(row) for row in numbers]
    for rank, status in enumerate(everyone):
        if error := error_of(status, f" (on rank {rank} of the group)"):
            raise error
    for field, what in (
        ("total", "vocab_size"),
        ("options", "options or class weights"),
        ("tensors", "numbers of rows or dtypes of logits"),
        ("targets", "targets: each needs those of all rows, and the same"),
        ("others", "numbers of features, rows of a chunk, grad_scale, reduce_input_grad or tensors that require grad"),
    ):
        values = [getattr(status, field) for status in everyone]
        others = [rank for rank, value in enumerate(values) if value != values[0]]
        if others:
            told = f": {values}" if field == "total" else ""
            raise RuntimeError(f"expected all ranks to be called alike; ranks 0 and {others[0]} had other {what}{told}")
    at = 0
    for first, held, rank in sorted((status.first, status.held, rank) for rank, status in enumerate(everyone)):
        if held and first != at:
            raise ValueError(
                f"expected shards that tile the {everyone[0].total} classes: rank {rank} holds {held} from {first} on, "
                f"where {at} should come next; pass vocab_start and vocab_size"
            )
        at += held
    if at != everyone[0].total:
        raise ValueError(
            f"expected shards that tile the {everyone[0].total} classes, got {at} together; pass vocab_size"
        )


def error_of(status: Status, where: str = "") -> Exception | None:
    """What a rank failed with; None if it did not."""
    return None if status.error == _FINE else _ERRORS[status.error](status.words + where)


def first_failed(numbers: Tensor) -> Tensor:  # (P, LENGTH) -> (LENGTH,)
    """The numbers of the first rank that failed; those of the first of all, if none did."""
    return numbers[int((numbers[:, 0] != _FINE).byte().argmax())]


def read(numbers: Tensor) -> Status:  # (LENGTH,)
    """The status that gave these numbers."""
    count = len(Status._fields) - 1
    values = numbers.tolist()
    fields = [int(number) if number == number else 0 for number in values[:count]]
    return Status(*fields, "".join(chr(int(code)) for code in values[count:] if code > 0))  # type: ignore[arg-type, call-arg]


def shards(numbers: Tensor) -> tuple[Tensor, Tensor]:  # (P, LENGTH) -> (P, 1) each
    """The first class of every rank's shard, and how many it holds."""
    first, held = (numbers[:, Status._fields.index(name), None].long() for name in ("first", "held"))
    return first, held
