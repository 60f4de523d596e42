"""A shard of the classes in Triton: its sums, which joined are those of whole rows, and its gradient from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import bits
from cases import LAYOUTS, PIXEL_LAYOUTS, Case, always, ignore, ramp, set_at
from conftest import Backend
from parts import OPTIONS, check_whole, gradient
from shards import joined, shards

from fused_ce import formula
from fused_ce.backends import reference
from fused_ce.backends.triton import kernels, launch
from fused_ce.backends.triton import plan as planning
from fused_ce.contract import Call, RowSums, Upstream

backends = pytest.mark.parametrize("backend", ["triton"], indirect=True)
inf, nan = torch.inf, torch.nan


BORDERS = {"even": (0, 20, 40), "uneven": (0, 7, 39, 40), "one-class": (0, 1, 2, 38, 39, 40), "whole": (0, 40)}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HARD = {
    "no-class-in-the-first": set_at((slice(None), slice(20)), -inf),
    "no-class-in-the-last": set_at((slice(None), slice(20, None)), -inf),
    "a-row-of-no-class": set_at(1, -inf),
    "target-is-minus-inf": set_at((1, 25), -inf),
    "inf": set_at((1, 25), inf),
    "nan": set_at((1, 25), nan),
    "shifted": lambda x, y: x + 1e4,
}


@backends
@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend: Backend, name: str, borders: str) -> None:
    one = torch.bfloat16 if borders in ("uneven", "whole") else torch.float32
    for dtype in DTYPES if borders == "uneven" and name in ("plain", "everything") else (one,):
        case = Case(f"{name}-{dtype}", N=5, C=40, dtype=dtype, target=ignore(1, 4), **OPTIONS[name])
        check_whole(backend, case.build(backend.device), BORDERS[borders], g_lse=borders != "even")


@backends
@pytest.mark.parametrize("name", HARD)
def test_hard_rows(backend: Backend, name: str) -> None:
    for options in ({"return_stats": True}, {}):
        case = Case(name, N=3, C=40, logits=HARD[name], target=always(3, 25, 39), options=options)
        call = case.build(backend.device)
        if "nan" in name or name == "inf":
            check_not_finite(backend, call)
        else:
            check_whole(backend, call, (0, 20, 40))


def check_not_finite(backend: Backend, call: Call) -> None:
    """Row 1 is NaN in its loss and in every gradient, the others are not; its argmax is the culprit."""
    calls = list(shards(call, (0, 20, 40)))
    parts = [backend.module.part(each) for each in calls]
    sums = joined(parts)
    assert formula.row_loss(sums, call.options)[0].isnan().tolist() == [False, True, False]
    if call.options.return_stats:
        assert RowSums(*parts[1]).argmax[1] == 25
    for each in calls:
        grad = gradient(backend, each, sums, Upstream(torch.ones(3)))
        assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == [False, True, False]


PATHS = {  # plan of forward, and multiprocessors
    "held": (planning.Plan(1, 32, 3, 4, 2, planning.MANY), 1),
    "walked": (planning.Plan(1, 32, 0, 4, 1, 1), 1),
    "shared": (planning.Plan(1, 32, 0, 4, 1, 1), 1000),
    "rows-held": (planning.Plan(4, 32, 3, 4, 1, planning.MANY), 1),
    "rows-walked": (planning.Plan(4, 16, 0, 4, 1, 2), 1),
}


def take(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 65 to 96 classes in three tiles or more, by one way that long rows, few or many go."""
    plan, multiprocessors = PATHS[path]
    monkeypatch.setattr(planning, "plan", lambda *_: plan)
    monkeypatch.setattr(planning, "device", lambda tensor: planning.Device(None, multiprocessors, 0, False))
    monkeypatch.setattr(planning, "ODD", 15)


