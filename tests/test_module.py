"""`CrossEntropyLoss` is `torch.nn.CrossEntropyLoss` with more keywords."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import p, w, x, y
from cases import OPTIONS
from torch import Tensor, nn

from fused_ce import CrossEntropyLoss, cross_entropy

CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {"weight": w()},
    "ignore_index": {"ignore_index": 2},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.2, "weight": w()},
}
EXTRAS = {name: keywords for name, keywords in OPTIONS.items() if not keywords.keys() & {"num_items", "grad_scale"}}


def run(module: nn.Module, *more: object) -> tuple[Tensor, Tensor]:
    input = x(4, 5).requires_grad_()
    loss = module(input, y(4), *more)
    return loss.detach(), torch.autograd.grad(loss.sum(), input)[0]


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_equals_torchs_module(name: str) -> None:
    ours, theirs = CrossEntropyLoss(**CONSTRUCTIONS[name]), nn.CrossEntropyLoss(**CONSTRUCTIONS[name])
    torch.testing.assert_close(run(ours), run(theirs))
    if name != "ignore_index":
        torch.testing.assert_close(ours(x(4, 5), p(4, 5)), theirs(x(4, 5), p(4, 5)))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert isinstance(ours, nn.CrossEntropyLoss)


@pytest.mark.parametrize("name", EXTRAS)
def test_passes_every_keyword_on(name: str) -> None:
    module = CrossEntropyLoss(w(), **EXTRAS[name])
    assert module(x(4, 5), y(4)) == cross_entropy(x(4, 5), y(4), w(), **EXTRAS[name])


def test_passes_dtype_and_backend_on() -> None:
    module = CrossEntropyLoss(dtype=torch.float32, backend="reference")
    loss = module(x(4, 5, dtype=torch.bfloat16), y(4))
    assert loss.dtype == torch.float32
    assert loss == cross_entropy(x(4, 5, dtype=torch.bfloat16), y(4), dtype=torch.float32, backend="reference")
    with pytest.raises(ValueError, match="nonsense"):
        CrossEntropyLoss(backend="nonsense")(x(4, 5), y(4))


def test_num_items_comes_with_the_batch() -> None:
    module = CrossEntropyLoss()
    for more in ((11,), (11.0,), (torch.tensor(11),)):
        loss, grad = run(module, *more)
        total, total_grad = run(CrossEntropyLoss(reduction="sum"))
        torch.testing.assert_close((loss, grad), (total / 11, total_grad / 11))


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_survives_copies(name: str) -> None:
    module = CrossEntropyLoss(**CONSTRUCTIONS[name], softcap=3.0, logit_scale=0.5, lse_square_scale=0.01)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(run(twin), run(module))
    fresh = CrossEntropyLoss(**(CONSTRUCTIONS[name] | ({"weight": w() * 0} if "weight" in module.state_dict() else {})))
    fresh.load_state_dict(module.state_dict())
    same_options = CrossEntropyLoss(**CONSTRUCTIONS[name])
    torch.testing.assert_close(run(fresh), run(same_options))


def test_weight_moves_with_the_module() -> None:
    module = CrossEntropyLoss(w()).to(torch.float32)
    assert module.weight.dtype == torch.float32
    loss = module(x(4, 5, dtype=torch.float32), y(4))
    torch.testing.assert_close(loss, nn.CrossEntropyLoss(w(5, torch.float32))(x(4, 5, dtype=torch.float32), y(4)))


def test_says_what_torch_says() -> None:
    for arguments, keywords in (((None, True), {}), ((None, None, -100, False), {}), ((), {"size_average": False})):
        messages = []
        for module in (CrossEntropyLoss, nn.CrossEntropyLoss):
            with pytest.warns(UserWarning, match="will be deprecated") as caught:
                made = module(*arguments, **keywords)
            messages.append([str(warning.message) for warning in caught] + [made.reduction])
        assert messages[0] == messages[1]
    for bad in ("bad", None):
        for module in (CrossEntropyLoss, nn.CrossEntropyLoss):
            made = module(reduction=bad)  # judged when called
            with pytest.raises(ValueError, match="is not a valid value for reduction"):
                made(x(4, 5), y(4))


def test_trains_as_torchs() -> None:
    losses = []
    for module in (CrossEntropyLoss(label_smoothing=0.1), nn.CrossEntropyLoss(label_smoothing=0.1)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 16, dtype=torch.float64), nn.ReLU(), nn.Linear(16, 5, dtype=torch.float64))
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        history = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = module(model(x(32, 7)), y(32))
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]


def test_shows_the_options_that_were_chosen() -> None:
    assert repr(CrossEntropyLoss()) == "CrossEntropyLoss()"
    shown = repr(CrossEntropyLoss(w(), reduction="sum", softcap=30.0, dtype=torch.float32, return_stats=True))
    assert shown == (
        "CrossEntropyLoss(weight=(5,), reduction='sum', dtype=torch.float32, softcap=30.0, return_stats=True)"
    )
    for name, value in {"ignore_index": 0, "label_smoothing": 0.1, "inplace": True, "backend": "cpu"}.items():
        assert repr(CrossEntropyLoss(**{name: value})) == f"CrossEntropyLoss({name}={value!r})"
    assert "(criterion): CrossEntropyLoss(logit_scale=0.5)" in repr(
        nn.ModuleDict({"criterion": CrossEntropyLoss(logit_scale=0.5)})
    )


class Model(nn.Module):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return self.criterion(input, target) * 2


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning", "ignore:.torch.jit.:FutureWarning")
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_is_scripted_as_torchs(name: str, tmp_path: Path) -> None:
    ours, theirs = CrossEntropyLoss(**CONSTRUCTIONS[name]).eval(), nn.CrossEntropyLoss(**CONSTRUCTIONS[name])
    scripted = torch.jit.script(ours)
    assert type(ours) is CrossEntropyLoss
    assert not scripted.training
    torch.jit.save(scripted, tmp_path / "loss.pt")
    for module in (scripted, torch.jit.load(tmp_path / "loss.pt")):
        torch.testing.assert_close(run(module), run(theirs), rtol=0, atol=0)
        assert module.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(run(torch.jit.script(Model(ours))), run(Model(theirs)), rtol=0, atol=0)


def test_keywords_that_torch_lacks_are_not_scripted() -> None:
    for keywords in ({"softcap": 2.0}, {"return_stats": True}, {"inplace": True}, {"dtype": torch.float32}):
        ((name, value),) = keywords.items()
        with pytest.raises(NotImplementedError, match=f"has no {name}={value}; it is deprecated: use torch.compile"):
            torch.jit.script(Model(CrossEntropyLoss(**keywords)))
