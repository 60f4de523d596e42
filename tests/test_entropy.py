"""The entropy's gradient, held against float64: in every backend, and by every way to ask for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import acc_dtype, relative_error
from cases import CASES, EVERYTHING, Case, confident, ignore, put, ramp
from conftest import Backend
from judge import GRAD
from oracle import as_rows, double
from shards import cuts, joined, shards
from test_backends import for_triton
from torch import Tensor

import fused_ce
from fused_ce import formula
from fused_ce.contract import Call, Upstream

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
inf, nan = torch.inf, torch.nan


def exact(call: Call, g: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient for upstream gradients g (R,) of the entropy, and the size of what is subtracted in each element.

    -p (log p + H) is p (drop - the mean of drop), in which a confident row loses no digit.
    """
    x, target = double(as_rows(call.input)), call.target.cpu()
    counted = torch.ones(len(x), dtype=torch.bool)
    if not call.has_probs:
        counted = target.reshape(-1).long() != call.options.ignore_index
    z = formula.transform(x, call.options)
    drop = z.amax(1, keepdim=True) - z
    p = torch.exp(-drop)
    p = p / p.sum(1, keepdim=True)
    drop = torch.where(p == 0, 0, drop)
    mean = (p * drop).sum(1, keepdim=True)
    factor = double(g.reshape(-1, 1)) * formula.transform_grad(x, call.options)
    parts = factor * p * (drop - mean), (factor * p).abs() * (drop + mean)
    grad, size = (shaped(torch.where(counted[:, None], part, 0), call.input) for part in parts)
    return grad, size


def shaped(rows: Tensor, like: Tensor) -> Tensor:  # (R, C) -> the logits' shape
    if like.dim() > 1:
        rows = rows.reshape(like.shape[:1] + like.shape[2:] + like.shape[1:2]).movedim(-1, 1)
    return rows.reshape(like.shape)


def holds(grad: Tensor, call: Call, g: Tensor, ulps: float = 4) -> None:
    """`ulps` of what the kernels compute in; float64 is judged by float64."""
    wanted, size = exact(call, g)
    assert grad.dtype == call.input.dtype
    info = torch.finfo(acc_dtype(grad.dtype))
    flush = 1024 * info.tiny * max(1.0, float(g.abs().max()))  # an exponential that is too small, times its drop
    allowed = ulps * info.eps if info.bits < 64 else 1e-12
    assert relative_error(grad.detach().cpu(), wanted, size, flush) <= allowed


def upstream(call: Call) -> Tensor:  # the shape of a value a row
    return torch.linspace(-2, 3, call.rows, dtype=call.acc, device=call.input.device).reshape(call.row_shape) + 0.25


def of_backend(backend: Backend, call: Call, given: Callable[[Tensor, Tensor], Upstream]) -> Tensor:
    """The gradient, for upstream gradients made from the loss and the entropy."""
    call = call._replace(options=call.options._replace(return_stats=True))
    loss, _, saved, stats = backend.module.forward(call, "recompute")
    assert stats is not None
    return backend.module.backward(call, None, saved, given(loss, stats.entropy), True, False).input


CHOSEN = [
    case
    for case in CASES
    if not case.declined_by
    and case.N
    and (case.id.startswith(("C", "pixels-", "layout-", "probabilities-C", "margin", "one-row", "ignored", "x10")))
    and 0 not in case.pixels
]
CHOSEN += [
    Case(f"entropy-{name}-{C}-{str(dtype)[6:]}", C=C, dtype=dtype, weight=ramp, options=options | {"reduction": "none"})
    for name, options in {"plain": {}, "softcap": {"softcap": 30.0}, "scale": {"logit_scale": -1.5}}.items()
    for C in (7, 700)
    for dtype in (f32, f64, bf16, f16)
]


@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_gradient(backend: Backend, case: Case) -> None:
    case = for_triton(case) if backend.name == "triton" else case
    call = case.build(backend.device)
    g = upstream(call)
    grad = of_backend(backend, call, lambda loss, _: Upstream(torch.zeros_like(loss), None, g))
    holds(grad, call, g, {"cpu": 8 if call.options.softcap else 4}.get(backend.name, GRAD[f32] / torch.finfo(f32).eps))


@pytest.mark.parametrize("C", [5, 600])
def test_no_part_no_gradient(backend: Backend, C: int) -> None:
    rows = [[-inf, 0, 1], [0, -inf, -inf], [200.0, 0, 1]]
    case = Case("no-part", C=C, logits=lambda x, y: put(*rows)(torch.where(x > 0, -inf, x), y))
    call = case.build(backend.device)
    g = upstream(call)
    grad = of_backend(backend, call, lambda loss, _: Upstream(torch.zeros_like(loss), None, g))
    holds(grad, call, g)
    assert not grad[call.input == -inf].any()
    alone = Case("alone", C=C, logits=lambda x, y: put([0.0])(torch.full_like(x, -inf), y)).build(backend.device)
    grad = of_backend(backend, alone, lambda loss, _: Upstream(torch.zeros_like(loss), None, g))
    assert not grad[0].any()
    assert grad[1].isnan().all()  # all -inf


