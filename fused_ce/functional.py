"""`cross_entropy`: the signature, what its arguments mean, and what a call returns."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import _torch, gate, ops
from .autograd import with_gradient
from .contract import Backend, Call, Stats
from .options import Options, check_keywords


class CrossEntropyOutput(NamedTuple):
    """What `cross_entropy(..., return_stats=True)` returns. R: the shape of one value a row, (N, d1..dk).

    `z_loss`, `argmax` and `correct` carry no gradient. An ignored row has lse, entropy and z-loss 0, argmax -1, and is
    not correct.
    """

    loss: Tensor  # the loss, z-loss included
    lse: Tensor  # R, logsumexp of the (scaled, capped) logits; float32, or float64 for float64; differentiable
    z_loss: Tensor  # the z-loss alone, reduced as the loss
    argmax: Tensor  # R, int64, the class with the largest logit
    correct: Tensor  # R, bool, whether that is the target (or the target's largest probability)
    entropy: Tensor  # R, of softmax, in nats; of lse's dtype; differentiable


# Type checkers do not look into *args and **keywords, so each overload repeats the signature; tests hold them equal.
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    num_items: float | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    inplace: bool = False,
    return_stats: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    num_items: float | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    inplace: bool = False,
    return_stats: Literal[True],
    backend: str | None = None,
) -> CrossEntropyOutput: ...
@overload
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    num_items: float | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    inplace: bool = False,
    return_stats: bool,
    backend: str | None = None,
) -> Tensor | CrossEntropyOutput: ...
def cross_entropy(
    input: Tensor,  # (N, C), (C) or (N, C, d1..dk)
    target: Tensor,  # (N), () or (N, d1..dk); or probabilities of the input's shape
    weight: Tensor | None = None,  # (C,)
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    num_items: float | Tensor | None = None,  # ()
    grad_scale: float | Tensor | None = None,  # ()
    inplace: bool = False,
    return_stats: bool = False,
    backend: str | None = None,
) -> Tensor | CrossEntropyOutput:
    """Cross entropy between logits and targets, with its gradient made in the same pass.

    A drop-in for `torch.nn.functional.cross_entropy`: the first eight arguments, their meaning, their
    results and their errors are torch's. What the kernels do not take runs torch's own operators. DTensors may have
    their classes or rows sharded: docs/distributed.md tells how the results lie.

    Args:
        input: logits, shape (N, C), (C) or (N, C, d1..dk); float32, float64, bfloat16 or float16.
        target: class indices in [0, C), shape (N), () or (N, d1..dk), int64 or uint8; or class
            probabilities, of the input's shape and any floating dtype.
        weight: rescales each class, shape (C), in the input's dtype.
        size_average, reduce: deprecated by torch; use `reduction`.
        ignore_index: rows with this target get loss 0 and gradient 0, even where their logits are
            not finite, and do not count in the mean.
        reduction: "none" (one loss a row), "mean" (over rows that are not ignored, weighted by the
            class weights) or "sum".
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].
        dtype: dtype of the loss, as if the input had been cast first (as in `torch.log_softmax`), without
            the copy; the gradient stays in the input's dtype. Default: the input's, float32 under autocast.
        logit_scale: the logits are multiplied by it first.
        softcap: then bounded smoothly to (-softcap, softcap): softcap * tanh(logits / softcap).
        lse_square_scale: adds lse_square_scale * logsumexp(logits)^2 to each row's loss (the z-loss of
            PaLM); in a mean it is divided by the number of rows that are not ignored.
        num_items: replaces the divisor of the mean: rows counted over all micro-batches, for instance.
        grad_scale: the upstream gradient that backward will see, such as a loss scaler's scale (default 1).
            A hint: the gradient is right for any other too, it only costs another pass.
        inplace: let the gradient take the logits' memory, so that no second tensor of their size is made. After
            forward (mean, sum) or backward (none, float16) they hold the gradient; whoever else saved them for a
            backward gets torch's error about in-place changes. Needs contiguous logits that are not a leaf;
            without a gradient to make, and under torch.compile or torch.func, nothing is overwritten.
        return_stats: return a `CrossEntropyOutput`: loss, lse, z_loss, argmax, correct, entropy, out of the
            same pass.
        backend: "cpu", "triton" or "reference" instead of the best that takes the call; also the
            environment variable FUSED_CE_BACKEND, read at import.

    Returns:
        A scalar, or one loss a row with reduction="none" (the target's shape, for class indices); with
        return_stats a `CrossEntropyOutput`.

    Raises:
        IndexError: a target outside [0, C) that is not ignored (CPU). On a GPU that row's loss and
            gradient are NaN, and `fused_ce.check_targets` raises.
        ValueError, RuntimeError, TypeError: as torch raises them.
        NotImplementedError: the backend that was asked for cannot take the call; the message says why.

    The formula stands in `fused_ce/formula.py`.
    """
    if size_average is not None or reduce is not None:
        reduction = _torch.legacy_reduction(size_average, reduce)
    if reduction == "elementwise_mean":
        reduction = _torch.mean_by_its_old_name()
    options = Options(
        ignore_index,
        label_smoothing,
        logit_scale,
        softcap,
        lse_square_scale,
        reduction,
        dtype,
        num_items,
        grad_scale,
        inplace,
        return_stats,
    )
    call = Call(input, target, weight, options)
    if backend is None and (chosen := gate.at_a_glance(call)):
        return _by_kernels(call, chosen)[0]
    if _torch.is_dtensor(input):
        from .distributed import dtensor  # which imports what only DTensors need

        return dtensor.cross_entropy(call, backend)
    if dtype is not None or grad_scale is not None or not options.is_plain:
        call = call._replace(options=check_keywords(options, getattr(input, "dtype", torch.float32)))
    loss, stats = _run(call, backend)
    return output(loss, stats, call) if return_stats else loss


def _run(call: Call, backend: str | None) -> tuple[Tensor, Stats | None]:
    call, chosen = gate.judge(call, backend)
    if chosen is None:
        loss, stats = gate.composite(call)
        gate.tell(call, backend)
        return loss, stats
    if torch.compiler.is_compiling() or _torch.is_dispatched():
        return ops.traced(call, backend, _wants_grad(call))
    return _by_kernels(call, chosen)


def _by_kernels(call: Call, chosen: Backend) -> tuple[Tensor, Stats | None]:
    if not _wants_grad(call):
        result = chosen.forward(call, "loss")
        return result.loss, result.stats
    if call.options.inplace:
        gate.check_inplace(call)
    return with_gradient(call, chosen, gate.again)


def _wants_grad(call: Call) -> bool:
    return torch.is_grad_enabled() and (call.input.requires_grad or call.target.requires_grad)


def output(loss: Tensor, stats: Stats | None, call: Call) -> CrossEntropyOutput:
    """The public result, from what a backend gave; of the logits it reads the shape alone."""
    assert stats is not None
    if not torch.compiler.is_compiling():
        return _torch.in_any_process(lambda: _reduced(loss, stats, call))
    return _reduced(loss, stats, call)


def _reduced(loss: Tensor, stats: Stats, call: Call) -> CrossEntropyOutput:
    input, target, _, options = call
    label = target.argmax(0 if input.dim() == 1 else 1) if target.shape == input.shape else target
    z_loss = stats.z_loss
    if options.reduction != "none":
        z_loss = z_loss.sum()
    if options.reduction == "mean":
        z_loss = z_loss / ((stats.argmax >= 0).sum() if options.num_items is None else options.num_items)
    correct = (stats.argmax == label) & (stats.argmax >= 0)
    return CrossEntropyOutput(loss, stats.lse, z_loss, stats.argmax, correct, stats.entropy)
