"""token_logprobs and linear_token_logprobs beside log_softmax in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accuracy import relative_error
from torch import Tensor

import fused_ce
from fused_ce import linear_token_logprobs, token_logprobs

EPS = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-6, torch.float16: 1e-6}
BEFORE_ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def made(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * scale).to(dtype)


def ids_for(*shape: int, V: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(7))


def exact(logits: Tensor, ids: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies out of float64."""
    T = temperature.double().expand(ids.shape)[..., None] if isinstance(temperature, Tensor) else temperature
    logps = (logits.double() / T).log_softmax(-1)
    return logps.gather(-1, ids.long()[..., None])[..., 0], -(logps.exp() * logps).sum(-1)


def check_gradient(got: Tensor, logits: Tensor, ids: Tensor, temperature: float, upstream: Tensor) -> None:
    z = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad((exact(z, ids, temperature)[0] * upstream.double()).sum(), z)
    p = (z.detach() / temperature).softmax(-1)
    terms = (p + torch.nn.functional.one_hot(ids, z.shape[-1])) * upstream.double().abs()[..., None] / temperature
    tiny = torch.finfo(got.dtype).smallest_normal
    assert relative_error(got, expected, terms, flush=tiny) <= BEFORE_ROUNDING[got.dtype]


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("shape", [(9,), (33,), (2, 1000), (2, 3, 65)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2])
def test_equals_float64(dtype: torch.dtype, shape: tuple[int, ...], temperature: float) -> None:
    logits, ids = made(*shape, dtype=dtype).requires_grad_(), ids_for(*shape[:-1], V=shape[-1])
    logps, entropy = token_logprobs(logits, ids, temperature=temperature, return_entropy=True)
    expected, entropies = exact(logits, ids, temperature)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    assert logps.dtype == entropy.dtype == acc
    assert logps.shape == entropy.shape == ids.shape
    torch.testing.assert_close(logps.double(), expected, rtol=EPS[dtype], atol=0)
    torch.testing.assert_close(entropy.double(), entropies, rtol=5 * EPS[dtype], atol=0)
    assert torch.equal(token_logprobs(logits, ids, temperature=temperature), logps)
    upstream = made(*ids.shape, dtype=acc)
    (grad,) = torch.autograd.grad(logps, logits, upstream)
    assert grad.dtype == dtype
    check_gradient(grad, logits, ids, temperature, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 1), (2, 3)], ids=str)
def test_a_tensor_of_temperatures(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits, ids = made(2, 3, 50, dtype=dtype).requires_grad_(), ids_for(2, 3, V=50)
    T = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5).requires_grad_()
    logps, entropy = token_logprobs(logits, ids, temperature=T, return_entropy=True)
    z, t = logits.detach().double().requires_grad_(), T.detach().double().requires_grad_()
    expected, entropies = exact(z, ids, t)
    torch.testing.assert_close(logps.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(entropy.double(), entropies, rtol=5e-6, atol=0)
    of_logits, of_T = torch.autograd.grad(logps.sum(), (logits, T))
    _, exact_T = torch.autograd.grad(expected.sum(), (z, t))
    torch.testing.assert_close(of_T.double(), exact_T, rtol=1e-5, atol=0)
    assert of_logits.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_rows_left_out(dtype: torch.dtype) -> None:
    """They are 0 and get 0, whatever they hold."""
    logits, ids = made(4, 50), ids_for(4, V=50)
    expected = token_logprobs(logits, ids)
    logits[1], ids[1], ids[2] = torch.nan, 999, -100
    logits.requires_grad_()
    mask = torch.tensor([1, 0, 1, 1]).to(dtype)
    logps, entropy = token_logprobs(logits, ids, mask=mask, return_entropy=True)
    kept = torch.tensor([True, False, False, True])
    assert torch.equal(logps, torch.where(kept, expected, 0))
    assert torch.equal(entropy == 0, ~kept)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    assert torch.equal((grad == 0).all(-1), ~kept)
    with pytest.raises(IndexError):
        token_logprobs(logits, ids)


def test_several_ids_a_row() -> None:
    """The way that the docstring shows."""
    logits, ids = made(3, 4, 50).requires_grad_(), ids_for(3, 4, 5, V=50)
    flat = logits.reshape(-1, 50)
    out = fused_ce.cross_entropy(flat, ids[..., 0].reshape(-1), reduction="none", return_stats=True)
    found = logits.gather(-1, ids) - out.lse.reshape(3, 4, 1)
    z = logits.detach().double().requires_grad_()
    expected = z.log_softmax(-1).gather(-1, ids)
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=0)
    (grad,), (of_exact,) = torch.autograd.grad(found.sum(), logits), torch.autograd.grad(expected.sum(), z)
    terms = 5 * z.detach().softmax(-1) + torch.zeros_like(z.detach()).scatter_add_(
        -1, ids, torch.ones_like(ids, dtype=z.dtype)
    )
    assert relative_error(grad, of_exact, terms) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_from_hidden_states(dtype: torch.dtype, with_bias: bool, temperature: float, softcap: float | None) -> None:
    """Small calls make the logits whole, and chunk_rows makes the same of them in chunks."""
    hidden, W = (
        made(2, 5, 16, dtype=dtype, scale=1).requires_grad_(),
        made(50, 16, dtype=dtype, scale=1).requires_grad_(),
    )
    bias = made(50, dtype=dtype).requires_grad_() if with_bias else None
    ids, mask = ids_for(2, 5, V=50), ids_for(2, 5, V=2).bool()
    inputs = [t for t in (hidden, W, bias) if t is not None]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    z = torch.nn.functional.linear(*doubles) * 1.3
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected, entropies = (torch.where(mask, value, 0) for value in exact(z, ids, temperature))
    of_exact = torch.autograd.grad(expected.sum(), doubles)
    # A product of 16 bits is rounded to 2^-9 of logits of up to 20.
    close = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.05}[dtype]
    for chunk_rows in (None, 3):
        keywords: dict[str, Any] = {"temperature": temperature, "logit_scale": 1.3, "softcap": softcap, "mask": mask}
        logps, entropy = linear_token_logprobs(
            hidden, W, ids, linear_bias=bias, return_entropy=True, chunk_rows=chunk_rows, **keywords
        )
        assert logps.shape == entropy.shape == ids.shape
        for found, right in ((logps, expected), (entropy, entropies)):
            assert float(((found - right).abs().max() / right.abs().max()).detach()) < close
        for grad, right in zip(torch.autograd.grad(logps.sum(), inputs), of_exact, strict=True):
            assert float((grad - right).norm() / right.norm()) < close
    if softcap is None and not with_bias:
        found = linear_token_logprobs(
            hidden, W, ids, **(keywords | {"temperature": torch.tensor(temperature, dtype=torch.float64)})
        )
        assert float(((found - expected).abs().max() / expected.abs().max()).detach()) < close


