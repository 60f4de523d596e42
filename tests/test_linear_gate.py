"""What linear cross entropy takes and refuses: torch's samples, errors and failures, and calls that fall back."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import p, w, x, y
from linear_cases import bf16, distance, f32, f64
from test_linear import BOUNDS
from test_opinfo import double
from torch import Tensor

from fused_ce import LinearCrossEntropyLoss, linear_cross_entropy
from fused_ce.backends import cpu
from fused_ce.linear import products

theirs = getattr(F, "linear_cross_entropy", None)
in_torch = pytest.mark.skipif(theirs is None, reason="torch has no linear_cross_entropy before 2.13")


def answer(function: Any, *arguments: Any, **keywords: Any) -> Any:
    """What a call gives, or how it fails."""
    try:
        return function(*arguments, **keywords)
    except Exception as error:
        return type(error), str(error).split("\n")[0]


W = x(5, 3)
# Arguments and keywords, of which torch says the same.
LIKE_TORCH: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "(N, H)": ((x(4, 3), W, y(4)), {}),
    "(H)": ((x(3), W, y()), {}),
    "(H), (1)": ((x(3), W, y(1)), {}),
    "(H), (V)": ((x(3), W, p(5)), {}),
    "(N, V)": ((x(4, 3), W, p(4, 5)), {}),
    "K-dimensional": ((x(4, 3), x(5, 2, 3), y(4, 2)), {"linear_bias": x(5, 2), "weight": w()}),
    "K-dimensional probabilities": ((x(4, 3), x(5, 2, 3), p(4, 5, 2)), {}),
    "no rows": ((x(0, 3), W, y(0)), {"reduction": "sum"}),
    "no features": ((x(4, 0), x(5, 0), y(4)), {}),
    "ignore_index": ((x(4, 3), W, y(4)), {"ignore_index": 1}),
    "uint8": ((x(4, 3), W, y(4).byte()), {}),
    "everything": ((x(4, 3), W, y(4)), {"weight": w(), "label_smoothing": 0.1, "linear_bias": x(5)}),
    "input of no dimension": ((x(), W, y()), {}),
    "weight of one dimension": ((x(4, 3), x(3), y(4)), {}),
    "other features": ((x(4, 2), W, y(4)), {}),
    "other bias": ((x(4, 3), W, y(4)), {"linear_bias": x(4)}),
    "K-dimensional, one row": ((x(3), x(5, 2, 3), y(2)), {}),
    "ignore_index of probabilities": ((x(4, 3), W, p(4, 5)), {"ignore_index": -100}),
    "other rows": ((x(4, 3), W, y(3)), {}),
    "other probabilities": ((x(4, 3), W, p(4, 4)), {}),
    "out of range": ((x(4, 3), W, torch.tensor([0, 1, 5, 2])), {}),
    "below 0": ((x(4, 3), W, torch.tensor([0, -1, 1, 2])), {}),
    "out of range, weight": ((x(4, 3), W, torch.tensor([0, 1, 9, 2])), {"weight": w()}),
    "int32": ((x(4, 3), W, y(4).int()), {}),
    "integers": ((y(4, 3), y(5, 3), y(4)), {}),
    "two dtypes": ((x(4, 3).float(), W, y(4)), {}),
    "weight of another dtype": ((x(4, 3), W, y(4)), {"weight": w().float()}),
    "weight of another size": ((x(4, 3), W, y(4)), {"weight": w(4)}),
    "smoothing": ((x(4, 3), W, y(4)), {"label_smoothing": 1.5}),
    "reduction": ((x(4, 3), W, y(4)), {"reduction": "bad"}),
    "float ignore_index": ((x(4, 3), W, y(4)), {"ignore_index": 1.5}),
}


@in_torch
@pytest.mark.parametrize("name", LIKE_TORCH)
@pytest.mark.parametrize("chunk_rows", [None, 2], ids=["small", "chunks"])
def test_answers_as_torch(name: str, chunk_rows: int | None) -> None:
    arguments, keywords = LIKE_TORCH[name]
    ours = answer(linear_cross_entropy, *arguments, **keywords, chunk_rows=chunk_rows)
    torchs = answer(theirs, *arguments, **keywords)
    if isinstance(torchs, Tensor):
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=0, equal_nan=True)
    else:
        assert ours == torchs


REFUSED = {
    "leading dimensions": (ValueError, "expected target of shape", {"input": x(2, 2, 3), "target": y(2, 3)}),
    "chunk_rows of 0": (ValueError, "chunk_rows must be a positive integer", {"chunk_rows": 0}),
    "chunk_rows of text": (ValueError, "chunk_rows must be a positive integer", {"chunk_rows": "8"}),
    "options": (TypeError, "options must be a torch.nn.LinearCrossEntropyOptions", {"options": {"rows": 8}}),
    "softcap": (ValueError, "softcap must be a positive", {"softcap": -1.0}),
    "num_items": (ValueError, "num_items replaces the divisor", {"num_items": 3, "reduction": "sum"}),
    "backend": (ValueError, "backend must be one of", {"backend": "nothing"}),
    "backend that cannot": (NotImplementedError, "backend 'triton' cannot take", {"backend": "triton"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    error, message, keywords = REFUSED[name]
    call = {"input": x(4, 3), "linear_weight": W, "target": y(4)} | keywords
    with pytest.raises(error, match=message):
        linear_cross_entropy(**call)  # type: ignore[call-overload]


def test_nothing_is_written_for_a_bad_target() -> None:
    input, target = x(40, 3).requires_grad_(), y(40)
    target[39] = 5
    for weight in (None, w()):
        with pytest.raises(IndexError, match="Target 5 is out of bounds"):
            linear_cross_entropy(input, W, target, weight=weight, chunk_rows=8)
    assert input.grad is None


@in_torch
@pytest.mark.parametrize("dtype", [f32, f64, bf16], ids=str)
def test_samples_of_torchs_operator(dtype: torch.dtype) -> None:
    pytest.importorskip("expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    ops = [op for op in op_db if op.name == "nn.functional.linear_cross_entropy"]
    samples = [sample for op in ops for sample in op.sample_inputs("cpu", dtype, requires_grad=True)]
    assert len(samples) > 50

    def results(function: Any, sample: Any, chunk_rows: int | None, change: Any) -> list[Tensor]:
        tensors = [change(t).detach().clone().requires_grad_() for t in (sample.input, sample.args[0])]
        keywords = {name: change(value) for name, value in sample.kwargs.items() if name != "options"}
        if function is linear_cross_entropy:
            keywords |= {"options": sample.kwargs.get("options"), "chunk_rows": chunk_rows}
        loss = function(*tensors, change(sample.args[1]), **keywords)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), tensors)]

    for sample, chunk_rows in itertools.product(samples, (None, 1)):
        ours, torchs = (results(f, sample, chunk_rows, lambda value: value) for f in (linear_cross_entropy, theirs))
        exact = results(theirs, sample, chunk_rows, double)
        for triple in zip(ours, torchs, exact, strict=True):
            got, like, right = triple
            assert (got.shape, got.dtype) == (like.shape, like.dtype)
            # So few numbers that luck counts.
            assert distance(got, right) <= max(4 * BOUNDS[dtype], 1.5 * distance(like, right))


@in_torch
def test_torchs_options() -> None:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's ignores them, and warns, where there is a smoothing
        found = linear_cross_entropy(x(5, 3), W, y(5), options=options, label_smoothing=0.1)
    torch.testing.assert_close(found, theirs(x(5, 3), W, y(5), label_smoothing=0.1), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("rows", "asked", "found"), [(600, 256, [200] * 3), (9, 8, [5, 4]), (3, 8, [3]), (16, 8, [8, 8])]
)
def test_chunks_are_even(rows: int, asked: int | None, found: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    product = products.logits

    def watched(x: Tensor, *rest: Any) -> Tensor:
        seen.append(len(x))
        return product(x, *rest)

    monkeypatch.setattr(products, "logits", watched)
    linear_cross_entropy(x(rows, 3, dtype=f32), W.float(), y(rows), chunk_rows=asked)
    assert seen == found


def test_ignored_rows_take_part_in_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    product = products.logits
    monkeypatch.setattr(products, "logits", lambda x, *rest: seen.append(len(x)) or product(x, *rest))
    linear_cross_entropy(x(40, 3), W, y(40).masked_fill(torch.arange(40) % 4 > 0, -100), chunk_rows=64)
    assert seen == [10]


def test_float16_is_widened_where_the_processor_has_no_products(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_ce import _torch

    device = torch.device("cpu")
    for dtype in (torch.float16, bf16):
        for has in (True, False):
            monkeypatch.setattr(_torch, "has_products", lambda _, has=has: has)
            assert products.computed_in(dtype, device) == (dtype if has else f32)
            assert products.computed_in(dtype, torch.device("cuda")) == dtype
    assert products.computed_in(f64, device) == f64


def test_which_products_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bool(products.chosen()) != bool(products.why_not())
    for facts, found in (
        ({"vendor_id": "AuthenticAMD", "cpu family": "26"}, 3),
        ({"vendor_id": "AuthenticAMD", "cpu family": "25"}, 1),
        ({"vendor_id": "AuthenticAMD", "cpu family": "23"}, 0),
        ({"vendor_id": "GenuineIntel", "cpu family": "6"}, 0),
        ({}, 0),
    ):
        monkeypatch.setattr(products, "_cpuinfo", lambda key, facts=facts: facts.get(key, ""))
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
        monkeypatch.setattr("fused_ce._torch.why_no_linear", lambda: "")
        products.why_not.cache_clear()
        products.chosen.cache_clear()
        assert len(products.chosen()) == found
        assert bool(products.why_not()) == (found == 0)
    products.why_not.cache_clear()
    products.chosen.cache_clear()


def test_what_falls_back_says_so() -> None:
    with pytest.warns(RuntimeWarning, match="ran torch's own operators"):
        torch.func.grad(lambda i: linear_cross_entropy(i, W, y(4), softcap=5.0))(x(4, 3))


def test_a_fallback_is_told_of_the_line_that_called() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        linear_cross_entropy(*(tensor.to("meta") for tensor in (x(2, 2, 3), W, y(2, 2))), softcap=5.0)
    assert [warning.filename for warning in told] == [__file__]
    assert "fused_ce.linear_cross_entropy ran" in str(told[0].message)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_meta_tensors_have_the_shape_of_a_loss(dtype: torch.dtype, chunk_rows: int | None) -> None:
    input, weight, target = (t.to("meta") for t in (x(4, 3).to(dtype), W.to(dtype), y(4)))
    input.requires_grad_()
    for reduction, shape in (("mean", ()), ("none", (4,))):
        loss = linear_cross_entropy(input, weight, target, reduction=reduction, chunk_rows=chunk_rows)
        assert (loss.shape, loss.dtype, loss.is_meta) == (shape, dtype, True)
        assert torch.autograd.grad(loss.sum(), input)[0].shape == (4, 3)


@in_torch
def test_module() -> None:
    ours = LinearCrossEntropyLoss(3, 5, bias=True, dtype=f64, label_smoothing=0.1)
    torchs = torch.nn.LinearCrossEntropyLoss(3, 5, bias=True, dtype=f64, label_smoothing=0.1)
    torchs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x(4, 3), y(4)), torchs(x(4, 3), y(4)), rtol=1e-12, atol=0)
    deep = LinearCrossEntropyLoss(3, 5, out_features=(2,), dtype=f64, weight=w())
    other = torch.nn.LinearCrossEntropyLoss(3, 5, out_features=(2,), dtype=f64, weight=w())
    other.load_state_dict(deep.state_dict())
    torch.testing.assert_close(deep(x(4, 3), y(4, 2)), other(x(4, 3), y(4, 2)), rtol=1e-12, atol=0)
    for bad in ({"weight": w(4)}, {"label_smoothing": 2.0}):
        refusals = [answer(cls, 3, 5, **bad) for cls in (LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss)]
        assert refusals[0] == refusals[1]
    stats = LinearCrossEntropyLoss(3, 5, dtype=f64, return_stats=True, loss_dtype=f64, softcap=5.0)(x(4, 3), y(4))
    assert stats.lse.shape == (4,)


MEMORY = """
import os, sys, torch, torch.nn.functional as F, fused_ce
torch.set_num_threads(1)
N, H, V = 2048, 64, 32000
def run(n):
    x, W, y = torch.ones(n, H, requires_grad=True), torch.ones(V, H, requires_grad=True), torch.arange(n)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    fused_ce.linear_cross_entropy(x, W, y, chunk_rows=128).backward()
    peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return peak - before
run(8)
fused_ce.empty_cache()
print(run(N) / (N * V * 4))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from /proc")
@pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built")
def test_the_logits_are_never_whole() -> None:
    """A chunk of them (1/16), the weight's gradient (1/32), and the slack of allocators; torch holds more than 2."""
    command = [sys.executable, "-c", MEMORY]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if "clear_refs" in result.stderr:
        pytest.skip("the kernel does not let a process set its peak back")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 1 / 16 + 1 / 32 + 0.08
