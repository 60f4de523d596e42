"""A call made of words: "sliced none" are logits with holes between their rows, and losses that are not summed."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from fuzz_calls import Drawn
from torch import Tensor

from fused_ce.options import Options

OPTIONS: dict[str, dict[str, Any]] = {
    "inplace": {"inplace": True},
    "smooth": {"label_smoothing": 0.1},
    "softcap": {"softcap": 5.0},
    "scaled": {"logit_scale": 0.5},
    "z": {"lse_square_scale": 0.01},
    "stats": {"return_stats": True},
    "none": {"reduction": "none"},
}
LAYOUTS = ("sliced", "turned", "far", "shifted")
ROWS = {"rows1": (1,), "rows9": (9,), "rows130": (130,), "pixels": (2, 5, 7), "lines": (2, 35)}
OTHERS = ("plain", "upstream", "loss", "few", "fused", "linear", "shards", "checked", "ignored", "inf", "bad", "weight")
WORDS = {*OPTIONS, *LAYOUTS, *ROWS, *OTHERS, "probs", "target", "lse"}
FAR = (1 << 31) + 64  # elements from one row to the next


def call_of(words: list[str], C: int, dtype: torch.dtype) -> Drawn:
    """Three rows unless a word says more; no two sizes, divisors or factors of a call are equal."""
    assert WORDS.issuperset(words), words
    seed = torch.Generator().manual_seed(zlib.crc32(f"{words} {C} {dtype}".encode()))

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=seed)

    rows = next((ROWS[word] for word in words if word in ROWS), (2,) if "far" in words else (3,))
    shape, keywords = (rows[0], C, *rows[1:]), Options().keywords()
    for word in words:
        keywords |= OPTIONS.get(word, {})
    x, y = torch.randn(shape, generator=seed) * 3, torch.randint(C, rows, generator=seed)
    if "inf" in words:
        x[:, 1::3] = -torch.inf
    if "ignored" in words:
        y[1] = -100
    if "bad" in words:
        y[1] = C + (1 << 40)
    weight = (uniform(C) + 0.5).to(dtype) if "weight" in words else None
    target = uniform(*shape).softmax(1).to(dtype) if "probs" in words else y
    losses = rows if "none" in words else ()
    upstream = uniform(*losses) + 0.25 if {"upstream", "none"} & {*words} else torch.ones(())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g_lse = torch.randn(rows, generator=seed).to(wide) if "lse" in words else None
    notes = {"values": "randn", "upstream": "random", "weight": "none", "words": words}
    x = laid_out(x.to(dtype), words)
    return Drawn(x, target, weight, keywords, upstream.to(dtype), g_lse, 1, "target" in words, notes)


def laid_out(x: Tensor, words: list[str]) -> Tensor:
    """The same values under other strides, with NaN in the holes."""
    if "turned" in words:
        return x.mT.contiguous().mT
    if "shifted" in words:  # contiguous, from the second element of its storage on
        return torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:].view(x.shape)
    if "sliced" in words:
        wide = x.new_full((x.shape[0], x.shape[1] + 3), torch.nan)
        wide[:, 1:-2] = x
        return wide[:, 1:-2]
    if "far" in words:  # offsets of more than 32 bits; pages that nobody touches take no memory
        return torch.empty(FAR + x.shape[1], dtype=x.dtype).as_strided(x.shape, (FAR, 1)).copy_(x)
    return x


def without(call: Drawn, rows: Tensor) -> Drawn:
    """The same with these rows ignored."""
    return call._replace(target=call.target.masked_fill(rows, -100))


class Computed(torch.autograd.Function):
    """A copy with the layout of these words, and a gradient: what a model computed, which may be overwritten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, words: list[str]) -> Tensor:
        laid = laid_out(x, words)
        return laid.clone() if laid is x else laid

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.clone(), None
