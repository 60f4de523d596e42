"""`LinearCrossEntropyLoss`: `torch.nn.LinearCrossEntropyLoss` with fused_ce's loop, kernels and keywords."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Generic, Literal, overload

import torch
from torch import Tensor

from ..functional import CrossEntropyOutput
from ..module import Result
from .functional import linear_cross_entropy

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions  # from torch 2.13 on


class LinearCrossEntropyLoss(torch.nn.Module, Generic[Result]):
    """A drop-in for `torch.nn.LinearCrossEntropyLoss`; see `fused_ce.linear_cross_entropy` for every argument.

    `dtype` and `device` are, as in torch, those of the linear weight; `loss_dtype` is the loss's. The state_dict is
    torch's: linear.weight, linear.bias and weight.

    Shape:
        input (N, H), (H) or (..., H); target the same without H, or probabilities (..., V); output a scalar, or the
        target's shape with reduction="none"; a `fused_ce.CrossEntropyOutput` with return_stats.

    Raises:
        RuntimeError: a weight of another shape than (num_classes,), or label_smoothing outside [0, 1].
    """

    @overload
    def __init__(
        self: LinearCrossEntropyLoss[Tensor],
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: LinearCrossEntropyOptions | None = None,
        loss_dtype: torch.dtype | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        lse_square_scale: float = 0.0,
        return_stats: Literal[False] = False,
        chunk_rows: int | None = None,
        backend: str | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: LinearCrossEntropyLoss[CrossEntropyOutput],
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: LinearCrossEntropyOptions | None = None,
        loss_dtype: torch.dtype | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        lse_square_scale: float = 0.0,
        return_stats: Literal[True],
        chunk_rows: int | None = None,
        backend: str | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: LinearCrossEntropyLoss[Tensor | CrossEntropyOutput],
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: LinearCrossEntropyOptions | None = None,
        loss_dtype: torch.dtype | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        lse_square_scale: float = 0.0,
        return_stats: bool,
        chunk_rows: int | None = None,
        backend: str | None = None,
    ) -> None: ...
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,  # (V,)
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: LinearCrossEntropyOptions | None = None,
        loss_dtype: torch.dtype | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        lse_square_scale: float = 0.0,
        return_stats: bool = False,
        chunk_rows: int | None = None,
        backend: str | None = None,
    ) -> None:
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if label_smoothing < 0 or label_smoothing > 1.0:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        super().__init__()
        self.register_buffer("weight", weight)
        self.weight: Tensor | None
        self.num_classes, self.out_features = num_classes, out_features
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.options, self.loss_dtype = options, loss_dtype
        self.logit_scale, self.softcap, self.lse_square_scale = logit_scale, softcap, lse_square_scale
        self.return_stats, self.chunk_rows, self.backend = return_stats, chunk_rows, backend
        rows = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)

    def forward(
        self,
        input: Tensor,  # (N, H)
        target: Tensor,  # (N,)
        num_items: float | Tensor | None = None,  # ()
        grad_scale: float | Tensor | None = None,  # ()
    ) -> Result:
        linear_weight: Tensor = self.linear.weight
        linear_bias: Tensor | None = self.linear.bias
        if self.out_features:
            classes = (self.num_classes, *self.out_features)
            linear_weight = linear_weight.reshape(*classes, self.linear.in_features)
            linear_bias = None if linear_bias is None else linear_bias.reshape(classes)
        return linear_cross_entropy(  # type: ignore[return-value]
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            dtype=self.loss_dtype,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            lse_square_scale=self.lse_square_scale,
            num_items=num_items,
            grad_scale=grad_scale,
            return_stats=self.return_stats,
            chunk_rows=self.chunk_rows,
            backend=self.backend,
        )

    if TYPE_CHECKING:
        # torch's is Callable[..., Any], which hides every mistake in the arguments and in what is done with the loss.
        def __call__(
            self,
            input: Tensor,
            target: Tensor,
            num_items: float | Tensor | None = None,
            grad_scale: float | Tensor | None = None,
        ) -> Result: ...

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, ignore_index={self.ignore_index!r}"
