"""Every private name of torch that the package uses, found once, here.

Where a version of torch lacks one, its stand-in gives the careful answer: the call then runs torch's own operators, or
costs a copy, but is never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _find(path: str, otherwise: Any = None) -> Any:
    """What `path` names inside torch, or `otherwise`."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return otherwise if found is None else found


# Whether a torch.func transform is at work.
transforms_active: Callable[[], bool] = _find("_C._are_functorch_transforms_active", lambda: True)

# Modes that watch torch's functions and operators, and what records them for torch.jit.trace.
_function_modes: Callable[[], int] = _find("_C._len_torch_function_stack", lambda: 1)
_dispatch_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack", lambda: 1)
_tracing_state: Callable[[], object] = _find("_C._get_tracing_state", lambda: "unknown")

# Whether the backward that runs now was asked to keep its graph.
keeps_graph: Callable[[], bool] = _find("_C._autograd._get_current_graph_task_keep_graph", lambda: True)

# Whether a vmap over upstream gradients (is_grads_batched, or torch.func's) made this tensor.
_is_legacy_batched: Callable[[Tensor], bool] = _find("_C._functorch.is_legacy_batchedtensor", lambda tensor: True)
_is_wrapped: Callable[[Tensor], bool] = _find("_C._functorch.is_functorch_wrapped_tensor", lambda tensor: True)

_HAS_LEVELS = _find("autograd.forward_ad._current_level") is not None
_HAS_VERSIONS = _find("Tensor._version") is not None
_HAS_BASES = _find("Tensor._is_view") is not None and _find("Tensor._base") is not None


def dual_level_active() -> bool:
    """Whether forward-mode differentiation is at work."""
    return not _HAS_LEVELS or forward_ad._current_level >= 0


def is_watched() -> bool:
    """Whether something records or intercepts torch's operators; or changes in place would go unseen."""
    return not (_HAS_VERSIONS and _function_modes() == 0 and _dispatch_modes() == 0 and _tracing_state() is None)


def is_batched(tensor: Tensor | None) -> bool:
    return tensor is not None and (_is_legacy_batched(tensor) or _is_wrapped(tensor))


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place; inference tensors do not count their changes."""
    return 0 if tensor.is_inference() else tensor._version


def shares_a_leaf(tensor: Tensor) -> bool:
    """Whether the tensor's memory belongs to a leaf that requires grad, such as a parameter."""
    if not _HAS_BASES:
        return True
    base = tensor._base if tensor._is_view() else tensor
    return base is not None and base.is_leaf and base.requires_grad


def _reduction_of(size_average: bool | None, reduce: bool | None) -> str:
    """torch's rule for its two deprecated arguments."""
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


legacy_reduction: Callable[[bool | None, bool | None], str] = _find("nn._reduction.legacy_get_string", _reduction_of)
