"""The samples that come with torch for its own cross entropy, run through ours: all have three classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import relative_error, same_kind
from torch import Tensor

import fused_ce

pytest.importorskip("expecttest")  # torch's test modules need it
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPS = {
    op.name.rpartition(".")[2]: op
    for op in op_db
    if op.name in ("nn.functional.cross_entropy", "nn.functional.nll_loss")
}
MODULE = next(info for info in module_db if info.module_cls is torch.nn.CrossEntropyLoss)


def results(function: Any, input: Tensor, *rest: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    input = input.detach().clone().requires_grad_()
    loss = function(input, *rest, **keywords)
    return loss.detach(), torch.autograd.grad(loss.sum(), input)[0]


def double(value: Any) -> Any:
    return value.detach().double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Ours is torch's in shape and dtype, and but a rounding away from torch in float64."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert same_kind(ours, exact)
    # Elements of a gradient are differences of probabilities.
    limit = 1e-12 if ours.dtype == torch.float64 else 2e-6
    assert relative_error(ours, exact, exact.abs().clamp(min=0.1)) <= limit


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_samples_of_the_operator(op: str, dtype: torch.dtype) -> None:
    samples = list(OPS[op].sample_inputs("cpu", dtype, requires_grad=True))
    assert len(samples) > 20
    for sample in samples:
        call, keywords = (sample.input, *sample.args), sample.kwargs
        exact = results(F.cross_entropy, *map(double, call), **{name: double(v) for name, v in keywords.items()})
        ours, theirs = (results(f, *call, **keywords) for f in (fused_ce.cross_entropy, F.cross_entropy))
        for triple in zip(ours, theirs, exact, strict=True):
            check(*triple)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nll_loss_of_log_softmax_is_the_same(reduction: str) -> None:
    # The two halves that torch's composes; every sample of nll_loss, with its own logits.
    for sample in OPS["nll_loss"].sample_inputs("cpu", torch.float64, requires_grad=False):
        keywords = sample.kwargs | {"reduction": reduction}
        halves = F.nll_loss(F.log_softmax(sample.input, 1 if sample.input.dim() > 1 else 0), *sample.args, **keywords)
        check(fused_ce.cross_entropy(sample.input, *sample.args, **keywords), halves, halves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_samples_of_the_module(dtype: torch.dtype) -> None:
    samples = MODULE.module_inputs_func(MODULE, device="cpu", dtype=dtype, requires_grad=True, training=True)
    assert len(samples) > 100
    for sample in samples:
        arguments, keywords = sample.constructor_input.args, sample.constructor_input.kwargs
        ours, theirs, exact = (
            cls(*arguments, **keywords).to(to)
            for cls, to in (
                (fused_ce.CrossEntropyLoss, dtype),
                (torch.nn.CrossEntropyLoss, dtype),
                (torch.nn.CrossEntropyLoss, torch.float64),
            )
        )
        call = sample.forward_input.args
        truth = results(exact, *map(double, call))
        for triple in zip(results(ours, *call), results(theirs, *call), truth, strict=True):
            check(*triple)
        if dtype == torch.float64:  # the loss once more in plain Python, which comes with the samples
            torch.testing.assert_close(sample.reference_fn(exact, *map(double, call)), truth[0])


def refusal(cls: Any, error: Any) -> tuple[type, str]:
    made = error.module_error_input
    with pytest.raises(error.error_type) as caught:  # noqa: PT012 torch may refuse in either call
        module = cls(*made.constructor_input.args, **made.constructor_input.kwargs)
        module(*made.forward_input.args)
    return caught.type, str(caught.value).split("\n")[0]


def test_error_inputs_of_the_module() -> None:
    errors = list(MODULE.module_error_inputs_func(MODULE, "cpu", torch.float32, requires_grad=False, training=True))
    assert errors
    for error in errors:
        ours, theirs = (refusal(cls, error) for cls in (fused_ce.CrossEntropyLoss, torch.nn.CrossEntropyLoss))
        assert ours == theirs
