"""THE table of calls that every backend is held to. A new option is a new row here, not a new test."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fused_ce.contract import Call
from fused_ce.options import Options

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
inf, nan = torch.inf, torch.nan


@dataclass(frozen=True, eq=False)  # hashed by identity
class Case:
    """One call; `build` makes its tensors."""

    id: str
    N: int = 3
    C: int = 10
    pixels: tuple[int, ...] = ()  # d1..dk
    dtype: torch.dtype = f32
    logits: Callable[[Tensor, Tensor], Tensor] = lambda x, y: x  # of standard normal x (R, C) and class indices (R)
    target: Callable[[Tensor], Tensor] = lambda y: y  # of random class indices (R)
    probs: torch.dtype | None = None  # a target of probabilities
    weight: Callable[[int], Tensor] | None = None  # of C
    layout: Callable[[Tensor], Tensor] = lambda x: x  # other strides
    options: dict[str, Any] = field(default_factory=dict)
    declined_by: tuple[str, ...] = ()  # backends that do not take it; all others do
    interpreted: dict[str, Any] | None = field(default_factory=dict)  # see `for_interpreter`

    def __str__(self) -> str:
        return self.id

    def for_interpreter(self) -> Case | None:
        """The row as Triton's interpreter runs it; None: other rows take every instruction that this one takes.

        To the interpreter a program costs much, its number of lanes next to nothing. `interpreted` holds sizes that
        cross the borders of Triton's plan where the row's own are made for the blocks of C++: rows of up to 512
        classes share a program, wider ones are held in pieces of 64 * 16 bytes, and above 32768 classes walked.
        """
        return None if self.interpreted is None else replace(self, **self.interpreted) if self.interpreted else self

    def build(self, device: str = "cpu") -> Call:
        seed = torch.Generator().manual_seed(zlib.crc32(self.id.encode()))
        R = self.N * math.prod(self.pixels)
        y = torch.randint(self.C, (R,), generator=seed)
        x = self.logits(torch.randn(R, self.C, generator=seed, dtype=f64), y)
        if self.probs is None:
            target = self.target(y.to(device))
            target = target.view(self.N, *self.pixels) if self.pixels else target
        else:
            # A third of the classes has no probability at all.
            target = torch.randn(R, self.C, generator=seed, dtype=f64).softmax(1)
            target = self.layout(self._shaped(target.index_fill(1, torch.arange(1, self.C, 3), 0), self.probs, device))
        weight = None if self.weight is None else self.weight(self.C).to(device, self.dtype)
        return Call(self.layout(self._shaped(x, self.dtype, device)), target, weight, Options(**self.options))

    def _shaped(self, rows: Tensor, dtype: torch.dtype, device: str) -> Tensor:  # (R, C) -> (N, C, d1..dk)
        return rows.to(device, dtype).view(self.N, *self.pixels, self.C).movedim(-1, 1).contiguous()


def put(*rows: list[float]) -> Callable[[Tensor, Tensor], Tensor]:
    """Logits that begin with these values in the first rows."""

    def logits(x: Tensor, y: Tensor) -> Tensor:
        for i, row in enumerate(rows):
            x[i, : len(row)] = torch.tensor(row, dtype=x.dtype)
        return x

    return logits


def set_at(index: Any, value: float) -> Callable[[Tensor, Tensor], Tensor]:
    def logits(x: Tensor, y: Tensor) -> Tensor:
        x[index] = value
        return x

    return logits


def ignore(*rows: int, value: int = -100) -> Callable[[Tensor], Tensor]:
    return lambda y: y.index_fill(0, torch.tensor(rows, device=y.device), value)


def always(*classes: int) -> Callable[[Tensor], Tensor]:
    return lambda y: y.new_tensor(classes)


def confident(margin: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The target stands `margin` above the largest of the rest."""
    return lambda x, y: x.scatter(1, y[:, None], x.amax(1, keepdim=True) + margin)


def ramp(C: int) -> Tensor:
    return torch.linspace(0.25, 2, C)


