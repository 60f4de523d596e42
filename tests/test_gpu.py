"""How `launch.py` cuts the work into programs, whatever the strides: no way of cutting changes a result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import bits
from cases import CASES as ALL
from cases import EVERYTHING, LAYOUTS, Case, always, confident, ignore, ramp, set_at
from conftest import Backend
from judge import check, check_grad, expected_grad, expected_of
from oracle import double

import fused_ce
from fused_ce import operators
from fused_ce.backends import reference
from fused_ce.backends.triton import kernels, launch
from fused_ce.backends.triton import plan as planning
from fused_ce.contract import Call, Schedule, Upstream
from fused_ce.options import Options

only_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@pytest.fixture(autouse=True)
def nothing_beyond(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the kernels write into stands between values that are nobody's to write, and still are at the end."""
    new_empty, beyond = torch.Tensor.new_empty, []

    def within(self: torch.Tensor, *size: Any, **keywords: Any) -> torch.Tensor:
        result = new_empty(self, *size, **keywords)
        if not result.is_floating_point():
            return result
        memory = new_empty(self, result.numel() + 8192, **keywords)
        beyond.extend(edge.fill_(12288) for edge in (memory[:4096], memory[-4096:]))  # exact in every dtype
        return memory[4096:-4096].view(result.shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", within)
    yield
    assert all((edge == 12288).all() for edge in beyond)


SUMMED = [
    Case("mean", N=37, options={"lse_square_scale": 1e-2}, weight=ramp, target=ignore(3, 36)),
    Case("sum", N=37, options={"reduction": "sum"}),
    Case("pixels", N=3, pixels=(5, 7), target=ignore(3, 36)),
    Case("probabilities", N=37, probs=torch.float32),
]


@only_triton
@pytest.mark.parametrize("case", SUMMED, ids=str)
@pytest.mark.parametrize("chunk", [8, 16, 256])  # several of one block and of two, and one of many
def test_chunks_of_rows(backend: Backend, case: Case, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CHUNK", chunk)
    monkeypatch.setattr(launch, "SUMS", launch.SUMS | {"CHUNK": chunk, "BLOCK": 8})
    call = case.build(backend.device)
    exact_loss, exact_grad = expected_of(case)
    loss, grad, _, _ = launch.forward(call, "fused")
    check(loss, exact_loss)
    check_grad(grad, call, exact_grad)


ROWS: dict[str, Any] = {"N": 9, "C": 40}
PIXELS: dict[str, Any] = {"N": 2, "C": 33, "pixels": (2, 3), "target": ignore(3, 11)}
SIDE_BY_SIDE = [
    Case("rows", target=ignore(3, 8), **ROWS),
    Case("rows-everything", options=EVERYTHING, weight=ramp, target=ignore(3, 8), **ROWS),
    Case("rows-bfloat16", dtype=torch.bfloat16, target=ignore(3, 8), **ROWS),
    Case("rows-transposed", layout=lambda x: x.T.contiguous().T, **ROWS),
    Case("rows-probabilities", probs=torch.float32, options=EVERYTHING, weight=ramp, **ROWS),
    Case("pixels", **PIXELS),
    Case("pixels-everything", options=EVERYTHING, weight=ramp, **PIXELS),
    Case("pixels-turned", layout=lambda x: x.mT.contiguous().mT, **PIXELS),
    Case("channels-last", layout=lambda x: x.to(memory_format=torch.channels_last), **PIXELS),
]


def launch_fewer(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Let these kernels, which walk on by the number of programs, run with half as many: else only huge inputs do."""
    launch_all = kernels.launch

    def fewer(kernel: str, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        launch_all(kernel, tuple(-(-size // 2) for size in grid) if kernel in names else grid, *args, **meta)

    monkeypatch.setattr(kernels, "launch", fewer)


@only_triton
@pytest.mark.parametrize("case", SIDE_BY_SIDE, ids=str)
def test_several_rows_at_a_time(backend: Backend, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three or four groups of rows, the last not full, in three tiles each, for two programs to walk.
    monkeypatch.setattr(planning, "plan", lambda *_: planning.Plan(4, 16, 0, 4, 1, 2))
    launch_fewer(monkeypatch, "backward")
    call = case.build(backend.device)
    exact_loss, exact_grad = expected_of(case)
    loss, grad, saved, _ = launch.forward(call, "fused")
    check(loss, exact_loss)
    check_grad(grad, call, exact_grad)
    if saved is None:
        saved = launch.forward(call, "recompute").saved
    again = launch.backward(call, None, saved, Upstream(torch.ones_like(loss)), True, False).input
    check_grad(again, call, exact_grad)


@only_triton
def test_fewer_programs_for_one_row(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "plan", lambda *_: planning.Plan(1, 32, 0, 4, 1, 2))
    launch_fewer(monkeypatch, "backward")
    case = Case("rows", N=3, C=75, dtype=torch.bfloat16, target=ignore(1))
    call = case.build(backend.device)
    loss, grad, saved, _ = launch.forward(call, "fused")
    again = launch.backward(call, None, saved, Upstream(torch.ones_like(loss)), True, False).input
    for result in (grad, again):
        check_grad(result, call, expected_of(case)[1])


@only_triton
@pytest.mark.parametrize("keep", [True, False])
def test_fewer_programs_to_rescale(backend: Backend, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launch_fewer(monkeypatch, "rescale_grad")
    grad = torch.randn(4 * 4096 + 5, device=backend.device)  # five blocks for three programs
    wanted = grad * 3
    assert torch.equal(launch.rescale(grad, torch.zeros(1), Options(), grad.new_tensor(3.0), keep, False), wanted)


WALKED = planning.Plan(1, 32, 0, 4, 1, 1)  # all rows by one program
PATHS = {  # plan of forward, and multiprocessors
    "held": (lambda C: planning.Plan(1, 32, -(-C // 32), 4, 2, planning.MANY), 1),
    "walked": (lambda C: WALKED, 1),
    "shared": (lambda C: WALKED, 1000),
}
# Of cases.py, what sends a call down another part of a path: layouts, dtypes, kinds of q, options that are compiled.
TAKEN = {
    *("C64-float32", "C64-bfloat16-everything", "mean-float64", "sum-float16", "none-bfloat16", "one-row-alone-mean"),
    *(f"layout-{name}-float32" for name in LAYOUTS),
    *(f"layout-{name}-bfloat16" for name in ("padded", "misaligned", "rows-apart")),  # begin anywhere in a vector
    *(f"{name}-weight-ignore" for name in ("smoothing", "scale", "softcap-2", "z-loss-num-items", "everything")),
    *("probabilities-C64", "probabilities-none", "probabilities-everything", "probabilities-z-loss"),
    *("probabilities-float64-bfloat16", "probabilities-float16-float64", "probabilities-bfloat16-bfloat16"),
}
# Rows that repeat what others do are not run: a program of the interpreter costs much, and its work little.
MATRICES = [replace(case, N=min(case.N, 2)) for case in ALL if case.id in TAKEN]
assert len(MATRICES) == len(TAKEN)
HARD = {  # C = 75 in tiles of 32
    "first-tiles-minus-inf": set_at((slice(None), slice(64)), -torch.inf),
    "last-tiles-minus-inf": set_at((slice(None), slice(32, None)), -torch.inf),
    "a-row-minus-inf": set_at(1, -torch.inf),
    "inf": set_at((1, 70), torch.inf),
    "nan": set_at((1, 70), torch.nan),
    "certain": confident(20),
    "shifted": lambda x, y: x + 1e8,
}
HARD_CALLS: dict[str, dict[str, Any]] = {
    "plain": {"dtype": torch.bfloat16},
    "everything": {"options": EVERYTHING | {"reduction": "none"}, "weight": ramp, "target": ignore(0)},
    "probabilities": {"options": {"reduction": "none", "label_smoothing": 0.1}, "probs": torch.float32},
}
HARD_CASES = [Case(f"{a}-{b}", N=2, C=75, logits=HARD[a], **HARD_CALLS[b]) for a in HARD for b in HARD_CALLS]
# The last tile holds one class, which is -inf and has a probability: it leaves out no class, and the loss is inf.
ALONE = Case("minus-inf-alone", N=2, C=65, logits=set_at((0, 64), -torch.inf), **HARD_CALLS["probabilities"])
# Nothing but z_y knows of the target's NaN.
OF_THE_TARGET = Case("nan-of-the-target", N=2, C=75, logits=set_at((1, 70), torch.nan), target=always(3, 70))
HARD_CASES += [ALONE, OF_THE_TARGET]


def take(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every call down one path, in tiles so short that there are many, cut at 16 bytes where rows are odd."""
    forward, multiprocessors = PATHS[path]
    backward = planning.Plan(1, 64, 0, 4, 1, planning.MANY)

    def plan(C: int, dtype: torch.dtype, side: int, extra: int, held: bool, device: planning.Device) -> planning.Plan:
        return forward(C) if held else backward

    monkeypatch.setattr(planning, "plan", plan)
    monkeypatch.setattr(planning, "device", lambda tensor: planning.Device(None, multiprocessors, 0, False))
    monkeypatch.setattr(planning, "ODD", 15)


def with_stats(call: Call) -> Call:
    return call._replace(options=call.options._replace(return_stats=True))


@only_triton
@pytest.mark.parametrize("case", MATRICES + HARD_CASES, ids=str)
def test_paths(backend: Backend, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    call = case.build(backend.device)
    exact_loss, exact_grad = expected_of(case)
    schedule: Schedule = "recompute" if call.options.reduction == "none" else "fused"
    take("held", monkeypatch)
    held = launch.forward(call, schedule)
    take("walked", monkeypatch)
    walked = launch.forward(with_stats(call), schedule)  # which saves in float32 too
    for loss, grad, _, _ in (held, walked):
        check(loss, exact_loss)
        if grad is not None:
            check_grad(grad, call, exact_grad)
    # Whatever a row holds, its largest logit is one that exists; where all are -inf, backward is told of none.
    exists = call.target.reshape(-1) != -100 if not call.has_probs else torch.ones(len(walked.saved) - 1).bool()
    assert torch.equal(walked.stats.argmax.reshape(-1) >= 0, exists)
    assert (walked.stats.argmax < case.C).all()
    assert (walked.saved[:-1, 3] < case.C).all()
    ones = torch.ones_like(walked.loss)
    again = launch.backward(call, None, walked.saved, Upstream(ones), True, False).input
    check_grad(again, call, exact_grad)


SHARED = [("fused", case) for case in HARD_CASES if case.weight or case.probs]
SHARED += [("loss", case) for _, case in SHARED if case.id.startswith("shifted")]  # the same but for the grid


@only_triton
@pytest.mark.parametrize(("schedule", "case"), SHARED, ids=str)
def test_rows_shared_by_programs_have_the_same_bits(
    backend: Backend, schedule: Schedule, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = with_stats(case.build(backend.device))
    if schedule == "fused":
        call = call._replace(options=call.options._replace(reduction="sum"))
    results = []
    for path in ("walked", "shared"):
        take(path, monkeypatch)
        loss, grad, saved, stats = launch.forward(call, schedule)
        results.append([bits(tensor) for tensor in (loss, *stats, grad, saved) if tensor is not None])
    for walked, shared in zip(*results, strict=True):
        assert torch.equal(walked, shared)


@only_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("C", "path"), [(65, "held"), (65, "walked"), (103, "walked"), (65, "shared")])
def test_neighbours_in_memory(
    backend: Backend, C: int, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows that begin at every place of a vector, between values that are nobody's to read or write; the targets stand
    # in the tiles that are written first, last and between.
    take(path, monkeypatch)
    case = Case("neighbours", N=5, C=C, dtype=dtype, target=always(C - 1, 1, -100, C // 2, C - 1))
    input, *rest, options = case.build(backend.device)
    exact_loss, exact_grad = expected_of(case)
    memory = input.new_full((7, C + 2), torch.nan)
    within = memory[1:-1, :C].copy_(input)
    loss, grad, _, _ = launch.forward(Call(within, *rest, options), "fused")
    check(loss, exact_loss)
    check_grad(grad, Call(input, *rest, options), exact_grad)
    within.fill_(torch.nan)
    within = memory[1:-1, 1 : C + 1].copy_(input)
    grad = launch.forward(Call(within, *rest, options._replace(inplace=True)), "fused")[1]
    assert grad is within
    check(grad, exact_grad)
    within.fill_(torch.nan)
    assert memory.isnan().all()


@only_triton
@pytest.mark.parametrize("path", PATHS)
def test_the_first_of_equal_logits(backend: Backend, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path, monkeypatch)
    case = Case("equal", N=2, C=75, logits=lambda x, y: (x * 0).index_fill(1, torch.tensor([40, 45, 72]), 1.0))
    assert launch.forward(with_stats(case.build(backend.device)), "loss").stats.argmax.tolist() == [40, 40]


NANS = {  # where a row's NaN stand, C = 75
    "first": [0],
    "last": [74],
    "in-two-tiles": [40, 72],
    "in-one-lane": [5, 37, 69],
    "in-two-lanes": [38, 69],
    "everywhere": [*range(75)],
    "last-tile": [*range(64, 75)],
    "none": [],
}
TILES = {
    **{path: None for path in PATHS},
    "rows-walked": planning.Plan(4, 16, 0, 4, 1, 2),
    "rows-held": planning.Plan(4, 32, 3, 4, 1, planning.MANY),
}


@only_triton
@pytest.mark.parametrize("probs", [None, torch.float32], ids=["indices", "probabilities"])
@pytest.mark.parametrize("tiles", TILES)
def test_the_first_nan_is_the_largest(
    backend: Backend, tiles: str, probs: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if TILES[tiles]:
        monkeypatch.setattr(planning, "plan", lambda *_: TILES[tiles])
    else:
        take(tiles, monkeypatch)

    def logits(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for row, at in enumerate(NANS.values()):
            x[row, at] = torch.nan
        x[0, 1:] = -torch.inf
        x[1, :74] = -torch.inf
        x[2, 41], x[4, 4] = torch.inf, torch.inf  # above all but NaN
        return x

    call = with_stats(Case("nan", N=len(NANS), C=75, probs=probs, logits=logits).build(backend.device))
    for schedule in ("loss", "fused"):
        loss, grad, _, stats = launch.forward(call._replace(options=call.options._replace(reduction="sum")), schedule)
        assert stats.argmax.tolist() == call.input.argmax(1).tolist()
        assert loss.isnan()
        assert stats.lse.isnan().tolist() == stats.entropy.isnan().tolist() == [bool(at) for at in NANS.values()]
        if grad is not None:
            assert grad.isnan().all(1).tolist() == grad.isnan().any(1).tolist() == [bool(at) for at in NANS.values()]


@only_triton
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("C", "strides"), [(65, ((1 << 31) + 8, 1)), (3, (1, (1 << 30) + 8))], ids=["rows", "classes"])
def test_more_than_2_to_the_31_apart(
    backend: Backend, C: int, strides: tuple[int, int], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(path, monkeypatch)
    case = Case("far", N=2, C=C, dtype=torch.float16, options={"reduction": "sum"})
    input, *rest, options = case.build(backend.device)
    size = strides[0] + (C - 1) * strides[1] + 1
    memory = torch.from_numpy(np.empty(size, np.float16)) if backend.device == "cpu" else input.new_empty(size)
    far = memory.as_strided((2, C), strides).copy_(input)
    grad = launch.forward(Call(far, *rest, options._replace(inplace=True)), "fused")[1]
    check(grad, expected_of(case)[1])


@only_triton
def test_check_targets(backend: Backend) -> None:
    with contextlib.suppress(IndexError):
        fused_ce.check_targets()  # what other tests left
    *tensors, options = Case("bad", N=4, target=lambda y: y.index_fill(0, y.new_tensor(2), 10)).build(backend.device)
    for reduction in ("none", "mean"):
        for _ in range(2):
            launch.forward(Call(*tensors, options._replace(reduction=reduction)), "loss")
        with pytest.raises(IndexError, match=r"^Target 10 is out of bounds\.$"):
            fused_ce.check_targets()
        fused_ce.check_targets()
    launch.forward(Call(*tensors, options._replace(ignore_index=10)), "loss")
    fused_ce.check_targets()


@only_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", ["number", "tensor"])
def test_expected_upstream_gradient(backend: Backend, dtype: torch.dtype, given: str) -> None:
    # 1 / 3 arrives in the dtype of the loss, and is recognised as it comes.
    case = Case("expected", N=5, C=50, dtype=dtype, target=ignore(1))
    hint = 1 / 3 if given == "number" else torch.tensor(1 / 3, device=backend.device)
    *tensors, options = case.build(backend.device)
    call = Call(*tensors, options._replace(grad_scale=hint))
    loss, grad, saved, _ = launch.forward(call, "fused")
    upstream = torch.full_like(loss, 1 / 3)
    check_grad(grad, call, expected_grad(upstream, call))
    # It is handed out as it is, whatever it is: nothing is computed again.
    grad.fill_(7)
    assert launch.backward(call, grad, saved, Upstream(upstream), False, False).input is grad
    assert (grad == 7).all()
    grad = launch.forward(call, "fused").grad
    other = launch.backward(call, grad, saved, Upstream(upstream * 2), False, False).input
    check_grad(other, call, expected_grad(upstream * 2, call), roundings=1 if dtype != torch.float32 else 2)


@only_triton
@pytest.mark.parametrize(
    "case",
    [
        Case("rows", N=2, C=65, target=always(64, 0)),
        Case("bfloat16-everything", N=2, C=65, dtype=torch.bfloat16, options=EVERYTHING, target=always(64, 0)),
        Case("probabilities", N=2, C=65, probs=torch.float32, logits=set_at((0, 64), 9.0)),
        Case("pixels", N=1, C=65, pixels=(2,), target=always(64, 0)),
    ],
    ids=str,
)
def test_in_place(backend: Backend, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # The largest logit, or the target's, stands in the tile that is overwritten first.
    take("walked", monkeypatch)
    input, *rest, options = case.build(backend.device)
    _, exact = expected_of(case)
    call = Call(input.clone(), *rest, options._replace(inplace=True))
    loss, _, saved, _ = launch.forward(call, "recompute")
    assert torch.equal(call[0], input)
    grad = launch.backward(call, None, saved, Upstream(torch.ones_like(loss)), False, False).input
    assert grad.data_ptr() == call[0].data_ptr()
    check_grad(grad, Call(input, *rest, options), exact)
    if not case.probs:
        call[0].copy_(input)
        grad = launch.forward(call, "fused")[1]
        assert grad.data_ptr() == call[0].data_ptr()
        check_grad(grad, Call(input, *rest, options), exact)


@only_triton
@pytest.mark.parametrize("probs", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pixels", [(), (3, 5)], ids=str)
def test_extras_and_their_gradients(backend: Backend, pixels: tuple[int, ...], probs: torch.dtype | None) -> None:
    case = Case("stats", N=2, C=33, pixels=pixels, probs=probs, options=EVERYTHING, weight=ramp)
    input, target, weight, options = case.build(backend.device)
    if probs is None:
        target.view(-1)[1] = options.ignore_index
    call = Call(input, target, weight, options._replace(return_stats=True))
    exact_call = Call(double(input), double(target) if probs else target.cpu(), double(weight), call.options)
    loss, _, saved, stats = launch.forward(call, "recompute")
    exact = operators.composite(exact_call)[1]
    for got, wanted in zip(stats, exact, strict=True):
        assert got.dtype == (torch.int64 if wanted.dtype == torch.int64 else torch.float32)
        torch.testing.assert_close(got.cpu().to(wanted.dtype), wanted, rtol=2e-6, atol=0)
    g_lse = torch.randn(*loss.shape, *stats.lse.shape, 2, device=backend.device)[..., 1]
    upstream = torch.full_like(loss, 1 / 3)
    wanted = reference.backward(
        exact_call, None, None, Upstream(double(upstream), double(g_lse)), True, probs is not None
    )
    got = launch.backward(call, None, saved, Upstream(upstream, g_lse), True, probs is not None)
    for result, exact_result, like in zip(got, wanted, (input, target), strict=True):
        if exact_result is None:
            assert result is None
            continue
        assert result.dtype == like.dtype
        assert result.is_contiguous()
        largest, eps = float(exact_result.abs().max()), torch.finfo(result.dtype).eps
        torch.testing.assert_close(result.cpu().double(), exact_result, rtol=0, atol=8 * eps * largest)
