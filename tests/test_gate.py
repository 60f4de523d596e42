"""What stands around a call (devices, modes, others' patches) does not turn the kernels off, break or double it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import p, w, x, y
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fused_ce import cross_entropy, gate, operators
from fused_ce.backends import cpu
from fused_ce.ops import LIBRARY

pytestmark = pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built")
f32, bf16 = torch.float32, torch.bfloat16


@pytest.fixture
def torchs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of torch's ways ran in place of the kernels."""
    ran: list[str] = []

    def record(owner: Any, name: str) -> None:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: ran.append(name) or original(*a, **k))

    record(gate, "_torch_cross_entropy")
    record(operators, "composite")
    return ran


@pytest.fixture
def default_device() -> Iterator[None]:
    torch.set_default_device("cpu")
    yield
    torch.set_default_device(None)


DEVICES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "cpu": lambda: torch.device("cpu"),
    "meta": lambda: torch.device("meta"),  # nothing that the package makes may follow it
}
KEYWORDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "num_items": {"num_items": 3},
    "grad_scale": {"grad_scale": 2.0},
    "return_stats": {"return_stats": True},
    "softcap": {"softcap": 3.0, "reduction": "none"},
}


def loss_and_gradient(
    loss: Callable[..., Any], input: Tensor, *arguments: Any, **keywords: Any
) -> tuple[Tensor, Tensor]:
    input = input.detach().requires_grad_()
    value = loss(input, *arguments, **keywords)
    value = value if isinstance(value, Tensor) else value.loss
    return value.detach(), torch.autograd.grad(value, input, torch.ones_like(value, device="cpu"))[0]


@pytest.mark.parametrize("keywords", KEYWORDS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_device_context_changes_nothing(device: str, keywords: str, torchs: list[str]) -> None:
    call = x(4, 5, dtype=f32), y(4)
    wanted = loss_and_gradient(cross_entropy, *call, **KEYWORDS[keywords])
    with DEVICES[device](), torch.device("cpu"), DEVICES[device]():
        got = loss_and_gradient(cross_entropy, *call, **KEYWORDS[keywords])
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    assert not torchs


@pytest.mark.usefixtures("default_device")
def test_a_default_device_changes_nothing(torchs: list[str]) -> None:
    cross_entropy(x(4, 5), y(4), softcap=2.0)
    assert not torchs


@pytest.mark.parametrize("around", ["nothing", "device", "subclass", "vmap"])
def test_a_wrong_backend_is_an_error_whatever_the_call(around: str) -> None:
    input = x(4, 5).as_subclass(Mine) if around == "subclass" else x(4, 5)
    with ExitStack() as stack:
        if around == "device":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(pytest.raises(ValueError, match="backend must be one of cpu, triton, reference"))
        if around == "vmap":
            torch.vmap(lambda i, t: cross_entropy(i, t, backend="nonsense"))(input, y(4))
        else:
            cross_entropy(input, y(4), backend="nonsense")


class Mine(Tensor):
    """A subclass that says nothing."""


ASSIGNED: dict[str, Callable[[], Any]] = {
    "plain": lambda: F.cross_entropy(x(4, 5), y(4)),
    "vmap": lambda: torch.vmap(F.cross_entropy)(x(4, 5), y(4)),
    "subclass": lambda: F.cross_entropy(x(4, 5).as_subclass(Mine), y(4)).as_subclass(Tensor),
    "meta": lambda: F.cross_entropy(x(4, 5).to("meta"), y(4).to("meta")).shape,
    "module": lambda: torch.nn.CrossEntropyLoss()(x(4, 5), y(4)),
    "int32": lambda: _error(lambda: F.cross_entropy(x(4, 5), y(4).int())),
    "wrong weight": lambda: _error(lambda: F.cross_entropy(x(4, 5), y(4), w(3))),
}


def _error(call: Callable[[], Any]) -> str:
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value).split("\n")[0]


@pytest.mark.parametrize("name", ASSIGNED)
def test_assigned_to_torch_it_does_not_call_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ASSIGNED[name]()
    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    got = ASSIGNED[name]()
    if isinstance(wanted, Tensor):
        torch.testing.assert_close(got, wanted, rtol=1e-14, atol=0)
    else:
        assert got == wanted


@pytest.mark.parametrize("keywords", [{}, *KEYWORDS.values()], ids=str)
def test_elementwise_mean(keywords: dict[str, Any]) -> None:
    if keywords.get("reduction"):
        keywords = {"softcap": 3.0}
    wanted = loss_and_gradient(cross_entropy, x(4, 5), y(4), **keywords)
    with pytest.warns(UserWarning, match="elementwise_mean"):
        got = loss_and_gradient(cross_entropy, x(4, 5), y(4), reduction="elementwise_mean", **keywords)
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("keywords", KEYWORDS)
def test_a_dispatch_mode_sees_one_operator(keywords: str, torchs: list[str]) -> None:
    wanted = loss_and_gradient(cross_entropy, x(4, 5), y(4), **KEYWORDS[keywords])
    with Watching() as mode:
        got = loss_and_gradient(cross_entropy, x(4, 5), y(4), **KEYWORDS[keywords])
    torch.testing.assert_close(got, wanted, rtol=1e-14, atol=0)
    assert mode.seen.count(f"{LIBRARY.ns}.forward.default") == mode.seen.count(f"{LIBRARY.ns}.backward.default") == 1
    assert not [name for name in mode.seen if "softmax" in name or "nll" in name]
    assert not torchs


