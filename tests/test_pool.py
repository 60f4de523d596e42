"""The pool of large gradients: reuse, bounds, what the system may take, threads and forks, its variable."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
import torch
from pool_calls import BYTES, CLASSES, ROWS, gradient, gradient_of, is_of_the_pool, marks, output, run

import fused_ce
from fused_ce import cross_entropy
from fused_ce.backends import pool

pytestmark = marks
_C = pool._C


def test_gradients_of_probabilities_are_of_the_pool() -> None:
    input = torch.randn(ROWS, CLASSES, requires_grad=True)
    target = torch.rand(ROWS, CLASSES, requires_grad=True)
    cross_entropy(input, target).backward()
    assert input.grad is not None
    assert target.grad is not None
    assert is_of_the_pool(input.grad)
    assert is_of_the_pool(target.grad)


def test_small_gradients_are_torchs() -> None:
    assert gradient(rows=ROWS - 1).untyped_storage().resizable()
    assert _C.held() == (0, 0)


@pytest.mark.parametrize("dtype", pool.DTYPES)
def test_dtype_shape_and_strides(dtype: torch.dtype) -> None:
    like = torch.empty(2048, 3, 1, 1024, dtype=dtype).transpose(0, 3)
    made = pool.empty_like(like)
    assert is_of_the_pool(made)
    assert (made.dtype, made.shape, made.is_contiguous()) == (dtype, like.shape, True)
    assert not made.requires_grad


def test_used_again_dirty_as_it_is() -> None:
    first = gradient()
    expected, address = first.clone(), first.data_ptr()
    first.fill_(torch.nan)
    del first
    assert _C.held() == (0, BYTES)
    again = gradient()
    assert again.data_ptr() == address
    assert torch.equal(again, expected)


def test_memory_that_is_in_use_is_not_handed_out() -> None:
    first = gradient()
    kept = first.clone()
    view = first[5:, 7]
    others = [gradient(seed) for seed in range(1, 4)]
    del first
    others += [gradient(seed) for seed in range(4, 8)]
    assert len({other.data_ptr() for other in others}) == len(others)
    assert torch.equal(view, kept[5:, 7])


def test_the_best_fitting_block_is_used() -> None:
    blocks = [_C.empty((size << 20,), 5) for size in (16, 8, 12)]
    assert _C.held() == (36 << 20, 0)
    del blocks
    kept = []
    for size, used in ((7, 8), (6, 8 + 12), (8, 8 + 12 + 16)):  # the last twice as large as wanted
        kept.append(_C.empty((size << 20,), 5))
        assert _C.held() == (used << 20, (36 - used) << 20)
    kept.pop()
    kept.append(_C.empty((6 << 20,), 5))  # not the 16 that are idle: those make room for another
    assert _C.held() == ((8 + 12 + 6) << 20, 0)


def test_no_more_than_was_once_in_use() -> None:
    draw, held, most = random.Random(0), [], 0
    for _ in range(10_000):
        if len(held) == 4:
            held.pop(draw.randrange(4))
        held.append(_C.empty((draw.randrange(1 << 22, 1 << 23),), 5))
        used, idle = _C.held()
        most = max(most, used)
        assert used + idle <= most
    assert most <= 4 * (16 << 20)
    held.clear()
    assert _C.held()[0] == 0


def mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def test_calls_of_changing_shapes_do_not_add_up() -> None:
    printed = output(
        """
torch.set_num_threads(1)
mapped = lambda: int(open("/proc/self/statm").read().split()[0]) * 4096
def call(rows):
    x = torch.zeros(1, 1 << 14).expand(rows, 1 << 14).requires_grad_()
    torch.autograd.grad(cross_entropy(x, torch.zeros(rows, dtype=torch.int64)), x)
call(128)
before = mapped(), sum(held())
for i in range(200): call(64 + i * 37 % 65)
print(mapped() - before[0], sum(held()) - before[1])
"""
    )
    grown, held = map(int, printed.split())
    assert held <= 0
    assert grown < 4 << 20


def test_idle_memory_is_bounded() -> None:
    _C.keep_at_most(24 << 20)
    blocks = [_C.empty((8 << 20,), 5) for _ in range(5)]
    while blocks:
        blocks.pop()
        assert _C.held()[1] <= 24 << 20
    assert _C.held() == (0, 24 << 20)
    assert _C.empty((24 << 20,), 5) is None  # could not be kept
    _C.keep_at_most(0)
    assert _C.held() == (0, 0)
    assert _C.empty((8 << 20,), 5) is None


def test_empty_cache_gives_the_mapping_back() -> None:
    blocks = [_C.empty((64 << 20,), 5), _C.empty((32 << 20,), 5)]
    del blocks[0]
    before = mapped()
    fused_ce.empty_cache()
    assert _C.held() == (32 << 20, 0)
    assert before - mapped() >= 64 << 20


def test_a_capsule_is_freed_once() -> None:
    capsule = _C.empty((8 << 20,), 5)
    tensor = torch.utils.dlpack.from_dlpack(capsule)
    del capsule
    assert _C.held() == (8 << 20, 0)
    del tensor
    assert _C.held() == (0, 8 << 20)


@pytest.mark.parametrize("arguments", [((-1,), 0), ((1,), 9), ((1,) * 9, 0), ([1], 0), (("1",), 0)])
def test_the_private_function_checks_what_it_is_given(arguments: tuple[object, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        _C.empty(*arguments)


@pytest.mark.parametrize("sizes", [(1 << 62, 1 << 62), (1 << 60,), (0,), (1 << 47,)])
def test_sizes_that_nobody_has(sizes: tuple[int, ...]) -> None:
    _C.keep_at_most((1 << 63) - 1)
    assert _C.empty(sizes, 1) is None
    assert _C.held() == (0, 0)


def lazily_free() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("LazyFree:"):
            return int(line.split()[1]) << 10
    pytest.skip("the kernel does not say which pages it may take")


def test_the_system_may_take_idle_pages() -> None:
    before = lazily_free()
    pool.empty_like(torch.empty(64 << 20, dtype=torch.uint8)).fill_(1)
    assert lazily_free() - before >= 64 << 20
    again = pool.empty_like(torch.empty(64 << 20, dtype=torch.uint8)).fill_(1)
    assert lazily_free() - before < 1 << 20
    del again


def test_threads() -> None:
    expected = {seed: gradient(seed).clone() for seed in range(4)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(8):
            grad = gradient_of(inputs[seed])
            if not torch.equal(grad, expected[seed]):
                wrong.append(seed)

    inputs = [torch.randn(ROWS, CLASSES, generator=torch.manual_seed(seed)).requires_grad_() for seed in range(4)]
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert _C.held()[0] == 0


def test_inference_mode() -> None:
    like = torch.empty(ROWS, CLASSES)
    with torch.inference_mode():
        assert pool.empty_like(like).is_inference()
    assert not pool.empty_like(like).is_inference()


def test_forks_while_threads_take_and_give_back() -> None:
    printed = output(
        """
