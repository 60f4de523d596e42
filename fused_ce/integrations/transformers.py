"""transformers: `patch(model)`, and the losses it puts into a model of Hugging Face's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers.loss import loss_utils

from ..functional import cross_entropy
from . import linear_head

_OPTIONS = ("backend", "inplace", "label_smoothing", "logit_scale", "lse_square_scale", "softcap")
Model = TypeVar("Model", bound=nn.Module)


def causal_lm_loss(
    logits: Tensor,  # (..., T, V)
    labels: Tensor,  # (..., T)
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,  # () or (1,)
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,  # (..., T)
    **keywords: Any,
) -> Tensor:
    """What transformers' ForCausalLMLoss computes, a float32 loss without the float32 copy of the logits.

    Args:
        logits: of every position; float32, float64, bfloat16 or float16.
        labels: the tokens themselves: position t is judged by label t + 1, the last by none.
        vocab_size: V.
        num_items_in_batch: divides the sum of the losses; None: the number of labels that are not ignored.
        ignore_index: labels with this value do not count.
        shift_labels: labels that are shifted already, in place of `labels`.
        keywords: `label_smoothing`, `logit_scale`, `softcap`, `lse_square_scale`, `inplace` and `backend` are those of
            `fused_ce.cross_entropy`; whatever else models hand their loss has no effect, as in transformers.

    Returns:
        A scalar, float32 (float64 for float64 logits).

    Raises:
        IndexError, ValueError, RuntimeError, TypeError: see `fused_ce.cross_entropy`.
    """
    target = linear_head.shifted(labels, ignore_index) if shift_labels is None else shift_labels
    return _loss(logits, target, vocab_size, num_items_in_batch, ignore_index, keywords)


def masked_lm_loss(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    vocab_size: int,
    num_items_in_batch: int | Tensor | None = None,  # () or (1,)
    ignore_index: int = -100,
    **keywords: Any,
) -> Tensor:
    """What transformers' ForMaskedLMLoss computes: label t judges position t. See `causal_lm_loss`."""
    return _loss(logits, labels, vocab_size, num_items_in_batch, ignore_index, keywords)


def patch(model: Model, *, linear: bool = False, **options: Any) -> Model:
    """Let a causal or masked language model of transformers compute its loss here, until `unpatch(model)`.

    `model(..., labels=...)`, Trainer, gradient accumulation, PEFT (before or after), DDP, and torch.compile see the
    same loss as before. Calling it again replaces the options.

    Args:
        model: a PreTrainedModel, or one that PEFT or torch.compile wrapped, of transformers 4.49 or later.
        linear: for causal language models whose head is an nn.Linear: in training, a forward with labels never makes
            the logits (`fused_ce.linear_cross_entropy`), and its output has none. They are made, and the loss from
            them, in eval mode, and where `logits_to_keep` or `skip_logits=False` asks for them; `skip_logits=True` asks
            for none in eval mode too.
        options: `label_smoothing`, `logit_scale`, `softcap`, `lse_square_scale`, `backend` and, but for linear,
            `inplace`; see `fused_ce.cross_entropy`.

    Returns:
        The model.

    Raises:
        TypeError: an option that does not exist, or a model that computes its loss in another way; the message says
            which, and what to do.
        RuntimeError: this transformers has no hook for the loss.
    """
    if unknown := sorted(options.keys() - set(_OPTIONS) | ({"inplace"} & options.keys() if linear else set())):
        raise TypeError(
            f"no option {', '.join(unknown)}{' with linear=True' if linear else ''}; expected some of "
            f"{', '.join(name for name in _OPTIONS if not (linear and name == 'inplace'))}"
        )
    own, cls = _unwrapped(model), linear_head.stock_class(_unwrapped(model))
    name, hook = cls.__name__, getattr(cls, "loss_function", None)
    if issubclass(cls, transformers.PreTrainedModel) and not (isinstance(hook, property) and hook.fset):
        raise RuntimeError(
            f"expected transformers 4.49 or later, whose models take another loss, got {transformers.__version__}; "
            "upgrade it, or train under `with fused_ce.patched():`"
        )
    if not (isinstance(hook, property) and "loss_function" in inspect.getsource(inspect.unwrap(cls.forward))):
        raise TypeError(
            f"{name} does not compute its loss by loss_function; expected a causal or masked language model of "
            "transformers that does. Train under `with fused_ce.patched():`"
        )
    losses: dict[Any, Callable[..., Tensor]] = {
        loss_utils.ForCausalLMLoss: causal_lm_loss,
        loss_utils.ForMaskedLMLoss: masked_lm_loss,
    }
    theirs = own.loss_function
    mine = theirs.func if _is_ours(theirs) else losses.get(theirs)
    if mine is None:
        raise TypeError(
            f"the loss of {name} is {getattr(theirs, '__name__', theirs)}; expected that of a causal or masked "
            "language model. Train under `with fused_ce.patched():`"
        )
    if linear:
        linear_head.check(own, mine is causal_lm_loss, options.get("softcap"))
    linear_head.remove(own)
    own.loss_function = functools.partial(mine, **options)
    if linear:
        linear_head.put(own)
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch(model)`; a model that is not patched stays as it is. Returns the model."""
    own = _unwrapped(model)
    linear_head.remove(own)
    if _is_ours(getattr(own, "loss_function", None)):
        del own._loss_function
    return model


def _is_ours(loss: object) -> bool:
    return isinstance(loss, functools.partial) and loss.func in (causal_lm_loss, masked_lm_loss)


def _unwrapped(model: Any) -> Any:
    """The model itself, from within torch.compile's, DDP's and PEFT's wrappers: only there is the hook heeded."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a model of transformers, got {type(model).__name__}")
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    of_peft: Any = getattr(model, "get_base_model", None)
    return of_peft() if of_peft else model


def _loss(
    logits: Tensor,  # (..., V)
    target: Tensor,  # (...)
    vocab_size: int,
    num_items: int | Tensor | None,  # () or (1,)
    ignore_index: int,
    keywords: dict[str, Any],
) -> Tensor:
    loss: Tensor = cross_entropy(
        logits.reshape(-1, vocab_size),
        target.reshape(-1).to(logits.device),
        ignore_index=ignore_index,
        dtype=None if logits.dtype == torch.float64 else torch.float32,
        num_items=linear_head.divisor(num_items, logits),
        **{name: keywords[name] for name in _OPTIONS if name in keywords},
    )
    return loss
