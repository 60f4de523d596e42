"""The table of calls in which fused_ce must answer as torch does: the same value, or the same error.

Rows follow the arguments one by one. Only what `torch.nn.functional.cross_entropy` takes stands here; the exact
numbers are judged in test_backends.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
inf, nan = torch.inf, torch.nan


def x(*shape: int, dtype: torch.dtype = f64) -> Tensor:
    """Logits of this shape."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=f64)
    return values.to(dtype)


def y(*shape: int, C: int = 5, dtype: torch.dtype = torch.int64) -> Tensor:
    """Class indices of this shape."""
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def p(*shape: int, dtype: torch.dtype = f64) -> Tensor:
    """Probabilities of this shape."""
    return x(*shape).flip(0).exp().softmax(0 if len(shape) == 1 else 1).to(dtype)


def w(C: int = 5, dtype: torch.dtype = f64) -> Tensor:
    return torch.linspace(0.5, 2, C, dtype=f64).to(dtype)


def row(*values: float, dtype: torch.dtype = f32) -> Tensor:
    return torch.tensor([values, [0.0] * len(values)], dtype=dtype)


ZEROS = torch.zeros(2, dtype=torch.int64)
IGNORED = torch.tensor([1, -100, 3])

# name: (input, target, keywords), made anew for every call
CALLS: dict[str, Callable[[], tuple[Any, Any, dict[str, Any]]]] = {}


def add(name: str, call: Callable[[], tuple[Any, Any, dict[str, Any]]]) -> None:
    assert name not in CALLS
    CALLS[name] = call


SHAPES = {
    "(C), ()": lambda: (x(5), y()),
    "(C), (1)": lambda: (x(5), y(1)),
    "(C), (2)": lambda: (x(5), y(2)),
    "(1), (1)": lambda: (x(1), y(1)),
    "(), () float": lambda: (x(), x()),
    "(), ()": lambda: (x(), y()),
    "(N, C), (N)": lambda: (x(3, 5), y(3)),
    "(N, C), (N, C) int": lambda: (x(3, 5), y(3, 5)),
    "(N, C), ()": lambda: (x(3, 5), y()),
    "(N, C), (N + 1)": lambda: (x(3, 5), y(4)),
    "(1, C), (N, C) float": lambda: (x(1, 5), p(3, 5)),
    "(N, C), (N, 1)": lambda: (x(3, 5), y(3, 1)),
    "(N, C), (N, C - 1) float": lambda: (x(3, 5), p(3, 4)),
    "(N, C, d1), (N)": lambda: (x(2, 5, 3), y(2)),
    "(N, C, d1), (N, d1)": lambda: (x(2, 5, 3), y(2, 3)),
    "(N, C, d1), (N, wrong)": lambda: (x(2, 5, 3), y(2, 4)),
    "(N, C, d1, d2), (N, d1)": lambda: (x(2, 5, 3, 4), y(2, 3)),
    "(N, C, d1, d2), (N, d2, d1)": lambda: (x(2, 4, 3, 2), y(2, 2, 3)),
    "(N, C, d1, d2), (N, d1, d2)": lambda: (x(2, 5, 3, 4), y(2, 3, 4)),
    "(N, C, d1, d2, d3)": lambda: (x(2, 5, 3, 2, 2), y(2, 3, 2, 2)),
    "(N, C, d1, .., d5)": lambda: (x(2, 5, 1, 2, 1, 2, 3), y(2, 1, 2, 1, 2, 3)),
    "(C), (C) float": lambda: (x(5), p(5)),
    "(N, C), (N, C) float": lambda: (x(3, 5), p(3, 5)),
    "(N, C, d1, d2), the same float": lambda: (x(2, 5, 3, 4), p(2, 5, 3, 4)),
    "one class": lambda: (x(3, 1), y(3, C=1)),
    "one class, float": lambda: (x(3, 1), p(3, 1)),
    "no rows": lambda: (x(0, 5), y(0)),
    "no rows, float": lambda: (x(0, 5), p(0, 5)),
    "no pixels": lambda: (x(2, 5, 0), y(2, 0)),
    "no classes": lambda: (x(3, 0), torch.zeros(3, dtype=torch.int64)),
    "no classes, all ignored": lambda: (x(3, 0), torch.full((3,), -100)),
    "no classes, no rows": lambda: (x(0, 0), y(0)),
    "no classes, float": lambda: (x(3, 0), x(3, 0)),
}
for _name, _tensors in SHAPES.items():
    for _reduction in ("none", "mean", "sum"):
        for _smoothing in (0.0, 0.2):
            add(
                f"{_name} {_reduction} {_smoothing}",
                lambda t=_tensors, r=_reduction, e=_smoothing: (*t(), {"reduction": r, "label_smoothing": e}),
            )

