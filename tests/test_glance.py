"""What the C++ module says of a call at a glance is what the gate says after a closer look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import CALLS, bf16, f32, f64, p, w, x, y
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ce import cross_entropy, gate
from fused_ce.backends import cpu
from fused_ce.contract import Call
from fused_ce.options import Options

pytestmark = pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built")


def common(input: Any, target: Any, weight: Any = None, **options: Any) -> bool:
    """Whether a call is taken at a glance; if so, the gate has to agree."""
    call = Call(input, target, weight, Options(**options))
    taken = gate.at_a_glance(call)
    if taken:
        judged, backend = gate.judge(call, None)
        assert backend is taken is cpu
        assert all(one is other for one, other in zip(judged, call, strict=True))
    return taken is not None


@pytest.mark.parametrize("call", CALLS)
def test_no_call_that_the_gate_would_not_take_as_it_is(call: str) -> None:
    input, target, options = CALLS[call]()
    known = {name: value for name, value in options.items() if name in Options._fields}
    for logits in (input, input.requires_grad_() if isinstance(input, Tensor) and input.is_floating_point() else input):
        common(logits, target, options.get("weight"), **known)


MOST: dict[str, tuple[Any, ...]] = {
    "rows": (x(3, 5), y(3)),
    "parameter": (torch.nn.Parameter(x(3, 5)), y(3)),
    "bfloat16": (x(3, 5, dtype=bf16), y(3)),
    "one row": (x(5), y()),
    "uint8": (x(3, 5), y(3, dtype=torch.uint8)),
    "pixels": (x(2, 5, 3, 2), y(2, 3, 2)),
    "probabilities": (x(2, 5, 3), p(2, 5, 3)),
    "weight": (x(3, 5), y(3), w()),
    "transposed": (x(5, 3).t(), y(3)),
    "columns": (x(3, 9)[:, 2:7], y(3)),
}


@pytest.mark.parametrize("call", MOST)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_most_calls_are_taken(call: str, reduction: str) -> None:
    assert common(*MOST[call], reduction=reduction)
    assert common(*MOST[call], reduction=reduction, label_smoothing=0.1, ignore_index=-1)


class Sub(Tensor):
    pass


def freed(tensor: Tensor) -> Tensor:
    """The tensor, its storage freed as FSDP does."""
    tensor.untyped_storage().resize_(0)
    return tensor


FEW: dict[str, Callable[[], tuple[Any, ...]]] = {
    "subclass": lambda: (x(3, 5).as_subclass(Sub), y(3)),
    "subclass as target": lambda: (x(3, 5), y(3).as_subclass(Sub)),
    "no tensor": lambda: ([[0.0, 1.0]], y(1)),
    "sparse": lambda: (x(3, 5).to_sparse(), y(3)),
    "sparse rows": lambda: (x(3, 5).to_sparse_csr(), y(3)),
    "mkldnn": lambda: (x(3, 5, dtype=f32).to_mkldnn(), y(3)),
    "quantized": lambda: (torch.quantize_per_tensor(x(3, 5, dtype=f32), 0.1, 0, torch.qint8), y(3)),
    "nested": lambda: (torch.nested.nested_tensor([x(5), x(5)]), y(2)),
    "meta": lambda: (x(3, 5).to("meta"), y(3).to("meta")),
    "negative bit": lambda: (torch._neg_view(x(3, 5)), y(3)),
    "negative bit of probabilities": lambda: (x(3, 5), torch._neg_view(p(3, 5))),
    "negative bit of weight": lambda: (x(3, 5), y(3), torch._neg_view(w())),
    "zeros without memory": lambda: (torch._efficientzerotensor((3, 5), dtype=f64), y(3)),
    "freed logits": lambda: (freed(x(3, 5)), y(3)),
    "freed logits, from an offset on": lambda: (freed(x(4, 5)[1:]), y(3)),
    "freed target": lambda: (x(3, 5), freed(y(3))),
    "freed weight": lambda: (x(3, 5), y(3), freed(w())),
    "no rows": lambda: (x(0, 5), y(0)),
    "no classes": lambda: (x(3, 0), y(3)),
    "no classes of more": lambda: (x(3, 5)[:, :0], y(3)),
    "no rows of more": lambda: (x(3, 5)[:0], y(3)[:0]),
    "no pixels": lambda: (x(3, 5, 0), y(3, 0)),
    "0-d": lambda: (x(), y()),
    "9 dimensions": lambda: (x(2, 5, *(1,) * 7), y(2, *(1,) * 7)),
    "float8": lambda: (x(3, 5).to(torch.float8_e4m3fn), y(3)),
    "integers": lambda: (y(3, 5), y(3)),
    "complex": lambda: (x(3, 5).to(torch.complex128), y(3)),
    "int32 target": lambda: (x(3, 5), y(3).int()),
    "uint8 pixels": lambda: (x(2, 5, 3), y(2, 3, dtype=torch.uint8)),
    "target of another length": lambda: (x(3, 5), y(4)),
    "target of another rank": lambda: (x(3, 5), y(3, 1)),
    "labels of the input's shape": lambda: (x(3, 5), y(3, 5)),
    "probabilities of another shape": lambda: (x(3, 5), p(3, 4)),
    "probabilities of another dtype": lambda: (x(3, 5), p(3, 5, dtype=f32)),
    "weight of another dtype": lambda: (x(3, 5), y(3), w(dtype=f32)),
    "weight of another length": lambda: (x(3, 5), y(3), w(4)),
    "weight of another rank": lambda: (x(3, 5), y(3), w()[None]),
    "weight that wants a gradient": lambda: (x(3, 5), y(3), w().requires_grad_()),
    "weight no tensor": lambda: (x(3, 5), y(3), [1.0] * 5),
}


@pytest.mark.filterwarnings("ignore")  # of what torch calls a beta
@pytest.mark.parametrize("call", FEW)
def test_what_needs_a_closer_look(call: str) -> None:
    assert not common(*FEW[call]())


OPTIONS: dict[str, Any] = {
    "label_smoothing": (1.5, 1, "0"),
    "ignore_index": (2**63, -(2**63) - 1, 1.0, True),
    "logit_scale": (2.0, 1, torch.tensor(1.0)),
    "softcap": (3.0,),
    "lse_square_scale": (1e-4, 0, torch.tensor(0.0)),
    "reduction": ("elementwise_mean", "", None, 1),
    "dtype": (f64, f32, "float64"),
    "num_items": (3, torch.tensor(3.0)),
    "grad_scale": (2.0, 1.0),
    "inplace": (True, 1),
    "return_stats": (True, 1),
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option in OPTIONS for value in OPTIONS[option]])
def test_options_that_need_a_closer_look(option: str, value: Any) -> None:
    assert not common(x(3, 5), y(3), **{option: value})


def test_options_that_only_some_targets_take() -> None:
    assert common(x(3, 5), y(3), ignore_index=2)
    assert not common(x(3, 5), p(3, 5), ignore_index=2)
    small = y(3, dtype=torch.uint8)
    assert common(x(3, 5), small, label_smoothing=0.1)
    assert common(x(3, 5), small, w())
    assert not common(x(3, 5), small, w(), label_smoothing=0.1)


def watched(body: Callable[[], bool], situation: str) -> bool:
    """What `body` answers while something is at work."""
    seen: list[bool] = []

    def note(value: Tensor) -> Tensor:
        seen.append(body())
        return value.sum()

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    if situation == "transform":
        torch.func.grad(note)(x(3))
    elif situation == "forward AD":
        with forward_ad.dual_level():
            note(x(3))
    elif situation == "function mode":
        with Functions():
            note(x(3))
    elif situation == "dispatch mode":
        with Operators():
            note(x(3))
    elif situation == "trace":
        torch.jit.trace(note, (x(3),), check_trace=False)
    elif situation == "autocast":
        with torch.autocast("cpu", dtype=bf16):
            note(x(3))
    else:
        note(x(3))
    return seen[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize(
    "situation", ["", "transform", "forward AD", "function mode", "dispatch mode", "trace", "autocast"]
)
def test_nothing_at_work_is_overlooked(situation: str, dtype: torch.dtype) -> None:
    call = Call(x(3, 5, dtype=dtype), y(3), None, Options())
    means_nothing = situation == "" or (situation == "autocast" and dtype == f32)
    assert watched(lambda: cpu.is_common(call), situation) == means_nothing


def test_a_backend_by_name_is_asked_by_that_name() -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        cross_entropy(x(3, 5), y(3), backend="cpus")
