"""Nothing kills the process: freed or missing memory, memory that overlaps, wrong entry points, forked children."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import p, w, x, y
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fused_ce import cross_entropy
from fused_ce.backends import cpu
from fused_ce.options import Options

pytestmark = pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built")
f32 = torch.float32
zero = torch._efficientzerotensor


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def part(tensor: Tensor) -> Tensor:
    """The same numbers behind others: without memory its address is not 0."""
    return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].reshape(tensor.shape)


FREED: dict[str, Callable[[], Any]] = {
    "logits": lambda: cross_entropy(freed(x(4, 5)), y(4)),
    "indices": lambda: cross_entropy(x(4, 5), freed(y(4))),
    "probabilities": lambda: cross_entropy(x(4, 5), freed(p(4, 5))),
    "weight": lambda: cross_entropy(x(4, 5), y(4), freed(w())),
    "a part's logits": lambda: cross_entropy(freed(part(x(4, 5))), y(4)),
    "a part's indices": lambda: cross_entropy(x(4, 5), freed(part(y(4)))),
    "a part's weight": lambda: cross_entropy(x(4, 5), y(4), freed(part(w()))),
    "a part's upstream": lambda: upstream(cross_entropy, freed(part(torch.ones(4).double())), reduction="none"),
    "logits that want a gradient": lambda: cross_entropy(freed(x(4, 5)).requires_grad_(), y(4), softcap=2.0),
    "upstream": lambda: upstream(cross_entropy, freed(torch.ones(4, dtype=torch.float64)), reduction="none"),
    "upstream of a mean": lambda: upstream(cross_entropy, freed(torch.ones(1, dtype=torch.float64)).reshape(())),
    "weight, between": lambda: between("weight", reduction="none"),
    "indices, between": lambda: between("target"),
    "indices, before a second derivative": lambda: between("target", create_graph=True),
    "logits in place, between": lambda: between("logits", inplace=True),
    "num_items": lambda: cross_entropy(x(4, 5), y(4), num_items=freed(torch.tensor([3.0])).reshape(())),
    "grad_scale": lambda: cross_entropy(x(4, 5), y(4), grad_scale=freed(torch.tensor([3.0])).reshape(())),
    "indices, fallen back": lambda: cross_entropy(x(4, 5, dtype=f32), freed(y(4)), softcap=3.0, dtype=torch.float64),
    "logits, fallen back": lambda: cross_entropy(freed(x(4, 5, dtype=f32)), y(4), dtype=torch.float64),
    "upstream, under a mode": lambda: under_a_mode(lambda: FREED["upstream"]()),
    "backend by name": lambda: cross_entropy(freed(x(4, 5)), y(4), backend="cpu"),
}


def between(what: str, create_graph: bool = False, **keywords: Any) -> Tensor:
    leaf, target, weight = x(4, 5).requires_grad_(), y(4), w()
    logits = leaf * 1
    value = cross_entropy(logits, target, weight, **keywords)
    freed({"logits": logits, "target": target, "weight": weight}[what])
    return torch.autograd.grad(value.sum(), leaf, create_graph=create_graph)[0]


def under_a_mode(call: Callable[[], Tensor]) -> Tensor:
    with FlopCounterMode(display=False):
        return call()


def upstream(loss: Callable[..., Tensor], given: Tensor, **keywords: Any) -> Tensor:
    leaf = x(4, 5).requires_grad_()
    return torch.autograd.grad(loss(leaf, y(4), **keywords), leaf, given)[0]


@pytest.mark.parametrize("name", FREED)
def test_freed_storage_is_an_error(name: str) -> None:
    with pytest.raises(RuntimeError, match="not allocated"):
        FREED[name]()


ZEROS: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "logits": lambda loss: loss(zero((4, 5)), y(4)),
    "indices": lambda loss: loss(x(4, 5), zero((4,), dtype=torch.int64)),
    "probabilities": lambda loss: loss(x(4, 5), zero((4, 5), dtype=torch.float64)),
    "weight": lambda loss: loss(x(4, 5), y(4), zero((5,), dtype=torch.float64), reduction="sum"),
    "upstream": lambda loss: upstream(loss, zero((4,), dtype=torch.float64), reduction="none"),
    "upstream of a mean": lambda loss: upstream(loss, zero((), dtype=torch.float64)),
}


@pytest.mark.parametrize("name", ZEROS)
def test_zeros_without_memory(name: str) -> None:
    torch.testing.assert_close(ZEROS[name](cross_entropy), ZEROS[name](F.cross_entropy), rtol=1e-14, atol=1e-300)


def test_in_place_refuses_tensors_inside_the_logits() -> None:
    logits = x(5, 5).requires_grad_() * 1
    with pytest.raises(RuntimeError, match="would overwrite the weight"):
        cross_entropy(logits, y(5), logits.detach()[0], inplace=True)
    with pytest.raises(RuntimeError, match="would overwrite the target"):
        cross_entropy(logits, logits.detach(), inplace=True)
    number = logits.detach()[0, 0].abs_()
    wanted = cross_entropy(logits.clone(), y(5), num_items=number.clone())
    assert torch.equal(cross_entropy(logits, y(5), num_items=number, inplace=True), wanted)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 1])
def test_in_place_of_few_rows(rows: int, reduction: str) -> None:
    leaf = x(rows, 5).requires_grad_()
    value = cross_entropy(leaf * 1, y(rows), inplace=True, reduction=reduction)
    assert value.shape == F.cross_entropy(leaf, y(rows), reduction=reduction).shape
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    assert grad.shape == leaf.shape


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "import torch, os, resource\nfrom fused_ce import cross_entropy\n" + code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


LIMITED = """
x = torch.randn(100_000, 16).t(); y = torch.zeros(16, dtype=torch.int64)
cross_entropy(x[:, :2000], y)  # starts the threads, whose stacks would not fit either
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 3_000_000, -1))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory by Linux's means")
def test_too_little_memory_is_an_exception() -> None:
    printed = run(
        LIMITED
        + """
for _ in range(3):
    try: print(type(cross_entropy(x, y)).__name__)
    except (MemoryError, RuntimeError) as error: print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
print(abs(cross_entropy(x, y).item() - torch.nn.functional.cross_entropy(x, y).item()) < 1e-5)
"""
    )
    *failures, afterwards = printed.split()
    assert set(failures) <= {"MemoryError", "RuntimeError"}
    assert "MemoryError" in failures
    assert afterwards == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's memory")
