"""Which calls of linear cross entropy go through the loop, which through torch's linear and then `cross_entropy`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _torch, gate
from ..contract import Backend, Call
from ..options import FLOATS, Options
from . import products
from .contract import LinearCall

# Of a product. The loop costs some 150 us of Python, which is as much as it saves here.
_LOGITS, _MULTIPLICATIONS = 1 << 22, 1 << 27


def check_shapes(
    input: Tensor,  # (..., H)
    linear_weight: Tensor,  # (V, d1..dk, H)
    target: Tensor,
    linear_bias: Tensor | None,  # (V, d1..dk)
    ignore_index: int | None,
) -> None:
    """What torch's `linear_cross_entropy` refuses before it computes anything, in its words.

    Raises:
        RuntimeError: shapes that do not go together, or an ignore_index for probabilities.
        ValueError: with more leading dimensions than torch knows, a target of another shape.
    """
    if input.dim() < 1:
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    classes = tuple(linear_weight.shape[:-1])
    if linear_bias is not None and tuple(linear_bias.shape) != classes:
        raise RuntimeError(f"expected linear_bias shape {classes}, got {tuple(linear_bias.shape)}")
    if len(classes) > 1 and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires"
            f" batched input, (N, {input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
        )
    logits = (*input.shape[:-1], *classes)
    if target.shape == logits and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    if input.dim() > 2 and (len(classes) > 1 or target.shape not in (input.shape[:-1], logits)):
        raise ValueError(
            f"expected target of shape {tuple(input.shape[:-1])} (class indices) or {logits} (probabilities) for input "
            f"{tuple(input.shape)} and linear_weight {tuple(linear_weight.shape)}, got {tuple(target.shape)}; a "
            "K-dimensional loss takes input (N, H)"
        )


def chunk_rows(asked: int | None, options: object) -> int | None:
    """Rows of a chunk as the call wants them, by either keyword; None: ours to choose.

    Raises:
        ValueError, TypeError: not a positive integer; options that are not torch's.
    """
    if options is not None and not hasattr(options, "batch_chunk_size"):
        raise TypeError(
            "options must be a torch.nn.LinearCrossEntropyOptions or None, got "
            f"{options!r} of type {type(options).__name__}; pass chunk_rows for the rows of a chunk"
        )
    if asked is not None and not (isinstance(asked, int) and asked > 0):
        raise ValueError(f"chunk_rows must be a positive integer or None (choose for me), got {asked!r}")
    return asked or getattr(options, "batch_chunk_size", None)


def judge(
    input: Tensor,  # (N, H)
    linear_weight: Tensor,  # (V, H)
    target: Tensor,  # (N,) or (N, V)
    linear_bias: Tensor | None,  # (V,)
    weight: Tensor | None,  # (V,)
    options: Options,
    chunk_rows: int | None,
    name: str | None,
) -> tuple[LinearCall, Backend] | None:
    """The call as the loop is to see it, and the backend for its chunks; None where it is not the loop's.

    Raises:
        ValueError, NotImplementedError: see `dispatch.choose`.
        RuntimeError: a tensor's storage was freed.
    """
    if not (input.is_cpu or input.is_cuda) or _is_small(input, linear_weight, chunk_rows):
        return None
    factors = [input, linear_weight] if linear_bias is None else [input, linear_weight, linear_bias]
    if not all(_is_plain(tensor) and tensor.dtype in FLOATS for tensor in factors):
        return None
    if any(tensor.device != input.device for tensor in (*factors, target)) or target.requires_grad:
        return None
    dtype, N = product_dtype(factors), input.shape[0]
    if dtype is None or _torch.surely(N == 0) or target.shape not in (input.shape[:1], (N, linear_weight.shape[0])):
        return None
    # The backend judges a row of logits, which takes no memory: all that matters is its shape and dtype.
    row = input.new_zeros((), dtype=dtype).expand(1, linear_weight.shape[0])
    # While compiling, whether there is a first row to take may be open.
    of_row = target.new_zeros(1, *target.shape[1:]) if torch.compiler.is_compiling() else target[:1]
    seen, backend = gate.judge(Call(row, of_row, weight, options), name)
    if backend is None:
        return None
    options = seen.options._replace(dtype=seen.options.dtype or dtype)
    call = LinearCall(input, linear_weight, target, linear_bias, weight, options, dtype, chunk_rows)
    return (call if torch.compiler.is_compiling() else with_memory(call)), backend


def _is_plain(tensor: Tensor) -> bool:
    return gate.is_strided(tensor) and (torch.compiler.is_compiling() or not tensor.is_neg())


def _is_small(input: Tensor, linear_weight: Tensor, chunk_rows: int | None) -> bool:
    """Whether torch's linear and `cross_entropy` are faster (docs/performance.md) and their logits no matter."""
    if chunk_rows is not None or not input.is_cpu or products.computed_in(input.dtype, input.device) != input.dtype:
        return False
    logits = input.shape[0] * linear_weight.shape[0]
    return _torch.surely(logits <= _LOGITS) and _torch.surely(logits * input.shape[1] <= _MULTIPLICATIONS)


def product_dtype(factors: list[Tensor]) -> torch.dtype | None:
    """What torch makes the products in: the factors' one dtype, or autocast's; None: it refuses them."""
    kind = factors[0].device.type
    if torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        dtypes = {tensor.dtype if tensor.dtype == torch.float64 else low for tensor in factors}
    else:
        dtypes = {tensor.dtype for tensor in factors}
    return dtypes.pop() if len(dtypes) == 1 else None


def with_memory(call: LinearCall) -> LinearCall:
    """Zeros that torch keeps without memory are made real.

    Raises:
        RuntimeError: a tensor's storage was freed.
    """
    return LinearCall(*(_torch.with_memory(tensor) for tensor in call[:5]), *call[5:])  # type: ignore[call-arg]
