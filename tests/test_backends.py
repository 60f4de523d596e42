"""The one contract: every backend against every row of cases.py, judged by the exact float64 result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from accuracy import bits
from cases import CASES, EVERYTHING, Case, ignore, ramp
from conftest import INTERPRET, Backend
from judge import check, check_grad, expected_grad, expected_of
from torch import Tensor

from fused_ce.contract import Call, Upstream


def take(backend: Backend, case: Case) -> Call:
    """The tensors of a case, on the backend's device; the table says which backends decline it, and they must."""
    call = case.build(backend.device)
    reasons = backend.module.unsupported(call)
    assert bool(reasons) == (backend.name in case.declined_by), reasons
    if reasons:
        assert all(isinstance(reason, str) and reason for reason in reasons)
        pytest.skip("; ".join(reasons))
    return call


@contextmanager
def unchanged(*arguments: object) -> Iterator[None]:
    """Holds every bit, and the version, of the tensors among the arguments."""
    tensors = [(t, t._version, bits(t).clone()) for t in arguments if isinstance(t, Tensor)]
    yield
    assert all(t._version == version and torch.equal(bits(t), before) for t, version, before in tensors)


def schedules(call: Call) -> list[str]:
    return ["recompute"] if call.options.reduction == "none" else ["fused", "recompute"]


