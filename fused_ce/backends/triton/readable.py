"""What comes to the kernels from outside, as they can read it: torch may leave a sign, zeros or a copy for later."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._torch import with_memory


def readable(tensor: Tensor) -> Tensor:
    """The tensor with its own numbers in its memory: a kernel sees neither the negative bit nor zeros without memory.

    Raises:
        RuntimeError: its storage was freed.
    """
    tensor = with_memory(tensor)
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def number(value: float | Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor | None:  # ()
    """Where a kernel can read it, rounded as an upstream gradient of that dtype is; filled in, because a copy waits."""
    if isinstance(value, Tensor) and device.type in ("cpu", value.device.type):
        return readable(value).to(device, dtype)
    return None if value is None else torch.full((), host(value), dtype=dtype, device=device)  # type: ignore[arg-type]


def host(value: float | Tensor) -> float | Tensor:
    """What a copy can be filled with; a tensor that lies on the CPU is read there, for its copy would wait for the GPU.

    Any other tensor is left as it is.
    """
    return value.item() if isinstance(value, Tensor) and value.device.type == "cpu" else value


def packed(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else readable(weight).contiguous()