def padded(x: Tensor) -> Tensor:
    return torch.cat([x, torch.full_like(x[:, :3], nan)], 1)[:, : x.shape[1]]


def misaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def rows_apart(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 0)[::2]


EVERYTHING = {"label_smoothing": 0.1, "logit_scale": 0.7, "softcap": 2.0, "lse_square_scale": 1e-2}
OPTIONS = {
    "smoothing": {"label_smoothing": 0.1},
    "smoothing-1": {"label_smoothing": 1.0},
    "smoothing-nan": {"label_smoothing": nan},
    "smoothing-below-0": {"label_smoothing": -0.5},
    "scale": {"logit_scale": 0.5},
    "scale-below-0": {"logit_scale": -1.5},
    "softcap-2": {"softcap": 2.0},
    "softcap-30": {"softcap": 30.0},
    "z-loss": {"lse_square_scale": 1e-3},
    "num-items": {"num_items": 7.0},
    "z-loss-num-items": {"lse_square_scale": 1e-2, "num_items": 0.5},
    "grad-scale": {"grad_scale": 1024.0},
    "everything": EVERYTHING,
}
LAYOUTS = {
    "padded": padded,
    "misaligned": misaligned,
    "rows-apart": rows_apart,
    "one-row-expanded": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.T.contiguous().T,
    "columns-apart": lambda x: torch.stack([x, x], 2).flatten(1)[:, ::2],
    "one-column-expanded": lambda x: x[:, :1].expand(x.shape),
    "one-value-expanded": lambda x: x[:1, :1].expand(x.shape),
}
PIXEL_LAYOUTS = {
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "pixels-apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "pixels-turned": lambda x: x.mT.contiguous().mT,
    "misaligned": misaligned,
    "images-apart": rows_apart,
    "one-image-expanded": lambda x: x[:1].expand(x.shape),
    "one-pixel-expanded": lambda x: x[..., :1, :1].expand(x.shape),
}
PIXELS = ((1,), (5,), (16,), (17,), (67,), (3, 2), (2, 1, 3), (1, 2, 1, 2, 1))
TARGETS = {
    "misaligned": lambda y: torch.cat([y[:1], y])[1:],
    "apart": lambda y: y.repeat_interleave(2)[::2],
    "expanded": lambda y: y[:1].expand(y.shape),
    "uint8": lambda y: y.to(torch.uint8),
    "uint8-like-minus-100": lambda y: y.to(torch.uint8).fill_(156),
    "first-and-last": lambda y: y.new_tensor([0, 99, 0]),
}
NON_FINITE = {  # C = 3, target 0
    "target-is-minus-inf": put([-inf, 0, 1]),
    "other-is-minus-inf": put([0, -inf, 1]),
    "others-are-minus-inf": put([0, -inf, -inf]),
    "all-minus-inf": put([-inf, -inf, -inf]),
    "plus-inf": put([0, inf, 1]),
    "target-is-plus-inf": put([inf, 0, 1]),
    "nan": put([0, nan, 1]),
    "huge": put([3e38, 3e38, 3e38], [-3e38, -3e38, -3e38], [1e30, 1e30, 0]),
}
SIZES = (1, 2, 3, 10, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 1000, 1023, 1024, 1025, 4096, 4097)


WITHIN = (15, 31, 63, 100, 127, 1023, 4096)  # of SIZES, on no border of Triton's: its tiles are powers of 2