def upstream_like(call: Call, value: float) -> Tensor:
    """An upstream gradient, of the loss's shape and dtype."""
    input, _, _, options = call
    rows = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
    shape = rows if options.reduction == "none" else ()
    return torch.full(shape, value, dtype=options.dtype or input.dtype, device=input.device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(backend: Backend, case: Case) -> None:
    holds(backend, case if backend.name != "triton" else for_triton(case))


def for_triton(case: Case) -> Case:
    interpreted = case.for_interpreter() if INTERPRET else case
    if interpreted is None:
        pytest.skip("other rows take the same way through the kernels")
    return interpreted


def holds(backend: Backend, case: Case) -> None:
    """Everything the contract says of one call."""
    call = take(backend, case)
    exact_loss, exact_grad = expected_of(case)
    ones = upstream_like(call, 1.0)
    for schedule in ("loss", *schedules(call)):
        with unchanged(*call):
            loss, grad, saved, _ = backend.module.forward(call, schedule)
        assert loss.dtype == ones.dtype
        assert (grad is None) == (schedule != "fused")
        assert schedule != "loss" or saved is None
        if schedule == "recompute":
            assert saved.dtype == torch.float64
            assert tuple(saved.shape) == tuple(backend.module.saved_shape(call))
        check(loss, exact_loss)
        if schedule == "loss":
            continue
        with unchanged(*call, grad, saved):
            kept = backend.module.backward(call, grad, saved, Upstream(ones), True, False).input
        assert grad is None or grad.numel() == 0 or kept.data_ptr() != grad.data_ptr()
        last = backend.module.backward(call, grad, saved, Upstream(ones), False, False).input
        nan = last.isnan()  # which torch's multiplication by 1 may give other bits
        assert torch.equal(kept.isnan(), nan)
        assert torch.equal(bits(kept)[~nan], bits(last)[~nan])
        check_grad(kept, call, exact_grad)


UPSTREAM = {  # made from ones of the loss's shape and dtype
    "-1": lambda ones: -ones,
    "1/3": lambda ones: ones / 3,
    "0": lambda ones: ones * 0,
    "half": lambda ones: ones / 2,
    "32768": lambda ones: ones * 2.0**15,
    "a-row-each": lambda ones: ones.cumsum(0) / 3,
    "every-second": lambda ones: torch.stack([ones / 3, ones], -1)[..., 0],
    "expanded": lambda ones: (ones[:1] / 3).expand(ones.shape),
}
PER_ROW = ("a-row-each", "every-second", "expanded")
UPSTREAM_CASES = [
    Case(f"{reduction}-{str(dtype)[6:]}", C=65, dtype=dtype, options=options, target=ignore(1))
    for reduction in ("mean", "sum", "none")
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for options in ({"reduction": reduction},)
]
UPSTREAM_CASES += [
    Case("everything", C=65, options=EVERYTHING, weight=ramp),
    Case("everything-none", C=65, options=EVERYTHING | {"reduction": "none"}, weight=ramp),
    Case("float16-float32-loss", C=129, dtype=torch.float16, options={"dtype": torch.float32}),
    Case("pixels", N=2, pixels=(2, 2), options={"reduction": "none"}, target=ignore(1)),
    Case("probabilities", probs=torch.float32, options=EVERYTHING, weight=ramp),
]


@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("case", UPSTREAM_CASES, ids=str)
def test_upstream_gradients(backend: Backend, case: Case, upstream: str) -> None:
    call = take(backend, case)
    if upstream in PER_ROW and call.options.reduction != "none":
        return
    given = UPSTREAM[upstream](upstream_like(call, 1.0))
    expected = expected_grad(given, call)
    for schedule in schedules(call):
        _, grad, saved, _ = backend.module.forward(call, schedule)
        with unchanged(*call, given, grad, saved):
            kept = backend.module.backward(call, grad, saved, Upstream(given), True, False).input
        last = backend.module.backward(call, grad, saved, Upstream(given), False, False).input
        assert torch.equal(bits(kept), bits(last))
        check_grad(kept, call, expected)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_finite_upstream_gradients(backend: Backend, dtype: torch.dtype, value: float) -> None:
    # inf * 0 is NaN or 0, as torch has it here and there; a finite number would be a lie.
    call = take(backend, Case("non-finite", N=4, C=129, dtype=dtype))
    given = upstream_like(call, value)
    for schedule in schedules(call):
        _, grad, saved, _ = backend.module.forward(call, schedule)
        result = backend.module.backward(call, grad, saved, Upstream(given), False, False).input
        assert not result.isfinite().any()


@pytest.mark.parametrize("upstream", ["1/3", "half", "32768"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rescaling_without_the_logits(backend: Backend, dtype: torch.dtype, upstream: str) -> None:
    # The logits were changed since: the stored gradient is all there is, which costs a second rounding.
    call = take(backend, Case("rescaled", N=4, C=129, dtype=dtype))
    given = UPSTREAM[upstream](upstream_like(call, 1.0))
    grad = backend.module.forward(call, "fused").grad
    for keep in (True, False):
        result = backend.module.rescale(grad, call.target, call.options, given, keep, False)
        check_grad(result, call, expected_grad(given, call), roundings=2)


@pytest.mark.parametrize("target", [-1, 10, -(2**62), 2**62])
def test_target_out_of_range(backend: Backend, target: int) -> None:
    call = take(backend, Case("out-of-range", target=lambda y: y.index_fill(0, y.new_tensor(1), target)))
    if backend.name != "triton":
        with pytest.raises(IndexError, match=rf"^Target {target} is out of bounds\.$"):
            backend.module.forward(call, "fused")
        return
    loss, grad, _, _ = backend.module.forward(call, "fused")
    assert loss.isnan()
    assert grad[1].isnan().all()
    call = call._replace(options=call.options._replace(reduction="none"))
    losses, _, saved, _ = backend.module.forward(call, "recompute")
    assert losses.isnan().tolist() == [False, True, False]
    again = backend.module.backward(call, None, saved, Upstream(torch.ones_like(losses)), True, False).input
    assert again.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_is_the_same_in_any_batch(backend: Backend, dtype: torch.dtype) -> None:
    case = Case("batch", N=7, C=1025, dtype=dtype, options={"reduction": "none"})
    input, target, weight, options = call = take(backend, case)
    losses, _, saved, _ = backend.module.forward(call, "recompute")
    grads = backend.module.backward(call, None, saved, Upstream(torch.ones_like(losses)), True, False).input
    for rows in (slice(3, 4), slice(2, 7), slice(None, None, 3)):
        alone = Call(input[rows], target[rows], weight, options)
        loss, _, saved, _ = backend.module.forward(alone, "recompute")
        grad = backend.module.backward(alone, None, saved, Upstream(torch.ones_like(loss)), True, False).input
        assert torch.equal(bits(loss), bits(losses[rows]))
        assert torch.equal(bits(grad), bits(grads[rows]))