def test_second_derivative_under_a_dispatch_mode() -> None:
    def curvature(loss: Callable[..., Tensor]) -> Tensor:
        input = x(4, 5).requires_grad_()
        (first,) = torch.autograd.grad(loss(input, y(4)), input, create_graph=True)
        return torch.autograd.grad(first.square().sum(), input)[0]

    with FlopCounterMode(display=False):
        got = curvature(cross_entropy)
    torch.testing.assert_close(got, curvature(F.cross_entropy), rtol=1e-12, atol=1e-15)


def test_selective_checkpointing() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if "mm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    weight = x(7, 5).requires_grad_()
    gradients = []
    for loss in (cross_entropy, F.cross_entropy):
        value = checkpoint(
            lambda h, loss=loss: loss(h @ weight, y(4)),
            x(4, 7),
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )
        gradients.append(torch.autograd.grad(value, weight)[0])
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "keywords", [{"softcap": 3.0}, {"inplace": True}, {"backend": "cpu"}, {"num_items": 2}], ids=str
)
def test_falling_back_is_told_once_a_line_with_the_reason(keywords: dict[str, Any], torchs: list[str]) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for _ in range(3):
            torch.vmap(lambda i, t: cross_entropy(i, t, **keywords))(x(3, 4, 5), y(3, 4))
    assert [str(one.message) for one in told if "torch.func transform is at work" in str(one.message)]
    assert len(told) == 1
    assert told[0].filename == __file__
    assert torchs.count("composite") == (3 if "softcap" in keywords or "num_items" in keywords else 0)


def test_nothing_is_told_of_a_plain_call() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.vmap(cross_entropy)(x(3, 4, 5), y(3, 4))


def test_a_keyword_of_ours_costs_one_pass_where_it_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    real = gate._torch_cross_entropy
    monkeypatch.setattr(gate, "_torch_cross_entropy", lambda x, *a, **k: asked.append(x) or real(x, *a, **k))
    with pytest.warns(RuntimeWarning, match="declined"):
        cross_entropy(x(40, 5), y(40), softcap=3.0, dtype=torch.float16)
    assert asked
    assert all(logits.is_meta or len(logits) == 1 for logits in asked)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: (x(4, 5), y(3)),
        lambda: (x(4, 5), y(4, 5)),
        lambda: (x(4, 5), y(4).int()),
        lambda: (x(4, 5), y(4) + 4),
        lambda: (x(4, 5), y(4), w(4)),
        lambda: (x(4, 5), y(4), w(5, f32)),
        lambda: (x(4, 5).long(), y(4)),
        lambda: (x(), y()),
    ],
)
def test_torchs_errors_where_torch_cannot_express_the_call(wrong: Callable[[], Any]) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        F.cross_entropy(*wrong())
    with pytest.raises(theirs.type) as ours:
        cross_entropy(*wrong(), softcap=3.0)
    assert str(ours.value).split("\n")[0] == str(theirs.value).split("\n")[0]


@pytest.mark.parametrize("name", ["num_items", "grad_scale"])
def test_numbers_of_one_element(name: str) -> None:
    wanted = loss_and_gradient(cross_entropy, x(4, 5), y(4), **{name: 3.0})
    for number in (torch.tensor([3.0]), torch.tensor([[3]]), torch.tensor(3.0)):
        got = loss_and_gradient(cross_entropy, x(4, 5), y(4), **{name: number})
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("half", [bf16, torch.float16], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_float32_weights_beside_16_bit_logits(half: torch.dtype, smoothing: float, torchs: list[str]) -> None:
    input, target, weight = x(40, 5, dtype=half), y(40), w(5, f32)
    results = [loss_and_gradient(cross_entropy, input, target, weight, dtype=f32, label_smoothing=smoothing)]
    with torch.autocast("cpu", half):
        results.append(loss_and_gradient(cross_entropy, input, target, weight, label_smoothing=smoothing))
    assert not torchs
    exact = loss_and_gradient(F.cross_entropy, input.double(), target, weight.double(), label_smoothing=smoothing)
    for loss, grad in results:
        assert loss.dtype == f32
        torch.testing.assert_close(loss.double(), exact[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(grad.double(), exact[1], rtol=2e-2 if half == bf16 else 2e-3, atol=1e-7)
    assert _error(lambda: cross_entropy(input, target, weight))  # as torch, where nothing casts them


def test_weights_of_any_float_dtype_under_autocast(torchs: list[str]) -> None:
    for dtype in (bf16, f32):
        with torch.autocast("cpu", bf16):
            got = cross_entropy(x(4, 5, dtype=bf16), y(4), w(5, dtype))
            wanted = F.cross_entropy(x(4, 5, dtype=bf16), y(4), w(5, dtype))
        torch.testing.assert_close(got, wanted)
    assert not torchs


@pytest.mark.parametrize("keywords", ["softcap", "logit_scale", "lse_square_scale", "ignore_index", "label_smoothing"])
def test_new_numbers_need_no_new_graph(keywords: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    values = range(-5, 0) if keywords == "ignore_index" else [0.1, 0.2, 0.3, 0.4, 0.5]
    compiled = torch.compile(lambda i, t, value: cross_entropy(i, t, **{keywords: value}), backend=counter)
    for value in values:
        wanted = cross_entropy(x(4, 5), y(4), **{keywords: value})
        torch.testing.assert_close(compiled(x(4, 5), y(4), value), wanted, rtol=1e-14, atol=0)
    assert counter.frame_count <= 2


def test_probabilities_beside_other_modes() -> None:
    class Doubling(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            return result * 2 if function is gate._torch_cross_entropy else result

    # A mode that is more than a device still sees torch's function, device contexts around it or not.
    with torch.device("cpu"), Doubling(), torch.device("cpu"):
        got = cross_entropy(x(4, 5), p(4, 5))
    torch.testing.assert_close(got, 2 * F.cross_entropy(x(4, 5), p(4, 5)))
