"""Global memory, of which only the pages that tensors reach are kept, and the shared memory of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .rounding import UINT, Array

SPACE = 40  # bits of a buffer's addresses
WINDOW = 24  # bits of a CTA's window in a cluster's shared memory
FIRST = 1024  # where shared memory begins in a window
PAGE = 4096
SLACK = 16  # bytes behind the last: an access that is reported may still be made


class Places(NamedTuple):
    """Where an access of n threads goes in a buffer."""

    start: Array  # (n,) bytes, in the buffer's own data
    cells: Array  # (n, cells of the access)
    inside: Array  # (n,) whether every cell belongs to a tensor


class Buffer:
    """One storage and the tensors in it, in cells of the smallest element."""

    def __init__(self, name: str, data: Array, cell: int) -> None:
        self.name, self.data, self.cell = name, data, cell
        self.valid = np.zeros(len(data) // cell, bool)
        # By which program of a launch: -1 none, -2 several.
        self.writer = np.full(len(self.valid), -1, np.int32)
        self.reader = np.full(len(self.valid), -1, np.int32)

    def start(self, offset: Array) -> Array:  # (n,) bytes of the storage -> bytes of `data`, -1 outside
        return np.where((offset >= 0) & (offset < len(self.data) - SLACK), offset, -1)

    def places(self, offset: Array, size: int) -> Places:
        start = self.start(offset)
        cells = start[:, None] // self.cell + np.arange(max(1, size // self.cell))
        return Places(start, cells, (start >= 0) & self.valid[np.where(start[:, None] < 0, 0, cells)].all(1))

    def view(self, width: int) -> Array:
        """The data as unsigned integers of `width` bytes."""
        return self.data.view(UINT[width * 8])


class Storage(Buffer):
    """The storage of tensors, page by page."""

    def __init__(self, name: str, tensors: Sequence[Tensor]) -> None:
        self.raw = _bytes(tensors[0])
        cell = min(tensor.itemsize for tensor in tensors)
        offsets = [_offsets(tensor) for tensor in tensors]
        self.pages = np.unique(np.concatenate([each // PAGE for each in offsets]))
        self.page_at = np.full(-(-len(self.raw) // PAGE) + 1, -1, np.int64)
        self.page_at[self.pages] = np.arange(len(self.pages))
        data = np.zeros(len(self.pages) * PAGE + SLACK, np.uint8)
        super().__init__(name, data, cell)
        for mine, theirs in self._pages():
            mine[:] = theirs
        for tensor, each in zip(tensors, offsets, strict=True):
            for k in range(tensor.itemsize // cell):
                self.valid[self.start(each) // cell + k] = True

    def start(self, offset: Array) -> Array:
        page = self.page_at[np.clip(offset // PAGE, -1, len(self.page_at) - 1)]  # the last one is nobody's
        return np.where(page < 0, -1, page * PAGE + offset % PAGE)

    def write_back(self) -> None:
        for mine, theirs in self._pages():
            theirs[:] = mine

    def _pages(self) -> list[tuple[Array, Array]]:
        """Runs of pages, here and in the storage."""
        ends = np.flatnonzero(np.diff(self.pages, append=-2) != 1) + 1
        starts = [0, *ends[:-1]]
        found = []
        for a, b in zip(starts, ends, strict=True):
            theirs = self.raw[self.pages[a] * PAGE : (self.pages[b - 1] + 1) * PAGE]
            found.append((self.data[a * PAGE :][: len(theirs)], theirs))
        return found


class Shared(Buffer):
    """The shared memory of all CTAs of a cluster, one after the other."""

    def __init__(self, ctas: int, size: int) -> None:
        self.stride, self.size = -(-size // 16) * 16, size
        super().__init__("shared memory", np.zeros(ctas * self.stride + SLACK, np.uint8), 1)
        self.valid[: ctas * self.stride] = np.tile(np.arange(self.stride) < size, ctas)
        self.known = np.zeros(len(self.valid), bool)  # written

    def offset(self, cta: Array, address: Array) -> Array:
        local = (address & ((1 << WINDOW) - 1)) - FIRST
        return np.where((local < 0) | (local >= self.size), -1, cta * self.stride + local)


def storages(tensors: Sequence[tuple[str, Tensor]]) -> dict[int, Storage]:
    """Of the tensors of a launch, by the number of their addresses' upper bits; `tensors` with their names."""
    groups: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors:
        groups.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    return {
        number: Storage("+".join(name for name, _ in group), [tensor for _, tensor in group])
        for number, group in enumerate(groups.values(), 1)
    }


def address_of(tensor: Tensor, found: dict[int, Storage]) -> int:
    """Of its first element, as the kernel is told."""
    storage = tensor.untyped_storage().data_ptr()
    number = next(number for number, each in found.items() if each.raw.ctypes.data == storage)
    return (number << SPACE) + tensor.storage_offset() * tensor.itemsize


def _bytes(tensor: Tensor) -> Array:
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    array: np.ndarray[Any, Any] = raw.numpy()
    return array


def _offsets(tensor: Tensor) -> Array:
    """Of every element, in bytes of the storage."""
    offsets = np.full((1,) * tensor.dim(), tensor.storage_offset(), np.int64)
    for d, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        shape = [1] * tensor.dim()
        shape[d] = size
        offsets = offsets + (np.arange(size, dtype=np.int64) * stride).reshape(shape)
    return offsets.ravel() * tensor.itemsize
