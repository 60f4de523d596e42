"""THE table of linear cross entropies: tensors, options, and what float64 makes of them. A new option is a new row."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from cases import EVERYTHING
from oracle import composed, double
from torch import Tensor

from fused_ce import linear_cross_entropy, operators
from fused_ce.contract import Call
from fused_ce.options import Options

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
H, V = 24, 131


@dataclass(frozen=True, eq=False)
class Case:
    id: str
    N: int = 37
    dtype: torch.dtype = f32
    bias: bool = False
    weight: bool = False
    probs: bool = False
    ignored: float = 0.0  # share of the rows
    frozen: tuple[str, ...] = ()  # which tensors want no gradient
    upstream: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    chunk_rows: int | None = 8  # ragged, for 37 rows: 8, 8, 8, 8, 5
    interpreted: bool = False  # whether Triton's slow interpreter runs it, too

    def __str__(self) -> str:
        return self.id

    def build(self) -> dict[str, Tensor]:
        """input, linear_weight, linear_bias, target, weight: those that there are."""
        seed = torch.Generator().manual_seed(zlib.crc32(self.id.encode()))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=seed, dtype=f64).to(self.dtype)

        found = {"input": normal(self.N, H), "linear_weight": normal(V, H) * 0.3}
        if self.bias:
            found["linear_bias"] = normal(V)
        for name, tensor in found.items():
            tensor.requires_grad_(name not in self.frozen)
        if self.probs:
            return found | {"target": torch.randn(self.N, V, generator=seed, dtype=f64).softmax(1).to(self.dtype)}
        target = torch.randint(V, (self.N,), generator=seed)
        found["target"] = target.masked_fill(torch.rand(self.N, generator=seed) < self.ignored, -100)
        if self.weight:
            found["weight"] = torch.linspace(0.25, 2, V).to(self.dtype)
        return found

    def ours(self, tensors: dict[str, Tensor], **keywords: Any) -> Tensor:
        loss = linear_cross_entropy(**tensors, **self.options, chunk_rows=self.chunk_rows, **keywords)
        assert isinstance(loss, Tensor)
        return loss

    def exact(self, tensors: dict[str, Tensor]) -> Tensor:
        """The loss in float64, differentiable."""
        options = Options(**self.options, dtype=f64)
        logits = F.linear(tensors["input"], tensors["linear_weight"], tensors.get("linear_bias"))
        return operators.composite(Call(logits, tensors["target"], tensors.get("weight"), options))[0]

    def eager(self, tensors: dict[str, Tensor]) -> Tensor:
        """As a user of torch would write it."""
        logits = F.linear(tensors["input"], tensors["linear_weight"], tensors.get("linear_bias"))
        return composed(logits, tensors["target"], tensors.get("weight"), Options(**self.options))


def in_float64(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: double(tensor).requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def gradients(loss: Tensor, tensors: dict[str, Tensor], upstream: float) -> dict[str, Tensor]:
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    given = torch.linspace(upstream, 2 * upstream, loss.numel()) if loss.dim() else torch.tensor(upstream)
    found = torch.autograd.grad(loss, list(wanted.values()), given.to(loss), retain_graph=True)
    return dict(zip(wanted, found, strict=True))


def distance(got: Tensor, exact: Tensor) -> float:
    """Root mean square of the error, relative to that of the exact values."""
    if torch.equal(got.double(), exact):
        return 0.0
    return float((got.double() - exact).norm() / exact.norm())


def _cases() -> Iterator[Case]:
    for reduction in ("mean", "sum", "none"):
        for dtype in (f32, f64, bf16, f16):
            name = f"{reduction}-{str(dtype)[6:]}"
            yield Case(
                name, dtype=dtype, options={"reduction": reduction}, ignored=0.3, interpreted=dtype in (f32, f16)
            )
            yield Case(f"{name}-upstream-3", dtype=dtype, options={"reduction": reduction}, upstream=3.0, bias=True)
        for weight in (False, True):
            options = EVERYTHING | {"reduction": reduction}
            case = {"weight": weight, "bias": True, "options": options, "ignored": 0.5}
            yield Case(f"{reduction}-everything{'-weight' * weight}", **case, upstream=3.0, interpreted=True)
        yield Case(f"{reduction}-weight", weight=True, options={"reduction": reduction}, ignored=0.5)
        yield Case(f"{reduction}-probabilities", probs=True, options={"reduction": reduction}, upstream=3.0)
        yield Case(f"{reduction}-no-gradient-of-input", frozen=("input",), options={"reduction": reduction}, bias=True)
    for dtype in (bf16, f16):
        everything = {"weight": True, "bias": True, "options": EVERYTHING, "ignored": 0.5}
        yield Case(f"everything-{str(dtype)[6:]}", dtype=dtype, **everything, upstream=3.0)
        yield Case(f"one-chunk-{str(dtype)[6:]}", dtype=dtype, chunk_rows=64, bias=True)
    yield Case("num-items", options={"num_items": 7.0}, ignored=0.3)
    yield Case("num-items-z-loss", options={"num_items": 7.0, "lse_square_scale": 1e-2}, weight=True, ignored=0.3)
    yield Case("probabilities-smoothing", probs=True, options={"label_smoothing": 0.1}, interpreted=True)
    for N in (1, 7, 8, 9, 300):
        yield Case(f"rows-{N}", N=N)
    yield Case("small", chunk_rows=None, bias=True, ignored=0.3)
    for name in ("input", "linear_weight", "linear_bias"):
        others = tuple({"input", "linear_weight", "linear_bias"} - {name})
        yield Case(f"frozen-{name}", bias=True, frozen=(name,))
        yield Case(f"only-{name}", bias=True, frozen=others)
    yield Case("all-ignored", ignored=1.1, options={"reduction": "sum"}, bias=True, interpreted=True)
    yield Case("all-ignored-mean", ignored=1.1, bias=True, interpreted=True)
    yield Case("all-ignored-none", ignored=1.1, options={"reduction": "none"})


CASES = list(_cases())
