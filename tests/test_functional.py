"""`cross_entropy` in torch's place: the same results, the same errors, and the kernels behind it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import relative_error, same_kind
from calls import CALLS, p, w, x, y
from cases import CASES, OPTIONS, Case
from judge import check, check_grad, expected_grad, expected_loss
from oracle import composed
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from fused_ce import cross_entropy, gate
from fused_ce.backends import cpu
from fused_ce.options import Options

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# torch's own distance from exact, in its 16-bit gradients; the kernels are held to far less in test_backends.py.
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


def outcome(function: Callable[..., Tensor], input: Any, target: Any, keywords: dict[str, Any]) -> list[Any]:
    """What a caller sees of a call and its backward: warnings, results, or the error's class and first line."""
    seen: list[Any] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if isinstance(input, Tensor) and input.dtype in FLOATS and input.is_leaf:
                input.requires_grad_()
            loss = function(input, target, **keywords)
        seen += [(w.category, str(w.message)) for w in caught]
        seen += [loss.shape, loss.dtype, loss.device, loss.requires_grad, loss.detach()]
        if loss.requires_grad:
            (grad,) = torch.autograd.grad(loss.sum(), input)
            seen += [grad.shape, grad.dtype, grad.is_contiguous(), grad]
    except Exception as error:  # any class: it is compared
        seen += [type(error), str(error).split("\n")[0]]
    return seen


@pytest.mark.parametrize("call", CALLS)
def test_answers_as_torch(call: str) -> None:
    make = CALLS[call]
    ours, theirs = outcome(cross_entropy, *make()), outcome(F.cross_entropy, *make())
    close = max(CLOSE.get(getattr(argument, "dtype", None), 0) for argument in make()[:2])
    for mine, its in zip(ours, theirs, strict=True):
        if not isinstance(its, Tensor):
            assert mine == its
        elif its.device.type != "meta" and its.dtype in FLOATS:
            assert same_kind(mine, its.double())
            # Elements of a gradient are differences of probabilities.
            assert relative_error(mine, its.double(), its.double().abs().clamp(min=0.01)) <= close


def test_weights_that_add_up_to_zero() -> None:
    # Divided by 0: torch's gradient is inf, -inf and NaN, ours NaN.
    input, weight = x(2, 2).requires_grad_(), torch.tensor([1.0, -1.0], dtype=torch.float64)
    loss = cross_entropy(input, torch.tensor([0, 1]), weight)
    loss.backward()
    assert loss == F.cross_entropy(input, torch.tensor([0, 1]), weight)
    assert not loss.isfinite()
    assert not input.grad.isfinite().any()


def test_signature_begins_as_torch() -> None:
    theirs = list(inspect.signature(F.cross_entropy).parameters.values())
    ours = list(inspect.signature(cross_entropy).parameters.values())
    for mine, its in zip(ours, theirs, strict=False):
        assert (mine.name, mine.kind, mine.default) == (its.name, its.kind, its.default)
    assert all(more.kind is inspect.Parameter.KEYWORD_ONLY for more in ours[len(theirs) :])


def test_positional_arguments() -> None:
    arguments = x(3, 5), y(3), w(), None, -100, None, "sum", 0.1
    torch.testing.assert_close(cross_entropy(*arguments), F.cross_entropy(*arguments))


@pytest.fixture
def without_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's cross entropy raises: what runs then is ours."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("torch.nn.functional.cross_entropy was called")

    monkeypatch.setattr(gate, "_torch_cross_entropy", refuse)


@pytest.mark.usefixtures("without_torchs")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_runs_our_kernels(isa: str, dtype: torch.dtype, reduction: str) -> None:
    call = x(7, 33, dtype=dtype).requires_grad_(), y(7), None, Options(reduction=reduction)
    with torch.profiler.profile() as profile:
        loss = cross_entropy(*call[:2], reduction=reduction)
        loss.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "CrossEntropy" in names
    assert not {name for name in names if "softmax" in name or "nll_loss" in name}
    check(loss, expected_loss(call))
    check_grad(call[0].grad, call, expected_grad(torch.ones_like(loss), call))
    with torch.no_grad():
        assert torch.equal(cross_entropy(*call[:2], reduction=reduction), loss)


TORCHS = {"softmax", "nll_loss", "logsumexp", "cross_entropy"}  # parts of the names of its operators


