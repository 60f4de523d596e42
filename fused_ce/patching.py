"""`patch`: torch.nn.functional's cross entropies become this package's, for code that nobody rewrites, and back."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function

from . import _torch, functional
from .linear import functional as linear

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions  # from torch 2.13 on


# Torch's own, bound before anybody here replaces them; the second is there from torch 2.13 on.
_torch_cross_entropy = F.cross_entropy
_TORCHS: dict[str, Callable[..., Tensor]] = {
    name: getattr(F, name) for name in ("cross_entropy", "linear_cross_entropy") if hasattr(F, name)
}


# Torch's signatures and no more: a keyword that torch refuses is refused, patched or not.
def cross_entropy(
    input: Tensor,  # (N, C), (C) or (N, C, d1..dk)
    target: Tensor,
    weight: Tensor | None = None,  # (C,)
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    # torch.jit.script, which is deprecated, compiles this branch alone.
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return _torch_cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    return functional.cross_entropy(
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
    )


def linear_cross_entropy(
    input: Tensor,  # (N, H) or (H)
    linear_weight: Tensor,  # (V, d1..dk, H)
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,  # (V, d1..dk)
    weight: Tensor | None = None,  # (V,)
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
) -> Tensor:
    tensors = (input, linear_weight, target, linear_bias, weight)
    given: dict[str, Any] = {
        "linear_bias": linear_bias,
        "weight": weight,
        "reduction": reduction,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "options": options,
    }
    if _torch.is_overridden(tensors):
        # Torch itself would tell them the name's present value, which no override is registered for.
        result: Tensor = handle_torch_function(_TORCHS["linear_cross_entropy"], tensors, *tensors[:3], **given)
        return result
    result = linear.linear_cross_entropy(input, linear_weight, target, **given)
    return result


_OURS = {name: globals()[name] for name in _TORCHS}

_lock = threading.RLock()
_holders = 0  # how many want the patch: patch() is one, each `with patched()` another
_explicit = False  # whether patch() is among them
_under: dict[str, Callable[..., Tensor]] = {}  # what stood there before


def patch() -> None:
    """Make `torch.nn.functional.cross_entropy` and `linear_cross_entropy` those of fused_ce, until `unpatch()`.

    `torch.nn.CrossEntropyLoss` and `LinearCrossEntropyLoss` follow, also those made before, and every library that
    calls `F.cross_entropy` by that name; functions that torch.compile compiled before notice. Names bound to torch's
    function before (`from torch.nn.functional import cross_entropy`) do not: `left_out()` lists them. Arguments stay
    torch's, and so do tensor subclasses' and modes' overrides, which see torch's own function. All threads of the
    process are concerned, child processes that are not forked are not. Calling it again does nothing.
    """
    global _explicit
    with _lock:
        if not _explicit:
            _hold()
            _explicit = True


def unpatch() -> None:
    """Undo `patch()`; what stood there before it stands there again. Without a patch it does nothing.

    A `with patched()` around the call stays in force to its end.

    Raises:
        RuntimeError: someone else replaced the functions since, who is to undo that first; nothing was changed.
    """
    global _explicit
    with _lock:
        if _explicit:
            _release()
            _explicit = False


@contextmanager
def patched() -> Iterator[None]:
    """`patch()` for a `with` block or, as a decorator, for a function; blocks may be nested, and overlap in threads.

    Raises:
        RuntimeError: at the end, if someone else replaced the functions since. They stay as they are until, that
            undone, `unpatch()` is called.
    """
    global _explicit, _holders
    with _lock:
        _hold()
    try:
        yield
    finally:
        with _lock:
            try:
                _release()
            except RuntimeError:
                if _explicit:
                    _holders -= 1  # whoever unpatches will say it again
                _explicit = True
                raise


def is_patched() -> bool:
    """Whether `torch.nn.functional.cross_entropy` is fused_ce's now."""
    return getattr(F, "cross_entropy") is cross_entropy  # noqa: B009 - mypy holds the name to be torch's


def left_out() -> list[str]:
    """Names that are bound to torch's own functions, which `patch()` does not reach, as "module.name".

    Found are variables of modules and of their classes; not found are attributes of objects, closures, and what lies
    in a list or a dict. Assign `torch.nn.functional.cross_entropy` to them while patched.
    """
    found = []
    for module, contents in [(name, vars(m)) for name, m in list(sys.modules.items()) if isinstance(m, ModuleType)]:
        if module.partition(".")[0] in ("torch", __package__):
            continue
        for name, value in list(contents.items()):
            if _is_torchs(value):
                found.append(f"{module}.{name}")
            elif inspect.isclass(value) and value.__module__ == module:
                names = [key for key, inner in list(vars(value).items()) if _is_torchs(inner)]
                found += [f"{module}.{name}.{key}" for key in names]
    return sorted(found)


def _is_torchs(value: object) -> bool:
    value = getattr(value, "__func__", value) if isinstance(value, staticmethod) else value
    return any(value is function for function in _TORCHS.values())


def _hold() -> None:
    global _holders
    if not _holders:
        for name, ours in _OURS.items():
            _under[name] = getattr(F, name)
            setattr(F, name, ours)
    _holders += 1


def _release() -> None:
    global _holders
    if _holders == 1:
        if other := [name for name, ours in _OURS.items() if getattr(F, name) is not ours]:
            raise RuntimeError(
                f"expected torch.nn.functional.{other[0]} as fused_ce.patch() left it, got {getattr(F, other[0])!r}, "
                "which someone put there since. Undo that first, then call fused_ce.unpatch()"
            )
        for name, before in _under.items():
            setattr(F, name, before)
    _holders -= 1
