"""Gradients in memory of the pool: what users do with them, and how much memory it holds."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fused_ce
from fused_ce import cross_entropy
from fused_ce.backends import cpu, pool

_C = pool._C
pytestmark = [
    pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="the pool is Linux's"),
]
ROWS, CLASSES = 64, 1 << 14  # 4 MiB of float32, the least that the pool takes
BYTES = ROWS * CLASSES * 4
MOST_IDLE = 1 << 32


@pytest.fixture(autouse=True)
def _own_pool() -> Iterator[None]:
    gc.collect()
    _C.keep_at_most(MOST_IDLE)
    _C.empty_cache()
    used = _C.held()[0]
    yield
    gc.collect()
    assert _C.held()[0] == used  # nothing outlives its tensor
    _C.empty_cache()


def gradient(seed: int = 0, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Tensor:
    input = torch.randn(rows, CLASSES, generator=torch.manual_seed(seed)).to(dtype).requires_grad_()
    cross_entropy(input, torch.arange(rows)).backward()
    assert input.grad is not None
    return input.grad


def is_of_the_pool(tensor: Tensor) -> bool:
    return not tensor.untyped_storage().resizable() and tensor.data_ptr() % (1 << 21) == 0


def run(code: str, limits: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: `limits` are set before the package is imported."""
    begin = f"import os, resource, torch\n{limits}\nfrom fused_ce import cross_entropy, empty_cache\n"
    begin += "from fused_ce.backends import pool\nheld = pool._C.held\n"
    return subprocess.run(
        [sys.executable, "-c", begin + code],
        env=os.environ | {"PYTHONWARNINGS": "ignore"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def output(code: str, limits: str = "", **environment: str) -> str:
    done = run(code, limits, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


# What users do with a gradient: (the gradient) -> something that must equal the same done to a clone of torch's.


def accumulated(grad: Tensor) -> Tensor:
    parameter = torch.zeros_like(grad, requires_grad=True)
    for _ in range(2):
        (parameter * grad).sum().backward()
    assert parameter.grad is not None
    return parameter.grad


def saved_and_loaded(grad: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(grad, file)
    file.seek(0)
    loaded: Tensor = torch.load(file)
    return loaded


def viewed_by_numpy(grad: Tensor) -> Tensor:
    view = grad.numpy()[3:]
    del grad
    return torch.from_numpy(view.copy())


def shared(grad: Tensor) -> Tensor:
    grad.share_memory_()
    assert grad.is_shared()
    return grad


def freed_and_back(grad: Tensor) -> Tensor:
    kept, storage = grad.clone(), grad.untyped_storage()
    size = storage.nbytes()
    assert storage.resize_(0) is storage
    assert grad.untyped_storage().nbytes() == 0
    del storage
    gc.collect()
    grad.untyped_storage().resize_(size)
    assert grad.untyped_storage().resizable()
    return grad.copy_(kept)


def enlarged(grad: Tensor) -> Tensor:
    grad.untyped_storage().resize_(2 * BYTES)
    return grad.resize_(2 * ROWS, CLASSES)[:ROWS]


def enlarged_typed(grad: Tensor) -> Tensor:
    grad.storage()._resize_(2 * ROWS * CLASSES)
    return grad


def cut_short(grad: Tensor) -> Tensor:
    grad.untyped_storage().resize_(BYTES // 2)
    return grad.resize_(ROWS // 2, CLASSES)


def sent(grad: Tensor) -> Tensor:
    return pickle.loads(pickle.dumps(grad))  # type: ignore[no-any-return]


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda grad: grad,
    "accumulated": accumulated,
    "clone": lambda grad: grad.clone(),
    "numpy": viewed_by_numpy,
    "pickle": sent,
    "torch.save": saved_and_loaded,
    "deepcopy": copy.deepcopy,
    "deepcopy of its storage": lambda grad: torch.empty(0).set_(copy.deepcopy(grad.untyped_storage())),
    "share_memory_": shared,
    "freed and back": freed_and_back,
    "enlarged": enlarged,
    "enlarged by TypedStorage": enlarged_typed,
    "cut short": cut_short,
    "in place": lambda grad: grad.mul_(2).add_(1).clamp_(max=1.5),
    "view": lambda grad: grad[1:].t(),
    "set_": lambda grad: torch.empty(0).set_(grad.untyped_storage(), 5, (7,)),
    "resize_ within": lambda grad: grad.resize_(ROWS, CLASSES),
    "exported": lambda grad: torch.from_dlpack(grad),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.storage:UserWarning")
@pytest.mark.parametrize("use", USES)
def test_everything_users_do(use: str) -> None:
    grad = gradient()
    assert is_of_the_pool(grad)
    assert type(grad.untyped_storage()) is torch.UntypedStorage
    plain = grad.clone()
    assert torch.equal(USES[use](grad), USES[use](plain))


def test_shared_memory_stays_shared() -> None:
    storage = gradient().share_memory_().untyped_storage()
    with pytest.raises(RuntimeError, match="not resizable"):  # torch's own storages crash there (2.13)
        storage.resize_(2 * BYTES)
    assert storage.is_shared()


def test_resizing_gives_the_block_back() -> None:
    grad = gradient()
    assert _C.held()[0] == BYTES
    grad.untyped_storage().resize_(0)
    assert _C.held() == (0, BYTES)


def test_the_storage_of_a_gradient_is_no_cycle() -> None:
    gc.disable()
    try:
        grad = gradient()
        grad.untyped_storage()
        del grad
        assert _C.held() == (0, BYTES)
    finally:
        gc.enable()


def test_two_backwards_into_one_grad() -> None:
    input = torch.randn(ROWS, CLASSES, requires_grad=True)
    for _ in range(2):
        cross_entropy(input, torch.arange(ROWS)).backward()
    torch_input = input.detach().clone().requires_grad_()
    (2 * torch.nn.functional.cross_entropy(torch_input, torch.arange(ROWS))).backward()
    torch.testing.assert_close(input.grad, torch_input.grad)


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
    assert 0 < mapped() - sum(_C.held()) < 1 << 40
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


def gradient_of(input: Tensor) -> Tensor:
    return torch.autograd.grad(cross_entropy(input, torch.arange(ROWS)), input)[0]


def test_a_gradient_outlives_its_graph() -> None:
    input = torch.randn(ROWS, CLASSES, requires_grad=True)
    loss = cross_entropy(input, torch.arange(ROWS))
    (grad,) = torch.autograd.grad(loss, input)
    kept = grad.clone()
    del loss, input
    for seed in range(2):
        gradient(seed)
    assert torch.equal(grad, kept)


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.device("meta"),
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor),
        lambda: torch.autograd.graph.save_on_cpu(),
    ],
    ids=["default device", "hooks", "save_on_cpu"],
)
def test_contexts(context: Callable[[], torch.device]) -> None:
    input, target = torch.randn(ROWS, CLASSES, requires_grad=True), torch.arange(ROWS)
    expected = gradient_of(input)
    with context():
        cross_entropy(input, target).backward()
        assert input.grad is not None
        assert is_of_the_pool(input.grad)
        assert torch.equal(input.grad, expected)
        input.grad.untyped_storage().resize_(2 * BYTES)
    assert torch.equal(input.grad, expected)


def test_inference_mode() -> None:
    like = torch.empty(ROWS, CLASSES)
    with torch.inference_mode():
        assert pool.empty_like(like).is_inference()
    assert not pool.empty_like(like).is_inference()


def test_a_forked_child() -> None:
    printed = output(
        """
import gc, time
x, y = torch.randn(64, 1 << 14, requires_grad=True), torch.arange(64)
cross_entropy(x, y).backward(); kept = x.grad.clone(); idle = pool.empty_like(x); del idle
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # torch's own operators would wait for threads that are not
    inherited = x.grad; x.grad = None
    cross_entropy(x, y).backward()
    same = torch.equal(inherited, kept) and torch.equal(x.grad, kept)
    x.grad.untyped_storage().resize_(2 * 64 << 16); same = same and torch.equal(x.grad, kept)
    inherited.zero_(); del inherited; x.grad = None
    os._exit(0 if same and held()[0] == 0 else 1)
for _ in range(200):
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid: print(status); break
    time.sleep(0.1)
else: os.kill(child, 9); print("hung")
print(torch.equal(x.grad, kept))
"""
    )
    assert printed.split() == ["0", "True"]


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


@pytest.mark.parametrize("how", ["", "import sys; sys.exit(0)", "del x", "torch.keep = x.grad; x.grad.keep = x"])
def test_the_interpreter_ends_with_a_live_gradient(how: str) -> None:
    done = run(
        f"""
import threading
x = torch.randn(64, 1 << 14, requires_grad=True)
cross_entropy(x, torch.arange(64)).backward()
state = threading.local(); state.grad = x.grad * 1
{how}
"""
    )
    assert (done.returncode, done.stderr) == (0, "")


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
def test_a_malformed_variable(value: str) -> None:
    done = run("", FUSED_CE_POOL=value)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: FUSED_CE_POOL: expected how many bytes")
    assert f"got {value!r}" in last
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


PARALLEL = """
import datetime, sys
import torch.distributed as dist
from torch import nn
rank, kind, file = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=60))
torch.manual_seed(0)
torch.set_num_threads(1)
class Model(nn.Module):
    # The logits are a parameter, so that its gradient is the loss's own.
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(64, 1 << 14))
    def forward(self, y):
        return cross_entropy(self.logits, y)
results, taken = [], []
for most_idle in (1 << 32, 0):
    pool._C.keep_at_most(most_idle)
    torch.manual_seed(0)
    model = Model()
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), 1000.0)
    for step in range(3):
        optimizer.zero_grad(set_to_none=True)
        model(torch.arange(64) + rank + step).backward()
        optimizer.step()
        taken.append(sum(held()) > 0)
    p = next(model.parameters())
    results.append((p.to_local() if kind == "fsdp" else p).detach().clone())
print(torch.equal(*results), taken == 3 * [True] + 3 * [False])
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_distributed(kind: str, tmp_path: Path) -> None:
    code = "import torch\nfrom fused_ce import cross_entropy\nfrom fused_ce.backends import pool\nheld = pool._C.held\n"
    command = [sys.executable, "-W", "ignore", "-c", code + PARALLEL]
    processes = [
        subprocess.Popen([*command, str(rank), kind, str(tmp_path / "meet")], stdout=-1, stderr=-1, text=True)
        for rank in range(2)
    ]
    for process, (printed, errors) in [(process, process.communicate(timeout=120)) for process in processes]:
        assert process.returncode == 0, errors[-2000:]
        assert printed.split() == ["True", "True"]
