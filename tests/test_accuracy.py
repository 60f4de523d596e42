"""The goals for exactness, on every instruction set; benchmarks/accuracy.py prints the figures of a larger grid."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from accuracy import HALF, ulp
from cases import confident
from oracle import exact_grad, exact_loss
from torch import Tensor

from fused_ce import cross_entropy
from fused_ce.backends import cpu
from fused_ce.contract import Call
from fused_ce.options import Options

pytestmark = pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built")
every_isa = pytest.mark.usefixtures("isa")
LOGITS = {
    "normal": lambda x, y: x,
    "x10": lambda x, y: x * 10,
    "around-256": lambda x, y: x * 20 + 256,  # on either side of where csrc/simd/math.inl.h changes its ways
    "plus-1000": lambda x, y: x + 1000,
    "margin-15": confident(15),
    "margin-25": confident(25),
}
CLASSES = (2, 64, 65, 1000, 50257)
EXP_OF_LOWEST = 1.22e-38  # the kernels' exp gives 0 below


class Problem(NamedTuple):
    x: Tensor  # (N, C)
    y: Tensor  # (N)
    losses: Tensor  # (N) exact
    grad: Tensor  # (N, C) exact, of the mean
    torch_losses: Tensor
    torch_grad: Tensor


@cache
def problem(dtype: torch.dtype, logits: str, C: int) -> Problem:
    seed = torch.Generator().manual_seed(C)
    N = min(1024, max(2, (1 << 15) // C))
    y = torch.randint(C, (N,), generator=seed)
    x = LOGITS[logits](torch.randn(N, C, generator=seed, dtype=torch.float64), y).to(dtype)
    losses = exact_loss(x, y, None, Options(reduction="none"))
    grad = exact_grad(torch.ones(()), x, y, None, Options())
    theirs = x.clone().requires_grad_()
    (torch_grad,) = torch.autograd.grad(F.cross_entropy(theirs, y), theirs)
    return Problem(x, y, losses, grad, F.cross_entropy(x, y, reduction="none"), torch_grad)


def errors(got: Tensor, exact: Tensor, flush: float = 0.0) -> Tensor:
    """In ULP of the dtype of `got`; an error of `flush` is free."""
    return ((got.double() - exact).abs() - flush).clamp(min=0) / ulp(exact, got.dtype)


def gradient(x: Tensor, y: Tensor, upstream: float, **keywords: Any) -> Tensor:
    x = x.clone().requires_grad_()
    loss = cross_entropy(x, y, **keywords)
    return torch.autograd.grad(loss, x, torch.tensor(upstream, dtype=loss.dtype))[0]


WIDE = {"dtype": torch.float32}  # 65536 is no float16
UPSTREAM = ((1.0, {}), (1 / 3, WIDE), (65536.0, WIDE), (65536.0, WIDE | {"grad_scale": 65536.0}))


@every_isa
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("C", CLASSES)
def test_16_bit_gradients(dtype: torch.dtype, logits: str, C: int) -> None:
    x, y, _, exact, *_ = problem(dtype, logits, C)
    for upstream, keywords in UPSTREAM if logits == "normal" else UPSTREAM[::3]:
        given = float(torch.tensor(upstream))
        distance = errors(gradient(x, y, upstream, **keywords), exact * given, EXP_OF_LOWEST * given)
        assert distance.max() <= 0.51
        assert (distance <= 0.5).double().mean() >= 0.9995


LOSS_GOAL = 4.0  # ULP


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("C", CLASSES)
def test_float32_losses(dtype: torch.dtype, logits: str, C: int) -> None:
    x, y, exact, *_ = problem(dtype, logits, C)
    losses = cross_entropy(x, y, reduction="none", dtype=torch.float32)
    assert errors(losses, exact).max() <= LOSS_GOAL
    mean = cross_entropy(x, y, dtype=torch.float32)
    assert errors(mean, exact.mean()) <= LOSS_GOAL


@every_isa
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("C", CLASSES)
def test_float32_is_never_less_accurate_than_torch(logits: str, C: int) -> None:
    x, y, losses, grad, torch_losses, torch_grad = problem(torch.float32, logits, C)
    mine, its = errors(gradient(x, y, 1.0), grad, EXP_OF_LOWEST), errors(torch_grad, grad, EXP_OF_LOWEST)
    assert mine.mean() <= its.mean()
    assert mine.max() <= its.max() * 1.1  # one element of thousands: noise
    mine, its = errors(cross_entropy(x, y, reduction="none"), losses), errors(torch_losses, losses)
    assert mine.mean() <= its.mean() * 1.05  # both little more than the rounding of the result: noise
    assert mine.max() <= max(its.max(), 1.5)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", ["plain", "weight", "smoothing", "pixels", "probabilities"])
def test_counts_and_sums_of_16_bit_means(dtype: torch.dtype, kind: str) -> None:
    # Neither dtype can count to 70001, nor float16 hold the sum.
    N = 70_001
    x, y = torch.zeros(N, 2, dtype=dtype), torch.arange(N) % 2
    weight = torch.tensor([1.0, 2.0], dtype=dtype) if kind == "weight" else None
    e = 0.5 if kind == "smoothing" else 0.0
    if kind == "pixels":
        x, y = x.T[None].contiguous(), y[None]
    if kind == "probabilities":
        y = torch.full((N, 2), 0.5, dtype=dtype)
    x.requires_grad_()
    loss = cross_entropy(x, y, weight, label_smoothing=e)
    loss.backward(torch.tensor(2.0**15, dtype=dtype))
    assert loss == torch.tensor(2.0).log().to(dtype)
    expected = x.detach().double().requires_grad_()
    target = y.double() if kind == "probabilities" else y
    double = F.cross_entropy(expected, target, None if weight is None else weight.double(), label_smoothing=e)
    double.backward(torch.tensor(2.0**15).double())
    assert errors(x.grad, expected.grad).max() <= 0.51


@every_isa
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 8), (torch.float64, 64)], ids=str)
@pytest.mark.parametrize("shift", [3e4, 3e7, -3e7, 1e30])  # what the exponent alone can take, and what it cannot
@pytest.mark.parametrize("C", [100, 1000, 5000])
def test_large_logits(dtype: torch.dtype, most: float, shift: float, C: int) -> None:
    seed = torch.Generator().manual_seed(C)
    spacing = max(1.0, abs(shift) * torch.finfo(dtype).eps)  # steps that the shifted logits can hold
    x = (torch.randn(8, C, generator=seed, dtype=torch.float64) * 2).round() * spacing + shift
    x, y = x.to(dtype), torch.randint(C, (8,), generator=seed)
    call = Call(x, y, None, Options())
    got = cpu.forward(call, "fused")
    assert errors(got.loss, exact_loss(*call)) <= most
    assert errors(got.grad, exact_grad(torch.ones(()), *call), EXP_OF_LOWEST).max() <= most
