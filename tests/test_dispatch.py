"""Which backend takes a call, and what is said when none does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from calls import p, w, x, y

from fused_ce import cross_entropy
from fused_ce.backends import cpu, dispatch
from fused_ce.backends.dispatch import BACKENDS, choose
from fused_ce.contract import Call
from fused_ce.options import Options

needs_kernels = pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def call(dtype: torch.dtype = torch.float32) -> Call:
    return Call(x(3, 5, dtype=dtype), y(3), None, Options())


def test_names_in_order() -> None:
    assert list(BACKENDS) == ["cpu", "triton", "reference"]
    for module in BACKENDS.values():
        assert all(
            callable(getattr(module, name)) for name in ("unsupported", "saved_shape", "forward", "backward", "rescale")
        )


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_cpu_tensors_go_to_the_cpu_kernels(dtype: torch.dtype) -> None:
    assert choose(call(dtype), None) is BACKENDS["cpu"]


def test_the_first_that_takes_the_call_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*reasons: str) -> SimpleNamespace:
        return SimpleNamespace(unsupported=lambda *arguments: list(reasons))

    takes, declines = backend(), backend("no")
    for table in (
        {"a": takes, "b": declines},
        {"b": declines, "a": takes},
        {"a": takes, "c": backend()},
        {"b": declines, "a": takes, "reference": dispatch.reference},
    ):
        monkeypatch.setattr(dispatch, "BACKENDS", table)
        assert choose(call(), None) is takes
    for table in ({"b": declines}, {}, {"b": declines, "reference": dispatch.reference, "a": takes}):
        monkeypatch.setattr(dispatch, "BACKENDS", table)
        assert choose(call(), None) is None


def test_reference_only_when_asked_for() -> None:
    wide = call(torch.float32)[0].to(torch.complex64)
    assert choose(Call(wide, y(3), None, Options()), None) is None
    assert choose(call(), "reference") is BACKENDS["reference"]


def test_the_variable_forces_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "FORCED", "reference")
    assert choose(call(), None) is BACKENDS["reference"]
    if cpu._C is not None:
        assert choose(call(), "cpu") is BACKENDS["cpu"]  # the argument is heard first
    monkeypatch.setattr(dispatch, "FORCED", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        cross_entropy(*call()[:2])


@needs_kernels
@pytest.mark.parametrize("how", ["argument", "variable"])
def test_the_backend_asked_for_runs(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    ran = []
    for name, module in BACKENDS.items():
        original = module.forward
        monkeypatch.setattr(module, "forward", lambda *a, n=name, f=original: ran.append(n) or f(*a))
    for name in ("reference", "cpu"):
        keywords = {"backend": name} if how == "argument" else {}
        if how == "variable":
            monkeypatch.setattr(dispatch, "FORCED", name)
        input = x(3, 5).requires_grad_()
        cross_entropy(input, y(3), **keywords).backward()
        assert ran == [name]
        (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(input, y(3)), input)
        torch.testing.assert_close(input.grad, expected)
        ran.clear()


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of cpu, triton, reference or None .* got 'cuda'"):
        cross_entropy(x(3, 5), y(3), backend="cuda")


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_that_declines_says_why(name: str) -> None:
    integers = x(3, 5).long()
    declined = Call(integers, y(3), None, Options())
    reasons = BACKENDS[name].unsupported(declined)
    assert reasons
    assert all(isinstance(reason, str) for reason in reasons)
    assert any("int64" in reason for reason in reasons)
    with pytest.raises(NotImplementedError) as error:
        choose(declined, name)
    message = str(error.value)
    assert message.startswith(f"backend {name!r} cannot take input (3, 5) torch.int64 on cpu with target (3,)")
    assert all(reason in message for reason in reasons)
    assert message.endswith("Drop backend= to let fused_ce choose.")


DECLINED = {
    "no class dimension": lambda: (x(), y(), None, Options()),
    "no classes": lambda: (x(3, 0), y(3), None, Options()),
    "integers": lambda: (x(3, 5).int(), y(3), None, Options()),
    "float8": lambda: (x(3, 5).to(torch.float8_e4m3fn), y(3), None, Options()),
    "meta": lambda: (x(3, 5).to("meta"), y(3).to("meta"), None, Options()),
    "target elsewhere": lambda: (x(3, 5), y(3).to("meta"), None, Options()),
    "weight elsewhere": lambda: (x(3, 5), y(3), w().to("meta"), Options()),
    "loss in float16": lambda: (x(3, 5), y(3), None, Options(dtype=torch.float16)),
    "int32 target": lambda: (x(3, 5), y(3).int(), None, Options()),
}


@pytest.mark.parametrize("name", ["cpu", "triton"])
@pytest.mark.parametrize("declined", DECLINED)
def test_kernels_decline_what_they_cannot_do(name: str, declined: str) -> None:
    assert BACKENDS[name].unsupported(Call(*DECLINED[declined]()))


REFUSED = {  # by torch, before any kernel could read past the end
    "short target": lambda: ((x(3, 5), y(2)), ValueError),
    "short target, pixels": lambda: ((x(2, 5, 3), y(2, 2)), RuntimeError),
    "short weight": lambda: ((x(3, 5), y(3), w(4)), RuntimeError),
    "short probabilities": lambda: ((x(3, 5), p(2, 5)), ValueError),
    "narrow probabilities": lambda: ((x(3, 5), p(3, 4)), RuntimeError),
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("refused", REFUSED)
def test_forcing_a_backend_does_not_skip_the_checks(name: str, refused: str) -> None:
    arguments, error = REFUSED[refused]()
    with pytest.raises(error):
        cross_entropy(*arguments, backend=name)
