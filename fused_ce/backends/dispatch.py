"""Which backend takes a call: the only file that matches tensors to backends, by the order of its table alone."""

from __future__ import annotations

import os

from ..contract import Backend, Call
from . import cpu, reference
from .triton import launch

# Best first. The reference and what comes after it are taken only by name: torch's own operators are faster.
BACKENDS: dict[str, Backend] = {"cpu": cpu, "triton": launch, "reference": reference}
FORCED = os.environ.get("FUSED_CE_BACKEND")  # read once: a look into the environment costs as much as the choice


def check_name(name: str | None) -> None:
    """Refuse a name that no backend has.

    Raises:
        ValueError: the message lists those there are.
    """
    if name is not None and not (isinstance(name, str) and name in BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None (choose for me), got {name!r}")


def at_a_glance(call: Call) -> Backend | None:
    """The backend of a call as most are, which is sure without a closer look; None for all others."""
    return cpu if FORCED is None and cpu.is_common(call) else None


def choose(call: Call, name: str | None) -> Backend | None:
    """The backend for this call, or None where only a torch composite will do.

    `name` (or the variable FUSED_CE_BACKEND at import) forces one.

    Raises:
        ValueError: no backend of that name.
        NotImplementedError: the backend asked for cannot take the call; the message lists why.
    """
    name = name or FORCED
    if name is None:
        for backend in BACKENDS.values():
            if backend is reference:
                return None
            if not backend.unsupported(call):
                return backend
        return None
    check_name(name)
    against = BACKENDS[name].unsupported(call)
    if against:
        input, target = call.input, call.target
        raise NotImplementedError(
            f"backend {name!r} cannot take input {tuple(input.shape)} {input.dtype} on {input.device} with target "
            f"{tuple(target.shape)} {target.dtype}: {'; '.join(against)}. Drop backend= to let fused_ce choose."
        )
    return BACKENDS[name]


def reasons(call: Call) -> str:
    """Why none of the backends that are chosen from takes the call."""
    chosen_from = list(BACKENDS)[: list(BACKENDS).index("reference")]
    return "; ".join(f"{name}: {', '.join(BACKENDS[name].unsupported(call))}" for name in chosen_from)


def name_of(backend: Backend | None) -> str:
    """The backend's name in the table; "torch" for None, where torch's own operators run."""
    return next((name for name, listed in BACKENDS.items() if listed is backend), "torch")
