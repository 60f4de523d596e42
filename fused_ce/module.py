"""`CrossEntropyLoss`: `torch.nn.CrossEntropyLoss` with fused_ce's kernels and keywords."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Generic, Literal, overload

import torch
from torch import Tensor
from typing_extensions import TypeVar  # torch requires it

from .functional import CrossEntropyOutput, cross_entropy

# What a call returns, as return_stats has it. Its default lets CrossEntropyLoss stand in annotations as torch's does.
Result = TypeVar("Result", default=Tensor)


class CrossEntropyLoss(torch.nn.CrossEntropyLoss, Generic[Result]):
    """A drop-in for `torch.nn.CrossEntropyLoss`; see `fused_ce.cross_entropy` for every argument.

    Shape:
        input (N, C), (C) or (N, C, d1..dk); target (N), () or (N, d1..dk), or probabilities of the
        input's shape; output a scalar, or the target's shape with reduction="none"; a
        `fused_ce.CrossEntropyOutput` with return_stats.
    """

    @overload
    def __init__(
        self: CrossEntropyLoss[Tensor],
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        dtype: torch.dtype | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        lse_square_scale: float = 0.0,
        inplace: bool = False,
        return_stats: Literal[False] = False,
        backend: str | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: CrossEntropyLoss[CrossEntropyOutput],
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        dtype: torch.dtype | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        lse_square_scale: float = 0.0,
        inplace: bool = False,
        return_stats: Literal[True],
        backend: str | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self: CrossEntropyLoss[Tensor | CrossEntropyOutput],
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        dtype: torch.dtype | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        lse_square_scale: float = 0.0,
        inplace: bool = False,
        return_stats: bool,
        backend: str | None = None,
    ) -> None: ...
    def __init__(
        self,
        weight: Tensor | None = None,  # (C,)
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        dtype: torch.dtype | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        lse_square_scale: float = 0.0,
        inplace: bool = False,
        return_stats: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.dtype = dtype
        self.logit_scale = logit_scale
        self.softcap = softcap
        self.lse_square_scale = lse_square_scale
        self.inplace = inplace
        self.return_stats = return_stats
        self.backend = backend

    def forward(  # type: ignore[override]
        self,
        input: Tensor,  # (N, C)
        target: Tensor,  # (N,)
        num_items: float | Tensor | None = None,  # ()
        grad_scale: float | Tensor | None = None,  # ()
    ) -> Result:
        return cross_entropy(  # type: ignore[return-value]
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            dtype=self.dtype,
            logit_scale=self.logit_scale,
            softcap=self.softcap,
            lse_square_scale=self.lse_square_scale,
            num_items=num_items,
            grad_scale=grad_scale,
            inplace=self.inplace,
            return_stats=self.return_stats,
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
        weight = [] if self.weight is None else [f"weight={tuple(self.weight.shape)}"]
        return ", ".join(weight + [f"{name}={value!r}" for name, value in self._chosen().items()])

    def __prepare_scriptable__(self) -> torch.nn.CrossEntropyLoss:
        """What torch.jit.script compiles in this module's place, and leaves in a model that holds it: torch's own.

        Raises:
            NotImplementedError: a keyword is used that torch's module does not have.
        """
        names = ("ignore_index", "reduction", "label_smoothing")
        if own := [f"{name}={value!r}" for name, value in self._chosen().items() if name not in names]:
            raise NotImplementedError(
                f"torch.jit.script runs torch's own cross entropy, which has no {', '.join(own)}; it is deprecated: "
                "use torch.compile or torch.export, or script the model without its loss"
            )
        theirs = torch.nn.CrossEntropyLoss(self.weight, **{name: getattr(self, name) for name in names})
        return theirs.train(self.training)

    def _chosen(self) -> dict[str, Any]:
        """The options that are not the default, but for the weight."""
        given, parameters = vars(self), inspect.signature(CrossEntropyLoss.__init__).parameters.items()
        return {name: given[name] for name, its in parameters if name in given and given[name] != its.default}
