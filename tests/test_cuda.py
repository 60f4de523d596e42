"""What only a device can show: kernels at their real sizes, the same bits every time, graphs, and that nobody waits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import bits
from cases import Case, ignore, ramp, rows_apart
from judge import check, check_grad, expected_of
from torch import Tensor

from fused_ce import check_targets, cross_entropy
from fused_ce.backends.triton import kernels, launch, self_check
from fused_ce.contract import Upstream

if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA device (tests/test_gpu.py interprets the kernels)", allow_module_level=True)

CLASSES = (10, 1000, 4096, 32000, 50257, 65537, 128256, 151936, 262144)
DTYPES = (torch.bfloat16, torch.float32)
HUGE = 2**31
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(N: int, C: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(N, C, generator=generator, device="cuda", dtype=dtype)
    y = torch.randint(C, (N,), generator=generator, device="cuda")
    return x.requires_grad_(), y


def both(x: Tensor, y: Tensor, upstream: float = 1.0, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient."""
    loss = cross_entropy(x, y, backend="triton", **options)
    return loss, torch.autograd.grad(loss, x, torch.full_like(loss, upstream))[0]


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:  # () on the device
    return torch.stack([(bits(one) == bits(other)).all() for one, other in zip(a, b, strict=True)]).all()


@dtypes
@pytest.mark.parametrize("C", CLASSES)
@pytest.mark.parametrize("layout", ["packed", "shifted", "apart"])
def test_real_sizes(C: int, dtype: torch.dtype, layout: str) -> None:
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "packed": lambda x: x,
        "shifted": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
        "apart": rows_apart,
    }
    case = Case(f"real-{C}-{dtype}", N=5, C=C, dtype=dtype, target=ignore(1), layout=layouts[layout])
    call = case.build("cuda")
    exact_loss, exact_grad = expected_of(case)
    loss, grad, _, _ = launch.forward(call, "fused")
    check(loss, exact_loss)
    check_grad(grad, call, exact_grad)
    loss, _, stats, _ = launch.forward(call, "recompute")
    check(loss, exact_loss)
    check_grad(launch.backward(call, None, stats, Upstream(torch.ones_like(loss)), True, False).input, call, exact_grad)