def groups(cases: list[Case]) -> dict[str, list[Case]]:
    """By the first word of their names: starting the profiler takes longer than a case."""
    result: dict[str, list[Case]] = {}
    for case in cases:
        result.setdefault(re.split(r"[-\d]", case.id)[0], []).append(case)
    return result


TAKEN = [case for case in CASES if "cpu" not in case.declined_by]


@pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built")
@pytest.mark.parametrize("group", groups(TAKEN))
def test_no_operator_of_torchs_runs(group: str) -> None:
    # Every row of the table is the kernels' work, loss and gradient.
    for keywords in ({}, {"return_stats": True}):
        calls = [case.build() for case in groups(TAKEN)[group]]
        with torch.profiler.profile() as profile:
            for input, target, weight, options in calls:
                input.requires_grad_()
                result = cross_entropy(input, target, weight, **options.keywords() | keywords)
                (result.loss if keywords else result).sum().backward()
        names = {event.key for event in profile.key_averages() if event.key.startswith("aten::")}
        assert names
        assert not {name for name in names for part in TORCHS if part in name}


@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 3), (2, 5, 3, 2)], ids=str)
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_keywords_beyond_torchs(options: str, shape: tuple[int, ...], probabilities: bool) -> None:
    options = OPTIONS[options]
    target = p(*shape) if probabilities else y(*(shape[:1] + shape[2:] if len(shape) > 1 else ()))
    ours, theirs = x(*shape).requires_grad_(), x(*shape).requires_grad_()
    loss = cross_entropy(ours, target, w(), **options)
    expected = composed(theirs, target, w(), Options(**options))
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_num_items_may_be_a_tensor() -> None:
    by_number = cross_entropy(x(3, 5), y(3), num_items=7)
    by_tensor = cross_entropy(x(3, 5), y(3), num_items=torch.tensor(7))
    assert by_number == by_tensor == cross_entropy(x(3, 5), y(3), reduction="sum") / 7


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("to", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("keywords", [{}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"softcap": 2.0}], ids=str)
def test_dtype(dtype: torch.dtype, to: torch.dtype, keywords: dict[str, Any]) -> None:
    input = x(4, 33, dtype=dtype).requires_grad_()
    loss = cross_entropy(input, y(4), dtype=to, **keywords)
    loss.sum().backward()
    call = input.detach().to(to), y(4), None, Options(**keywords)
    assert loss.dtype == to
    assert input.grad.dtype == dtype
    assert relative_error(loss.detach(), expected_loss(call).exact) < 1e-6
    exact = expected_grad(torch.ones_like(loss.detach()), call)
    assert relative_error(input.grad, exact.exact, exact.terms) < 1e-5


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_autocast(dtype: torch.dtype, cast: torch.dtype) -> None:
    weight = w(5, torch.promote_types(dtype, torch.float32))
    for keywords in ({}, {"reduction": "none"}, {"weight": weight}, {"label_smoothing": 0.1}, {"softcap": 2.0}):
        input = x(4, 5, dtype=dtype).requires_grad_()
        with torch.autocast("cpu", cast):
            loss = cross_entropy(input, y(4), **keywords)
        loss.sum().backward()
        options = {name: value for name, value in keywords.items() if name != "weight"}
        call = input.detach(), y(4), keywords.get("weight"), Options(**options)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert input.grad.dtype == dtype
        assert relative_error(loss.detach(), expected_loss(call).exact) < 1e-6
        exact = expected_grad(torch.ones_like(loss.detach()), call)
        assert relative_error(input.grad, exact.exact, exact.terms) < 1e-5


class Logits(Tensor):
    pass


def test_subclass_in_subclass_out() -> None:
    input = x(3, 5).as_subclass(Logits).requires_grad_()
    loss = cross_entropy(input, y(3))
    assert type(loss) is type(F.cross_entropy(input, y(3))) is Logits
    assert loss == F.cross_entropy(x(3, 5), y(3))


def test_torch_function_mode_sees_the_call() -> None:
    class Record(TorchFunctionMode):
        seen: list[Any] = []  # noqa: RUF012

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(function)
            return function(*args, **(kwargs or {}))

    with Record():
        loss = cross_entropy(x(3, 5), y(3))
    assert F.cross_entropy in Record.seen
    assert loss == F.cross_entropy(x(3, 5), y(3))


