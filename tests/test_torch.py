"""Private names of torch: the package is right without any one of them."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import p, w, x, y
from torch import Tensor
from torch.autograd import forward_ad

import fused_ce
from fused_ce import _torch, cross_entropy

PACKAGE = Path(fused_ce.__file__).parent
NAMES = re.findall(r'_find\("([\w.]+)"', Path(_torch.__file__).read_text())


class Without:
    """A module that lacks one name, however deep."""

    def __init__(self, thing: Any, path: str) -> None:
        self.thing, self.path = thing, path

    def __getattr__(self, name: str) -> Any:
        first, _, rest = self.path.partition(".")
        if name != first:
            return getattr(self.thing, name)
        if not rest:
            raise AttributeError(name)
        return Without(getattr(self.thing, name), rest)


@contextlib.contextmanager
def lacking_name(path: str) -> Iterator[None]:
    """The package as it would be on a torch without this name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch", Without(torch, path))
        importlib.reload(_torch)
    try:
        yield
    finally:
        importlib.reload(_torch)


@pytest.fixture(params=["nothing", *NAMES])
def lacking(request: pytest.FixtureRequest) -> Iterator[str]:
    with lacking_name(request.param):
        yield request.param


def gradient(loss: Callable[..., Tensor], **keywords: Any) -> Tensor:
    input = x(4, 5).requires_grad_()
    return torch.autograd.grad(loss(input, y(4), **keywords).sum(), input)[0]


def with_graph_kept(loss: Callable[..., Tensor]) -> list[Tensor]:
    input = x(4, 5).requires_grad_()
    value = loss(input, y(4))
    upstream = [torch.tensor(factor, dtype=torch.float64) for factor in (1.0, 2.0, 1.0)]
    return [torch.autograd.grad(value, input, factor, retain_graph=True)[0] for factor in upstream]


def changed_in_between(loss: Callable[..., Tensor]) -> Tensor:
    input = x(4, 5).requires_grad_()
    logits = input * 1
    value = loss(logits, y(4))
    with torch.no_grad():
        logits.mul_(3)
    return torch.autograd.grad(value, input)[0]


def dual(loss: Callable[..., Tensor]) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(loss(forward_ad.make_dual(x(4, 5), x(4, 5)), y(4))).tangent


def many_upstreams(loss: Callable[..., Tensor]) -> Tensor:
    input = x(4, 5).requires_grad_()
    losses = loss(input, y(4), reduction="none")
    return torch.autograd.grad(losses, input, torch.eye(4).double(), is_grads_batched=True)[0]


class Doubling(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is F.cross_entropy else result


def under_a_mode(loss: Callable[..., Tensor]) -> Tensor:
    with Doubling():
        return loss(x(4, 5), y(4))


READS_AGAIN = (
    "_C._functorch.is_legacy_batchedtensor",
    "_C._functorch.is_functorch_wrapped_tensor",
    "_C._len_torch_dispatch_stack",
    "_C._autograd._top_saved_tensors_default_hooks",
)

USES: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "loss": lambda loss: loss(x(4, 5), y(4), w(), label_smoothing=0.1),
    "gradient": gradient,
    "gradient of rows": lambda loss: gradient(loss, reduction="none"),
    "graph kept": with_graph_kept,
    "logits changed": changed_in_between,
    "probabilities": lambda loss: torch.autograd.functional.jacobian(lambda t: loss(x(4, 5), t), p(4, 5)),
    "second derivative": lambda loss: torch.autograd.functional.hessian(lambda z: loss(z, y(4)), x(4, 5)),
    "torch.func": lambda loss: torch.func.vmap(torch.func.grad(loss))(x(4, 5), y(4)),
    "forward AD": dual,
    "many upstream gradients": many_upstreams,
    "function mode": under_a_mode,
    "sum": lambda loss: gradient(loss, reduction="sum"),
}


@pytest.mark.parametrize("use", USES)
def test_right_without(lacking: str, use: str) -> None:
    if use == "logits changed" and lacking in READS_AGAIN:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # a second reading would be needed
            USES[use](cross_entropy)
        return
    torch.testing.assert_close(USES[use](cross_entropy), USES[use](F.cross_entropy), rtol=1e-12, atol=1e-15)


@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_deprecated_arguments_without(lacking: str) -> None:
    for size_average in (None, True, False):
        for reduce in (None, True, False):
            call = x(4, 5), y(4), None, size_average, -100, reduce
            torch.testing.assert_close(cross_entropy(*call), F.cross_entropy(*call))


def test_a_leaf_is_never_overwritten(lacking: str) -> None:
    leaf = x(4, 5).requires_grad_()
    for logits in (leaf, leaf[1:]):
        with contextlib.suppress(RuntimeError):
            cross_entropy(logits, y(len(logits)), inplace=True).backward()
    assert torch.equal(leaf, x(4, 5))


def test_inplace_is_refused_where_a_leaf_might_be() -> None:
    with lacking_name("Tensor._base"), pytest.raises(RuntimeError, match="inplace=True would overwrite a leaf"):
        cross_entropy(x(4, 5).requires_grad_() * 1, y(4), inplace=True)


def test_private_names_stand_in_one_file() -> None:
    private = re.compile(r"\btorch\._[a-zA-Z]|\btorch(\.\w+)+\._[a-z]\w*|\._(version|base|is_view|current_level)\b")
    for path in PACKAGE.rglob("*.py"):
        lines = path.read_text().splitlines()
        found = [line for line in lines if private.search(line)]
        assert not found or path.name == "_torch.py", (path, found)


def test_what_a_transform_left_behind_is_an_ordinary_tensor() -> None:
    left = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        left.append(x)
        return x.sum()

    torch.func.grad(keep)(torch.randn(4, 5))
    target = torch.tensor([0, 1, 2, 3])
    assert cross_entropy(left[0], target).item() == pytest.approx(F.cross_entropy(left[0], target).item())
