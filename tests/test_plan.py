"""How `plan.py` and `rows.py` cut a call and see its strides: numbers alone, no kernel runs."""

from __future__ import annotations

import math

import pytest
import torch

from fused_ce.backends.triton import launch, rows
from fused_ce.backends.triton import plan as planning

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


@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "permuted", "sliced", "turned", "expanded"])
def test_no_layout_is_copied(layout: str) -> None:
    x = torch.randn(2, 6, 4, 8)
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
