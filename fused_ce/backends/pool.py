"""Large gradients on a CPU: in memory that a gradient before them left (csrc/memory.cpp).

The variable FUSED_CE_POOL says how many bytes may stay idle for the next one; 0 turns the pool off.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .._torch import swap

_C: Any
try:
    from .. import _C
except ImportError:  # cpu.py says what to do about it
    _C = None

# Bytes. Below, torch's allocator has memory at hand, which is in the caches besides.
SMALLEST = 4 << 20
# Their numbers in cross_entropy.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3, torch.int64: 4, torch.uint8: 5}


def _most_idle() -> int:
    """Bytes, by FUSED_CE_POOL or by what the machine has."""
    asked = os.environ.get("FUSED_CE_POOL", "").strip()
    if asked:
        if not (asked.isascii() and asked.isdigit() and int(asked) < 1 << 63):
            raise ValueError(
                "FUSED_CE_POOL: expected how many bytes of large gradients may stay idle for the next, 0 for none, "
                f"got {asked!r}; unset it for a quarter of the machine's memory"
            )
        return int(asked)
    if sys.platform != "linux":
        return 0
    import resource  # which is not everywhere

    # What is idle counts against these limits, and no other allocator would know how to get it back.
    limits = (resource.getrlimit(of)[0] for of in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits) or swap is None:
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4


if _C is not None:
    _C.keep_at_most(_most_idle())


def empty_like(tensor: Tensor) -> Tensor:
    """A contiguous tensor of the same shape and dtype on the CPU, of any content."""
    if tensor.nbytes >= SMALLEST and (lent := _lent(tensor.shape, tensor.dtype)) is not None:
        return lent
    if tensor.is_contiguous():
        return torch.empty_like(tensor)  # naming a format takes as long as the memory
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of any content on the CPU."""
    if math.prod(shape) * dtype.itemsize >= SMALLEST and (lent := _lent(shape, dtype)) is not None:
        return lent
    return torch.empty(shape, dtype=dtype, device="cpu")


def _lent(shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    lent = None if _C is None else _C.empty(shape, DTYPES[dtype])
    if lent is None:
        return None
    result = from_dlpack(lent)
    _make_resizable(result)
    return result


def _make_resizable(tensor: Tensor) -> None:
    """Let `tensor.untyped_storage().resize_` work although the memory was made elsewhere: FSDP frees gradients so.

    torch keeps the Python object of a storage, and with it this attribute, for as long as the storage lives. A subclass
    of UntypedStorage would not be copied or pickled by torch.
    """
    if (exchange := swap) is None:
        return
    storage = tensor.untyped_storage()
    known, address = weakref.ref(storage), storage.data_ptr()

    def resize_(size: int) -> Any:
        storage = known()
        assert storage is not None
        # Unless it was resized before, or moved to shared memory.
        if not storage.resizable() and storage.data_ptr() == address:
            ours: Any = torch.UntypedStorage(size, device="cpu")  # type: ignore[no-untyped-call]
            # Not copy_: a forked child would wait for the threads of it.
            ctypes.memmove(ours.data_ptr(), address, min(size, storage.nbytes()))
            nothing: Any = torch.UntypedStorage(0, device="cpu")  # type: ignore[no-untyped-call]
            exchange(storage, nothing)  # of two sizes that differ one must be 0
            exchange(storage, ours)
            return storage
        return torch.UntypedStorage.resize_(storage, size)

    storage.resize_ = resize_  # type: ignore[method-assign]


def empty_cache() -> None:
    """Give the memory that large gradients on the CPU left idle back to the operating system.

    Memory of tensors that are alive is not touched. Idle memory is not lost to other programs: the system takes it
    when it runs short, and at most FUSED_CE_POOL bytes (a quarter of the machine's memory) are kept.
    """
    if _C is not None:
        _C.empty_cache()
