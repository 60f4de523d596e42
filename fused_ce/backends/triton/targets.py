"""Class indices out of range: the kernels note one, and whoever wants to know waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

_FLAGS: dict[torch.device, Tensor] = {}


def flag(device: torch.device) -> Tensor | None:  # (1,)
    """Where kernels store the last target of this device that was out of range; 0 before, which no target can be.

    None inside the capture of a CUDA graph on a device without a flag: made there, it would lie in the graph's own
    memory and be cleared at each replay. A call outside of a capture, as Triton needs to compile, makes it for good.
    """
    if device not in _FLAGS:
        if is_capturing(device):
            return None
        with torch.inference_mode(False):
            made = torch.zeros(1, dtype=torch.int64, device=device)
        if device.type == "cuda":
            # Once for each device: kernels of another stream must not be overtaken by the zero.
            torch.cuda.current_stream(device).synchronize()
        _FLAGS.setdefault(device, made)
    return _FLAGS[device]


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on this device now becomes part of a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def check_targets() -> None:
    """Raise for a class index out of range that a GPU has met since the last check; waits for the GPU.

    On a GPU nothing else looks: such a row's loss and gradient are NaN. For one device after the other, it waits for
    all streams, reads what was met and forgets it: nothing queued before this call goes unseen, on whichever stream.
    Of several such targets of a device one is named; where a device has met one, the devices after it are left for the
    next check. What other threads queue while it runs is seen now, by the next check or, if it comes between reading
    and forgetting another, not at all. A replay of a CUDA graph counts as a call, if the graph was captured after an
    ordinary call on its device. It cannot itself be captured.

    Raises:
        IndexError: with torch's message, for one of the targets.
    """
    for device, met in list(_FLAGS.items()):
        _wait(device)
        value = int(met)
        if value:
            met.zero_()
            _wait(device)  # or a kernel that another stream runs next would be forgotten with it
            raise IndexError(f"Target {value} is out of bounds.")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
