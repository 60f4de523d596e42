"""What a call asks for, checked once."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")
_LARGEST = torch.finfo(torch.float64).max
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # of logits, probabilities and weights


class Shard(NamedTuple):
    """Which of all classes the logits of a call hold, where others hold the rest."""

    first: int  # how many come before
    total: int  # how many there are in all


class Options(NamedTuple):
    """Everything in a call that is not a tensor of the formula; the first five are the kernels', in this order."""

    ignore_index: int = -100
    label_smoothing: float = 0.0  # e
    logit_scale: float = 1.0  # k
    softcap: float | None = None  # s; None: no softcap
    lse_square_scale: float = 0.0  # L
    reduction: str = "mean"
    dtype: torch.dtype | None = None  # of the loss; None: the input's
    num_items: float | Tensor | None = None  # (), replaces the divisor of the mean
    grad_scale: float | Tensor | None = None  # (), the upstream gradient to expect; None: 1
    inplace: bool = False
    return_stats: bool = False
    shard: Shard | None = None  # None: the logits hold all classes

    @property
    def is_plain(self) -> bool:
        """Whether `torch.nn.functional.cross_entropy` can express the call."""
        # A tensor that equals the default is not the default: it would get no gradient.
        return (
            not isinstance(self.logit_scale, Tensor)
            and self.logit_scale == 1.0
            and self.softcap is None
            and not isinstance(self.lse_square_scale, Tensor)
            and self.lse_square_scale == 0.0
            and self.num_items is None
            and not self.return_stats
        )

    def keywords(self) -> dict[str, Any]:
        """As `cross_entropy` takes them."""
        given = self._asdict()
        given.pop("shard")
        return given

    @property
    def smoothing(self) -> float:
        """torch reads a smoothing that is not above zero (NaN too) as none."""
        return self.label_smoothing if self.label_smoothing > 0 else 0.0

    def expected(self, dtype: torch.dtype) -> float:
        """The upstream gradient to expect on a CPU, rounded as it will arrive: in `dtype`, the loss's."""
        if self.grad_scale is None:
            return 1.0
        return torch.as_tensor(self.grad_scale, dtype=torch.float64, device="cpu").to(dtype).item()


def check_keywords(options: Options, logits: torch.dtype = torch.float32) -> Options:
    """Refuse values of the keywords that torch does not have; torch judges its own.

    Returns:
        The options, with num_items and grad_scale as numbers or 0-d tensors.

    Raises:
        ValueError: a keyword is outside its range; the message says what was expected and what came.
        TypeError: a keyword is of another type; likewise.
    """
    if options.dtype is not None and not isinstance(options.dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype or None (that of the input), got {options.dtype!r}")
    if options.dtype not in (None, *FLOATS) and not options.is_plain:
        raise TypeError(f"dtype must be floating, for a loss, got {options.dtype}")
    for name in ("logit_scale", "softcap", "lse_square_scale"):
        value = getattr(options, name)
        if isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a number, got a tensor, which would get no gradient; apply it to the logits"
            )
        if not _is_number(value) and not (value is None and name == "softcap"):
            raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}; pass a float")
    # Comparisons, not math.isfinite: torch.compile makes a number that changes symbolic.
    if not -math.inf < options.logit_scale < math.inf:
        raise ValueError(f"logit_scale must be a finite number, got {options.logit_scale}")
    if options.softcap is not None and not (0.0 < options.softcap < math.inf):
        raise ValueError(f"softcap must be a positive finite number or None (no softcap), got {options.softcap}")
    if not -math.inf < options.lse_square_scale < math.inf:
        raise ValueError(f"lse_square_scale must be a finite number, got {options.lse_square_scale}")
    if logits != torch.float64:
        _check_float32(options)
    if options.num_items is not None and options.reduction != "mean":
        raise ValueError(
            f'num_items replaces the divisor of reduction="mean", got reduction="{options.reduction}"; '
            "drop num_items or use the mean"
        )
    num_items, grad_scale = _scalar("num_items", options.num_items), _scalar("grad_scale", options.grad_scale)
    return options._replace(num_items=num_items, grad_scale=grad_scale)


def _check_float32(options: Options) -> None:
    """Logits that are not float64 are computed in float32, which has to hold the numbers too."""
    info = torch.finfo(torch.float32)
    for name in ("logit_scale", "softcap", "lse_square_scale"):
        value = getattr(options, name)
        if value is not None and not -info.max <= value <= info.max:
            raise ValueError(f"{name} must be at most {info.max:.4g}, the largest float32, got {value}; drop it")
    if options.softcap is not None and options.softcap < info.tiny:
        raise ValueError(
            f"softcap must be at least {info.tiny:.4g}, the least normal float32, got {options.softcap}; drop it"
        )


def _scalar(name: str, value: float | Tensor | None) -> float | Tensor | None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got a tensor of shape {tuple(value.shape)}")
        if value.is_complex():
            raise TypeError(f"{name} must be real, got {value.dtype}; pass its real part")
        return value if value.dim() == 0 else value.reshape(())  # DataParallel hands out parts of shape (1,)
    if value is not None and not _is_number(value):
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {value!r}; pass a float")
    if value is not None and not 0 < value <= _LARGEST:
        raise ValueError(f"{name} must be a positive finite number, got {value}")
    return value


def _is_number(value: object) -> bool:
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
        return True
    return not torch.compiler.is_compiling() and isinstance(value, Real)  # NumPy's
