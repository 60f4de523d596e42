"""Which calls sharded logits allow, and the backend that takes one; all that can be wrong on one rank is found here."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _torch, gate
from ..backends import dispatch
from ..contract import Backend, Call, row_shape
from ..options import FLOATS, REDUCTIONS, Options, check_keywords
from .layout import Layout


def judge(
    input: Tensor,  # (N, V_local, d1..dk), padding included
    target: Tensor,  # (N, d1..dk)
    weight: Tensor | None,  # (V,)
    options: Options,
    layout: Layout,
    name: str | None,
) -> tuple[Call, Backend]:
    """The call of the classes that this rank holds, without padding, and the backend.

    Raises:
        ValueError, TypeError, NotImplementedError: the message says what was expected and what came.
        RuntimeError: a tensor's storage was freed; a transform or forward-mode differentiation is at work.
    """
    if _torch.under_transforms():
        raise RuntimeError("vocab_parallel_cross_entropy cannot be transformed by torch.func or forward-mode autograd")
    check_tensors(input, target, weight)
    if input.dtype not in FLOATS:
        raise TypeError(f"expected float32, float64, bfloat16 or float16 logits, got {input.dtype}")
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"expected class indices, int64 or uint8, got {target.dtype}; probabilities cannot be sharded")
    if target.shape != row_shape(input):
        raise ValueError(
            f"expected targets of shape {tuple(row_shape(input))} for logits (N, V_local, d1..dk) of shape "
            f"{tuple(input.shape)}, got {tuple(target.shape)}; flatten leading dimensions first"
        )
    if weight is not None and (weight.dtype not in FLOATS or weight.shape != (layout.shard.total,)):
        raise ValueError(
            f"expected one class weight for each of all {layout.shard.total} classes on every rank, "
            f"got {tuple(weight.shape)} of {weight.dtype}"
        )
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("expected class weights without a gradient, got some that require it; detach them")
    if options.reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {options.reduction!r}")
    if not isinstance(options.label_smoothing, (float, int)) or options.label_smoothing > 1:  # as torch has it
        raise ValueError(f"label_smoothing must be between 0.0 and 1.0, got {options.label_smoothing!r}")
    if type(options.ignore_index) is not int:
        raise TypeError(f"ignore_index must be an int, got {options.ignore_index!r}")
    options = check_keywords(options, input.dtype)._replace(shard=layout.shard)
    call = gate.with_loss_dtype(Call(own(input, layout), target, weight, options))
    if call.options.inplace and input.requires_grad and torch.is_grad_enabled():
        gate.check_inplace(call._replace(input=input))
    backend = dispatch.choose(call, name) if layout.held else None
    return call._replace(target=_torch.with_memory(target)), backend or dispatch.BACKENDS["reference"]


def check_tensors(input: Tensor, *others: Tensor | None) -> None:
    """Whether all are plain tensors on one device."""
    for tensor in (input, *others):
        if tensor is None:
            continue
        if not gate.is_strided(tensor):
            raise TypeError(f"expected plain strided tensors, got {type(tensor).__name__}; give this rank's own part")
        if tensor.device != input.device:
            raise ValueError(f"expected all tensors on {input.device}, got one on {tensor.device}")


def own(input: Tensor, layout: Layout) -> Tensor:  # (N, V_local, d1..dk)
    """The classes without the padding after them."""
    dim = class_dim(input)
    return input if layout.held == input.shape[dim] else input.detach().narrow(dim, 0, layout.held)


def class_dim(input: Tensor) -> int:
    return 1 if input.dim() > 1 else 0