def _cases() -> Iterator[Case]:
    for C in SIZES:
        rows: dict[str, Any] = {"interpreted": None if C in WITHIN else {"N": 2} if C > 512 else {}}
        yield Case(f"C{C}-float32", C=C, **rows)
        # With a softcap a padding lane of -inf would become -s, and be counted.
        everything = {"options": EVERYTHING, "weight": ramp, "target": ignore(1)}
        rows["interpreted"] = rows["interpreted"] if C < 4096 else None
        yield Case(f"C{C}-bfloat16-everything", C=C, dtype=bf16, **everything, **rows)
    for C in (1, 17, 100, 1025):
        for dtype in (f64, bf16, f16):
            yield Case(
                f"C{C}-{str(dtype)[6:]}", C=C, dtype=dtype, interpreted={"N": 2} if C < 100 or dtype == f64 else None
            )
        everything = {"options": EVERYTHING, "weight": ramp, "target": ignore(1)}
        yield Case(f"C{C}-float32-everything", C=C, **everything, interpreted=None if C == 100 else {"N": 2})
    for C, dtype in ((32001, bf16), (50257, f16), (50257, f32), (131073, bf16)):
        interpreted: dict[str, Any] | None = {} if C == 32001 or dtype == f16 else None  # held, walked
        yield Case(f"C{C}-{str(dtype)[6:]}", N=1, C=C, dtype=dtype, interpreted=interpreted)
    for kind in ("indices", "probs", "everything"):  # C++ takes more than 65,536 classes that lie apart in chunks
        more = {"indices": {}, "probs": {"probs": f32}, "everything": everything}[kind]
        yield Case(f"C65537-apart-{kind}", N=3, C=65537, layout=LAYOUTS["transposed"], **more, interpreted=None)
    yield Case("no-rows", N=0)
    yield Case("no-rows-sum", N=0, options={"reduction": "sum"})
    yield Case("many-rows", N=300, C=5, interpreted={"N": 130})  # 128 share a program
    for e in (0.1, 0.5):  # many equal terms: all would be rounded the same way
        for C in (1999, 30000):
            equal = {"logits": lambda x, y: x * 0 + 1, "options": {"label_smoothing": e}}
            interpreted = None if e != 0.1 else {"N": 1, "C": min(C, 17000)}  # above 16384 smoothed rows are walked
            yield Case(f"equal-logits-{C}-{e}", C=C, **equal, interpreted=interpreted)
    for name, options in OPTIONS.items():
        for dtype in (f32, f64, bf16, f16) if name in ("everything", "softcap-2") else (f32, bf16):
            interpreted = None if dtype == bf16 and name not in ("everything", "softcap-2") else {}
            yield Case(f"{name}-{str(dtype)[6:]}", C=100, dtype=dtype, options=options, interpreted=interpreted)
        yield Case(f"{name}-weight-ignore", C=33, options=options, weight=ramp, target=ignore(0))
    for reduction in ("none", "sum", "mean"):
        for dtype in (f32, f64, bf16, f16):
            options = {"reduction": reduction}
            yield Case(f"{reduction}-{str(dtype)[6:]}", N=5, C=65, dtype=dtype, options=options)
        yield Case(f"{reduction}-weight-ignore", N=5, options=options, weight=ramp, target=ignore(0, 3))
        yield Case(f"{reduction}-all-ignored", options=options, target=ignore(0, 1, 2))
        without_num_items = EVERYTHING | {"reduction": reduction, "ignore_index": 2}
        yield Case(f"{reduction}-everything", options=without_num_items, weight=ramp, target=ignore(0, value=2))
    for dtype in (bf16, f16):
        yield Case(f"float32-loss-{str(dtype)[6:]}", C=100, dtype=dtype, options={"dtype": f32})
        yield Case(f"float32-losses-{str(dtype)[6:]}", C=100, dtype=dtype, options={"dtype": f32, "reduction": "none"})
    for name, layout in LAYOUTS.items():
        for dtype in (f32, bf16):
            yield Case(f"layout-{name}-{str(dtype)[6:]}", C=65, dtype=dtype, layout=layout)
        yield Case(f"layout-{name}-wide", C=301, layout=layout, interpreted=None)  # C++ has lanes across rows
    for reduction in ("mean", "none"):
        alone = {"layout": lambda x: x[0], "target": lambda y: y[0]}  # (C) and ()
        yield Case(f"one-row-alone-{reduction}", N=1, C=65, options={"reduction": reduction}, **alone)
    for name, target in TARGETS.items():
        yield Case(f"target-{name}", C=100 if "100" not in name else 300, target=target)
    yield Case("ignored-uint8", C=100, target=lambda y: y.new_tensor([7, 255, 3]).byte(), options={"ignore_index": 255})
    yield Case("ignored-positive", target=always(4, 2, 4), options={"ignore_index": 4})
    yield Case("ignored-above-C", target=always(1, 2, 10**12), options={"ignore_index": 10**12})
    for value in (nan, inf, -inf):
        yield Case(f"ignored-row-of-{value}", logits=set_at(1, value), target=ignore(1))
        yield Case(f"ignored-row-with-{value}", logits=set_at((1, 3), value), target=ignore(1), options=EVERYTHING)
    for name, logits in NON_FINITE.items():
        for reduction in ("none", "sum"):
            options = {"reduction": reduction}
            yield Case(f"{name}-{reduction}", C=3, logits=logits, target=always(0, 1, 2), options=options)
        yield Case(f"{name}-smoothing", C=3, logits=logits, target=always(0, 0, 0), options=OPTIONS["smoothing"])
        for dtype in (f32, bf16):  # in one of several blocks, or vectors
            many = {"C": 2100, "logits": logits, "target": always(0, 1, 2)}
            # test_gpu.py sends rows with one inf or NaN down every path of the kernels.
            interpreted = {"C": 513} if dtype == f32 and name.startswith(("target", "huge")) else None
            yield Case(f"{name}-of-many-{str(dtype)[6:]}", dtype=dtype, **many, interpreted=interpreted)
        # An infinite drop of the target's must not meet its q of 0 among the others.
        smoothed = {"target": always(0, 0, 0), "options": OPTIONS["smoothing"], "interpreted": None}
        yield Case(f"{name}-of-many-smoothing", C=2100, logits=logits, **smoothed)
    first_blocks = set_at((slice(None), slice(4096)), -inf)
    for dtype in (f32, bf16):
        name = f"first-blocks-minus-inf-{str(dtype)[6:]}"
        yield Case(name, C=4097 + 64, dtype=dtype, logits=first_blocks, interpreted={"N": 1})
    # The square of such an lse is inf, which must not meet a z-loss factor of 0.
    yield Case("huge-float64", C=3, dtype=f64, logits=put([3e300] * 3, [-3e300] * 3, [1e200, 1e200, 0]))
    yield Case("weight-zero", weight=lambda C: ramp(C).index_fill(0, torch.tensor([3]), 0), target=always(3, 1, 3))
    for margin in (5, 10, 15, 20, 30, 60):
        for dtype in (f32, bf16, f16):
            interpreted = None if dtype == f16 else {"C": 100}
            values: dict[str, Any] = {"dtype": dtype, "logits": confident(margin), "interpreted": interpreted}
            yield Case(f"margin-{margin}-{str(dtype)[6:]}", C=1000, **values)
    for name, change in {"x10": lambda x, y: x * 10, "plus-1000": lambda x, y: x + 1000}.items():
        for dtype in (f32, bf16, f16):
            yield Case(f"{name}-{str(dtype)[6:]}", C=1000, dtype=dtype, logits=change, interpreted={"C": 100})
    for dtype in (f32, f64, bf16, f16):  # at the cap, where 1 - tanh^2 would round to 0
        name = f"softcap-reached-{str(dtype)[6:]}"
        values = {"dtype": dtype, "logits": lambda x, y: x * 10, "interpreted": {"C": 100}}
        yield Case(name, C=1000, options={"softcap": 3.0}, **values)
    yield Case("plus-1e4", C=1000, logits=lambda x, y: x + 1e4, interpreted={"C": 100})
    yield Case("up-to-1e4", C=1000, dtype=bf16, logits=lambda x, y: x * 3e3, interpreted={"C": 100})
    low = {"logits": lambda x, y: x.scatter(1, y[:, None], -300.0), "interpreted": {"N": 256}}
    yield Case("f16-sum-above-65504", N=300, C=4, dtype=f16, **low)
    yield from _declined()
    yield from _pixels()
    yield from _probabilities()


