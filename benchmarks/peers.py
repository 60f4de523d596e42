"""What is compared. A peer is a function from a Problem to a Peer, and a row in PEERS; the first row is the yardstick.

A peer that is not installed raises ImportError, one that cannot do this problem raises Unable: it is skipped, with
the reason. Its results may be tensors or anything `torch.from_dlpack` or `torch.as_tensor` takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ce import cross_entropy
from fused_ce.backends import cpu, dispatch
from fused_ce.contract import Call
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


def jax_optax(problem: Problem) -> Peer:
    import jax
    import optax

    if problem.reduction == "none" or problem.input.is_cuda:
        raise Unable("only the mean and the sum, and only on the CPU")
    reduce = jax.numpy.mean if problem.reduction == "mean" else jax.numpy.sum
    upstream = 1.0 if problem.upstream is None else float(problem.upstream)
    x, y = jax.dlpack.from_dlpack(problem.input.detach()), jax.numpy.asarray(problem.target.int().numpy())

    def loss_of(x: Any, y: Any) -> Any:
        return reduce(optax.softmax_cross_entropy_with_integer_labels(x, y))

    if not problem.backward:
        forward = jax.jit(loss_of)
        return Peer(lambda: (forward(x, y).block_until_ready(), None), 1, 0)

    @jax.jit
    def both(x: Any, y: Any) -> Any:
        loss, pull_back = jax.vjp(lambda x: loss_of(x, y), x)
        return loss, pull_back(jax.numpy.asarray(upstream, loss.dtype))[0]

    return Peer(lambda: jax.block_until_ready(both(x, y)), 2, 1)


def numpy(problem: Problem) -> Peer:
    import numpy as np

    if problem.reduction == "none" or problem.input.is_cuda or problem.input.itemsize == 2:
        raise Unable("only the mean and the sum, on the CPU, of float32 and float64")
    x, y, each = problem.input.detach().numpy(), problem.target.numpy(), np.arange(len(problem.target))
    share = 1 / len(y) if problem.reduction == "mean" else 1.0
    upstream = share if problem.upstream is None else share * float(problem.upstream)

    def run() -> tuple[Any, Any]:
        m = x.max(axis=1, keepdims=True)
        e = x - m
        e_y = e[each, y]
        np.exp(e, out=e)
        s = e.sum(axis=1, keepdims=True)
        loss = (np.log(s[:, 0]) - e_y).sum(dtype=np.float64) * share
        if not problem.backward:
            return x.dtype.type(loss), None
        e *= upstream / s
        e[each, y] -= x.dtype.type(upstream)
        return x.dtype.type(loss), e

    return Peer(run, *((5, 3) if problem.backward else (4, 2)))


def fused_ce(problem: Problem, isa: str | None = None) -> Peer:
    call = Call(problem.input, problem.target, None, Options(reduction=problem.reduction))
    chosen = dispatch.choose(call, None)
    if chosen is None:
        raise Unable("no backend of fused_ce takes this call here; python -m fused_ce says why")
    name = dispatch.name_of(chosen)
    fused = problem.reduction != "none" and problem.input.dtype != torch.float16
    passes = (1, 0) if not problem.backward else (2, 1) if not fused else (1, 1) if problem.upstream is None else (2, 2)
    run = with_autograd(cross_entropy, problem)
    if isa is None:
        return Peer(run, *passes, name)
    if chosen is not cpu or isa not in cpu._C.isa_names():
        raise Unable(f"the C++ kernels do not run here with {isa}")
    best = cpu._C.isa()

    def with_isa() -> tuple[Any, Any]:
        cpu._C.set_isa(isa)
        try:
            return run()
        finally:
            cpu._C.set_isa(best)

    return Peer(with_isa, *passes, f"{name} {isa}")


def fused_ce_inplace(problem: Problem) -> Peer:
    if not problem.backward:
        raise Unable("without a gradient nothing is written")
    # Logits as a model leaves them: not a leaf, and free to be overwritten. Before each run they are new again.
    logits, anchor = problem.input.detach().clone(), torch.zeros((), requires_grad=True)

    def run() -> tuple[Tensor, Tensor]:
        input = FromModel.apply(logits, anchor)
        loss = cross_entropy(input, problem.target, reduction=problem.reduction, inplace=True)
        return loss, torch.autograd.grad(loss, input, problem.upstream)[0]

    usual = fused_ce(problem)
    return usual._replace(run=run, before=lambda: logits.copy_(problem.input.detach()))


class FromModel(torch.autograd.Function):
    """Makes a tensor look like the output of a model."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        return torch.empty(0, dtype=tensor.dtype).set_(tensor)  # the same memory, and not a view

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None


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
    "jax+optax": jax_optax,
    "numpy": numpy,
    "liger-kernel": liger,
    "quack-kernels": quack,
    "fused_ce": fused_ce,
    "fused_ce inplace": fused_ce_inplace,
    "fused_ce avx2": functools.partial(fused_ce, isa="avx2"),
    "fused_ce base": functools.partial(fused_ce, isa="base"),
}
USUAL = {
    "cpu": ["torch", "torch.compile", "jax+optax", "numpy", "fused_ce", "fused_ce inplace"],
    "cuda": ["torch", "torch.compile", "liger-kernel", "quack-kernels", "fused_ce"],
}


def with_autograd(loss_of: Callable[..., Tensor], problem: Problem) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """Loss and gradient by autograd. Nothing is kept between calls: every gradient is made in new memory."""
    input, target, upstream, reduction = problem

    def run() -> tuple[Tensor, Tensor | None]:
        loss = loss_of(input, target, reduction=reduction)
        return loss, torch.autograd.grad(loss, input, upstream)[0] if problem.backward else None

    return run
