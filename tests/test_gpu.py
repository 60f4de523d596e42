"""How `launch.py` cuts the work into programs, whatever the strides: no way of cutting changes a result."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from accuracy import bits
from cases import CASES as ALL
from cases import EVERYTHING, Case, confident, ignore, ramp, set_at
from conftest import Backend
from judge import check, check_grad, expected_grad, expected_of
from oracle import double

import fused_ce
from fused_ce import formula
from fused_ce.backends import reference
from fused_ce.backends.triton import launch, rows
from fused_ce.backends.triton import plan as planning
from fused_ce.contract import Call, Upstream

PIXELS: dict[str, Any] = {"N": 3, "pixels": (5, 7), "target": ignore(3, 36)}
CASES = [
    Case("rows", N=37, C=130, target=ignore(3, 36)),
    Case("rows-everything", N=37, C=130, options=EVERYTHING, weight=ramp, target=ignore(3, 36)),
    Case("rows-bfloat16", N=37, C=130, dtype=torch.bfloat16, target=ignore(3, 36)),
    Case("rows-transposed", N=37, C=130, layout=lambda x: x.T.contiguous().T),
    Case("rows-probabilities", N=37, C=130, probs=torch.float32, options=EVERYTHING, weight=ramp),
    Case("pixels", C=33, **PIXELS),
    Case("pixels-everything", C=33, options=EVERYTHING, weight=ramp, **PIXELS),
    Case("pixels-turned", C=33, layout=lambda x: x.mT.contiguous().mT, **PIXELS),
    Case("channels-last", C=33, layout=lambda x: x.to(memory_format=torch.channels_last), **PIXELS),
]
only_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@only_triton
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("chunk", [8, 40, 64])
def test_chunks_of_rows(backend: Backend, case: Case, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CHUNK", chunk)
    monkeypatch.setattr(launch, "SUMS", launch.SUMS | {"CHUNK": chunk, "BLOCK": 8})
    call = case.build(backend.device)
    exact_loss, exact_grad = expected_of(case)
    loss, grad, _, _ = launch.forward(call, "fused")
    check(loss, exact_loss)
    check_grad(grad, call, exact_grad)


@only_triton
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tile", [(1, 256), (4, 64), (16, 16)], ids=str)
def test_tiles_and_fewer_programs(
    backend: Backend, case: Case, tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_all = launch._launch

    def launch_fewer(kernel: str, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        # These walk on by the number of programs, which only huge inputs make less than the work.
        grid = tuple(-(-size // 3) for size in grid) if kernel in ("backward", "rescale") else grid
        launch_all(kernel, grid, *args, **meta)

    monkeypatch.setattr(planning, "plan", lambda *arguments: planning.Plan(*tile, 0, 4, 1, 3))
    monkeypatch.setattr(launch, "_launch", launch_fewer)
    call = case.build(backend.device)
    exact_loss, exact_grad = expected_of(case)
    loss, grad, _, _ = launch.forward(call, "fused")
    check(loss, exact_loss)
    check_grad(grad, call, exact_grad)
    saved = launch.forward(call, "recompute")[2]
    again = launch.backward(call, None, saved, Upstream(torch.ones_like(loss)), True, False).input
    check_grad(again, call, exact_grad)
    doubled = launch.backward(call, grad, saved, Upstream(torch.full_like(loss, 2)), True, False).input
    assert torch.equal(bits(doubled), bits(grad * 2))


PATHS = {  # plan of forward, and multiprocessors
    "held": (lambda C: planning.Plan(1, 32, -(-C // 32), 4, 2, planning.MANY), 1),
    "walked": (lambda C: planning.Plan(1, 32, 0, 4, 1, 2), 1),
    "shared": (lambda C: planning.Plan(1, 32, 0, 4, 1, 2), 1000),
}
MATRICES = [case for case in ALL if not case.pixels and case.C in (33, 64, 65) and "grad_scale" not in case.options]
HARD = {
    "first-tiles-minus-inf": set_at((slice(None), slice(64)), -torch.inf),
    "last-tiles-minus-inf": set_at((slice(None), slice(64, None)), -torch.inf),
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
MATRICES += [Case(f"{a}-{b}", C=101, logits=HARD[a], **HARD_CALLS[b]) for a in HARD for b in HARD_CALLS]


def take(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every call down one path, in tiles so short that there are many, cut at 16 bytes where rows are odd."""
    forward, multiprocessors = PATHS[path]
    backward = planning.Plan(1, 64, 0, 4, 1, planning.MANY)
    monkeypatch.setattr(planning, "plan", lambda C, *_: forward(C) if _[-2] else backward)
    monkeypatch.setattr(planning, "device", lambda tensor: planning.Device(None, multiprocessors, 0, False))
    monkeypatch.setattr(planning, "ODD", 15)


