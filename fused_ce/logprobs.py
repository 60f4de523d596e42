"""`token_logprobs`, `linear_token_logprobs`: what GRPO, PPO and DPO need of a token, from logits or hidden states."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .functional import CrossEntropyOutput, cross_entropy
from .linear.functional import linear_cross_entropy

_LEFT_OUT = -100


@overload
def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    return_entropy: Literal[False] = False,
) -> Tensor: ...
@overload
def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    return_entropy: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def token_logprobs(
    logits: Tensor,  # (..., V)
    ids: Tensor,  # (...)
    *,
    temperature: float | Tensor = 1.0,  # () or broadcast against (...)
    mask: Tensor | None = None,  # (...)
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probability of one token a row: log_softmax(logits / temperature) at the ids.

    Nothing of the logits' size is made in forward; backward makes their gradient.

    Args:
        logits: shape (..., V); float32, float64, bfloat16 or float16, of which 16 bits are computed in float32.
        ids: shape (...), of any integer dtype, in [0, V); rows with -100, as labels have it, are left out.
        temperature: a positive number; or a tensor of numbers for the rows, which may want a gradient, and costs a copy
            of the logits in float32.
        mask: shape (...); rows where it is False or 0 are left out: they cost nothing, whatever their logits and ids
            are, and have log-probability, entropy and gradient 0.
        return_entropy: give the entropy of each row's distribution too, in nats, from the same pass, with its gradient.

    Returns:
        Log-probabilities of shape (...), float32, or float64 for float64 logits; with return_entropy a tuple of them
        and of entropies.

    Raises:
        IndexError: an id outside [0, V) in a row that is not left out (CPU). On a GPU see `cross_entropy`.
        ValueError, TypeError: shapes that do not go together, a temperature that is not positive, ids of another dtype.

    For several ids a row: `out = cross_entropy(logits, any_ids, return_stats=True)`, then
    `logits.gather(-1, ids) - out.lse[..., None]`, which is differentiable.
    """
    if logits.dim() < 1 or ids.shape != logits.shape[:-1]:
        raise ValueError(
            f"expected ids of the logits' shape without the last dimension, got ids {tuple(ids.shape)} and logits "
            f"{tuple(logits.shape)}; for several ids a row see the docstring"
        )
    scale = 1.0
    if isinstance(temperature, Tensor):
        logits = logits.to(_acc(logits)) / _of_rows(temperature, ids)
    else:
        scale = _inverse(temperature)
    out = cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        _counted(ids, mask).reshape(-1),
        reduction="none",
        dtype=_acc(logits),
        logit_scale=scale,
        return_stats=return_entropy,
    )
    return _outputs(out, ids)


@overload
def linear_token_logprobs(
    hidden: Tensor,
    linear_weight: Tensor,
    ids: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    return_entropy: Literal[False] = False,
    chunk_rows: int | None = None,
) -> Tensor: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    linear_weight: Tensor,
    ids: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    return_entropy: Literal[True],
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_token_logprobs(
    hidden: Tensor,
    linear_weight: Tensor,
    ids: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    return_entropy: bool,
    chunk_rows: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def linear_token_logprobs(
    hidden: Tensor,  # (..., H)
    linear_weight: Tensor,  # (V, H)
    ids: Tensor,  # (...)
    *,
    linear_bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,  # () or broadcast against (...)
    logit_scale: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,  # (...)
    return_entropy: bool = False,
    chunk_rows: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`token_logprobs` of `hidden @ linear_weight.T + linear_bias`, a chunk of logits at a time.

    Backward makes each chunk's logits again, and from them the gradients of hidden, linear_weight and linear_bias.

    Args:
        hidden: shape (..., H); float32, float64, bfloat16 or float16.
        linear_weight: shape (V, H), in hidden's dtype (any under autocast).
        ids, mask, return_entropy: see `token_logprobs`; rows left out take part in no product on a CPU.
        linear_bias: shape (V,).
        temperature: a positive number, which divides the logits last; or a tensor of numbers for the rows, which
            divides the hidden states, in their dtype, and so goes with neither linear_bias nor softcap.
        logit_scale: the logits are multiplied by it first.
        softcap: then bounded smoothly to (-softcap, softcap), as by Gemma 2.
        chunk_rows: see `linear_cross_entropy`.

    Returns:
        See `token_logprobs`.

    Raises:
        IndexError, ValueError, TypeError: see `token_logprobs`.
        RuntimeError: shapes or dtypes that do not go together.
    """
    if hidden.dim() < 1 or ids.shape != hidden.shape[:-1]:
        raise ValueError(
            "expected ids of the hidden states' shape without the last dimension, got ids "
            f"{tuple(ids.shape)} and hidden {tuple(hidden.shape)}"
        )
    scale = logit_scale
    if isinstance(temperature, Tensor):
        if linear_bias is not None or softcap is not None:
            raise ValueError(
                "expected a number as temperature beside linear_bias or softcap, got a tensor, which can only divide "
                "the hidden states; pass a float, or make the logits and call token_logprobs"
            )
        hidden = (hidden / _of_rows(temperature, ids)).to(hidden.dtype)
    else:
        # s tanh(k z / s) / T is the formula's softcap again, with s / T and k / T.
        scale = logit_scale * _inverse(temperature)
        softcap = None if softcap is None else softcap * _inverse(temperature)
    out = linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        linear_weight,
        _counted(ids, mask).reshape(-1),
        linear_bias=linear_bias,
        reduction="none",
        dtype=_acc(hidden),
        logit_scale=scale,
        softcap=softcap,
        return_stats=return_entropy,
        chunk_rows=chunk_rows,
    )
    return _outputs(out, ids)


def _outputs(out: Tensor | CrossEntropyOutput, ids: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    if isinstance(out, Tensor):
        return -out.reshape(ids.shape)
    # Its gradient, once the kernels give one, needs nothing here.
    return -out.loss.reshape(ids.shape), out.entropy.reshape(ids.shape)


def _counted(ids: Tensor, mask: Tensor | None) -> Tensor:
    """The ids, with the value that is ignored in the rows that are left out."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"expected ids of an integer dtype, such as int64, got {ids.dtype}")
    ids = ids.long()
    if mask is None:
        return ids
    if mask.shape != ids.shape:
        raise ValueError(f"expected a mask of the ids' shape {tuple(ids.shape)}, got {tuple(mask.shape)}")
    return torch.where(mask.bool(), ids, _LEFT_OUT)


def _acc(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _of_rows(temperature: Tensor, ids: Tensor) -> Tensor:  # () or broadcast against (...) -> (..., 1)
    return temperature.expand(ids.shape).unsqueeze(-1)


def _inverse(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; for greedy decoding take the argmax")
    return 1.0 / temperature
