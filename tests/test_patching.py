"""`patch`: what it reaches, and the way back; tests/test_patched_calls.py has what calls give under it."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ce
from fused_ce import functional, patching
from fused_ce.linear import functional as linear

TORCHS = F.cross_entropy
HAS_LINEAR = hasattr(F, "linear_cross_entropy")


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    assert F.cross_entropy is TORCHS, "a test left it patched"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which functions of the package's own were called."""
    calls: list[str] = []
    for module, name in ((functional, "cross_entropy"), (linear, "linear_cross_entropy")):
        theirs = getattr(module, name)

        def counted(*args: Any, theirs: Any = theirs, name: str = name, **keywords: Any) -> Any:
            calls.append(name)
            return theirs(*args, **keywords)

        monkeypatch.setattr(module, name, counted)
    return calls


def logits(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()


X, Y = logits(6, 10), torch.arange(6)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y)


def test_calls_and_modules_made_before_are_ours(seen: list[str]) -> None:
    layer = Layer()
    layer(X, Y)
    assert seen == []
    with fused_ce.patched():
        layer(X, Y)
        F.cross_entropy(X, Y)
    assert seen == ["cross_entropy"] * 2
    layer(X, Y)
    assert len(seen) == 2


@pytest.mark.skipif(not HAS_LINEAR, reason="this torch has no linear_cross_entropy")
def test_linear_cross_entropy_is_ours(seen: list[str]) -> None:
    W = logits(7, 10)
    stock = F.linear_cross_entropy(X, W, Y, label_smoothing=0.1)
    module = nn.LinearCrossEntropyLoss(10, 7)
    with fused_ce.patched():
        torch.testing.assert_close(F.linear_cross_entropy(X, W, Y, label_smoothing=0.1), stock, rtol=1e-6, atol=0)
        module(X, Y)
        with torch.device("cpu"):
            F.linear_cross_entropy(X, W, Y)
    assert seen == ["linear_cross_entropy"] * 3
    assert F.linear_cross_entropy(X, W, Y, label_smoothing=0.1) == stock
    assert len(seen) == 3


def test_signatures_are_torchs() -> None:
    for name, theirs in patching._TORCHS.items():
        ours = {n: (p.kind, p.default) for n, p in inspect.signature(patching._OURS[name]).parameters.items()}
        assert ours == {n: (p.kind, p.default) for n, p in inspect.signature(theirs).parameters.items()}


class Override(Tensor):
    """Answers by a table of torch's functions, as libraries make it at import."""

    TABLE = types.MappingProxyType({theirs: f"theirs: {name}" for name, theirs in patching._TORCHS.items()})

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in cls.TABLE:
            return cls.TABLE[function]
        return super().__torch_function__(function, types, args, kwargs or {})