INPUT_DTYPES = (f64, f32, bf16, f16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
TARGET_DTYPES = (torch.uint8, torch.int32, torch.int16, torch.int8, torch.bool, torch.uint16, f32, f64, torch.cfloat)
for _dtype in INPUT_DTYPES:
    add(f"input {_dtype}", lambda d=_dtype: (x(3, 5, dtype=d), y(3), {}))
    add(f"input {_dtype}, 3-D", lambda d=_dtype: (x(3, 5, 2, dtype=d), y(3, 2), {}))
    add(f"input {_dtype}, weight {_dtype}", lambda d=_dtype: (x(3, 5, dtype=d), y(3), {"weight": w(5, d)}))
    add(f"input {_dtype}, weight f32", lambda d=_dtype: (x(3, 5, dtype=d), y(3), {"weight": w(5, f32)}))
    add(f"input {_dtype}, probabilities f32", lambda d=_dtype: (x(3, 5, dtype=d), p(3, 5, dtype=f32), {}))
for _dtype in TARGET_DTYPES:
    add(f"target {_dtype}", lambda d=_dtype: (x(3, 5), y(3, dtype=d), {}))
    add(f"target {_dtype}, 3-D", lambda d=_dtype: (x(3, 5, 2), y(3, 2, dtype=d), {}))
    add(f"target {_dtype}, smoothing", lambda d=_dtype: (x(3, 5), y(3, dtype=d), {"label_smoothing": 0.1}))
    add(f"target {_dtype}, weight", lambda d=_dtype: (x(3, 5), y(3, dtype=d), {"weight": w()}))
    add(f"target {_dtype}, of the input's shape", lambda d=_dtype: (x(3, 5), y(3, 5, dtype=d), {}))

KEYWORDS = {
    "weight": lambda: {"weight": w()},
    "weight and smoothing": lambda: {"weight": w(), "label_smoothing": 0.3},
    "weight, short": lambda: {"weight": w(4)},
    "weight, 2-D": lambda: {"weight": w()[None]},
    "weight, negative": lambda: {"weight": -w()},
    "weight, nan": lambda: {"weight": w() * nan},
    "weight, zero": lambda: {"weight": w() * 0},
    "weight, strided": lambda: {"weight": w(10)[::2]},
    "weight, needing a gradient": lambda: {"weight": w().requires_grad_()},
    "weight, a list": lambda: {"weight": [1.0] * 5},
    "ignore_index 2": lambda: {"ignore_index": 2},
    "ignore_index 5": lambda: {"ignore_index": 5},
    "ignore_index -1": lambda: {"ignore_index": -1},
    "ignore_index 2 ** 63 - 1": lambda: {"ignore_index": 2**63 - 1},
    "ignore_index 2 ** 63": lambda: {"ignore_index": 2**63},
    "ignore_index 1.0": lambda: {"ignore_index": 1.0},
    "ignore_index None": lambda: {"ignore_index": None},
    "ignore_index True": lambda: {"ignore_index": True},
    "ignore_index tensor": lambda: {"ignore_index": torch.tensor(3)},
    "ignore_index numpy": lambda: {"ignore_index": np.int64(3)},
    "reduction bad": lambda: {"reduction": "bad"},
    "reduction None": lambda: {"reduction": None},
    "reduction elementwise_mean": lambda: {"reduction": "elementwise_mean"},
    "smoothing 1": lambda: {"label_smoothing": 1.0},
    "smoothing 1, int": lambda: {"label_smoothing": 1},
    "smoothing above 1": lambda: {"label_smoothing": 1.1},
    "smoothing inf": lambda: {"label_smoothing": inf},
    "smoothing nan": lambda: {"label_smoothing": nan},
    "smoothing below 0": lambda: {"label_smoothing": -3.0},
    "smoothing a string": lambda: {"label_smoothing": "0.1"},
    "smoothing None": lambda: {"label_smoothing": None},
    "smoothing a tensor": lambda: {"label_smoothing": torch.tensor(0.25)},
    "smoothing numpy": lambda: {"label_smoothing": np.float32(0.25)},
}
for _a in (None, True, False):
    for _b in (None, True, False):
        KEYWORDS[f"size_average {_a}, reduce {_b}"] = lambda a=_a, b=_b: {"size_average": a, "reduce": b}
for _name, _keywords in KEYWORDS.items():
    add(_name, lambda k=_keywords: (x(3, 5), IGNORED, k()))
    add(f"{_name}, 3-D", lambda k=_keywords: (x(3, 5, 1), IGNORED[:, None], k()))
    add(f"{_name}, probabilities", lambda k=_keywords: (x(3, 5), p(3, 5), k()))

for _dtype in (torch.int64, torch.bool, f32, bf16):  # with probabilities torch takes weights of any dtype
    add(f"weight {_dtype}, probabilities", lambda d=_dtype: (x(3, 5), p(3, 5), {"weight": w(5, d)}))
    add(f"weight {_dtype}", lambda d=_dtype: (x(3, 5), y(3), {"weight": w(5, d)}))
for _dtype, _other in ((f32, f64), (bf16, f16), (f16, bf16), (bf16, bf16)):
    add(f"input {_dtype}, probabilities {_other}", lambda d=_dtype, o=_other: (x(3, 5, dtype=d), p(3, 5, dtype=o), {}))
add("weight, 2-D, for pixels", lambda: (x(2, 5, 3, 4), y(2, 3, 4), {"weight": w()[None]}))
add("weight, short, for pixels", lambda: (x(2, 5, 3, 4), y(2, 3, 4), {"weight": w(4)}))
add("weight, nan for a class not met", lambda: (x(3, 5), IGNORED, {"weight": w().index_fill(0, ZEROS, nan)}))
_byte = lambda **keywords: (x(3, 5), y(3, dtype=torch.uint8), {"weight": w()} | keywords)  # noqa: E731
add("target torch.uint8, weight and smoothing", lambda: _byte(label_smoothing=0.1))
add("target torch.uint8, 1-D", lambda: (x(5), y(dtype=torch.uint8), {}))

BAD_TARGETS = {"C": 5, "-1": -1, "huge": 2**40}
for _name, _value in BAD_TARGETS.items():
    for _keywords in ({}, {"label_smoothing": 0.1}, {"weight": w()}, {"reduction": "none"}):
        target = torch.tensor([1, _value, 2])
        add(f"target {_name} {list(_keywords)}", lambda t=target, k=_keywords: (x(3, 5), t, k))
        add(f"target {_name} {list(_keywords)}, 3-D", lambda t=target, k=_keywords: (x(3, 5, 1), t[:, None], k))
add("target uint8 156 is not -100", lambda: (x(2, 200), torch.tensor([156, 3], dtype=torch.uint8), {}))
for _reduction in ("none", "mean", "sum"):
    for _keywords in ({}, {"weight": w()}, {"label_smoothing": 0.1}):
        _all = {"reduction": _reduction} | _keywords
        add(f"all ignored {_reduction} {list(_keywords)}", lambda k=_all: (x(3, 5), torch.full((3,), -100), k))
        add(f"all ignored {_reduction} {list(_keywords)}, 3-D", lambda k=_all: (x(3, 5, 2), IGNORED[1].expand(3, 2), k))
add("all ignored, one row", lambda: (x(5), torch.tensor(-100), {}))
add("target a list", lambda: (x(3, 5), [1, 2, 3], {}))
add("target an int", lambda: (x(5), 3, {}))
add("target numpy", lambda: (x(3, 5), np.array([1, 2, 3]), {}))
add("input a list", lambda: ([[1.0, 2.0]], y(1, C=2), {}))
add("input None", lambda: (None, y(1), {}))

ROWS = {
    "-inf at the target": row(-inf, 0, 1),
    "-inf at another": row(0, -inf, 1),
    "-inf at all others": row(0, -inf, -inf),
    "all -inf": row(-inf, -inf, -inf),
    "inf": row(0, inf, 1),
    "inf at the target": row(inf, 0, 1),
    "nan": row(0, nan, 1),
    "3.38e38": row(3.38e38, 3.38e38, 3.38e38),
    "1e30": row(1e30, 1e30, 0),
    "-3.38e38": row(-3.38e38, -3.38e38, -3.38e38),
    "from 3.4e38 to -3.4e38": row(-3.4e38, 0, 3.4e38),
}
for _name, _row in ROWS.items():
    for _reduction in ("none", "sum", "mean"):
        add(f"{_name} {_reduction}", lambda r=_row, k=_reduction: (r.clone(), ZEROS, {"reduction": k}))
    add(f"{_name} smoothing", lambda r=_row: (r.clone(), ZEROS, {"reduction": "none", "label_smoothing": 0.1}))
    add(f"{_name} bfloat16", lambda r=_row: (r.bfloat16(), ZEROS, {"reduction": "none"}))
    add(f"{_name} 3-D", lambda r=_row: (r[..., None].clone(), ZEROS[:, None], {"reduction": "none"}))

LAYOUTS = {
    "transposed": lambda: x(5, 3).T,
    "every second row": lambda: x(6, 5)[::2],
    "every second class": lambda: x(3, 10)[:, ::2],
    "padded rows": lambda: x(3, 8)[:, :5],
    "an offset": lambda: x(16)[1:].view(3, 5),
    "one row expanded": lambda: x(1, 5).expand(3, 5),
    "one column expanded": lambda: x(3, 1).expand(3, 5),
    "one value expanded": lambda: x(1, 1).expand(3, 5),
    "negative": lambda: torch._neg_view(x(3, 5)),
}
for _name, _input in LAYOUTS.items():
    add(f"layout {_name}", lambda i=_input: (i(), y(3), {}))
add("layout channels last", lambda: (x(2, 5, 3, 4).to(memory_format=torch.channels_last), y(2, 3, 4), {}))
add("layout channels first", lambda: (x(2, 3, 4, 5).movedim(-1, 1), y(2, 3, 4), {}))
add("layout target expanded", lambda: (x(3, 5), y(1).expand(3), {}))
add("layout target strided", lambda: (x(3, 5), y(6)[::2], {}))
add("layout target negative step", lambda: (x(3, 5), y(3).flip(0), {}))
add("sparse input", lambda: (x(3, 5).to_sparse(), y(3), {}))
add("sparse probabilities", lambda: (x(3, 5), p(3, 5).to_sparse(), {}))
add("meta", lambda: (x(3, 5).to("meta"), y(3).to("meta"), {}))
add("meta 3-D", lambda: (x(3, 5, 2).to("meta"), y(3, 2).to("meta"), {"reduction": "none"}))
add("meta weight, short", lambda: (x(3, 5).to("meta"), y(3).to("meta"), {"weight": w(4).to("meta")}))
add("meta target only", lambda: (x(3, 5), y(3).to("meta"), {}))
