"""docs/contract.md: every test it names exists, and what it says falls back does."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from calls import p, w, x, y
from torch.fx.experimental.proxy_tensor import make_fx

from fused_ce import cross_entropy, gate, operators
from fused_ce.backends import cpu
from fused_ce.backends.dispatch import BACKENDS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "contract.md"
NAMED = re.findall(r"(tests/\w+\.py)::(\w+)", PAGE.read_text())


def test_every_promise_names_its_tests() -> None:
    promises = re.split(r"\*\*P\d\. ", PAGE.read_text().split("\n## ")[0])[1:]
    assert len(promises) == 8
    assert all("tests/" in promise for promise in promises[:-1])


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_the_tests_it_names_exist(file: str) -> None:
    nodes = ast.walk(ast.parse((ROOT / file).read_text()))
    tests = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    assert {test for of, test in NAMED if of == file} <= tests


# name: does the call itself with the function, and with keywords that only fused_ce has
FALLS_BACK: dict[str, Callable[..., Any]] = {
    "torch.func": lambda f, **k: torch.func.grad(lambda i: f(i, y(3), **k))(x(3, 5)),
    "vmap": lambda f, **k: torch.vmap(lambda i, t: f(i, t, **k))(x(2, 3, 5), y(2, 3)),
    "forward AD": lambda f, **k: torch.func.jvp(lambda i: f(i, y(3), **k), (x(3, 5),), (x(3, 5),))[1],
    "meta": lambda f, **k: f(x(3, 5).to("meta"), y(3).to("meta"), **k).shape,
    "make_fx": lambda f, **k: make_fx(lambda i, t: f(i, t, **k))(x(3, 5), y(3))(x(3, 5), y(3)),
    "torch.jit.trace": lambda f, **k: trace(lambda i, t: f(i, t, **k), (x(3, 5), y(3)))(x(3, 5), y(3)),
    "negative bit": lambda f, **k: f(torch._neg_view(x(3, 5)), y(3), **k),
    "weight that requires grad": lambda f, **k: f(x(3, 5), p(3, 5), w().requires_grad_(), **k),
    "weight of another dtype": lambda f, **k: f(x(3, 5), p(3, 5), w(5, torch.float32), **k),
    "uint8, weight and smoothing": lambda f, **k: error(f, x(3, 5), y(3).byte(), w(), label_smoothing=0.1, **k),
    "ignore_index as a tensor": lambda f, **k: f(x(3, 5), y(3), ignore_index=torch.tensor(1), **k),
    "label_smoothing of NumPy": lambda f, **k: f(x(3, 5), y(3), label_smoothing=np.float32(0.25), **k),
    "no classes": lambda f, **k: error(f, x(3, 0), y(3), **k),
}


def trace(function: Callable[..., Any], example: tuple[Any, ...]) -> Any:
    return torch.jit.trace(function, example, check_trace=False)  # which calls it again, untraced


def error(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    with pytest.raises((RuntimeError, IndexError)) as caught:
        function(*arguments, **keywords)
    return str(caught.value).split("\n")[0]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Who ran: a backend's name, or "torch" or "composite"."""
    names: list[str] = []

    def record(owner: Any, function: str, name: str) -> None:
        original = getattr(owner, function)
        monkeypatch.setattr(owner, function, lambda *a, **k: names.append(name) or original(*a, **k))

    for name, module in BACKENDS.items():
        record(module, "forward", name)
    record(gate, "_torch_cross_entropy", "torch")
    record(operators, "composite", "composite")
    return names


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", FALLS_BACK)
def test_falls_back(name: str, ran: list[str]) -> None:
    expected = FALLS_BACK[name](F.cross_entropy)
    ran.clear()
    result = FALLS_BACK[name](cross_entropy)
    assert set(ran) == {"torch"}
    if isinstance(expected, torch.Tensor):
        assert torch.equal(result, expected)
    else:
        assert result == expected
    ran.clear()
    FALLS_BACK[name](cross_entropy, softcap=3.0)
    assert set(ran) <= {"torch", "composite"}


@pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built")
def test_falls_back_for_other_dtypes(ran: list[str]) -> None:
    half = x(3, 5, dtype=torch.bfloat16)
    for keywords, who in (
        ({}, "cpu"),
        ({"dtype": torch.float32}, "cpu"),
        ({"dtype": torch.float64}, "torch"),
        ({"dtype": torch.float64, "return_stats": True}, "composite"),
    ):
        ran.clear()
        cross_entropy(half, y(3), **keywords)
        assert ran[-1] == who
    ran.clear()
    cross_entropy(x(3, 5, dtype=torch.float32), y(3), dtype=torch.float16)
    assert ran == ["torch"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("keywords", [{"softcap": 3.0}, {"logit_scale": 2.0, "reduction": "none"}, {}], ids=str)
def test_what_was_traced_takes_other_batches(keywords: dict[str, Any]) -> None:
    def loss(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return cross_entropy(input, target, **keywords)

    traced = (
        torch.jit.trace(loss, (x(6, 5), y(6)), check_trace=False),
        make_fx(loss, tracing_mode="symbolic")(x(6, 5), y(6)),
    )
    for N in (6, 9, 2):
        for graph in traced:
            torch.testing.assert_close(graph(x(N, 5), y(N)), loss(x(N, 5), y(N)))
