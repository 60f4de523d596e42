"""A loss scale that linear cross entropy was told of and that does not come: the gradients are right all the same."""

from __future__ import annotations

import pytest
import torch
from linear_cases import Case, distance, f32, gradients, in_float64
from torch import Tensor

from fused_ce.linear import chunks, products


@pytest.mark.parametrize("hint", [65536.0, 1e5, torch.tensor(65536.0), 1e300, torch.tensor(1e300).double(), 1e-300])
@pytest.mark.parametrize("dtype", [f32, torch.float16], ids=str)
def test_a_loss_scale_that_does_not_come(hint: float | Tensor, dtype: torch.dtype) -> None:
    """Rounded to the loss's dtype, or that of sums, it is infinite or 0: nothing can be divided by it."""
    case = Case("no-scale", dtype=dtype, bias=True)
    tensors = case.build()
    exact = in_float64(tensors)
    ours, right = gradients(case.ours(tensors, grad_scale=hint), tensors, 1.0), gradients(case.exact(exact), exact, 1.0)
    for name in right:
        assert distance(ours[name], right[name]) <= (1e-6 if dtype == f32 else 1e-3), name


def test_no_hint_that_sums_cannot_hold_reaches_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where nothing looks whether the factor will do."""
    monkeypatch.setattr(chunks, "can_wait", lambda tensor: False)
    for dtype in (f32, torch.float64):
        case = Case("beyond", dtype=dtype)
        tensors = case.build()
        exact = in_float64(tensors)
        ours, right = (
            gradients(f, of, 2.0)
            for f, of in ((case.ours(tensors, grad_scale=1e300), tensors), (case.exact(exact), exact))
        )
        assert all(distance(ours[name], right[name]) <= (1e-6 if dtype == f32 else 1e-14) for name in right)


@pytest.mark.parametrize("hint", [1.0, 60000.0])
def test_a_wrong_loss_scale_of_float16_products(hint: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What float16 flushed to zero for the hint, no multiplication brings back."""
    monkeypatch.setattr(products, "computed_in", lambda dtype, device: dtype)
    case = Case("wrong-scale", dtype=torch.float16, options={"num_items": 1e6})
    tensors = case.build()
    exact = in_float64(tensors)
    ours = gradients(case.ours(tensors, grad_scale=hint, dtype=f32), tensors, 4096.0)
    right, theirs = (
        gradients(case.exact(exact), exact, 4096.0),
        gradients(case.ours(tensors, grad_scale=4096.0, dtype=f32), tensors, 4096.0),
    )
    for name in right:
        assert distance(ours[name], right[name]) <= 1.01 * distance(theirs[name], right[name]), name