@only_triton
@pytest.mark.parametrize("path", ["held", "walked"])
@pytest.mark.parametrize("case", MATRICES, ids=str)
def test_paths(backend: Backend, case: Case, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path, monkeypatch)
    call = case.build(backend.device)
    exact_loss, exact_grad = expected_of(case)
    ones = torch.ones_like(exact_loss.exact).to(backend.device, call[3].dtype or call[0].dtype)
    if call[3].reduction != "none" and exact_grad.exact.numel():
        loss, grad, _, _ = launch.forward(call, "fused")
        check(loss, exact_loss)
        check_grad(grad, call, exact_grad)
    loss, _, saved, _ = launch.forward(call, "recompute")
    check(loss, exact_loss)
    check_grad(launch.backward(call, None, saved, Upstream(ones), True, False).input, call, exact_grad)


@only_triton
@pytest.mark.parametrize("case", [case for case in MATRICES if case.C == 101 and (case.weight or case.probs)], ids=str)
def test_rows_shared_by_programs_have_the_same_bits(
    backend: Backend, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for path in ("walked", "shared"):
        take(path, monkeypatch)
        *tensors, options = case.build(backend.device)
        call = Call(*tensors, options._replace(return_stats=True))
        sums = Call(*tensors, options._replace(return_stats=True, reduction="sum"))
        results.append((*launch.forward(call, "loss")[::3], *launch.forward(sums, "fused")))
    for walked, shared in zip(*results, strict=True):
        pairs = [(walked, shared)] if isinstance(walked, torch.Tensor) else zip(walked, shared, strict=True)
        assert all(torch.equal(bits(a), bits(b)) for a, b in pairs)


@only_triton
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("C", [64, 65, 103])
def test_neighbours_in_memory(
    backend: Backend, C: int, dtype: torch.dtype, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows that begin at every place of a vector, between values that are nobody's to read or write.
    take(path, monkeypatch)
    case = Case("neighbours", N=5, C=C, dtype=dtype, target=ignore(2))
    input, *rest, options = case.build(backend.device)
    exact_loss, exact_grad = expected_of(case)
    memory = input.new_full((7, C + 3), torch.nan)
    for offset in (0, 1):
        within = memory[1:-1, offset : offset + C].copy_(input)
        loss, grad, _, _ = launch.forward(Call(within, *rest, options), "fused")
        check(loss, exact_loss)
        check_grad(grad, (input, *rest, options), exact_grad)
        grad = launch.forward(Call(within, *rest, options._replace(inplace=True)), "fused")[1]
        assert grad is within
        check(grad, exact_grad)
        within.fill_(torch.nan)
        assert memory.isnan().all()


@only_triton
@pytest.mark.parametrize("path", PATHS)
def test_more_than_2_to_the_31_apart(backend: Backend, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take(path, monkeypatch)
    case = Case("far", N=2, C=65, dtype=torch.float16, options={"reduction": "sum"})
    input, *rest, options = case.build(backend.device)
    apart = (1 << 31) + 8
    memory = torch.from_numpy(np.empty(apart + 65, np.float16)) if backend.device == "cpu" else None
    memory = memory if memory is not None else input.new_empty(apart + 65)
    far = memory.as_strided((2, 65), (apart, 1)).copy_(input)
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


DEVICES = {
    "hopper": planning.Device((9, 0), 132, 50 << 20, True),
    "hopper, old triton": planning.Device((9, 0), 132, 50 << 20, False),
    "ampere": planning.Device((8, 0), 108, 40 << 20, False),
    "amd": planning.Device(None, 304, 4 << 20, False),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("extra", [0, 1, 2, 5])
@pytest.mark.parametrize("side", [1, 2, 5, 32, 3136])
def test_plan_holds_the_classes(side: int, extra: int, held: bool, device: str) -> None:
    for dtype in launch.FLOATS:
        for C in (1, 2, 3, 10, 150, 512, 513, 1000, 4096, 4097, 16384, 16385, 32001, 50257, 151936, 262144, 1 << 20):
            cut = planning.plan(C, dtype, side, extra, held, DEVICES[device])
            numbers = (cut.rows, cut.block, cut.warps, cut.ctas)
            assert all(number & (number - 1) == 0 for number in numbers)  # Triton's shapes
            assert cut.rows >= min(side, 32)
            threads = cut.warps * cut.ctas * (32 if DEVICES[device].capability else 64)
            assert cut.rows * cut.block * max(cut.pieces, 1) <= threads * max(64 >> extra, 16)
            assert (cut.pieces - 1) * cut.block < C <= max(cut.pieces * cut.block, C * (cut.pieces == 0))
            assert cut.warps <= 16
            assert cut.ctas == 1 or (held and cut.pieces and cut.ctas <= 8 and DEVICES[device].clusters)
            assert cut.programs >= DEVICES[device].multiprocessors


@only_triton
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "permuted", "sliced", "turned", "expanded"])
def test_no_layout_is_copied(backend: Backend, layout: str) -> None:
    x = torch.randn(2, 6, 4, 8, device=backend.device)
    x = {
        "contiguous": x,
        "channels-last": x.to(memory_format=torch.channels_last),
        "permuted": x.permute(3, 1, 0, 2),
        "sliced": x[:, 1:-1, 1:, ::2],
        "turned": x.mT,
        "expanded": x[:1].expand(3, 6, 4, 8),
    }[layout]
    grad = x.new_empty(x.shape)
    sizes, views = rows.matrices(x, None, grad)
    C = x.shape[1]
    assert views[0].ptr.data_ptr() == x.data_ptr()
    assert views[1] is None
    assert math.prod(sizes) == x[:, 0].numel()
    for tensor, view in ((x, views[0]), (grad.copy_(x), views[2])):
        strides = [1 if stride is None else stride for stride in (*(view.outer or ())[::-1], view.inner)]
        seen = torch.as_strided(tensor, sizes, strides, tensor.storage_offset())
        assert torch.equal(seen.flatten(), tensor[:, 0].flatten())
        align = rows.alignment(C, sizes[-1], [view])
        assert all(stride % align == 0 for stride in (*strides, view.col or 1) if stride != 1)


@only_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("given", ["number", "tensor"])
def test_expected_upstream_gradient(backend: Backend, dtype: torch.dtype, given: str) -> None:
    # 1 / 3 arrives in the dtype of the loss, and is recognised as it comes.
    case = Case("expected", N=5, C=130, dtype=dtype, target=ignore(1))
    hint = 1 / 3 if given == "number" else torch.tensor(1 / 3, device=backend.device)
    *tensors, options = case.build(backend.device)
    call = Call(*tensors, options._replace(grad_scale=hint))
    loss, grad, saved, _ = launch.forward(call, "fused")
    upstream = torch.full_like(loss, 1 / 3)
    check_grad(grad, call, expected_grad(upstream, call))
    untouched = grad.clone()
    assert launch.backward(call, grad, saved, Upstream(upstream), False, False).input is grad
    assert torch.equal(bits(grad), bits(untouched))
    other = launch.backward(call, grad, saved, Upstream(upstream * 2), False, False).input
    check_grad(other, call, expected_grad(upstream * 2, call), roundings=1 if dtype != torch.float32 else 2)


@only_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_place(backend: Backend, case: Case) -> None:
    input, *rest, options = case.build(backend.device)
    if not input.is_contiguous():
        return
    call = Call(input.clone(), *rest, options._replace(inplace=True))
    _, exact = expected_of(case)
    grad = launch.forward(call, "fused")[1]
    assert grad.data_ptr() == call[0].data_ptr()
    check_grad(grad, (input, *rest, options), exact)
    call = Call(input.clone(), *rest, options._replace(inplace=True))
    loss, _, saved, _ = launch.forward(call, "recompute")
    assert torch.equal(call[0], input)
    grad = launch.backward(call, None, saved, Upstream(torch.ones_like(loss)), False, False).input
    assert grad.data_ptr() == call[0].data_ptr()
    check_grad(grad, (input, *rest, options), exact)


@only_triton
@pytest.mark.parametrize("probs", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pixels", [(), (3, 5)], ids=str)
def test_extras_and_their_gradients(backend: Backend, pixels: tuple[int, ...], probs: torch.dtype | None) -> None:
    case = Case("stats", N=4, C=130, pixels=pixels, probs=probs, options=EVERYTHING, weight=ramp)
    input, target, weight, options = case.build(backend.device)
    if probs is None:
        target.view(-1)[1] = options.ignore_index
    call = Call(input, target, weight, options._replace(return_stats=True))
    exact_call = Call(double(input), double(target) if probs else target.cpu(), double(weight), call.options)
    loss, _, saved, stats = launch.forward(call, "recompute")
    exact = formula.composite(exact_call)[1]
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