@pytest.mark.parametrize("call", ["x.t()", "x.t()[None]", "x.bfloat16().t().contiguous()", "x.t().contiguous()"])
def test_scratch_is_bounded_and_given_back(call: str) -> None:
    held = run(
        f"""
x = torch.randn(1 << 20, 2); logits = {call}; y = torch.zeros(logits.shape[:1] + logits.shape[2:], dtype=torch.int64)
held = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
cross_entropy(torch.randn(4, 300).t(), y.new_zeros(300)); before = held()
cross_entropy(logits, y); print(held() - before)
"""
    )
    assert int(held) < 24  # MB; 192 bytes a class and thread would be 400


# Arguments of _C.forward: input, target, weight, options, num_items, scale, loss, grad, saved, stats, threads.
WRONG: dict[str, tuple[int, Any]] = {
    "no tensor": (0, 7),
    "no target": (1, None),
    "integer logits": (0, torch.zeros(3, 5, dtype=torch.int64)),
    "complex logits": (0, torch.zeros(3, 5, dtype=torch.complex64)),
    "sparse logits": (0, torch.zeros(3, 5).to_sparse()),
    "logits on meta": (0, torch.zeros(3, 5, device="meta")),
    "0-d logits": (0, torch.zeros(())),
    "9-d logits": (0, torch.zeros((3, 5) + (1,) * 7)),
    "no classes": (0, torch.zeros(3, 0)),
    "fewer target dimensions": (1, torch.tensor(1)),
    "more target dimensions": (1, torch.zeros(3, 1, dtype=torch.int64)),
    "other sizes": (1, torch.zeros(4, dtype=torch.int64)),
    "other classes": (1, torch.zeros(3, 4)),
    "0-d probabilities": (1, torch.zeros(())),
    "int32 target": (1, torch.zeros(3, dtype=torch.int32)),
    "weight of another size": (2, torch.zeros(4)),
    "weight of another dtype": (2, torch.zeros(5, dtype=torch.float64)),
    "weight apart": (2, torch.zeros(10)[::2]),
    "few options": (3, (1, 2.0)),
    "no options": (3, None),
    "reduction 7": (3, Options(reduction="7")),
    "num_items of text": (4, "7"),
    "integer loss": (6, torch.zeros((), dtype=torch.int64)),
    "no loss": (6, None),
    "loss of rows": (6, torch.zeros(3)),
    "gradient of another dtype": (7, torch.zeros(3, 5, dtype=torch.float64)),
    "gradient of another shape": (7, torch.zeros(5, 3)),
    "few saved rows": (8, torch.zeros(2, 3, dtype=torch.float64)),
    "float32 statistics": (9, torch.zeros(3, 4)),
    "no threads": (10, 0),
    "threads below 0": (10, -1),
    "threads of text": (10, "2"),
}


