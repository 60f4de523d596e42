"""`linear_cross_entropy`: the signature, what its arguments mean, and what a call returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _torch, functional
from ..contract import Call
from ..functional import CrossEntropyOutput, cross_entropy
from ..options import Options, check_keywords
from . import chunks, composite, gate, ops
from .autograd import InOneProcess, with_gradient
from .contract import Wanted

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions  # from torch 2.13 on


# Type checkers do not look into *args and **keywords, so each overload repeats the signature; tests hold them equal.
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    dtype: torch.dtype | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    num_items: float | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    return_stats: Literal[False] = False,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    dtype: torch.dtype | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    num_items: float | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    return_stats: Literal[True],
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> CrossEntropyOutput: ...
@overload
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    dtype: torch.dtype | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    num_items: float | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    return_stats: bool,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor | CrossEntropyOutput: ...
def linear_cross_entropy(
    input: Tensor,  # (N, H), (H) or (..., H)
    linear_weight: Tensor,  # (V, H)
    target: Tensor,  # (N), () or (...) class indices; or probabilities (N, V), (V) or (..., V)
    *,
    linear_bias: Tensor | None = None,  # (V,)
    weight: Tensor | None = None,  # (V,)
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    dtype: torch.dtype | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    num_items: float | Tensor | None = None,  # ()
    grad_scale: float | Tensor | None = None,  # ()
    return_stats: bool = False,
    chunk_rows: int | None = None,
    backend: str | None = None,
) -> Tensor | CrossEntropyOutput:
    """Cross entropy of `input @ linear_weight.T + linear_bias`, with every gradient, the logits never whole.

    A drop-in for `torch.nn.functional.linear_cross_entropy` (torch 2.13), and works without it. Rows are taken a chunk
    at a time: a product makes a chunk's logits, the kernels of `cross_entropy` turn them into their gradient in place,
    and two products make the gradients of input and weight of it. Sums over chunks are float32.

    Args:
        input: hidden states, shape (N, H), (H), or (..., H) with any leading dimensions, as (B, T, H); float32,
            float64, bfloat16 or float16.
        linear_weight: shape (V, H), in the input's dtype (any under autocast); as torch has it, (V, d1..dk, H) with
            input (N, H) is a K-dimensional loss, whose logits are made whole.
        target: class indices in [0, V), the input's shape without its last dimension, int64 or uint8; or class
            probabilities, with V as the last dimension, of any floating dtype.
        linear_bias: shape (V,), or the linear_weight's without its last dimension.
        weight: rescales each class, shape (V,), in the input's dtype.
        reduction: "none" (one loss a row), "mean" (over rows that are not ignored, weighted by the class weights) or
            "sum".
        ignore_index: rows with this target get loss 0 and gradient 0, whatever they hold, and do not count in the mean.
            None: -100. torch refuses one for probabilities, and so does this.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].
        options: torch's `LinearCrossEntropyOptions`. Its `batch_chunk_size` is taken as chunk_rows; sums are float32
            and a second backward is right whatever the rest says.
        dtype: dtype of the loss; see `cross_entropy`. Default: the input's, float32 under autocast.
        logit_scale, softcap, lse_square_scale, num_items: see `cross_entropy`.
        grad_scale: the upstream gradient that backward will see, such as a loss scaler's scale (default 1). A hint: the
            gradients are right for any other too. float16 gains most: see docs/performance.md.
        return_stats: return a `CrossEntropyOutput` of rows in the target's shape; lse and entropy are
            differentiable.
        chunk_rows: rows of a chunk, which needs memory for chunk_rows x V logits. Default: what the products want
            (256; 1024 of 16 bits; 2048 on a GPU).
        backend: "cpu", "triton" or "reference" instead of the best that takes the call.

    Returns:
        A scalar, or one loss a row with reduction="none"; with return_stats a `CrossEntropyOutput`.

    Raises:
        IndexError: a target outside [0, V) that is not ignored (CPU). On a GPU see `cross_entropy`.
        RuntimeError: shapes or dtypes that do not go together, in torch's words.
        ValueError, TypeError: a keyword is outside its range; the message says what was expected and what came.
        NotImplementedError: the backend that was asked for cannot take the call; the message says why.

    The formula stands in `fused_ce/formula.py`, the loop in `fused_ce/linear/chunks.py`.
    """
    gate.check_shapes(input, linear_weight, target, linear_bias, ignore_index)
    asked = Options(
        -100 if ignore_index is None else ignore_index,
        label_smoothing,
        logit_scale,
        softcap,
        lse_square_scale,
        reduction,
        dtype,
        num_items,
        grad_scale,
        return_stats=return_stats,
    )
    if dtype is not None or grad_scale is not None or not asked.is_plain:
        asked = check_keywords(asked, input.dtype)
    rows = gate.chunk_rows(chunk_rows, options)
    if _torch.is_dtensor(linear_weight) and not target.is_floating_point():
        from ..distributed import linear_dtensor  # which imports what only DTensors need

        if linear_dtensor.class_dim(linear_weight) is not None:  # type: ignore[arg-type]
            given = asked._asdict() | {"linear_bias": linear_bias, "weight": weight, "chunk_rows": rows}
            del given["inplace"], given["shard"]
            return linear_dtensor.linear_cross_entropy(input, linear_weight, target, given | {"backend": backend})  # type: ignore[arg-type]
    x, y = input, target
    if input.dim() > 2:
        x, y = input.flatten(0, -2), target.flatten(0, input.dim() - 2)
    elif input.dim() == 1 and target.shape in ((), (linear_weight.shape[0],)):
        x, y = input.unsqueeze(0), target.unsqueeze(0)
    judged = None
    if linear_weight.dim() == 2 and x.dim() == 2:
        judged = gate.judge(x, linear_weight, y, linear_bias, weight, asked, rows, backend)
    if judged is None:
        if input.dim() > 2:
            return unflattened(_whole(x, linear_weight, y, linear_bias, weight, asked, backend), input.shape[:-1])
        return _whole(input, linear_weight, target, linear_bias, weight, asked, backend)
    call, chosen = judged
    wanted = Wanted(*map(requires_grad, (x, linear_weight, linear_bias)))
    if torch.compiler.is_compiling() or _torch.is_dispatched():
        loss, stats = ops.traced(call, backend, wanted)
    elif any(wanted):
        loss, stats = with_gradient(call, InOneProcess(chosen))
    else:
        loss, _, stats = chunks.forward(call, chosen, wanted)
    result: Tensor | CrossEntropyOutput = loss
    if stats is not None:
        # All that is read of the logits there is whether the targets have their shape.
        like = Call(y if call.has_probs else x, y, weight, call.options)
        result = functional.output(loss, stats, like)
    return result if input.dim() == 2 else unflattened(result, input.shape[:-1])


def requires_grad(tensor: Tensor | None) -> bool:
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


def _whole(
    input: Tensor,  # (N, H) or (H)
    linear_weight: Tensor,  # (V, d1..dk, H)
    target: Tensor,
    linear_bias: Tensor | None,  # (V, d1..dk)
    weight: Tensor | None,  # (V,)
    options: Options,
    backend: str | None,
) -> Tensor | CrossEntropyOutput:
    """By torch's linear, and `cross_entropy` of its logits: every derivative, every transform, every error message."""
    if target.shape == input.shape[:-1] and not target.is_floating_point() and _may_be_ignored(target, options):
        input = composite.without_ignored(input, target, options.ignore_index)
    if linear_weight.dim() == 2:
        logits = F.linear(input, linear_weight, linear_bias)
    else:
        bias = None if linear_bias is None else linear_bias.flatten()
        logits = F.linear(input, linear_weight.flatten(0, -2), bias)
        logits = logits.reshape(*input.shape[:-1], *linear_weight.shape[:-1])
    given = options.keywords()
    given.pop("inplace")
    return cross_entropy(logits, target, weight, **given, backend=backend)  # type: ignore[no-any-return]


def _may_be_ignored(target: Tensor, options: Options) -> bool:
    """Whether a row is ignored, where it costs little to know; else True."""
    if not target.is_cpu or torch.compiler.is_compiling() or _torch.under_transforms() or _torch.is_dispatched():
        return True
    return type(target) is not Tensor or bool((target.long() == options.ignore_index).any())


def unflattened(result: Tensor | CrossEntropyOutput, leading: torch.Size) -> Tensor | CrossEntropyOutput:
    """What is one value a row, in the shape of the rows."""
    if isinstance(result, Tensor):
        return result.reshape(leading) if result.dim() else result
    return CrossEntropyOutput(*(field.reshape(leading) if field.dim() else field for field in result))
