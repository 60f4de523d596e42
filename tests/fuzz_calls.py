"""Random calls over the whole face of `cross_entropy`, each of them a function of a seed and an index alone."""

from __future__ import annotations

import math
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

f32, f64, bf16, f16 = FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
inf, nan = torch.inf, torch.nan
CLASSES = (1, 2, 3, 4, 5, 7, 8, 10, 16, 17, 31, 33, 64, 100, 255, 256, 257, 300, 511, 1000, 1025, 2048, 2049, 4999)
VALUES = ("randn", "randn", "randn*100", "+100", "+1e4", "+1e8", "-inf", "+inf", "nan", "equal", "confident", "extreme")
LAYOUTS = (
    "contiguous",
    "contiguous",
    "contiguous",
    "permuted",
    "class last",
    "steps",
    "expanded",
    "offset",
    "negative",
)
UPSTREAMS = ("one", "one", "random", "power of two", "subnormal", "large", "zero", "inf", "nan")
ELEMENTS = {"triton": 1000}  # logits of the usual call; an interpreter is slow


class Drawn(NamedTuple):
    """One call, its upstream gradients, and under `notes` the choices that made it."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    keywords: dict[str, Any]
    upstream: Tensor  # of the loss
    g_lse: Tensor | None  # of lse, with return_stats
    threads: int
    wants_target: bool
    notes: dict[str, Any]


def draw(seed: int, index: int, backend: str) -> Drawn:
    rng, torch_rng = Random(f"{seed} {index}"), torch.Generator()
    torch_rng.manual_seed(rng.getrandbits(60))
    shape = _shape(rng, ELEMENTS.get(backend, 40000 if rng.random() < 0.03 else 3000))
    classes = shape[0] if len(shape) == 1 else shape[1]
    dtype, values, layout = rng.choice((f32, f32, f64, bf16, f16)), rng.choice(VALUES), rng.choice(LAYOUTS)
    keywords = _keywords(rng, classes, dtype)
    target = _target(rng, torch_rng, shape, keywords["ignore_index"])
    x = _values(values, shape, dtype, rng, torch_rng, target)
    wide = keywords["dtype"] == f32 and rng.random() < 0.5
    weight, weight_kind = _weight(rng, torch_rng, classes, f32 if wide else dtype)
    if weight_kind in ("1e-37", "1e30") and rng.random() < 0.5:
        keywords["grad_scale"] = 65536.0
    if keywords["inplace"]:
        layout = "contiguous"
    target_layout = rng.choice(LAYOUTS[:-1])
    x, target = laid_out(x, layout, rng), laid_out(target, target_layout, rng)
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    loss_dtype = keywords["dtype"] or dtype
    if target.dtype in FLOATS:
        loss_dtype = torch.promote_types(loss_dtype, target.dtype)
    upstream_kind = rng.choice(UPSTREAMS)
    upstream = _upstream(upstream_kind, rows if keywords["reduction"] == "none" else (), rng, torch_rng).to(loss_dtype)
    if keywords["grad_scale"] == "right":
        given = float(upstream.reshape(-1)[0]) if upstream.numel() else 1.0
        keywords["grad_scale"] = given if 0 < given < inf else None
    # In place, the gradient is made before that of lse is known.
    wants_lse = keywords["return_stats"] and not keywords["inplace"] and rng.random() < 0.3
    g_lse = torch.randn(rows, generator=torch_rng, dtype=f64 if dtype == f64 else f32) if wants_lse else None
    notes = {"rank": len(shape), "dtype": dtype, "target": target.dtype, "values": values, "layout": layout}
    notes |= {"target layout": target_layout, "weight": weight_kind, "upstream": upstream_kind}
    old_name = keywords["reduction"] == "mean" and rng.random() < 0.05
    notes |= {"elementwise_mean": old_name, "default device": rng.choice((*[None] * 10, "cpu", "meta"))}
    notes |= {"weight dtype": None if weight is None else weight.dtype}
    notes |= {name: value for name, value in keywords.items() if name in ("reduction", "softcap", "logit_scale")}
    notes |= {name: bool(keywords[name]) for name in ("label_smoothing", "lse_square_scale", "inplace", "return_stats")}
    notes |= {name: keywords[name] is not None for name in ("num_items", "grad_scale", "dtype")}
    wants_target = target.dtype in FLOATS and rng.random() < 0.3
    return Drawn(x, target, weight, keywords, upstream, g_lse, rng.choice((1, 1, 2)), wants_target, notes)


def _shape(rng: Random, most: int) -> tuple[int, ...]:
    if rng.random() < 0.002 and most > 1000:
        return rng.randint(1, 3), rng.randint(20000, 70000)
    classes = min(rng.choice(CLASSES) if rng.random() < 0.6 else rng.randint(1, 60), 2 * most)
    rank = rng.choice((1, 2, 2, 2, 3, 4, 5))
    if rank == 1:
        return (classes,)
    left, sizes = max(1, rng.randint(1, most) // classes), []
    for _ in range(rank - 1):
        sizes.append(rng.randint(1, max(1, min(left, 300 if rank == 2 else 12))))
        left //= sizes[-1]
    if rng.random() < 0.02:
        sizes[rng.randrange(len(sizes))] = 0
    rng.shuffle(sizes)
    return sizes[0], classes, *sizes[1:]


def _keywords(rng: Random, classes: int, dtype: torch.dtype) -> dict[str, Any]:
    def sometimes(share: float, usual: Any, *others: Any) -> Any:
        return rng.choice(others) if rng.random() < share else usual

    reduction = rng.choice(("mean", "mean", "sum", "none"))
    items = sometimes(0.15, None, 7, 0.5, 1e6, torch.tensor(3), torch.tensor(12.5), torch.tensor([4.0]))
    return {
        "ignore_index": sometimes(0.3, -100, 0, classes - 1, rng.randrange(classes), -1),
        "reduction": reduction,
        "label_smoothing": sometimes(0.3, 0.0, 0.1, 0.5, 1.0, 1e-6),
        "logit_scale": sometimes(0.2, 1.0, 0.7, -1.0, -2.5, 1e-3, 50.0),
        "softcap": sometimes(0.2, None, 30.0, 1.0, 0.01, 1e4),
        "lse_square_scale": sometimes(0.2, 0.0, 1e-4, 0.1, 1.0, -0.5),
        "num_items": items if reduction == "mean" else None,
        "grad_scale": sometimes(0.2, None, "right", "right", 65536.0, 3.0, torch.tensor(2.0**10), torch.tensor([8.0])),
        "dtype": f32 if dtype in (bf16, f16) and rng.random() < 0.25 else None,
        "inplace": rng.random() < 0.12,
        "return_stats": rng.random() < 0.25,
    }


def _target(rng: Random, torch_rng: torch.Generator, shape: tuple[int, ...], ignore_index: int) -> Tensor:
    rank, classes = len(shape), shape[0] if len(shape) == 1 else shape[1]
    if rng.random() < 0.3 and ignore_index < 0:
        dtype, kind = rng.choice(FLOATS), rng.choice(("softmax", "one-hot", "random"))
        dim = 0 if rank == 1 else 1
        t = torch.randn(shape, generator=torch_rng, dtype=f64)
        if kind == "one-hot" and t.numel():
            return (t == t.amax(dim, keepdim=True)).to(dtype)
        return (t.softmax(dim) if kind == "softmax" else t.abs()).to(dtype)
    rows = shape[:1] + shape[2:] if rank > 1 else ()
    y = torch.randint(classes, rows, generator=torch_rng)
    ignored = torch.rand(rows, generator=torch_rng) < rng.choice((0.0, 0.2, 0.2, 1.0))
    if rank <= 2 and classes <= 256 and rng.random() < 0.2:
        return torch.where(ignored, max(ignore_index, 0) if ignore_index >= 0 else y, y).to(torch.uint8)
    return torch.where(ignored, ignore_index, y)


def _values(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, rng: Random, torch_rng: torch.Generator, target: Tensor
) -> Tensor:
    x = torch.randn(shape, generator=torch_rng, dtype=f32).to(f64)
    dim = 0 if len(shape) == 1 else 1
    chosen = torch.rand(shape, generator=torch_rng) < rng.choice((0.02, 0.3, 0.9))
    if kind == "randn*100":
        x *= 100
    elif kind in ("+100", "+1e4", "+1e8"):
        x = x * rng.choice((1, 10)) + float(kind[1:]) * rng.choice((1, -1))
    elif kind in ("-inf", "+inf", "nan"):
        x = torch.where(chosen, float(kind), x)
    elif kind == "equal":
        x = torch.full_like(x, rng.choice((0.0, 1.0, -3.25, 1000.0)))
    elif kind == "confident":
        best = target if target.shape == x.shape else torch.zeros(shape, dtype=f64)
        if target.shape != x.shape and x.numel():
            best = best.scatter(dim, target.long().clamp(0, shape[dim] - 1).unsqueeze(dim), 1.0)
        x = x + best * rng.choice((10.0, 20.0, 40.0, 100.0))
    elif kind == "extreme":
        info = torch.finfo(dtype)
        size = rng.choice((info.max, info.max / 4, info.tiny, info.tiny * info.eps, math.sqrt(info.max)))
        x = torch.where(chosen, x.sign() * size, x)
    return x.to(dtype)


def _weight(rng: Random, torch_rng: torch.Generator, classes: int, dtype: torch.dtype) -> tuple[Tensor | None, str]:
    kind = rng.choice((*["none"] * 5, "random", "zeros", "tiny", "large", "steps", "1e-37", "1e30", "inf"))
    if kind == "none" or (dtype == f16 and kind in ("1e-37", "1e30")):
        return None, "none"
    w = torch.rand(classes, generator=torch_rng, dtype=f64) + 0.1
    if kind == "zeros":
        w = torch.where(torch.rand(classes, generator=torch_rng) < rng.choice((0.3, 1.0)), 0, w)
    if kind == "inf":
        w = torch.where(torch.rand(classes, generator=torch_rng) < rng.choice((0.05, 0.3)), inf, w)
    w = (w * {"tiny": 1e-4, "large": 1e4, "1e-37": 1e-37, "1e30": 1e30}.get(kind, 1.0)).to(dtype)
    return w.repeat_interleave(2)[::2] if kind == "steps" else w, kind


def _upstream(kind: str, shape: tuple[int, ...], rng: Random, torch_rng: torch.Generator) -> Tensor:
    g = torch.randn(shape, generator=torch_rng, dtype=f64)
    if kind == "random":
        return g
    sizes = {"one": 1.0, "zero": 0.0, "inf": inf, "nan": nan, "large": 3e4, "subnormal": 1e-40}
    return torch.full_like(g, rng.choice((0.5, 2.0**-14, 1024.0, -4.0)) if kind == "power of two" else sizes[kind])


def laid_out(tensor: Tensor, kind: str, rng: Random) -> Tensor:
    """The same values under other strides ("expanded" repeats some); NaN, or an index out of range, between them."""
    shape, rank = tensor.shape, tensor.dim()
    if rank == 0 or tensor.numel() == 0 or kind == "contiguous":
        return tensor
    if kind == "negative":
        return torch._neg_view(-tensor) if tensor.is_floating_point() else tensor
    if kind == "expanded":
        dim = rng.randrange(rank)
        return tensor.narrow(dim, 0, 1).expand(shape)
    if kind in ("permuted", "class last"):
        order = rng.sample(range(rank), rank) if kind == "permuted" else [0, *range(2, rank), 1][:rank]
        back = sorted(range(rank), key=order.__getitem__)
        return tensor.permute(order).contiguous().permute(back)
    offset = rng.randint(1, 3)
    steps = [rng.randint(1, 2) if kind == "steps" else 1 for _ in shape]
    spare = nan if tensor.is_floating_point() else 255 if tensor.dtype == torch.uint8 else 2**40
    storage = tensor.new_full([n * step + offset for n, step in zip(shape, steps, strict=True)], spare)
    view = storage[tuple(slice(offset, offset + n * step, step) for n, step in zip(shape, steps, strict=True))]
    return view.copy_(tensor)
