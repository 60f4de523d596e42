"""Which calls a linear head of sharded classes allows, and the backend of its chunks of logits."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..contract import Backend
from ..linear import chunks
from ..linear import gate as linear_gate
from ..linear.contract import LinearCall
from ..options import FLOATS, Options
from . import gate
from .layout import Ranks, locate


class Given(NamedTuple):
    """A call as the user made it."""

    input: Tensor  # (..., H)
    linear_weight: Tensor  # (V_local, H), padding included
    target: Tensor  # (...)
    linear_bias: Tensor | None  # (V_local,)
    weight: Tensor | None  # (V,)
    options: Options
    chunk_rows: int | None
    vocab_start: int | None
    vocab_size: int | None
    backend: str | None


def judge(given: Given, ranks: Ranks) -> tuple[LinearCall, Backend]:
    """The call of the classes that this rank holds, without padding, its leading dimensions flattened.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: the message says what was expected and what came.
    """
    input, linear_weight, target, linear_bias, weight, options, *_ = given
    tensors: list[Any] = [input, linear_weight, target]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TypeError(f"expected tensors, got {', '.join(type(tensor).__name__ for tensor in tensors)}")
    if linear_weight.dim() != 2:
        raise ValueError(
            f"expected linear_weight (V_local, H), got shape {tuple(linear_weight.shape)}; the classes of a "
            "K-dimensional loss cannot be sharded"
        )
    linear_gate.check_shapes(input, linear_weight, target, linear_bias, None)
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"expected one class index a row, of shape {tuple(input.shape[:-1])} for input (..., H) of shape "
            f"{tuple(input.shape)}, got {tuple(target.shape)}; probabilities cannot be sharded"
        )
    gate.check_tensors(input, linear_weight, target, linear_bias)
    factors = [input, linear_weight] if linear_bias is None else [input, linear_weight, linear_bias]
    dtype = linear_gate.product_dtype(factors)
    if dtype is None or any(tensor.dtype not in FLOATS for tensor in factors):
        raise TypeError(
            "expected input, linear_weight and linear_bias of one floating dtype, got "
            f"{', '.join(str(tensor.dtype) for tensor in factors)}; cast them, or call under autocast"
        )
    columns, H = linear_weight.shape
    layout = locate(columns, given.vocab_start, given.vocab_size, ranks)
    x, y = input.reshape(-1, H), target.reshape(-1)
    # A row of logits, which takes no memory, has all that is judged of them.
    row = input.new_zeros((), dtype=dtype).expand(min(1, len(x)), columns)
    seen, backend = gate.judge(row, y[:1], weight, options, layout, given.backend)
    options = seen.options._replace(dtype=seen.options.dtype or dtype)
    # The same on every rank, however many of the classes it holds.
    rows = linear_gate.chunk_rows(given.chunk_rows, None)
    rows = rows or chunks.most_rows(input, dtype, -(-layout.shard.total // ranks.size))
    W, bias = linear_weight, linear_bias
    if layout.held < columns:
        W, bias = W[: layout.held], None if bias is None else bias[: layout.held]
    return linear_gate.with_memory(LinearCall(x, W, y, bias, weight, options, dtype, rows)), backend
