"""The first look at the kernels of a shard of the classes: `launch.part` and `launch.finish`."""

from __future__ import annotations

import pytest
import torch
from cases import EVERYTHING, Case, always, ignore, ramp
from conftest import Backend
from first_looks import counted, make_wrong
from first_looks import looks as looks
from oracle import double

from fused_ce.backends import reference
from fused_ce.backends.triton import launch, self_check
from fused_ce.contract import Call, RowSums, Upstream
from fused_ce.options import Shard

only_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)
TARGETS = always(0, 39, -100, 20, 5, 30, 38, 13, -100)  # the shard begins with class 13
BEYOND = always(30, 39, -100, 35, 5, 30, 38, 13, -100)  # of as many as the shard has, in the rows that are looked at
SHARDS = [
    Case("everything", N=9, C=40, options=EVERYTHING, weight=ramp, target=TARGETS),
    Case("bfloat16", N=9, C=40, dtype=torch.bfloat16, target=BEYOND),
    Case("pixels", N=3, C=7, pixels=(5, 6), weight=ramp, target=ignore(3, 11)),
]


def shard_of(case: Case, backend: Backend) -> tuple[Call, torch.Tensor, Upstream, torch.Tensor]:
    """The end of the classes; the sums of whole rows, upstream gradients, and the exact gradient."""
    call = case.build(backend.device)
    C, R = case.C, call.rows
    call = call._replace(options=call.options._replace(return_stats=True, shard=Shard(0, C)))
    exact = call._replace(input=double(call.input), weight=double(call.weight), target=call.target.cpu())
    upstream = Upstream(torch.linspace(0.5, 2, R).double(), torch.linspace(2, 0.5, R).double())
    sums, grad = reference.part(exact), torch.empty_like(exact.input)
    reference.finish(exact, sums, upstream, grad)
    begin = C // 3
    options = call.options._replace(shard=Shard(begin, C))
    call = call._replace(input=call.input[:, begin:], options=options)
    on_device = Upstream(*(numbers.to(backend.device) for numbers in upstream[:2]))
    return call, sums.to(backend.device), on_device, grad[:, begin:]


@only_triton
@pytest.mark.parametrize("case", SHARDS, ids=str)
def test_right_kernels_of_a_shard_pass_once(backend: Backend, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    call, sums, upstream, exact = shard_of(case, backend)
    launched, numbers = counted(monkeypatch), []
    for inplace in (False, True):
        launched.clear()
        launch.part(call)
        given = call.input.clone()
        into = given if inplace else torch.empty_like(given)
        launch.finish(call._replace(input=given), sums, upstream, into)
        numbers.append(len(launched))
        torch.testing.assert_close(into.cpu().double(), exact, rtol=1e-2, atol=1e-5)
    assert not self_check.DECLINED
    assert not self_check.UNCOMPARED
    assert [variant.key[0] for variant in self_check.PASSED] == ["part", "finish"]
    assert numbers == [4, 2]


@only_triton
@pytest.mark.parametrize("what", RowSums._fields)
@pytest.mark.parametrize("case", SHARDS[:2], ids=str)
def test_a_wrong_part(backend: Backend, case: Case, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, sums, upstream, exact = shard_of(case, backend)
    wanted = reference.part(call)
    if not wanted[RowSums._fields.index(what)].any():
        pytest.skip("is 0 here")
    make_wrong(monkeypatch, "forward", what, 1.5)
    with pytest.warns(RuntimeWarning, match=rf"{what} .* instead of .*; variant part"):
        part = launch.part(call)
    assert torch.equal(part, wanted)
    # What is still under way is torch's.
    grad = torch.empty_like(call.input)
    launch.finish(call, sums, upstream, grad)
    assert torch.equal(launch.part(call), wanted)
    torch.testing.assert_close(grad.cpu().double(), exact, rtol=1e-2, atol=1e-5)


@only_triton
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", SHARDS, ids=str)
def test_a_wrong_finish(backend: Backend, case: Case, inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    call, sums, upstream, exact = shard_of(case, backend)
    make_wrong(monkeypatch, "backward", "grad", 1.05)
    grad = call.input if inplace else torch.empty_like(call.input)
    with pytest.warns(RuntimeWarning, match=r"gradient .* instead of .*; variant finish"):
        launch.finish(call, sums, upstream, grad)
    torch.testing.assert_close(grad.cpu().double(), exact, rtol=1e-2, atol=1e-5)
    assert self_check.DECLINED