class Watch(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        functions.append(function)
        return function(*args, **(kwargs or {}))


functions: list[Any] = []


def test_overrides_see_torchs_own_function() -> None:
    x = X.as_subclass(Override)
    with fused_ce.patched():
        assert F.cross_entropy(x, Y) == nn.CrossEntropyLoss()(x, Y) == "theirs: cross_entropy"
        assert fused_ce.cross_entropy(x, Y) == "theirs: cross_entropy"
        if HAS_LINEAR:
            assert F.linear_cross_entropy(x, X, Y) == "theirs: linear_cross_entropy"
        functions.clear()
        with Watch():
            F.cross_entropy(X, Y)
        assert functions.count(TORCHS) == 1
        assert patching.cross_entropy not in functions


def test_compiled_functions_notice_both_switches(seen: list[str]) -> None:
    function = torch.compile(lambda x, y: F.cross_entropy(x, y), backend="aot_eager")
    layer = torch.compile(Layer(), backend="aot_eager")
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    torch._dynamo.reset()
    watched = torch.compile(lambda x, y: F.cross_entropy(x, y), backend=backend)
    for patched in (False, True, False):
        for call in (function, layer, watched):
            if patched:
                with fused_ce.patched():
                    call(X, Y)
            else:
                call(X, Y)
    # The graph of before is found again.
    assert ["fused_ce" in code for code in graphs] == [False, True]


def test_patch_and_unpatch() -> None:
    assert not fused_ce.is_patched()
    fused_ce.unpatch()
    fused_ce.patch()
    fused_ce.patch()
    assert fused_ce.is_patched()
    with fused_ce.patched():
        pass
    assert fused_ce.is_patched()
    fused_ce.unpatch()
    assert not fused_ce.is_patched()
    assert F.cross_entropy is TORCHS


def test_blocks_nest_and_end_after_an_exception() -> None:
    @fused_ce.patched()
    def decorated() -> bool:
        return fused_ce.is_patched()

    with pytest.raises(KeyError), fused_ce.patched(), fused_ce.patched():
        raise KeyError
    assert not fused_ce.is_patched()
    assert decorated()
    assert decorated()
    with fused_ce.patched():
        fused_ce.patch()
        fused_ce.unpatch()
        assert fused_ce.is_patched(), "the block lasts"
    with fused_ce.patched():
        fused_ce.patch()
    assert fused_ce.is_patched(), "patch() lasts"
    fused_ce.unpatch()


def test_threads_that_overlap() -> None:
    """The function is ours wherever any block is open, and torch's once the last is closed."""
    failures = []
    ready = threading.Barrier(4)

    def work(_: int) -> None:
        ready.wait()
        for _ in range(300):
            with fused_ce.patched():
                if not fused_ce.is_patched():
                    failures.append(1)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert failures == []
    assert F.cross_entropy is TORCHS


def test_what_stood_there_before_stands_there_again() -> None:
    def theirs(*args: Any, **keywords: Any) -> Tensor:
        return TORCHS(*args, **keywords)

    F.cross_entropy = theirs
    try:
        with fused_ce.patched():
            assert fused_ce.is_patched()
        assert F.cross_entropy is theirs
    finally:
        F.cross_entropy = TORCHS


def test_unpatching_under_another_patch_is_an_error() -> None:
    fused_ce.patch()
    ours = F.cross_entropy
    F.cross_entropy = lambda *args, **keywords: ours(*args, **keywords)
    with pytest.raises(RuntimeError, match=r"expected torch.nn.functional.cross_entropy as fused_ce.patch\(\) left it"):
        fused_ce.unpatch()
    assert not fused_ce.is_patched()
    F.cross_entropy = ours
    fused_ce.unpatch()

    block = fused_ce.patched()
    block.__enter__()
    F.cross_entropy = TORCHS
    with pytest.raises(RuntimeError, match="Undo that first"):
        block.__exit__(None, None, None)
    F.cross_entropy = ours
    fused_ce.unpatch()


def test_left_out() -> None:
    module = types.ModuleType("of_a_test")
    module.__dict__.update(early=TORCHS, other=len)
    module.__dict__["Holder"] = type("Holder", (), {"loss": staticmethod(TORCHS), "__module__": "of_a_test"})
    sys.modules["of_a_test"] = module
    try:
        found = [name for name in fused_ce.left_out() if name.startswith("of_a_test")]
        assert found == ["of_a_test.Holder.loss", "of_a_test.early"]
        assert f"{__name__}.TORCHS" in fused_ce.left_out()
        assert not [name for name in fused_ce.left_out() if name.startswith(("torch.", "fused_ce."))]
    finally:
        del sys.modules["of_a_test"]


def test_pickles_by_name() -> None:
    """A worker that gets the function gets ours, patched there or not."""
    with fused_ce.patched():
        kept = F.cross_entropy
        data = pickle.dumps(kept)
    assert pickle.loads(data) is kept
    assert pickle.dumps(kept) == data


def test_nothing_is_patched_by_an_import() -> None:
    code = "import torch.nn.functional as F; f = F.cross_entropy; import fused_ce; assert F.cross_entropy is f"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
