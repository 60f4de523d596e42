"""What is compared. A peer is a function from a Problem to a Peer, and a row in PEERS; the first row is the yardstick.

A peer that is not installed raises ImportError, one that cannot do this problem raises Unable: it is skipped, with
the reason. Its results may be tensors or anything `torch.from_dlpack` or `torch.as_tensor` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ce import cross_entropy, dispatch
from fused_ce.options import Options


class Unable(Exception):
    """Why a peer cannot take this problem here."""


class Problem(NamedTuple):
    """One loss to compute, with its gradient if the input requires one."""

    input: Tensor  # (N, C)
    target: Tensor  # (N)
    upstream: Tensor | None  # (N) with reduction "none", else () or None: 1
    reduction: str

    @property
    def backward(self) -> bool:
        return self.input.requires_grad


class Peer(NamedTuple):
    """How to run one implementation, and how often it goes over the N x C logits in memory."""

    run: Callable[[], tuple[Any, Any]]  # a new loss and gradient (None if not asked for), finished when it returns
    reads: int
    writes: int
    backend: str = ""
    before: Callable[[], object] = lambda: None  # ahead of each run, not timed

    @property
    def schedule(self) -> str:
        return "+".join(f"{n}{way}" for n, way in ((self.reads, "R"), (self.writes, "W")) if n)


def torch_eager(problem: Problem) -> Peer:
    # log_softmax reads and writes; backward fills one matrix with zeros and one per row, reads it and the
    # log_softmax, and writes the gradient.
    return Peer(with_autograd(F.cross_entropy, problem), *((3, 3) if problem.backward else (1, 1)))


def torch_compile(problem: Problem) -> Peer:
    # Forward keeps one number a row; backward reads the logits again.
    torch.compiler.reset()  # else the ninth shape would run eagerly
    compiled = torch.compile(F.cross_entropy, dynamic=False)
    return Peer(with_autograd(compiled, problem), *((2, 1) if problem.backward else (1, 0)))


def fused_ce(problem: Problem) -> Peer:
    options = Options(reduction=problem.reduction)
    chosen = dispatch.choose(problem.input, problem.target, None, options, None)
    if chosen is None:
        raise Unable("no backend of fused_ce takes this call here; python -m fused_ce says why")
    name = next(name for name, backend in dispatch.BACKENDS.items() if backend is chosen)
    fused = problem.reduction != "none" and problem.input.dtype != torch.float16
    passes = (1, 0) if not problem.backward else (2, 1) if not fused else (1, 1) if problem.upstream is None else (2, 2)
    return Peer(with_autograd(cross_entropy, problem), *passes, name)


def liger(problem: Problem) -> Peer:
    from liger_kernel.transformers.functional import liger_cross_entropy

    # It writes the gradient over the logits, and its users let it. So do we: it has logits of its own, which are
    # restored before each run and outside of the time.
    logits = problem.input.detach().clone().requires_grad_(problem.backward)
    run = with_autograd(liger_cross_entropy, problem._replace(input=logits))
    passes = (1, 0) if not problem.backward else (2, 1) if problem.upstream is None else (3, 2)
    return Peer(run, *passes, before=lambda: logits.data.copy_(problem.input))


def quack(problem: Problem) -> Peer:
    from quack import cross_entropy as of_quack

    return Peer(with_autograd(of_quack, problem), *((2, 1) if problem.backward else (1, 0)))


PEERS: dict[str, Callable[[Problem], Peer]] = {
    "torch": torch_eager,
    "torch.compile": torch_compile,
    "fused_ce": fused_ce,
    "liger-kernel": liger,
    "quack-kernels": quack,
}


def with_autograd(loss_of: Callable[..., Tensor], problem: Problem) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """Loss and gradient by autograd. Nothing is kept between calls: every gradient is made in new memory."""
    input, target, upstream, reduction = problem

    def run() -> tuple[Tensor, Tensor | None]:
        loss = loss_of(input, target, reduction=reduction)
        return loss, torch.autograd.grad(loss, input, upstream)[0] if problem.backward else None

    return run
