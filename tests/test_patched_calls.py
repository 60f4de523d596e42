"""Calls of torch's cross entropy under `patch`, and under an assignment as Liger makes it, give what torch gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ce

TORCHS = F.cross_entropy


@contextmanager
def assigned() -> Iterator[None]:
    """As Liger patches torch: a global assignment, undone here alone."""
    F.cross_entropy = fused_ce.cross_entropy
    try:
        yield
    finally:
        F.cross_entropy = TORCHS


def logits(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()


X, Y = logits(6, 10), torch.arange(6)


class Subclass(Tensor):
    pass


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y)


def in_default_device() -> Tensor:
    with torch.device("cpu"):
        return F.cross_entropy(X, Y)


def forward_ad() -> Tensor:
    return torch.func.jvp(lambda x: F.cross_entropy(x, Y), (X,), (torch.ones_like(X),))[1]


def traced() -> Tensor:
    return torch.fx.symbolic_trace(lambda x, y: F.cross_entropy(x, y))(X, Y)


CALLS: dict[str, Callable[[], Any]] = {
    "function": lambda: F.cross_entropy(X, Y),
    "module": lambda: nn.CrossEntropyLoss()(X, Y),
    "positional": lambda: F.cross_entropy(X, Y, torch.ones(10), None, 3, None, "sum", 0.1),
    "keywords": lambda: F.cross_entropy(target=Y, input=X, reduction="none"),
    "probabilities": lambda: F.cross_entropy(X, X.softmax(1)),
    "deprecated": lambda: F.cross_entropy(X, Y, size_average=False),
    "pixels": lambda: F.cross_entropy(logits(2, 5, 3, 3), torch.arange(18).view(2, 3, 3) % 5, ignore_index=1),
    "one row": lambda: F.cross_entropy(X[0], Y[3]),
    "bfloat16": lambda: F.cross_entropy(X.bfloat16(), Y),
    "default device": in_default_device,
    "int32 targets": lambda: F.cross_entropy(X, Y.int()),
    "bad shapes": lambda: F.cross_entropy(X, Y[:3]),
    "out of range": lambda: F.cross_entropy(X, Y + 8),
    "no tensor": lambda: F.cross_entropy([1.0], Y),
    "bad reduction": lambda: F.cross_entropy(X, Y, reduction="median"),
    "not torch's": lambda: F.cross_entropy(X, Y, inplcae=True),
    "subclass": lambda: F.cross_entropy(X.as_subclass(Subclass), Y),
    "meta": lambda: F.cross_entropy(X.to("meta"), Y.to("meta")),
    "sparse": lambda: F.cross_entropy(X.to_sparse(), Y),
    "vmap": lambda: torch.func.vmap(F.cross_entropy)(X, Y),
    "grad": lambda: torch.func.grad(lambda x: F.cross_entropy(x, Y))(X),
    "forward AD": forward_ad,
    "torch.fx": traced,
    "compiled": lambda: torch.compile(lambda x, y: F.cross_entropy(x, y), backend="aot_eager", fullgraph=True)(X, Y),
    "exported": lambda: torch.export.export(Layer(), (X, Y)).module()(X, Y),
    "jit.trace": lambda: torch.jit.trace(lambda x, y: F.cross_entropy(x, y), (X, Y))(X, Y),
    "jit.script": lambda: torch.jit.script(Layer())(X, Y),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning", "ignore:.torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_every_call_gives_what_torch_gives(name: str) -> None:
    """The result, or the error, of each; Liger's way too, but where its function is not torch's by signature."""

    def outcome() -> Any:
        torch._dynamo.reset()
        try:
            return CALLS[name]()
        except Exception as error:
            return type(error), str(error).splitlines()[0]

    expected = outcome()
    with fused_ce.patched():
        found = outcome()
    ways = [found]
    if name not in ("jit.script", "not torch's"):
        with assigned():
            ways.append(outcome())
    for way in ways:
        if isinstance(expected, Tensor):
            assert type(way) is type(expected)
            if expected.is_meta:
                assert way.shape == expected.shape
            else:
                torch.testing.assert_close(way, expected, rtol=1e-6 if way.dtype == torch.float32 else 8e-3, atol=0)
        else:
            assert way == expected