def test_the_logits_are_never_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "linear", None)
    hidden, W = made(64, 8).requires_grad_(), made(70000, 8)
    assert linear_token_logprobs(hidden, W, ids_for(64, V=70000)).shape == (64,)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: token_logprobs(made(2, 3, 5), ids_for(2, V=5)), ValueError, r"got ids \(2,\) and logits \(2, 3, 5\)"),
        (lambda: token_logprobs(made(3, 5), ids_for(3, 2, V=5)), ValueError, "for several ids a row see"),
        (lambda: token_logprobs(torch.tensor(1.0), torch.tensor(0)), ValueError, "expected ids"),
        (
            lambda: token_logprobs(made(3, 5), torch.zeros(3)),
            TypeError,
            "integer dtype, such as int64, got torch.float",
        ),
        (lambda: token_logprobs(made(3, 5), ids_for(3, V=5), temperature=0), ValueError, "must be positive, got 0"),
        (
            lambda: token_logprobs(made(3, 5), ids_for(3, V=5), mask=torch.ones(2)),
            ValueError,
            r"mask of the ids' shape",
        ),
        (lambda: linear_token_logprobs(made(3, 5), made(4, 5), ids_for(2, V=4)), ValueError, "got ids"),
        (
            lambda: linear_token_logprobs(
                made(3, 5), made(4, 5), ids_for(3, V=4), softcap=2.0, temperature=torch.ones(3)
            ),
            ValueError,
            "expected a number as temperature",
        ),
        (lambda: token_logprobs(made(3, 5), ids_for(3, V=5) + 5), IndexError, "out of bounds"),
    ],
)
def test_refuses(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_int32_and_uint8_ids() -> None:
    """156 is what -100 is as a uint8."""
    logits, ids = made(3, 200), torch.tensor([156, 0, 199])
    expected = token_logprobs(logits, ids)
    assert bool((expected != 0).all())
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(token_logprobs(logits, ids.to(dtype)), expected)


def test_compiled_and_under_transforms() -> None:
    logits, ids = made(4, 50), ids_for(4, V=50)
    expected = token_logprobs(logits, ids, temperature=0.7)
    compiled = torch.compile(token_logprobs, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, ids, temperature=0.7), expected, rtol=1e-6, atol=0)
    per_row = torch.func.vmap(token_logprobs)(logits, ids)
    torch.testing.assert_close(per_row, token_logprobs(logits, ids), rtol=1e-6, atol=0)