def _declined() -> Iterator[Case]:
    """What a backend does not take, beside a neighbour that it does."""
    for pixels, by in (((1, 2, 1, 1, 2, 1), ()), ((1, 2, 1, 1, 2, 1, 1), ("cpu",))):
        yield Case(f"pixels-of-{2 + len(pixels)}-dimensions", N=2, C=5, pixels=pixels, declined_by=by)
    kernels = ("cpu", "triton")
    for dtype in (f32, bf16):
        yield Case(f"float64-loss-{str(dtype)[6:]}", dtype=dtype, options={"dtype": f64}, declined_by=kernels)
    yield Case("float64-loss-float64", dtype=f64, options={"dtype": f64})


def _pixels() -> Iterator[Case]:
    for pixels in PIXELS:
        for dtype in (f32, f64, bf16, f16):
            interpreted: dict[str, Any] | None = {} if dtype == f32 or pixels in ((17,), (3, 2)) else None
            name = f"pixels-{pixels}-{str(dtype)[6:]}"
            yield Case(name, N=2, C=17, pixels=pixels, dtype=dtype, interpreted=interpreted)
        shape = {"N": 2, "pixels": pixels, "weight": ramp}
        yield Case(f"pixels-{pixels}-everything", C=5, options=EVERYTHING, target=ignore(1), **shape)
        shape["interpreted"] = {} if pixels in ((1,), (17,), (2, 1, 3)) else None
        yield Case(f"pixels-{pixels}-none", C=130, options=EVERYTHING | {"reduction": "none"}, **shape)
    for name, layout in PIXEL_LAYOUTS.items():
        for C, probs in ((19, None), (1030, None), (19, f32)):
            target = f"{C}-probabilities" if probs else C
            # 16 pixels of more than 512 classes are walked; the strides are the same.
            interpreted = {} if C == 19 else {"C": 513} if name in ("channels-last", "misaligned") else None
            shape = {"N": 2, "C": C, "pixels": (3, 5), "probs": probs, "interpreted": interpreted}
            yield Case(f"pixels-layout-{name}-{target}", layout=layout, **shape)
    for value in (nan, inf, -inf):
        row = {"logits": set_at(1, value), "target": ignore(1)}
        yield Case(f"pixels-ignored-{value}", N=2, pixels=(3,), options={"reduction": "none"}, **row)
    yield Case("no-pixels", pixels=(0,))


