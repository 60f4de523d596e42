"""The C++ kernels' rows in lanes: many groups of them, chunks of classes, equals among the largest, sums made again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ce import cross_entropy
from fused_ce.backends import cpu
from fused_ce.contract import Call, Upstream
from fused_ce.options import Options

pytestmark = [
    pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built"),
    pytest.mark.usefixtures("isa"),
]


def results(function: object, input: Tensor, target: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient under "none"."""
    leaf = input.clone().requires_grad_()
    loss = function(leaf, target, reduction="none")  # type: ignore[operator]
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))[0]


# More groups than are worked on at a time, lines that end inside a vector, and classes in more than one chunk.
@pytest.mark.parametrize("shape", [(2, 2, 300), (23, 3, 37), (5, 17, 130), (1, (1 << 16) + 70, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_is_exact(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    # Here and there beyond what needs no subtraction before exp.
    input = torch.randn(shape, dtype=dtype) * 3 + 1000 * (torch.rand(shape[0], 1, shape[2], dtype=dtype) > 0.5)
    target = torch.randint(shape[1], (shape[0], shape[2]))
    if kind == "probabilities":
        target = torch.randn(shape, dtype=dtype).softmax(1)
    upstream = torch.rand(shape[0], shape[2], dtype=dtype)
    loss, grad = results(cross_entropy, input, target, upstream)
    wide = target.double() if kind == "probabilities" else target
    exact_loss, exact_grad = results(F.cross_entropy, input.double(), wide, upstream.double())
    # float64 is held against torch in float64, which is no truth.
    eps = max(torch.finfo(dtype).eps, 1e-13)
    torch.testing.assert_close(loss.double(), exact_loss, rtol=8 * eps, atol=1e-14)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=16 * eps, atol=2 * eps * exact_grad.abs().max().item())


@pytest.mark.parametrize("C", [2, 10, 40])
def test_of_equal_largest_one_is_left_out(C: int) -> None:
    input, target = torch.full((50, C), 3.0), torch.full((50, C), 1 / C)
    loss, grad = results(cross_entropy, input, target, torch.ones(50))
    torch.testing.assert_close(loss, torch.full((50,), C, dtype=torch.float32).log())
    torch.testing.assert_close(grad, torch.zeros(50, C))


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_backward_makes_the_sums_again(kind: str) -> None:
    input = torch.randn(70, 5)
    target = torch.randint(5, (70,)) if kind == "indices" else torch.randn(70, 5).softmax(1)
    call = Call(input, target, None, Options(reduction="none"))
    unread = torch.full(cpu.saved_shape(call), torch.nan, dtype=torch.float64)
    grad = cpu.backward(call, None, unread, Upstream(torch.ones(70)), True, False).input
    assert grad is not None
    torch.testing.assert_close(grad, results(F.cross_entropy, input, target, torch.ones(70))[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(300, 2), (3, 1000)], ids=str)
def test_losses_of_16_bits_are_rounded_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    input, target = torch.randn(shape).to(dtype), torch.randint(shape[1], shape[:1])
    wide = cross_entropy(input, target, reduction="none", dtype=torch.float32)
    assert torch.equal(cross_entropy(input, target, reduction="none"), wide.to(dtype))


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("back", ["contiguous", "transposed"])
def test_logits_may_come_back_in_another_layout(back: str, kind: str) -> None:
    """As from a saved-tensor hook that copies them."""
    one = torch.randn(500, 40)
    input = one.t().requires_grad_() if back == "contiguous" else one.t().contiguous().requires_grad_()
    target = torch.randint(500, (40,)) if kind == "indices" else torch.randn(40, 500).softmax(1)

    def copy(tensor: Tensor) -> Tensor:
        if tensor.shape != input.shape or tensor.dtype != input.dtype:
            return tensor
        return tensor.contiguous() if back == "contiguous" else tensor.t().contiguous().t()

    with torch.autograd.graph.saved_tensors_hooks(copy, lambda tensor: tensor):
        loss = cross_entropy(input, target, reduction="none")
    upstream = torch.rand(40)
    grad = torch.autograd.grad(loss, input, upstream)[0]
    exact = results(
        F.cross_entropy, input.detach().double(), target if kind == "indices" else target.double(), upstream
    )
    torch.testing.assert_close(grad.double(), exact[1].double(), rtol=1e-5, atol=1e-9)