@backends
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["plain", "everything", "nothing-in-two-tiles"])
def test_paths(backend: Backend, name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path, monkeypatch)
    more = OPTIONS.get(name, {"logits": set_at((1, slice(64)), -inf), "options": {"label_smoothing": 0.0}})
    target = always(0, 70, -100, 71, 140, 143) if path.startswith("rows") else always(3, -100, 140)
    N = 6 if path.startswith("rows") else 3
    call = Case(name, N=N, C=144, dtype=torch.bfloat16, target=target, **more).build(backend.device)
    launched, launch_all = [], kernels.launch

    def noted(kernel: str, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        launched.append((kernel, meta["TILING"].STEP))
        launch_all(kernel, grid, *args, **meta)

    monkeypatch.setattr(kernels, "launch", noted)
    check_whole(backend, call, (0, 71, 144))
    steps = [("forward", 1), ("forward", 2)] if path == "shared" else [("forward", 0)]
    assert launched == [*steps, *steps, ("backward", 0), ("backward", 0)]


@backends
@pytest.mark.parametrize("pixels", [(), (2, 3)], ids=["rows", "pixels"])
def test_layouts(backend: Backend, pixels: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    launched, launch_all = [], kernels.launch

    def noted(kernel: str, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        launched.append(args[0].logits.ptr.data_ptr())
        launch_all(kernel, grid, *args, **meta)

    for name, layout in (PIXEL_LAYOUTS if pixels else LAYOUTS).items():
        case = Case(name, N=3, C=21, pixels=pixels, layout=layout, target=ignore(1), **OPTIONS["everything"])
        call = case.build(backend.device)
        check_whole(backend, call, (0, 9, 21))
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "launch", noted)
            for shard in shards(call, (0, 9, 21)):
                launched.clear()
                sums = launch.part(shard)
                launch.finish(shard, sums, Upstream(sums[0]), torch.empty_like(shard.input))
                assert launched == [shard.input.data_ptr()] * 2, f"{name} was copied"


@backends
def test_without_batch_and_without_rows(backend: Backend) -> None:
    call = Case("one", N=1, C=21, target=lambda y: y[0]).build(backend.device)
    check_whole(backend, call._replace(input=call.input[0]), (0, 9, 21))
    for call in shards(Case("none", N=0, C=21).build(backend.device), (0, 9, 21)):
        sums = backend.module.part(call)
        assert sums.shape == (8, 0)
        backend.module.finish(call, sums, Upstream(sums[0]), torch.empty_like(call.input))


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("odd", [15, planning.ODD])
def test_into_the_logits_and_into_a_padded_one(
    backend: Backend, dtype: torch.dtype, odd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "ODD", odd)
    call = Case("into", N=4, C=75, dtype=dtype, target=always(3, 70, -100, 40), **OPTIONS["smoothing"])
    for shard in shards(call.build(backend.device), (0, 37, 75)):
        sums, g = launch.part(shard), torch.rand(4, device=backend.device)
        wanted = torch.empty(shard.input.shape, dtype=dtype, device=backend.device)
        launch.finish(shard, sums, Upstream(g), wanted)
        memory = torch.full((6, shard.classes + 3), 7.0, dtype=dtype, device=backend.device)
        for inplace in (False, True):
            for begin in range(3):
                memory.fill_(7.0)
                into = memory[1:-1, begin : begin + shard.classes]
                given = into.copy_(shard.input) if inplace else shard.input
                options = shard.options._replace(inplace=inplace)
                launch.finish(shard._replace(input=given, options=options), sums, Upstream(g), into)
                assert torch.equal(bits(into), bits(wanted))
                into.fill_(7.0)
                assert (memory == 7.0).all()


@backends
@pytest.mark.parametrize("path", PATHS)
def test_one_shard_of_all_classes_has_the_bits_of_a_whole_call(
    backend: Backend, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(path, monkeypatch)
    for name in ("plain", "everything"):
        case = Case("bits", N=3, C=75, target=ignore(1), **OPTIONS[name])
        call = case.build(backend.device)
        call = call._replace(options=call.options._replace(reduction="none", lse_square_scale=0.0))
        _, _, saved, stats = launch.forward(call, "recompute")
        g = torch.tensor([0.3, 0.5, 2.0], device=backend.device)
        wanted = launch.backward(call, None, saved, Upstream(g, g / 3), True, False).input
        (shard,) = shards(call, (0, 75))
        sums = launch.part(shard)
        counted = call.target != -100
        for saved_at, field in ((0, "m"), (1, "so"), (2, "q_others")):
            assert torch.equal(saved[:-1, saved_at][counted], getattr(RowSums(*sums), field)[counted])
        assert stats is None or torch.equal(stats.argmax, sums[7].long())
        into = torch.empty_like(wanted)
        launch.finish(shard, sums, Upstream(g, g / 3), into)
        assert torch.equal(bits(into), bits(wanted))


@backends
def test_one_upstream_gradient_for_all_rows(backend: Backend) -> None:
    (_, call) = shards(Case("number", N=5, C=21).build(backend.device), (0, 9, 21))
    sums, g = launch.part(call), torch.tensor(0.7, device=backend.device)
    results = [torch.empty_like(call.input) for _ in range(2)]
    for into, loss in zip(results, (g, torch.stack([g, g * 0] * 5)[::2]), strict=True):  # rows of which lie apart
        launch.finish(call, sums, Upstream(loss), into)
        sums = sums.T.contiguous().T  # whose rows lie apart too
    assert torch.equal(bits(results[0]), bits(results[1]))


@backends
def test_the_gradient_of_the_entropy_is_by_torch(backend: Backend) -> None:
    (_, call) = shards(Case("entropy", N=5, C=21, options={"return_stats": True}).build(backend.device), (0, 9, 21))
    sums, g = launch.part(call), torch.rand(3, 5, device=backend.device).double()
    results = [torch.empty_like(call.input) for _ in range(2)]
    for module, into in zip((launch, reference), results, strict=True):
        module.finish(call, sums, Upstream(*g), into)
    assert torch.equal(bits(results[0]), bits(results[1]))


@backends
@pytest.mark.parametrize("bad", [21, 22, -1, 1 << 40, (1 << 32) + 3])
def test_targets_outside_of_all_classes(backend: Backend, bad: int) -> None:
    call = Case("bad", N=4, C=21, target=always(20, bad, -100, 3)).build(backend.device)
    launch.check_targets()
    calls = list(shards(call, (0, 9, 21)))
    with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
        reference.part(calls[0])
    for shard in calls:
        part = RowSums(*backend.module.part(shard).cpu())
        assert part.z_y.isnan().tolist() == [False, True, False, False]
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            launch.check_targets()
    sums = joined([backend.module.part(shard) for shard in calls])
    for shard in calls:
        grad = gradient(backend, shard, sums, Upstream(torch.ones(4)))
        assert grad.isnan().any(1).tolist() == grad.isnan().all(1).tolist() == [False, True, False, False]
    with pytest.raises(IndexError):
        launch.check_targets()


@backends
def test_a_target_elsewhere_is_neither_ignored_nor_bad(backend: Backend) -> None:
    case = Case("far", N=4, C=21, target=always(20, 9, 8, 0), options={"return_stats": True}, weight=ramp)
    launch.check_targets()
    low, high = (RowSums(*backend.module.part(shard).cpu()) for shard in shards(case.build(backend.device), (0, 9, 21)))
    launch.check_targets()
    assert (low.z_y == -inf).tolist() == (low.q_y == 0).tolist() == [True, True, False, False]
    assert (high.z_y == -inf).tolist() == (high.q_y == 0).tolist() == [False, False, True, True]
    assert (low.argmax < 9).all()
    assert (high.argmax >= 9).all()
    assert low.so.all()
    assert high.so.all()


@backends
def test_an_ignored_row_is_0_whatever_it_holds(backend: Backend) -> None:
    for stats in (False, True):
        case = Case("ignored", N=3, C=21, logits=set_at(1, nan), target=ignore(1), options={"return_stats": stats})
        calls = list(shards(case.build(backend.device), (0, 9, 21)))
        parts = [backend.module.part(shard).cpu() for shard in calls]
        for part in parts:
            assert part[:, 1].tolist() == [0, 0, 0, 0, 0, 0, 0, -1]
            assert (part[7] == -1).all() != stats
            assert bool(part[6].any()) == stats
        for shard in calls:
            grad = gradient(backend, shard, joined(parts), Upstream(torch.full((3,), inf), torch.ones(3)))
            assert not grad[1].any()


def test_weights_are_of_all_classes() -> None:
    call = Case("weights", N=3, C=21, weight=ramp).build()
    _, shard = shards(call, (0, 9, 21))
    assert not [reason for reason in launch.unsupported(shard) if "weight" in reason]
    assert [
        reason for reason in launch.unsupported(shard._replace(weight=torch.ones(12))) if "weight must be" in reason
    ]
