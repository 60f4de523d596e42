"""The first look at every Triton kernel: right ones pass once, wrong ones leave the call and the device to torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, EVERYTHING, LAYOUTS, Case, ignore, ramp
from conftest import Backend
from first_looks import counted, make_wrong
from first_looks import looks as looks
from judge import check, check_grad, expected_grad, expected_of

from fused_ce import __main__ as main
from fused_ce import cross_entropy
from fused_ce.backends import dispatch
from fused_ce.backends.triton import kernels, launch, self_check
from fused_ce.contract import Upstream
from fused_ce.options import Options

only_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)


CALLS = [
    Case("plain", N=9, C=40, target=ignore(3, 8)),
    Case("bfloat16", N=9, C=40, dtype=torch.bfloat16, target=ignore(0)),
    Case("everything", N=9, C=40, options=EVERYTHING, weight=ramp, target=ignore(3, 8)),
    Case("float64", N=9, C=40, dtype=torch.float64, options={"reduction": "sum"}),
    Case("pixels", N=3, C=7, pixels=(5, 6), weight=ramp, target=ignore(3, 11)),
    Case("probabilities", N=5, C=40, probs=torch.float32, options={"label_smoothing": 0.1}),
]


@only_triton
@pytest.mark.parametrize("case", CALLS, ids=str)
def test_right_kernels_pass_once(backend: Backend, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    call = case.build(backend.device)
    call = call._replace(options=call.options._replace(return_stats=True))
    launched, numbers = counted(monkeypatch), []
    for _ in range(2):
        launched.clear()
        loss, grad, saved, _ = launch.forward(call, "fused")
        launch.backward(call, None, saved, Upstream(torch.ones_like(loss)), True, bool(case.probs))
        launch.backward(call, grad, saved, Upstream(torch.ones_like(loss) / 3), False, False)
        numbers.append(len(launched))
    assert not self_check.DECLINED
    assert not self_check.UNCOMPARED
    assert {variant.key[0] for variant in self_check.PASSED} >= {"forward", "backward"}
    assert numbers[0] > numbers[1]
    check(loss, expected_of(case)[0])


@only_triton
def test_no_right_kernel_is_declined(backend: Backend) -> None:
    # No rounding, no mask, no infinity of the table of cases is taken for a fault.
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for case in CASES[::31]:
            call = case.build(backend.device)
            if not launch.unsupported(call):
                _, _, saved, _ = result = launch.forward(call, "recompute")
                launch.backward(call, None, saved, Upstream(torch.ones_like(result.loss)), True, bool(case.probs))
    assert not self_check.DECLINED
    assert len(self_check.PASSED) > 4 * len(self_check._tried)


WRONG = [("forward", "loss"), ("forward", "grad"), ("forward", "lse"), ("prepare", ""), ("total", "")]


@only_triton
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("kernel", "what"), WRONG)
def test_a_wrong_forward(
    backend: Backend, kernel: str, what: str, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CALLS[0]
    call = case.build(backend.device)
    call = call._replace(options=call.options._replace(return_stats=True, inplace=inplace))
    exact_loss, exact_grad = expected_of(case)
    make_wrong(monkeypatch, kernel, what)
    with pytest.warns(
        RuntimeWarning, match=r"Please report this: .* instead of .*; variant forward .* torch 2"
    ) as seen:
        loss, grad, saved, _ = launch.forward(call, "fused")
    assert len(seen) == 1
    check(loss, exact_loss)
    check(grad, exact_grad)
    assert (grad is call.input) == inplace
    assert saved.shape == launch.saved_shape(call)
    # From now on the backend is out of it, and so is what is still under way.
    (reason,) = launch.unsupported(call)
    assert "did not agree with torch" in reason
    assert dispatch.choose(call, None) is not launch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = launch.backward(call, grad, saved, Upstream(torch.ones_like(loss)), True, False).input
        check(again, exact_grad)
        check(launch.rescale(grad, call.target, call.options, torch.ones_like(loss), True, False), exact_grad)


@only_triton
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("what", ["grad", "target"])
def test_a_wrong_backward(backend: Backend, what: str, inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if inplace and what == "target":
        pytest.skip("in place, the table has no probabilities")
    case = CALLS[5 if what == "target" else 0]
    call = case.build(backend.device)
    call = call._replace(options=call.options._replace(inplace=inplace))
    loss, _, saved, _ = launch.forward(call, "recompute")
    make_wrong(monkeypatch, "backward", what)
    with pytest.warns(RuntimeWarning, match=r"gradient .* instead of .*; variant backward"):
        grads = launch.backward(call, None, saved, Upstream(torch.ones_like(loss)), False, what == "target")
    check_grad(grads.input, case.build(backend.device), expected_of(case)[1])
    assert (grads.target is not None) == (what == "target")
    assert self_check.DECLINED


@only_triton
@pytest.mark.parametrize("layout", [lambda x: torch.stack([x] * 16, -1)[..., 0], LAYOUTS["padded"]])
def test_in_place_a_few_rows_lie_as_all_do(backend: Backend, layout: Callable[..., torch.Tensor]) -> None:
    call = Case("strided", N=6, C=103, layout=layout, options={"inplace": True}).build(backend.device)
    launch.forward(call, "fused")
    assert not self_check.DECLINED
    assert self_check.PASSED


@only_triton
def test_a_wrong_backward_that_has_nothing_to_do_yet(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CALLS[1]
    call = case.build(backend.device)
    loss, grad, saved, _ = launch.forward(call, "fused")
    launch_all = kernels.launch

    def wrong(kernel: str, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        launch_all(kernel, grid, *args, **meta)
        if kernel == "backward" and float(args[1].loss.ptr) != 1.0:  # where it does not return at once
            args[2].input.ptr.mul_(1.1)

    monkeypatch.setattr(kernels, "launch", wrong)
    with pytest.warns(RuntimeWarning, match="variant backward"):
        result = launch.backward(call, grad, saved, Upstream(torch.ones_like(loss)), False, False).input
    check_grad(result, call, expected_of(case)[1])


@only_triton
@pytest.mark.parametrize("keep", [False, True])
def test_a_wrong_rescale(backend: Backend, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wrong(monkeypatch, "rescale_grad", "")
    grad, upstream = torch.randn(3, 50, device=backend.device), torch.tensor(3.0, device=backend.device)
    before = grad.clone()
    with pytest.warns(RuntimeWarning, match="variant rescale_grad"):
        result = launch.rescale(grad, torch.zeros(1), Options(), upstream, keep, False)
    assert torch.equal(result, before * 3)
    assert torch.equal(launch.rescale(before, torch.zeros(1), Options(), upstream, keep, False), before * 3)


@only_triton
def test_through_autograd(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    # Found wrong in backward, after a forward by the kernels: the gradient is right, and so is the next step.
    make_wrong(monkeypatch, "rescale_grad", "")
    call = CALLS[0].build(backend.device)
    x = call.input.requires_grad_()
    wanted = expected_grad(torch.tensor(1 / 3), call._replace(input=x.detach()))
    monkeypatch.setitem(dispatch.BACKENDS, "triton", launch)
    loss = cross_entropy(x, call.target, backend="triton")
    with pytest.warns(RuntimeWarning, match="torch's operators run on"):
        check(torch.autograd.grad(loss, x, torch.tensor(1 / 3, device=backend.device))[0], wanted)
    with pytest.raises(NotImplementedError, match="did not agree with torch"):
        cross_entropy(x, call.target, backend="triton")


@only_triton
def test_what_cannot_be_compared_is_let_through(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Case("ignored", N=4, C=40, target=ignore(0, 1, 2, 3)).build(backend.device)
    launched = counted(monkeypatch)
    for _ in range(self_check.TRIES):
        launch.forward(call, "loss")
    assert not self_check.PASSED
    assert len(self_check.UNCOMPARED) == 1
    launched.clear()
    launch.forward(call, "loss")
    assert launched.count("forward") == 1


def nobody_looks(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wrong(monkeypatch, "forward", "loss")
    launch.forward(CALLS[0].build(backend.device), "loss")
    assert not self_check.PASSED
    assert not self_check.DECLINED


@only_triton
@pytest.mark.parametrize("setting", ["0", None])
def test_switched_off(backend: Backend, setting: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if setting is None and backend.device != "cpu":
        pytest.skip("on a device the look is the default")
    monkeypatch.setattr(self_check, "SETTING", setting)
    self_check._is_wanted.cache_clear()
    nobody_looks(backend, monkeypatch)


@only_triton
def test_never_in_a_capture(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "is_capturing", lambda device: True)
    nobody_looks(backend, monkeypatch)


@only_triton
def test_the_program_lists_what_was_found(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(main.first_launches()) == []
    launch.forward(CALLS[1].build(backend.device), "fused")
    title, line = main.first_launches()
    assert title.startswith("Triton kernels at their first launch")
    assert line.startswith(f"  agrees: forward {self_check.PASSED[0].device} bfloat16 int64")
    make_wrong(monkeypatch, "forward", "loss")
    with pytest.warns(RuntimeWarning, match="Please report this"):
        launch.forward(CALLS[0].build(backend.device), "loss")
    assert list(main.first_launches())[-1].startswith("  differs: forward")