def test_fake_tensors() -> None:
    with FakeTensorMode() as mode:
        input = mode.from_tensor(x(3, 5, dtype=torch.float32)).requires_grad_()
        loss = cross_entropy(input, mode.from_tensor(y(3)), reduction="none")
        loss.sum().backward()
    assert (loss.shape, loss.dtype) == ((3,), torch.float32)
    assert (input.grad.shape, input.grad.dtype) == ((3, 5), torch.float32)


def test_no_gradient_wanted() -> None:
    expected = F.cross_entropy(x(3, 5), y(3))
    input = x(3, 5).requires_grad_()
    with torch.no_grad():
        loss = cross_entropy(input, y(3))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)
    with torch.inference_mode():
        loss = cross_entropy(input, y(3))
        assert loss.is_inference()
        torch.testing.assert_close(loss, expected)
    assert input.grad is None


def test_probabilities_may_need_a_gradient() -> None:
    ours, theirs = p(3, 5).requires_grad_(), p(3, 5).requires_grad_()
    cross_entropy(x(3, 5), ours, w(), label_smoothing=0.1).backward()
    F.cross_entropy(x(3, 5), theirs, w(), label_smoothing=0.1).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_logits_inside_a_network(dtype: torch.dtype) -> None:
    # The logits feed another operator that saved them: they must come out as they went in.
    leaf, other = x(4, 5, dtype=dtype).requires_grad_(), x(4, 5, dtype=dtype).requires_grad_()
    for input, function in ((leaf, cross_entropy), (other, F.cross_entropy)):
        logits = input * 2
        (function(logits, y(4)) + logits.softmax(1)[:, 0].sum() + logits.tanh().sum()).backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_logits_changed_after_forward(dtype: torch.dtype, reduction: str) -> None:
    leaf = x(4, 33, dtype=dtype).requires_grad_()
    logits = leaf * 1
    call = logits.detach().clone(), y(4), None, Options(reduction=reduction)
    loss = cross_entropy(logits, y(4), reduction=reduction)
    logits.zero_()
    loss.backward()
    check_grad(leaf.grad, call, expected_grad(torch.ones_like(loss), call))


def test_logits_changed_after_forward_where_they_are_needed() -> None:
    logits = x(4, 5).requires_grad_() * 1
    loss = cross_entropy(logits, y(4), reduction="none")
    logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_target_changed_after_forward() -> None:
    target = y(4)
    loss = cross_entropy(x(4, 5).requires_grad_(), target)
    target.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_get_zero_gradient(reduction: str, value: float) -> None:
    input = x(3, 5)
    input[1] = value
    input.requires_grad_()
    cross_entropy(input, torch.tensor([0, -100, 2]), reduction=reduction).sum().backward()
    assert torch.equal(input.grad[1], torch.zeros(5, dtype=torch.float64))
    assert input.grad.isfinite().all()


def test_float16_mean_does_not_overflow() -> None:
    input = torch.zeros(70_000, 2, dtype=torch.float16)
    loss = cross_entropy(input.requires_grad_(), torch.zeros(70_000, dtype=torch.int64))
    loss.backward()
    assert loss == torch.tensor(2.0).log().half()
    assert torch.equal(input.grad, torch.tensor([[-0.5, 0.5]]).div(70_000).half().expand(70_000, 2))


def test_a_forked_child_does_not_hang() -> None:
    code = """
import os, signal, torch
from fused_ce import cross_entropy
torch.set_num_threads(4)
x, y = torch.randn(512, 1000, requires_grad=True), torch.zeros(512, dtype=torch.int64)
many, labels = torch.randn(100_000, 3).bfloat16().requires_grad_(), torch.zeros(100_000, dtype=torch.int64)
cross_entropy(x, y).backward()
ones = torch.ones(100_000).bfloat16()
child = os.fork()
if child == 0:
    signal.alarm(60)
    before, x.grad = x.grad, None
    cross_entropy(x, y).backward()
    same = (before.numpy() == x.grad.numpy()).all()
    x.grad = None
    cross_entropy(x, y).backward(torch.tensor(2.0))  # twice what forward made
    cross_entropy(many, labels, reduction="none").backward(ones)
    os._exit(0 if same and (2 * before.numpy() == x.grad.numpy()).all() else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0
