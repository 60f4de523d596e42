"""`vocab_parallel_cross_entropy`: the signature, what its arguments mean, and what a call returns."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..contract import Stats
from ..functional import CrossEntropyOutput, output
from ..options import Options
from .autograd import VocabParallel
from .layout import ranks_of
from .sums import sums_of


# Type checkers do not look into *args and **keywords, so each overload repeats the signature; tests hold them equal.
@overload
def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
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
def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
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
def vocab_parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
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
def vocab_parallel_cross_entropy(
    input: Tensor,  # (N, V_local), (V_local) or (N, V_local, d1..dk)
    target: Tensor,  # (N), () or (N, d1..dk)
    weight: Tensor | None = None,  # (V,)
    *,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
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
    """Cross entropy of logits whose classes are sharded over the ranks of a group.

    Every rank calls it with its own columns of the logits and the targets of all rows, and gets the loss of the whole
    vocabulary, with the same bits on all ranks, and the gradient of its own logits. Forward exchanges 48 bytes a row
    in one all-gather (two reductions where ranks and rows are many), backward nothing.

    Args:
        input: this rank's logits, shape (N, V_local), (V_local) or (N, V_local, d1..dk); float32, float64, bfloat16 or
            float16.
        target: class indices in [0, V), of the whole vocabulary, shape (N), () or (N, d1..dk), int64 or uint8; the
            same on every rank.
        weight: rescales each class, shape (V,), all of them on every rank.
        group: the ranks that share the vocabulary; None: the default group. In a process without torch.distributed,
            a group of one.
        vocab_start: the first class of this rank. Default: shards follow each other in the order of the ranks, all of
            one width (what is beyond `vocab_size` is padding) or, like a DTensor's, fewer at the end.
        vocab_size: V, the classes of all ranks, without padding. Default: V_local times the ranks.
        backend: as in `fused_ce.cross_entropy`, like all other arguments. `inplace` lets the gradient take the memory
            of the logits in backward; `grad_scale` changes nothing here, because the gradient is made in backward.

    Returns:
        A scalar, or one loss a row with reduction="none"; with return_stats a `CrossEntropyOutput`, whose argmax is
        of all classes. Where the backward of several ranks meet (the hidden states' gradient), sum them; the loss is
        not to be averaged over the group.

    Raises:
        IndexError: a target outside [0, V) that is not ignored, on any rank (CPU). On a GPU that row's loss and
            gradient are NaN, and `fused_ce.check_targets` raises.
        ValueError, TypeError, NotImplementedError, MemoryError, RuntimeError: an argument is wrong or something failed,
            on any rank: on a CPU all of them raise. RuntimeError: the ranks were not called alike. ValueError: the
            shards do not tile the vocabulary. On a GPU, which nobody waits for, a rank that fails makes the
            others' losses NaN.

    The formula stands in `fused_ce/formula.py`; docs/distributed.md tells of layouts, means and failures.
    """
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
    if torch.compiler.is_compiling():
        # The exchange looks at numbers, which a graph does not hold: it is left for this call.
        outside: Any = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]
        return outside(input, target, weight, options, group, vocab_start, vocab_size, backend)  # type: ignore[no-any-return]
    return _run(input, target, weight, options, group, vocab_start, vocab_size, backend)


def _run(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    group: ProcessGroup | None,
    vocab_start: int | None,
    vocab_size: int | None,
    backend: str | None,
) -> Tensor | CrossEntropyOutput:
    ranks = ranks_of(group)
    rows, sums, chosen = sums_of(input, target, weight, options, vocab_start, vocab_size, ranks, backend)
    if torch.is_grad_enabled() and input.requires_grad:
        outputs: Any = VocabParallel.apply(input, torch.stack(sums), rows, chosen)  # type: ignore[no-untyped-call]
    else:
        outputs = (rows.loss(sums), *rows.stats(sums)) if options.return_stats else rows.loss(sums)
    if not options.return_stats:
        return outputs  # type: ignore[no-any-return]
    loss, *stats = outputs
    return output(loss, Stats(*stats), rows.call)
