"""Tensors that torch left unfinished, numbers on the CPU, and targets out of range: what meets the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accuracy import bits
from cases import EVERYTHING, Case, ramp
from conftest import Backend
from torch import Tensor

from fused_ce.backends.triton import launch, readable, targets
from fused_ce.contract import Call, Upstream
from fused_ce.options import Options

only_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)
CUDA = torch.device("cuda:0")


def negative(tensor: Tensor) -> Tensor:
    return torch._neg_view(-tensor)


def lazy_zeros(tensor: Tensor) -> Tensor:
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def freed(tensor: Tensor) -> Tensor:
    """A view that does not begin where its memory did."""
    tensor = torch.stack([tensor, tensor])[1]
    tensor.untyped_storage().resize_(0)
    return tensor


UNFINISHED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "negative": (negative, torch.clone),
    "zeros": (lazy_zeros, torch.zeros_like),
}


@only_triton
@pytest.mark.parametrize("kind", UNFINISHED)
@pytest.mark.parametrize("probs", [None, torch.float32], ids=["indices", "probabilities"])
def test_upstream_gradients(backend: Backend, probs: torch.dtype | None, kind: str) -> None:
    unfinished, finished = UNFINISHED[kind]
    call = Case("upstream", N=3, C=20, probs=probs, options=EVERYTHING | {"reduction": "none"}).build(backend.device)
    call = call._replace(options=call.options._replace(return_stats=True))
    saved = launch.forward(call, "recompute").saved
    g, g_lse = torch.rand(2, 3, device=backend.device) + 1
    for which in ((True, False), (False, True), (True, True)):
        results = []
        for change in (unfinished, finished):
            upstream = Upstream(*(change(t) if changed else t for t, changed in zip((g, g_lse), which, strict=True)))
            results.append(launch.backward(call, None, saved, upstream, True, probs is not None))
        for got, wanted in zip(*results, strict=True):
            assert (got is None) == (wanted is None)
            assert got is None or torch.equal(got, wanted)


@only_triton
@pytest.mark.parametrize("kind", UNFINISHED)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upstream_of_a_fused_gradient(backend: Backend, dtype: torch.dtype, keep: bool, kind: str) -> None:
    unfinished, finished = UNFINISHED[kind]
    call = Case("fused", N=3, C=20, dtype=dtype).build(backend.device)
    results = []
    for change in (unfinished, finished):
        loss, grad, saved, _ = launch.forward(call, "fused")
        upstream = change(torch.full_like(loss, 3.0))
        results.append(launch.backward(call, grad, saved, Upstream(upstream), keep, False).input)
        results.append(
            launch.rescale(
                torch.ones(5, device=backend.device), call.target, call.options, upstream.float(), keep, False
            )
        )
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@only_triton
@pytest.mark.parametrize("kind", UNFINISHED)
@pytest.mark.parametrize("which", ["weight", "num_items", "grad_scale"])
def test_weight_and_numbers(backend: Backend, which: str, kind: str) -> None:
    unfinished, finished = UNFINISHED[kind]
    case = Case("numbers", N=3, C=20, weight=ramp, options={"label_smoothing": 0.1})
    input, target, weight, options = case.build(backend.device)
    results = []
    for change in (unfinished, finished):
        changed = weight
        if which == "weight":
            changed = change(weight)
        else:
            options = options._replace(**{which: change(torch.tensor(3.0, device=backend.device))})
        loss, grad, _, _ = launch.forward(Call(input, target, changed, options), "fused")
        results.append((bits(loss), bits(grad)))
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


@only_triton
def test_freed_memory_is_an_error(backend: Backend) -> None:
    call = Case("freed", N=3, C=20, dtype=torch.bfloat16).build(backend.device)
    loss, grad, saved, _ = launch.forward(call, "fused")
    one = torch.ones_like(loss)
    for arguments in (
        (grad, saved, Upstream(freed(one)), False),
        (grad, saved, Upstream(one, freed(torch.ones(3, device=backend.device))), False),
        (grad, freed(saved), Upstream(one), False),
        (freed(grad), saved, Upstream(one), False),
    ):
        with pytest.raises(RuntimeError, match="data is not allocated yet"):
            launch.backward(call, *arguments, False)
    for arguments in ((freed(grad), Options(), one), (grad, Options(), freed(one))):
        with pytest.raises(RuntimeError, match="data is not allocated yet"):
            launch.rescale(arguments[0], call.target, *arguments[1:], True, False)
    assert readable.readable(torch.empty(0)).numel() == 0


@pytest.mark.parametrize(
    "value", [3.0, torch.tensor(3.0), torch.tensor(3, dtype=torch.int64), negative(torch.ones(()))]
)
def test_a_number_on_the_cpu_is_read_there(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []

    def full(size: tuple[int, ...], number: Any, **keywords: Any) -> Tensor:
        filled.append((number, keywords))
        return torch.empty(size, dtype=keywords["dtype"])

    monkeypatch.setattr(torch, "full", full)
    readable.number(value, torch.float32, CUDA)
    (number, keywords), *others = filled
    assert not others
    assert type(number) in (float, int)
    assert number == value
    assert keywords == {"dtype": torch.float32, "device": CUDA}


@pytest.fixture
def flags(monkeypatch: pytest.MonkeyPatch) -> dict[torch.device, Tensor]:
    """Flags of devices that are not here, on the CPU."""
    zeros, made = torch.zeros, {}
    monkeypatch.setattr(targets, "_FLAGS", made)
    monkeypatch.setattr(torch, "zeros", lambda *size, dtype, device: zeros(*size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return made


def test_no_flag_is_made_in_a_capture(flags: dict[torch.device, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    capturing, waits = True, []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    class Stream:
        def synchronize(self) -> None:
            waits.append(self)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    assert targets.flag(CUDA) is None
    assert not flags
    assert not waits
    capturing = False
    made = targets.flag(CUDA)
    assert made.tolist() == [0]
    assert len(waits) == 1
    capturing = True
    assert targets.flag(CUDA) is made
    assert len(waits) == 1


def test_check_targets_waits_for_every_stream(
    flags: dict[torch.device, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    met = flags[CUDA] = torch.tensor([0])
    flags[torch.device("cuda:1")] = torch.tensor([0])
    queued, seen = [41, 42], []

    def synchronize(device: torch.device) -> None:
        seen.append((device, met.item()))
        if queued and device == CUDA:
            met.fill_(queued.pop())  # what a side stream had still to do

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(IndexError, match=r"^Target 42 is out of bounds\.$"):
        targets.check_targets()
    assert seen == [(CUDA, 0), (CUDA, 0)]  # the second once it is cleared
    with pytest.raises(IndexError, match=r"^Target 41 is out of bounds\.$"):
        targets.check_targets()
    targets.check_targets()
    assert [device.index for device, _ in seen[4:]] == [0, 1]