import threading, time
stop = False
def work():
    while not stop: pool._C.empty((8 << 20,), 5)
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads: thread.start()
states = []
for _ in range(50):
    child = os.fork()
    if child == 0:
        pool._C.empty((8 << 20,), 5)
        os._exit(0)
    for _ in range(1000):
        if os.waitpid(child, os.WNOHANG)[0]: break
        time.sleep(0.01)
    else: os.kill(child, 9); states.append("hung"); break
stop = True
for thread in threads: thread.join()
print(states)
"""
    )
    assert printed == "[]"


BITS = """
import hashlib
x = torch.randn(96, 1 << 14, generator=torch.manual_seed(0))
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for keywords in ({}, {"reduction": "none"}, {"label_smoothing": 0.1, "softcap": 5.0}):
        for _ in range(2):
            input = x.to(dtype).repeat(2, 1).requires_grad_()
            cross_entropy(input, torch.arange(192), **keywords).sum().backward()
            grad = input.grad.view(torch.uint8).numpy().tobytes()
            print(hashlib.sha256(grad).hexdigest())
print(torch.cat([x, x, x]).t()[None].shape)
print(cross_entropy(x.repeat(1, 8).t()[None], torch.zeros(1, 96, dtype=torch.int64)).item().hex())
"""


def test_the_same_bits_with_and_without() -> None:
    assert output(BITS) == output(BITS, FUSED_CE_POOL="0")


STATE = "x = pool.empty_like(torch.empty(8 << 20)); print(held()[0])"


def test_the_variable() -> None:
    assert output(STATE) == str(32 << 20)
    assert output(STATE, FUSED_CE_POOL="0") == "0"
    assert output(STATE, FUSED_CE_POOL=str(16 << 20)) == "0"  # too large to be kept
    assert output(STATE, FUSED_CE_POOL=f" {64 << 20} ") == str(32 << 20)
    assert output(STATE, FUSED_CE_POOL="") == str(32 << 20)


@pytest.mark.parametrize("value", ["on", "-1", "1e9", "4GB", "٣", str(1 << 63)])
def test_a_malformed_variable(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_CE_POOL", value)
    with pytest.raises(ValueError, match="FUSED_CE_POOL: expected how many bytes") as error:
        pool._most_idle()
    assert f"got {value!r}" in str(error.value)
    assert "unset it" in str(error.value)


def test_no_import_with_a_malformed_variable() -> None:
    done = run("", FUSED_CE_POOL="on")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: FUSED_CE_POOL: expected how many bytes")
    assert "got 'on'" in last
    assert "unset it" in last


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_off_where_address_space_is_limited(limit: str) -> None:
    limits = f"resource.setrlimit(resource.{limit}, (1 << 36, resource.RLIM_INFINITY))"
    assert output(STATE, limits) == "0"
    assert output(STATE, limits, FUSED_CE_POOL=str(1 << 30)) == str(32 << 20)


def test_idle_memory_makes_room_where_there_is_none() -> None:
    printed = output(
        """
blocks = [pool._C.empty((64 << 20,), 5) for _ in range(4)]; del blocks
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (80 << 20), -1))
block = pool._C.empty((200 << 20,), 5); print(held())
print(pool._C.empty((200 << 20,), 5))
x = pool.empty_like(torch.empty(1)); print(x.numel())
"""
    )
    assert printed.splitlines() == [str((200 << 20, 0)), "None", "1"]


def test_large_scratch_is_of_the_pool() -> None:
    logits = torch.randn(1 << 16, 16).t()  # rows lie side by side: 16 MiB for each thread
    cross_entropy(logits, torch.zeros(16, dtype=torch.int64))
    assert _C.held()[1] >= 16 << 20
    _C.keep_at_most(0)
    cross_entropy(logits, torch.zeros(16, dtype=torch.int64))
    assert _C.held() == (0, 0)