@pytest.mark.parametrize("name", ["right", *WRONG])
def test_the_private_module_checks_what_it_is_given(name: str) -> None:
    input, target, loss = x(3, 5, dtype=f32), y(3), torch.zeros((), dtype=f32)
    arguments = [input, target, None, Options(), float("-inf"), 1.0, loss, None, None, None, 1]
    if name == "right":
        cpu._C.forward(*arguments)
        torch.testing.assert_close(loss, F.cross_entropy(input, target))
        return
    i, wrong = WRONG[name]
    arguments[i] = wrong
    with pytest.raises((ValueError, TypeError, RuntimeError, BufferError)):
        cpu._C.forward(*arguments)
    with pytest.raises(TypeError):
        cpu._C.forward(*arguments[:-1])


@pytest.mark.parametrize(
    ("i", "wrong"),
    [(5, torch.ones(2)), (7, torch.ones(6)[::2]), (8, torch.ones(3).double()), (9, None), (11, None)],
)
def test_the_private_module_checks_what_backward_is_given(i: int, wrong: Any) -> None:
    input, target = x(3, 500, dtype=f32), y(3)
    saved, grad = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 500, dtype=f32)
    arguments = [input, target, None, Options(), float("-inf"), None, 1.0, None, None, grad, None, saved, 1]
    cpu._C.backward(*arguments)
    arguments[i] = wrong
    with pytest.raises(ValueError, match="expected"):
        cpu._C.backward(*arguments)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(
    "call",
    [
        "cross_entropy(x, p, return_stats=True)",
        "cross_entropy(x, y, return_stats=True, reduction='none')",
        "cross_entropy(x, y, softcap=3.0, num_items=torch.tensor(5.0))",
        "cross_entropy(x.requires_grad_(), y, reduction='none').sum().backward()",
        "(cross_entropy(x.requires_grad_(), y) / 3).backward()",
        "cross_entropy(x.t().contiguous().t(), y, torch.ones(500))",
    ],
)
def test_a_forked_child_does_not_hang(call: str) -> None:
    printed = run(
        f"""
torch.set_num_threads(2)
x, y = torch.randn(400, 500), torch.zeros(400, dtype=torch.int64); p = x.softmax(1)
cross_entropy(x, y); (x @ x.t()).sum()
child = os.fork()
if child == 0:
    {call}
    os._exit(0)
import time
for _ in range(200):
    if os.waitpid(child, os.WNOHANG)[0]: print("ended"); break
    time.sleep(0.1)
else: os.kill(child, 9); print("hung")
""",
        PYTHONWARNINGS="ignore",
    )
    assert printed == "ended"


def test_the_instruction_set_is_chosen_at_import() -> None:
    # Many first calls at once, in many threads.
    printed = run(
        """
import threading
x, y = torch.randn(64, 50), torch.zeros(64, dtype=torch.int64); got = []
threads = [threading.Thread(target=lambda: got.append(cross_entropy(x, y).item())) for _ in range(16)]
[thread.start() for thread in threads]; [thread.join() for thread in threads]
print(len(got), len(set(got)))
"""
    )
    assert printed == "16 1"
