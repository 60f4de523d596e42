"""Float32 losses within 4 ULP whatever the options are, on every backend and instruction set; weights of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import ulp
from cases import confident
from conftest import Backend
from oracle import exact_loss
from torch import Tensor

from fused_ce import cross_entropy
from fused_ce.backends import cpu
from fused_ce.options import Options

pytestmark = pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built")
LOSS_GOAL = 4.0  # ULP
LOGITS = {
    "plus-100": lambda x, y: x + 100,
    "x10": lambda x, y: x * 10,
    "minus-300": lambda x, y: x * 3 - 300,
    "margin-20": confident(20),
    "plus-1e6": lambda x, y: (x * 3).round() / 2 + 1e6,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "softcap-30": {"softcap": 30.0},
    "softcap-5": {"softcap": 5.0},
    "softcap-300": {"softcap": 300.0},
    "scale": {"logit_scale": 0.7},
    "scale-below-0": {"logit_scale": -1.3},
    "both": {"logit_scale": 0.3, "softcap": 20.0},
    "smoothing": {"label_smoothing": 0.1},
    "scale-smoothing": {"logit_scale": 0.7, "label_smoothing": 0.3},
    "z-loss": {"lse_square_scale": 1e-3},
    "softcap-z-loss": {"softcap": 30.0, "lse_square_scale": 1e-3},
}


def losses_are_exact(
    backend: str, N: int, C: int, logits: str, keywords: dict[str, Any], across: bool = False, device: str = "cpu"
) -> None:
    seed = torch.Generator().manual_seed(C)
    y = torch.arange(N) % C
    x = LOGITS[logits](torch.randn(N, C, generator=seed, dtype=torch.float64), y).float()
    x = x.t().contiguous().t() if across else x
    exact = exact_loss(x, y, None, Options(reduction="none", **keywords))
    got = cross_entropy(x.to(device), y.to(device), reduction="none", backend=backend, **keywords).cpu()
    assert ((got.double() - exact).abs() / ulp(exact, torch.float32)).max() <= LOSS_GOAL


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("keywords", OPTIONS)
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize(("C", "across"), [(2, False), (100, False), (1500, False), (1500, True), (5000, False)])
def test_losses_of_any_options(C: int, across: bool, logits: str, keywords: str) -> None:
    losses_are_exact("cpu", max(8, min(300, 100_000 // C)), C, logits, OPTIONS[keywords], across)


@pytest.mark.parametrize("keywords", OPTIONS)
@pytest.mark.parametrize("logits", LOGITS)
def test_losses_of_any_options_by_any_backend(logits: str, keywords: str, backend: Backend) -> None:
    losses_are_exact(backend.name, 16, 100, logits, OPTIONS[keywords], device=backend.device)


@pytest.mark.parametrize("name", ["inf", "1e-37", "1e30", "mixed"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("C", [5, 600])
def test_weights_of_any_size(C: int, smoothing: float, name: str) -> None:
    weight = torch.linspace(0.5, 2, C) * {"1e-37": 1e-37, "1e30": 1e30}.get(name, 1.0)
    if name == "inf":
        weight[3] = torch.inf
    elif name == "mixed":
        weight[1::2] *= 1e-20
    x, y = torch.randn(40, C, generator=torch.Generator().manual_seed(C)), torch.arange(40) % 3
    keywords = {"label_smoothing": smoothing, "grad_scale": 65536.0}

    def result(x: Tensor, weight: Tensor, loss: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        value = loss(x, y, weight, **keywords)
        return value.detach(), torch.autograd.grad(value, x, torch.full_like(value, 65536.0))[0]

    loss, grad = result(x, weight, cross_entropy, **keywords)
    exact = result(x.double(), weight.double(), F.cross_entropy, label_smoothing=smoothing)
    assert torch.isclose(loss.double(), exact[0], rtol=1e-6, atol=0)
    if smoothing == 0 or name != "inf":  # then every class has a share of inf - inf
        terms = exact[1].abs() + 65536 / 40 * 1e-3  # an element may be a difference
        assert ((grad.double() - exact[1]).abs() / terms).max() < 1e-5


def test_smoothing_of_1_beside_minus_infinity() -> None:
    # 0 of the target's own share times an infinite loss: torch gives NaN.
    x = torch.tensor([[-torch.inf, 1.0, 2.0]])
    assert cross_entropy(x, torch.tensor([0]), label_smoothing=1.0) == torch.inf
    assert F.cross_entropy(x, torch.tensor([0]), label_smoothing=1.0).isnan()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("scale", [2.5, -2.5, 0.7])
def test_scaled_logits_near_the_largest_number(scale: float, across: bool) -> None:
    # Their differences are beyond float32, and what a product is rounded by is beyond 1.
    seed = torch.Generator().manual_seed(1)
    x = (torch.rand(3, 2100, generator=seed) * 2 - 1) * 8e37
    y = torch.tensor([5, 700, 2099])
    x[2, 2099] = x[2].abs().max() * (1 if scale > 0 else -1)
    x = (x.t().contiguous().t() if across else x).requires_grad_()
    loss = cross_entropy(x, y, reduction="none", logit_scale=scale, backend="cpu")
    exact = exact_loss(x.detach(), y, None, Options(reduction="none", logit_scale=scale))
    assert ((loss.double() - exact).abs() <= LOSS_GOAL * ulp(exact, torch.float32)).all()
    grad = torch.autograd.grad(loss.sum(), x)[0].double()
    z = (x.detach().double() * scale).requires_grad_()
    truth = torch.autograd.grad(F.cross_entropy(z, y, reduction="sum"), z)[0] * scale
    assert torch.equal(grad, truth.float().double())


@pytest.mark.parametrize("C", [7, 700])
def test_the_z_loss_of_large_logits_overflows_no_sooner_than_its_gradient(backend: Backend, C: int) -> None:
    # 30000 lse is beyond float32, and 2e-4 of that is not.
    x = torch.linspace(-4e37, 4e37, C, device=backend.device).repeat(3, 1).requires_grad_()
    y, L, upstream = torch.tensor([0, C // 2, C - 1]), 1e-4, 30000.0
    loss = cross_entropy(x, y.to(x.device), reduction="none", lse_square_scale=L, backend=backend.name)
    grad = torch.autograd.grad(loss, x, torch.full_like(loss, upstream))[0].cpu().double()
    z = x.detach().cpu().double().requires_grad_()
    of_rows = F.cross_entropy(z, y, reduction="none") + L * z.logsumexp(1) ** 2
    truth = torch.autograd.grad(of_rows, z, torch.full_like(of_rows, upstream))[0]
    assert ((grad - truth).abs() <= 4 * ulp(truth, torch.float32)).all()
