"""What a call asks for, checked once; the field order is the one the C++ and Triton kernels use."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


class Options(NamedTuple):
    """Everything in a call that is not a tensor of the formula (see `reference.py` for the letters)."""

    ignore_index: int = -100
    label_smoothing: float = 0.0  # e
    logit_scale: float = 1.0  # k
    softcap: float | None = None  # s; None: no softcap
    lse_square_scale: float = 0.0  # L
    reduction: str = "mean"
    dtype: torch.dtype | None = None  # of the loss; None: the input's
    num_items: float | Tensor | None = None  # (), replaces the divisor of the mean

    @property
    def is_plain(self) -> bool:
        """Whether `torch.nn.functional.cross_entropy` can express the call."""
        return (
            self.logit_scale == 1.0
            and self.softcap is None
            and self.lse_square_scale == 0.0
            and self.num_items is None
        )


def check_extras(options: Options) -> None:
    """Refuse values of the keywords that torch does not have; torch judges its own.

    Raises:
        ValueError: a keyword is outside its range; the message says what was expected and what came.
    """
    if not math.isfinite(options.logit_scale):
        raise ValueError(f"logit_scale must be a finite number, got {options.logit_scale}")
    if options.softcap is not None and not (0.0 < options.softcap < math.inf):
        raise ValueError(f"softcap must be a positive finite number or None (no softcap), got {options.softcap}")
    if not math.isfinite(options.lse_square_scale):
        raise ValueError(f"lse_square_scale must be a finite number, got {options.lse_square_scale}")
    if options.num_items is not None and not options.reduction == "mean":
        raise ValueError(
            f'num_items replaces the divisor of reduction="mean", got reduction="{options.reduction}"; '
            "drop num_items or use the mean"
        )