def _probabilities() -> Iterator[Case]:
    for C in (1, 2, 17, 64, 100, 1025, 4097):
        yield Case(f"probabilities-C{C}", C=C, probs=f32, interpreted={"N": 1} if C > 512 else {})
    for name, options in OPTIONS.items():
        yield Case(f"probabilities-{name}", C=33, probs=f32, options=options, weight=ramp)
    for dtype in (f32, f64, bf16, f16):
        for probs in (f32, f64, bf16, f16):
            options = {"dtype": torch.promote_types(dtype, probs)}
            name = f"probabilities-{str(dtype)[6:]}-{str(probs)[6:]}"
            yield Case(name, C=33, dtype=dtype, probs=probs, options=options)
    for reduction in ("none", "sum"):
        options = {"reduction": reduction}
        yield Case(f"probabilities-{reduction}", C=33, probs=f32, options=options)
    yield Case("probabilities-pixels", N=2, C=33, pixels=(7, 3), probs=f32, options=EVERYTHING)
    for name, logits in NON_FINITE.items():
        options = {"reduction": "none"}
        yield Case(f"probabilities-{name}", C=3, probs=f32, logits=logits, options=options)
    for margin in (5, 20, 60):
        yield Case(f"probabilities-margin-{margin}", C=33, probs=f32, logits=confident(margin))


CASES = list(_cases())
assert len({case.id for case in CASES}) == len(CASES)