@pytest.mark.parametrize("C", [9, 1000])
@pytest.mark.parametrize("dtype", [f32, f64, bf16], ids=str)
def test_with_the_others(backend: Backend, dtype: torch.dtype, C: int) -> None:
    options = EVERYTHING | {"reduction": "none"}
    call = Case("all", N=5, C=C, dtype=dtype, options=options, weight=ramp, target=ignore(1)).build(backend.device)
    of_entropy, of_lse, of_loss = upstream(call), upstream(call) / 3, upstream(call).flip(0)
    grad = of_backend(backend, call, lambda loss, _: Upstream(of_loss.to(loss.dtype), of_lse, of_entropy))
    given = (of_loss.to(dtype), of_lse, of_entropy)
    wide = call._replace(
        input=double(call.input), weight=double(call.weight), target=call.target.cpu(),
        options=call.options._replace(return_stats=True),
    )  # fmt: skip
    exact = Backend("reference", fused_ce.backends.reference, "cpu")
    wanted = of_backend(exact, wide, lambda *_: Upstream(*map(double, given)))
    rtol = {f32: 1e-5, f64: 1e-11, bf16: 4e-3}[dtype]
    torch.testing.assert_close(double(grad), wanted, rtol=rtol, atol=rtol / 10 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_of_shards(backend: Backend, dtype: torch.dtype) -> None:
    for C, options in ((40, {}), (900, {"softcap": 3.0}), (900, {})):
        case = Case("shards", N=4, C=C, dtype=dtype, options=options | {"return_stats": True}, target=ignore(2))
        call = case.build(backend.device)
        g = upstream(call)
        for borders in cuts(C):
            of_shards = shards(call, borders)
            sums = torch.stack(tuple(joined([backend.module.part(shard) for shard in of_shards]))).to(backend.device)
            grad = torch.empty_like(call.input)
            for shard, into in zip(of_shards, shards(call._replace(input=grad), borders), strict=True):
                backend.module.finish(shard, sums, Upstream(g.new_zeros(()), None, g), into.input)
            holds(grad, call, g, 8 if options else 4)


def of_entropy(reduction: str, **keywords: object) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def function(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
        out = fused_ce.cross_entropy(x, y, reduction=reduction, return_stats=True, **keywords)  # type: ignore[call-overload]
        return (out.entropy * g).sum() + 0 * out.loss.sum()

    return function


WAYS = {
    "mean": of_entropy("mean"),
    "none": of_entropy("none"),
    "in-compile": torch.compile(of_entropy("mean"), fullgraph=True, backend="aot_eager"),
    "reference": of_entropy("mean", backend="reference"),
    "alone": lambda x, y, g: (fused_ce.cross_entropy(x, y, return_stats=True).entropy * g).sum(),
}


@pytest.mark.parametrize("C", [10, 500])
@pytest.mark.parametrize("way", WAYS)
def test_ways(way: str, C: int) -> None:
    torch.manual_seed(0)
    x, y, g = torch.randn(6, C, requires_grad=True), torch.randint(C, (6,)), torch.linspace(-1, 2, 6)
    (grad,) = torch.autograd.grad(WAYS[way](x, y, g), x)
    holds(grad, Call(x, y, None, fused_ce.options.Options()), g)


def test_confident_rows() -> None:
    # torch's -(p * log p).sum() has nothing left of them.
    call = Case("confident", N=8, C=50, logits=confident(40)).build()
    x = call.input.requires_grad_()
    fused_ce.cross_entropy(x, call.target, return_stats=True).entropy.sum().backward()
    assert x.grad is not None
    holds(x.grad, call, torch.ones(8))
    assert (x.grad[torch.arange(8), call.target] < 0).all()


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 7, dtype=f64, requires_grad=True), torch.tensor([0, -100, 3, 6])

    def ours(x: Tensor) -> Tensor:
        return fused_ce.cross_entropy(x, y, return_stats=True, softcap=2.0).entropy

    assert torch.autograd.gradcheck(ours, x)
    assert torch.autograd.gradgradcheck(ours, x)
    x = torch.tensor([[0.0, -inf, 1.0]], dtype=f64, requires_grad=True)
    (grad,) = torch.autograd.grad(
        fused_ce.cross_entropy(x, y[:1], return_stats=True).entropy.sum(), x, create_graph=True
    )
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert grad[0, 1] == second[0, 1] == 0
    assert second.isfinite().all()


def test_under_transforms() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(3, 6, dtype=f64), torch.tensor([0, 5, 2])

    def ours(x: Tensor) -> Tensor:
        return fused_ce.cross_entropy(x, y, return_stats=True).entropy.sum()

    def plain(x: Tensor) -> Tensor:
        return -(x.softmax(1) * x.log_softmax(1)).sum()

    torch.testing.assert_close(torch.func.grad(ours)(x), torch.func.grad(plain)(x))
    torch.testing.assert_close(torch.func.hessian(ours)(x), torch.func.hessian(plain)(x))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_of_hidden_states(reduction: str) -> None:
    torch.manual_seed(0)
    x, W = torch.randn(40, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    y, g = torch.randint(300, (40,)), torch.linspace(-1, 2, 40)
    y[3] = -100

    def gradients(x: Tensor, W: Tensor, entropy: Tensor, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((entropy * g.to(x.dtype)).sum() + 0.5 * loss.sum(), (x, W))

    out = fused_ce.linear_cross_entropy(x, W, y, reduction=reduction, return_stats=True, chunk_rows=16)
    found = gradients(x, W, out.entropy, out.loss)
    wide_x, wide_W = (tensor.detach().double().requires_grad_() for tensor in (x, W))
    logits = wide_x @ wide_W.T
    entropy = torch.where(y == -100, 0, -(logits.softmax(1) * logits.log_softmax(1)).sum(1))
    loss = torch.nn.functional.cross_entropy(logits, y, reduction=reduction)
    for mine, wanted in zip(found, gradients(wide_x, wide_W, entropy, loss), strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=2e-5, atol=2e-6 * wanted.abs().max().item())
    twice = fused_ce.linear_cross_entropy(x, W, y, reduction=reduction, return_stats=True, chunk_rows=16)
    (first,) = torch.autograd.grad((twice.entropy * g).sum(), x, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), W)[0].isfinite().all()
