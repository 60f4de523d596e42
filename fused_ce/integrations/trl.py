"""TRL: its helpers by their signatures, and `patch()`, by which its trainers call them.

SFTTrainer, GRPOTrainer, DPOTrainer, RLOOTrainer and KTOTrainer of TRL 1.16 compute everything from hidden states
(`ChunkedLogProb`); others, and scripts, from logits (the three functions).
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor
from trl.trainer import utils

from ..functional import cross_entropy
from ..linear.functional import linear_cross_entropy
from ..logprobs import token_logprobs


def selective_log_softmax(
    logits: Tensor,  # (..., V)
    index: Tensor,  # (...) or (..., K)
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # the index's shape
) -> Tensor:
    """TRL's helper of this name: log_softmax(logits / temperature) at the index, of the index's shape.

    float32 where TRL's is rounded to 16 bits; rows that row_mask leaves out are 0, and with one id a row cost nothing.

    Raises:
        IndexError, ValueError, TypeError: see `fused_ce.token_logprobs`.
    """
    if index.dim() < logits.dim():
        logps: Tensor = token_logprobs(logits, index, temperature=temperature, mask=row_mask)
        return logps
    first = index[..., 0] if index.shape[-1] else index.new_zeros(index.shape[:-1])
    lse = _statistics(logits, first, temperature).lse
    found: Tensor = logits.gather(-1, index).to(lse.dtype) / temperature - lse.reshape(*index.shape[:-1], 1)
    return found if row_mask is None else found.masked_fill(row_mask == 0, 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:  # (..., V) -> (...)
    """TRL's helper of this name: entropies of softmax(logits), in nats; without chunks, whose size has no say."""
    any_ids = logits.new_zeros(logits.shape[:-1], dtype=torch.long)
    entropy: Tensor = _statistics(logits, any_ids).entropy
    return entropy.reshape(any_ids.shape)


def selective_log_softmax_and_entropy(
    logits: Tensor,  # (..., V)
    index: Tensor,  # (...)
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # (...)
) -> tuple[Tensor, Tensor]:
    """TRL's helper of this name: both, and both gradients, in one pass over the logits.

    Raises:
        IndexError, ValueError, TypeError: see `fused_ce.token_logprobs`.
    """
    logps, entropy = token_logprobs(logits, index, temperature=temperature, mask=row_mask, return_entropy=True)
    return logps, entropy if entropy_requires_grad else entropy.detach()


class ChunkedLogProb:
    """TRL's ChunkedLogProbFunction, by `linear_cross_entropy`."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (N, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities; and entropy, log_sum_sq_probs, mean_logits, is_top1 where `outputs` has them; (N,) each.

        What the kernels do not give (log_sum_sq_probs; mean_logits of capped logits) is TRL's.
        """
        softcap = final_logit_softcapping
        if "log_sum_sq_probs" in outputs or ("mean_logits" in outputs and softcap is not None):
            found: tuple[Tensor | None, ...] = _THEIRS["_ChunkedLogProbFunction"].apply(
                hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
            )
            return found
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        out = linear_cross_entropy(
            hidden,
            weight,
            targets,
            linear_bias=bias,
            reduction="none",
            dtype=torch.promote_types(hidden.dtype, torch.float32),
            logit_scale=logit_scale / temperature,
            softcap=None if softcap is None else softcap / temperature,
            return_stats=True,
        )
        entropy = out.entropy if "entropy" in outputs else None
        mean_logits = None
        if "mean_logits" in outputs:
            with torch.no_grad():
                acc = out.lse.dtype
                mean_logits = hidden.to(acc) @ weight.mean(0, dtype=acc)
                mean_logits = mean_logits if bias is None else mean_logits + bias.mean(dtype=acc)
                mean_logits = mean_logits * (logit_scale / temperature)
        return -out.loss, entropy, None, mean_logits, out.correct if "is_top1" in outputs else None


def patch() -> None:
    """Let TRL's trainers, those made before too, compute log-probabilities and entropies here, until `unpatch()`.

    On a CPU the trainers then leave out the rows whose label is -100, as TRL does on a GPU. Calling it again does
    nothing more, save for modules of TRL that were imported since.

    Raises:
        RuntimeError: a version of TRL whose helpers have other arguments.
    """
    for name, theirs in _THEIRS.items():
        if name != "_use_triton" and _arguments(theirs) != _arguments(_OURS[name]):
            raise RuntimeError(
                f"expected trl.trainer.utils.{name} with arguments {_arguments(_OURS[name])}, as TRL 1.16 has it, got "
                f"{_arguments(theirs)}; call this module's functions yourself"
            )
    _swap(_THEIRS, _OURS)


def unpatch() -> None:
    """Undo `patch()`."""
    _swap(_OURS, _THEIRS)


def _swap(old: dict[str, Any], new: dict[str, Any]) -> None:
    for module in [module for name, module in list(sys.modules.items()) if name.startswith("trl.")]:
        for key, value in list(vars(module).items()):
            for name in _names_in(module):
                if value is old[name]:
                    setattr(module, key, new[name])


def _names_in(module: Any) -> list[str]:
    """What is replaced in this module: the kernels keep what they are made of, and one name is meant for one place."""
    if module.__name__.startswith("trl.kernels"):
        return []
    return [name for name in _OURS if name != "_use_triton" or module is utils]


def _arguments(function: Any) -> list[str]:
    if isinstance(function, type):
        function = function.forward if issubclass(function, torch.autograd.Function) else function.apply  # type: ignore[attr-defined]
    return [name for name in inspect.signature(function).parameters if name != "ctx"]


def _statistics(logits: Tensor, index: Tensor, temperature: float = 1.0) -> Any:  # (..., V), (...)
    return cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        index.reshape(-1),
        reduction="none",
        dtype=torch.promote_types(logits.dtype, torch.float32),
        logit_scale=1 / temperature,
        return_stats=True,
    )


def _every_device(device: torch.device) -> bool:
    """In place of the helper by which TRL decides whether to leave rows out: a kernel made for it is there."""
    return True


_OURS: dict[str, Any] = {
    "selective_log_softmax": selective_log_softmax,
    "entropy_from_logits": entropy_from_logits,
    "selective_log_softmax_and_entropy": selective_log_softmax_and_entropy,
    "_ChunkedLogProbFunction": ChunkedLogProb,
    "_use_triton": _every_device,
}
# Bound before anybody here replaces them; what this TRL does not have is not replaced.
_THEIRS: dict[str, Any] = {name: vars(utils)[name] for name in list(_OURS) if name in vars(utils)}
_OURS = {name: _OURS[name] for name in _THEIRS}
