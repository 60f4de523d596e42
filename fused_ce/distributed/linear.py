"""`vocab_parallel_linear_cross_entropy`: the signature, what its arguments mean, and what a call returns."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import functional
from ..contract import Call
from ..functional import CrossEntropyOutput
from ..linear.autograd import with_gradient
from ..linear.contract import Wanted
from ..linear.functional import requires_grad, unflattened
from ..options import Options
from .layout import ranks_of
from .linear_gate import Given, judge
from .linear_loop import ShardedLoop, refuse


# Type checkers do not look into *args and **keywords, so each overload repeats the signature; tests hold them equal.
@overload
def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    num_items: float | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    return_stats: Literal[False] = False,
    chunk_rows: int | None = None,
    reduce_input_grad: bool = True,
    backend: str | None = None,
) -> Tensor: ...
@overload
def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    num_items: float | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    return_stats: Literal[True],
    chunk_rows: int | None = None,
    reduce_input_grad: bool = True,
    backend: str | None = None,
) -> CrossEntropyOutput: ...
@overload
def vocab_parallel_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    num_items: float | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
    return_stats: bool,
    chunk_rows: int | None = None,
    reduce_input_grad: bool = True,
    backend: str | None = None,
) -> Tensor | CrossEntropyOutput: ...
def vocab_parallel_linear_cross_entropy(
    input: Tensor,  # (N, H), (H) or (..., H)
    linear_weight: Tensor,  # (V_local, H)
    target: Tensor,  # (N), () or (...)
    *,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    linear_bias: Tensor | None = None,  # (V_local,)
    weight: Tensor | None = None,  # (V,)
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    num_items: float | Tensor | None = None,  # ()
    grad_scale: float | Tensor | None = None,  # ()
    return_stats: bool = False,
    chunk_rows: int | None = None,
    reduce_input_grad: bool = True,
    backend: str | None = None,
) -> Tensor | CrossEntropyOutput:
    """Cross entropy of `input @ linear_weight.T + linear_bias`, the classes sharded over the ranks of a group.

    Every rank calls it with the same hidden states and targets and its own rows of the weight. The logits are never
    whole, neither over the classes nor over the rows: chunk after chunk each rank makes its own columns, and one
    exchange of 48 bytes a row gives all of them the sums of whole rows. The gradients of linear_weight and linear_bias
    are this rank's own; that of the input is added up over the ranks, N x H numbers of float32 (float64 for float64),
    once, and then rounded.

    Args:
        input: hidden states, shape (N, H), (H) or (..., H), the same on every rank; float32, float64, bfloat16 or
            float16.
        linear_weight: this rank's rows, shape (V_local, H), in the input's dtype (any under autocast). Rows that stand
            beyond `vocab_size` are padding: never read, their gradient 0.
        target: class indices in [0, V), of the whole vocabulary, the input's shape without its last dimension.
        group, vocab_start, vocab_size: see `vocab_parallel_cross_entropy`.
        linear_bias: this rank's, shape (V_local,).
        weight: rescales each class, shape (V,), all of them on every rank.
        chunk_rows: rows of a chunk, the same on every rank. Default: what the products want.
        reduce_input_grad: add up the ranks' terms of the input's gradient. False leaves this rank's own term, for
            whoever adds them up behind the input already: Megatron's `copy_to_tensor_model_parallel_region`, or
            `gather_from_sequence_parallel_region` (whose backward is a reduce-scatter).
        backend: as in `fused_ce.linear_cross_entropy`, like all other arguments.

    Returns:
        A scalar, or one loss a row with reduction="none", with the same bits on every rank; with return_stats a
        `CrossEntropyOutput`. The upstream gradient is to be the same on every rank, and a backward that starts from
        the inputs again (reduction="none", a gradient of lse, float16 without grad_scale) runs on all of them.

    Raises:
        IndexError, ValueError, TypeError, NotImplementedError, MemoryError, RuntimeError: as in
            `vocab_parallel_cross_entropy`: on a CPU all ranks raise what one of them does, between chunks and in
            backward too. RuntimeError also where a backward is differentiated again.

    docs/distributed.md tells of layouts, means and failures.
    """
    options = Options(
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
    run: Any = _run
    if torch.compiler.is_compiling():
        run = torch.compiler.disable(_run)  # type: ignore[no-untyped-call]
    return run(  # type: ignore[no-any-return]
        Given(input, linear_weight, target, linear_bias, weight, options, chunk_rows, vocab_start, vocab_size, backend),
        group,
        reduce_input_grad,
    )


def _run(given: Given, group: ProcessGroup | None, reduces: bool) -> Tensor | CrossEntropyOutput:
    ranks = ranks_of(group)
    try:
        call, backend = judge(given, ranks)
    except Exception as error:
        refuse(given, error, ranks, reduces)
        raise
    loop = ShardedLoop(backend, ranks, reduces)
    wanted = Wanted(*map(requires_grad, (call.input, call.linear_weight, call.linear_bias)))
    if any(wanted):
        loss, stats = with_gradient(call, loop)
    else:
        loss, _, stats = loop.forward(call, wanted)
    if stats is None:
        return unflattened(loss, given.input.shape[:-1])
    like = Call(call.input, call.target, call.weight, call.options)
    return unflattened(functional.output(loss, stats, like), given.input.shape[:-1])
