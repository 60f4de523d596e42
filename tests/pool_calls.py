"""What the tests of the pool share: gradients large enough for it, a pool that is empty before, other processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fused_ce import cross_entropy
from fused_ce.backends import cpu, pool

HAS_POOL = cpu._C is not None and sys.platform == "linux"
marks = [pytest.mark.skipif(not HAS_POOL, reason="the pool is _C's, on Linux"), pytest.mark.usefixtures("own_pool")]
_C = pool._C
ROWS, CLASSES = 64, 1 << 14  # 4 MiB of float32, the least that the pool takes
BYTES = ROWS * CLASSES * 4


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


def gradient_of(input: Tensor) -> Tensor:
    return torch.autograd.grad(cross_entropy(input, torch.arange(ROWS)), input)[0]
