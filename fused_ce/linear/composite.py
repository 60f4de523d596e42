"""Linear cross entropy out of differentiable torch operators, the logits whole: for derivatives of derivatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import operators
from ..contract import Call, Upstream
from . import products
from .contract import LinearCall, LinearGradients, Wanted


def without_ignored(input: Tensor, target: Tensor, ignore_index: int) -> Tensor:  # (N, H), (N,) or () -> (N, H)
    """The features with zeros in ignored rows: 0 times an inf that one holds would be NaN in the weight's gradient."""
    return torch.where((target.long() == ignore_index).unsqueeze(-1), 0, input)


def gradients(
    call: LinearCall, g_loss: Tensor | None, g_lse: Tensor | None, g_entropy: Tensor | None, wanted: Wanted
) -> LinearGradients:
    """The gradients wanted for these upstream gradients, () or (N,), out of differentiable operators."""
    with torch.autocast(call.input.device.type, enabled=False):
        dtype = products.computed_in(call.product_dtype, call.input.device)
        x, W = call.input.to(dtype), call.linear_weight.to(dtype)
        if not call.has_probs:
            x = without_ignored(x, call.target, call.options.ignore_index)
        logits = F.linear(x, W, None if call.linear_bias is None else call.linear_bias.to(dtype))
        g_loss = logits.new_zeros(()) if g_loss is None else g_loss
        upstream = Upstream(g_loss, g_lse, g_entropy)
        g, _ = operators.gradients(Call(logits, call.target, call.weight, call.options), upstream, False)
        return LinearGradients(
            (g @ W).to(call.input.dtype) if wanted.input else None,
            (g.t() @ x).to(call.linear_weight.dtype) if wanted.linear_weight else None,
            None if call.linear_bias is None or not wanted.linear_bias else g.sum(0).to(call.linear_bias.dtype),
        )