@dtypes
@pytest.mark.parametrize("C", CLASSES)
def test_the_same_bits_250_times(C: int, dtype: torch.dtype) -> None:
    x, y = make(max(64, 2**24 // C), C, dtype)
    for upstream in (1.0, 1 / 3):
        first, equal = both(x, y, upstream), torch.ones((), dtype=torch.bool, device="cuda")
        for _ in range(250):
            equal &= same(both(x, y, upstream), first)
        assert equal


@dtypes
@pytest.mark.parametrize("C", [10, 4096, 50257, 128256])
@pytest.mark.parametrize("upstream", [1.0, 1 / 3])
def test_graph(C: int, dtype: torch.dtype, upstream: float) -> None:
    x, y = make(64, C, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both(x, y, upstream)  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(x, y, upstream)
    for seed in (1, 2):
        other = make(64, C, dtype, seed)
        x.data.copy_(other[0])
        y.copy_(other[1])
        graph.replay()
        assert same(captured, both(*other, upstream))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@dtypes
@pytest.mark.parametrize("C", [10, 1000, 50257, 128256])
def test_nothing_waits_for_the_device(C: int, dtype: torch.dtype) -> None:
    x, y = make(64, C, dtype)
    y[3] = -100
    number = torch.full((), 50.0, device="cuda")
    weight = ramp(C).to("cuda", dtype)
    calls: list[dict[str, Any]] = [
        {},
        {"upstream": 1 / 3},
        {"upstream": 1 / 3, "grad_scale": 1 / 3},
        {"grad_scale": number, "num_items": number},
        {"weight": weight, "label_smoothing": 0.1, "lse_square_scale": 1e-4, "softcap": 30.0, "logit_scale": 0.5},
        {"reduction": "none"},
        {"reduction": "sum", "ignore_index": 5},
    ]
    before = torch.cuda.get_sync_debug_mode()
    for options in calls:
        both(x, y, **options)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            both(x, y, **options)
        finally:
            torch.cuda.set_sync_debug_mode(before)


@dtypes
@pytest.mark.parametrize("C", [10, 50257, 128256])
def test_another_stream(C: int, dtype: torch.dtype) -> None:
    x, y = make(256, C, dtype)
    expected = both(x, y)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = both(x, y)
    torch.cuda.current_stream().wait_stream(side)
    assert same(got, expected)


def test_targets_met_on_another_stream() -> None:
    with contextlib.suppress(IndexError):
        check_targets()  # what other tests left
    x, y = make(4096, 50257, torch.bfloat16)
    y[7] = 50257
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(10):
            both(x, y)
    with pytest.raises(IndexError, match=r"^Target 50257 is out of bounds\.$"):
        check_targets()
    check_targets()


def test_targets_met_by_a_graph() -> None:
    x, y = make(64, 1000, torch.bfloat16)
    both(x, y)
    with contextlib.suppress(IndexError):
        check_targets()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both(x, y)
    y[3] = 1000
    graph.replay()
    y[3] = 0
    graph.replay()  # forgets nothing
    with pytest.raises(IndexError, match=r"^Target 1000 is out of bounds\.$"):
        check_targets()
    graph.replay()
    check_targets()


@pytest.mark.parametrize("name", ["num_items", "grad_scale"])
def test_a_number_on_the_cpu_neither_waits_nor_breaks_a_capture(name: str) -> None:
    x, y = make(64, 1000, torch.float32)
    wanted = both(x, y, **{name: 3.0})
    given = {name: torch.tensor(3.0)}
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = both(x, y, **given)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert same(got, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(x, y, **given)
    graph.replay()
    assert same(captured, wanted)


@dtypes
@pytest.mark.parametrize("C", [1000, 50257, 128256])
@pytest.mark.parametrize("upstream", [1.0, 1 / 3])
def test_memory_beyond_logits_and_gradient(C: int, dtype: torch.dtype, upstream: float) -> None:
    N = 2**26 // C
    x, y = make(N, C, dtype)
    both(x, y, upstream)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both(x, y, upstream)
    assert torch.cuda.max_memory_allocated() - before <= x.numel() * x.itemsize + 128 * N + 2**16


@pytest.mark.parametrize("C", [1000, 128256])
def test_other_values_do_not_compile_again(C: int) -> None:
    table = kernels.table()
    x, y = make(64, C, torch.bfloat16)
    counts = []
    for value in (0.1, 0.2, 0.3):
        options = {"label_smoothing": value, "lse_square_scale": value, "softcap": 30 + value, "logit_scale": value}
        both(x, y, value, **options, grad_scale=value)
        caches = [table[name].device_caches for name in ("forward", "backward", "prepare", "total")]
        counts.append([sum(len(entry[0]) for entry in cache.values()) for cache in caches])
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("elements", [HUGE, 2 * HUGE], ids=["2^31", "2^32"])
@pytest.mark.parametrize("C", [1000, 50257, 128256])
def test_more_logits_than_an_int32_counts(C: int, elements: int) -> None:
    N = elements // C + 3
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < (needed := 7 * N * C):
        pytest.skip(f"needs {needed / 1e9:.0f} GB of the device's memory, {free / 1e9:.0f} GB are free")
    x, y = make(N, C, torch.bfloat16)
    losses, grad = both(x, y, 1 / 3, reduction="none")
    _, fused = both(x, y, 1 / 3, reduction="sum", grad_scale=1 / 3)
    middle = elements // 2 // C
    for rows in (slice(0, 2), slice(middle - 1, middle + 2), slice(N - 5, N)):
        alone = x.detach()[rows].clone().requires_grad_()
        assert same(both(alone, y[rows], 1 / 3, reduction="none"), (losses[rows], grad[rows]))
        assert same(both(alone, y[rows], 1 / 3, reduction="sum", grad_scale=1 / 3)[1:], (fused[rows],))


def test_first_launches_agreed() -> None:
    for dtype in DTYPES:
        for C in CLASSES:
            both(*make(64, C, dtype))
            both(*make(64, C, dtype), reduction="none")
    assert not self_check.DECLINED
    if self_check.SETTING != "0" and torch.cuda.get_device_name() not in self_check.REPORTED:
        assert {variant.key[0] for variant in self_check.PASSED} >= {"forward", "backward"}
