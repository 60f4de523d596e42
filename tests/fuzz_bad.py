"""Calls that should be refused, made out of good ones: each change by its name."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import torch
from fuzz_calls import Drawn
from torch import Tensor

OURS = ("logit_scale", "softcap", "lse_square_scale", "num_items", "grad_scale", "dtype", "inplace", "return_stats")
REFUSALS = (ValueError, TypeError, RuntimeError, IndexError)


class Bad(NamedTuple):
    name: str
    args: list[Any]  # input, target, weight
    torchs: dict[str, Any]  # the keywords of torch
    ours: dict[str, Any]  # and of fused_ce alone
    is_ours: bool  # whether it is one of these that is out of range; torch then has nothing to say


def _some(tensor: Tensor, value: Any) -> Tensor:
    tensor = tensor.clone()
    tensor.reshape(-1)[-1:] = value
    return tensor


# What changes in (input, target, weight), or in torch's keywords.
Change = Callable[[Tensor, Any, Any], list[Any]]
ARGUMENTS: dict[str, Change] = {
    "target past the end": lambda x, t, w: [x, _some(t, min(255, x.shape[min(1, x.dim() - 1)])), w],
    "target below 0": lambda x, t, w: [x, t if t.dtype == torch.uint8 else _some(t, -7), w],
    "a row too many": lambda x, t, w: [x, torch.cat([t, t]) if t.dim() else t.expand(2), w],
    "a dimension too many": lambda x, t, w: [x, t.unsqueeze(-1), w],
    "a dimension too few": lambda x, t, w: [x[0], t, w],
    "no dimension": lambda x, t, w: [x.sum(), t, w],
    "int32 targets": lambda x, t, w: [x, t.to(torch.int32), w],
    "int16 targets": lambda x, t, w: [x, t.to(torch.int16), w],
    "bool targets": lambda x, t, w: [x, t.to(torch.bool), w],
    "complex targets": lambda x, t, w: [x, t.to(torch.complex64), w],
    "float targets": lambda x, t, w: [x, t.float(), w],
    "integer logits": lambda x, t, w: [torch.ones_like(x, dtype=torch.int64), t, w],
    "complex logits": lambda x, t, w: [x.to(torch.complex64), t, w],
    "a list of logits": lambda x, t, w: [[1.0, 2.0], t, w],
    "no target": lambda x, t, w: [x, None, w],
    "a number for a target": lambda x, t, w: [x, 1, w],
    "a weight too many": lambda x, t, w: [x, t, x.new_ones(x.shape[min(1, x.dim() - 1)] + 1)],
    "a weight of two dimensions": lambda x, t, w: [x, t, x.new_ones(1, x.shape[min(1, x.dim() - 1)])],
    "weights of another dtype": lambda x, t, w: [x, t, torch.ones(x.shape[min(1, x.dim() - 1)], dtype=_other(x))],
    "integer weights": lambda x, t, w: [x, t, torch.ones(x.shape[min(1, x.dim() - 1)], dtype=torch.int64)],
    "a number for a weight": lambda x, t, w: [x, t, 1.0],
    "targets on another device": lambda x, t, w: [x, t.to("meta"), w],
}
KEYWORDS: dict[str, tuple[Any, ...]] = {
    "reduction": ("avg", "", None, 3),
    "label_smoothing": (1.5, -0.1, "a", None, float("nan")),
    "ignore_index": (1.5, None, "a", 2**63, -(2**70)),
}
NAN, INF = float("nan"), float("inf")
OWN: dict[str, tuple[Any, ...]] = {
    "logit_scale": (NAN, INF, None, "a", 1e39, torch.tensor(2.0)),
    "softcap": (0.0, -1.0, NAN, INF, "a", 1e-40, torch.tensor(2.0)),
    "lse_square_scale": (NAN, -INF, None, "a", torch.tensor(2.0)),
    "num_items": (0, -1.0, NAN, INF, "a", torch.ones(2), torch.ones(0)),
    "grad_scale": (0.0, -1.0, NAN, INF, "a", torch.ones(2)),
    "dtype": ("float32", torch.int64, torch.complex64, 3),
    "backend": ("cuda", "", 3),
}


def _other(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype == torch.float64 else torch.float64


def spoiled(call: Drawn, rng: Random) -> Bad:
    """The call with one thing wrong, mostly; with none of fused_ce's keywords, or with those that were drawn."""
    args = [call.input, call.target, call.weight]
    torchs = {name: call.keywords[name] for name in ("ignore_index", "reduction", "label_smoothing")}
    ours = {name: call.keywords[name] for name in OURS} if rng.random() < 0.5 else {}
    kind = rng.choice(("arguments", "arguments", "torch's", "ours"))
    if kind == "arguments":
        name = rng.choice(list(ARGUMENTS))
        return Bad(name, ARGUMENTS[name](*args), torchs, ours, False)
    name = rng.choice(list(KEYWORDS if kind == "torch's" else OWN))
    value = rng.choice((KEYWORDS if kind == "torch's" else OWN)[name])
    if isinstance(value, float) and value in (1e39, 1e-40) and call.input.dtype == torch.float64:  # which holds these
        value = NAN
    text = f"{name}={value!r}"
    if kind == "torch's":
        if name == "reduction":
            ours.pop("num_items", None)
        return Bad(text, args, {**torchs, name: value}, ours, False)
    if name == "num_items":
        torchs["reduction"] = "mean"
    return Bad(text, args, torchs, {**ours, name: value}, True)
