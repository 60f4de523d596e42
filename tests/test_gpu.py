"""How `gpu.py` cuts the work into programs: no way of cutting changes a result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import bits
from cases import EVERYTHING, Case, ignore, ramp
from conftest import Backend
from judge import check, check_grad, expected_of

from fused_ce import gpu
from fused_ce.options import Options

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CASES = [
    Case("rows", N=37, C=130, target=ignore(3, 36)),
    Case("rows-everything", N=37, C=130, options=EVERYTHING, weight=ramp, target=ignore(3, 36)),
    Case("rows-bfloat16", N=37, C=130, dtype=torch.bfloat16, target=ignore(3, 36)),
]
only_triton = pytest.mark.parametrize("backend", ["triton"], indirect=True)


@only_triton
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("chunk", [8, 37, 64])
def test_chunks_of_rows(backend: Backend, case: Case, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "CHUNK", chunk)
    monkeypatch.setattr(gpu, "SUMS", gpu.SUMS | {"CHUNK": chunk, "BLOCK": 8})
    call = case.build(backend.device)
    exact_loss, exact_grad = expected_of(case)
    loss, grad, _, _ = gpu.forward(*call, "fused")
    check(loss, exact_loss)
    check_grad(grad, call, exact_grad)


@only_triton
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("tile", [gpu.Tile(1, 256, 4), gpu.Tile(4, 64, 4), gpu.Tile(16, 16, 4)], ids=str)
def test_tiles_and_fewer_programs(
    backend: Backend, case: Case, tile: gpu.Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = gpu._launch

    def launch_fewer(kernel: str, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        # These walk on by the number of programs, which only huge inputs make less than the work.
        grid = tuple(-(-size // 3) for size in grid) if kernel in ("backward", "rescale") else grid
        launch(kernel, grid, *args, **meta)

    monkeypatch.setattr(gpu, "tile", lambda *arguments: tile)
    monkeypatch.setattr(gpu, "_launch", launch_fewer)
    call = case.build(backend.device)
    exact_loss, exact_grad = expected_of(case)
    loss, grad, stats, _ = gpu.forward(*call, "fused")
    check(loss, exact_loss)
    check_grad(grad, call, exact_grad)
    again = gpu.backward(torch.ones_like(loss), None, *call, None, stats, True, False)[0]
    check_grad(again, call, exact_grad)
    doubled = gpu.backward(torch.full_like(loss, 2), None, *call, grad, stats, True, False)[0]
    assert torch.equal(bits(doubled), bits(grad * 2))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", [Options(), Options(softcap=2.0)], ids=["plain", "softcap"])
def test_tile_holds_the_classes(dtype: torch.dtype, options: Options) -> None:
    for C in (1, 2, 3, 10, 1000, 1024, 1025, 4096, 4097, 16384, 16385, 50257, 262144):
        rows, block, warps = gpu.tile(C, dtype, options)
        assert all(number & (number - 1) == 0 for number in (rows, block, warps))  # Triton's shapes
        assert block <= 16384
        assert block < 2 * max(C, 2)
        assert 4 <= warps <= 16
