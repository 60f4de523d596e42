"""Gradients in memory of the pool: everything that users do with them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pool_calls import BYTES, CLASSES, ROWS, gradient, gradient_of, is_of_the_pool, marks, output, run
from torch import Tensor

from fused_ce import cross_entropy
from fused_ce.backends import pool

pytestmark = marks
_C = pool._C


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


def test_only_torchs_c_cannot_enlarge() -> None:
    grad = gradient()
    with pytest.raises(RuntimeError, match="storage that is not resizable"):
        grad.resize_(2 * ROWS, CLASSES)
    assert grad.resize_(ROWS // 2, CLASSES).shape == (ROWS // 2, CLASSES)
