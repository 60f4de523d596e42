"""Which backend takes a call: the only file that matches tensors to backends.

A backend is a module with three names:

    unsupported(input, target, weight, options) -> list[str]
        why it cannot take the call, in words; empty when it can
    forward(input, target, weight, options, schedule) -> (loss, grad, stats, extras)
        schedule "loss": the loss alone; "fused": loss and gradient in one pass, for an upstream gradient of
        `options.grad_scale`, into the logits' own memory with `options.inplace`; "recompute": the loss, and
        the stats that backward needs to make the gradient. extras: with `options.return_stats`
    backward(grad_output, g_lse, input, target, weight, options, grad, stats, keep, wants_target) -> (dx, dt)
        the gradient for these upstream gradients (of the loss, and of lse or None) from what forward gave, and
        that of probabilities if wanted. keep: grad is needed again; input None: it was changed since forward
"""

from __future__ import annotations

import os
from types import ModuleType

from torch import Tensor

from . import cpu, gpu, reference
from .options import Options

# In order of preference. The reference is never chosen unasked: torch's own operators are faster.
BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "triton": gpu, "reference": reference}
FORCED = os.environ.get("FUSED_CE_BACKEND")  # read once: a look into the environment costs as much as the choice


def choose(
    input: Tensor, target: Tensor, weight: Tensor | None, options: Options, name: str | None
) -> ModuleType | None:
    """The backend for this call, or None where only a torch composite will do.

    `name` (or the variable FUSED_CE_BACKEND at import) forces one.

    Raises:
        ValueError: no backend of that name.
        NotImplementedError: the backend asked for cannot take the call; the message lists why.
    """
    name = name or FORCED
    if name is None:
        for backend in (cpu, gpu):
            if not backend.unsupported(input, target, weight, options):
                return backend
        return None
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None (choose for me), got {name!r}")
    reasons = BACKENDS[name].unsupported(input, target, weight, options)
    if reasons:
        raise NotImplementedError(
            f"backend {name!r} cannot take input {tuple(input.shape)} {input.dtype} on {input.device} with target "
            f"{tuple(target.shape)} {target.dtype}: {'; '.join(reasons)}. Drop backend= to let fused_ce choose."
        )
    return BACKENDS[name]
