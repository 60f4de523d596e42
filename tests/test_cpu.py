"""The C++ kernels: on every instruction set the same bits for any number of threads, any batch and any address."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accuracy import bits
from calls import p, x, y
from cases import EVERYTHING, misaligned, padded, rows_apart
from torch import Tensor

from fused_ce import cross_entropy
from fused_ce.backends import cpu
from fused_ce.contract import Call, Upstream
from fused_ce.options import Options

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((1, 50257), (5, 50257), (20011, 3), (513, 1000), (3, 5, 80, 80))  # above the size that takes threads
pytestmark = pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built")
every_isa = pytest.mark.usefixtures("isa")


@pytest.fixture
def threads() -> Iterator[None]:
    """Gives the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def everything(input: Tensor, target: Tensor, options: Options) -> list[Tensor]:
    """Every result of a forward and a backward, as bits."""
    schedule = "recompute" if options.reduction == "none" else "fused"
    loss, grad, *_ = cpu.forward(Call(input, target, None, options), schedule)
    saved = cpu.forward(Call(input, target, None, options), "recompute")[2]
    upstream = torch.full_like(loss, 0.3)
    again = cpu.backward(Call(input, target, None, options), None, saved, Upstream(upstream), True, False).input
    return [bits(t) for t in (loss, grad, again) if t is not None]


@every_isa
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("keywords", [{}, EVERYTHING | {"reduction": "none"}], ids=["mean", "everything"])
def test_threads_do_not_matter(dtype: torch.dtype, shape: tuple[int, ...], keywords: dict[str, Any]) -> None:
    input, target = x(*shape, dtype=dtype), y(shape[0], *shape[2:], C=shape[1])
    options = Options(**keywords)
    torch.set_num_threads(1)
    expected = everything(input, target, options)
    for count in (2, 3, 4, 7):
        torch.set_num_threads(count)
        assert all(map(torch.equal, everything(input, target, options), expected))


@every_isa
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("C", [3, 10, 17, 100, 256, 257, 1000, 4099])
def test_batch_and_address_do_not_matter(dtype: torch.dtype, C: int) -> None:
    for keywords in ({}, EVERYTHING):
        options = Options(reduction="none", **keywords)
        input, target = x(9, C, dtype=dtype), y(9, C=C)
        expected = everything(input, target, options)
        for other in (misaligned(input), padded(input), rows_apart(input)):
            assert all(map(torch.equal, everything(other, target, options), expected))
        for rows in (slice(4, 5), slice(2, 7), slice(None, None, 3)):
            got = everything(input[rows], target[rows], options)
            assert all(torch.equal(mine, all_rows[rows]) for mine, all_rows in zip(got, expected, strict=True))


WIDTHS = (1, 3, 10, 16, 17, 100, 256, 257, 2049)  # around the lanes of a vector, and those of a bundle of rows


@every_isa
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("C", WIDTHS)
def test_nothing_is_written_beside_the_gradient(C: int, dtype: torch.dtype) -> None:
    N, margin = 37, 70
    memory = x(N * C + 2 * margin, 1, dtype=dtype).flatten()
    before, inside = memory.clone(), slice(margin, margin + N * C)
    target = y(N, C=C)
    expected = cpu.forward(Call(memory[inside].view(N, C).clone(), target, None, Options()), "fused")[1]
    grad = cpu.forward(Call(memory[inside].view(N, C), target, None, Options(inplace=True)), "fused")[1]
    assert torch.equal(bits(grad), bits(expected))
    assert torch.equal(bits(memory[:margin]), bits(before[:margin]))
    assert torch.equal(bits(memory[-margin:]), bits(before[-margin:]))


@every_isa
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("C", WIDTHS)
@pytest.mark.parametrize("step", [0, 1, 2])
def test_rows_that_overlap(C: int, dtype: torch.dtype, step: int) -> None:
    input, target = x(1, C + 40, dtype=dtype).as_strided((19, C), (step, 1)), y(19, C=C)
    options = Options(reduction="none")
    expected = everything(input.contiguous(), target, options)
    assert all(map(torch.equal, everything(input, target, options), expected))


@every_isa
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("N", [1, 5])  # rows that several threads share, beside rows that one has for itself
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_threads_do_not_matter_in_place(N: int, dtype: torch.dtype, softcap: float | None) -> None:
    input, target = x(N, 50257, dtype=dtype), y(N, C=50257)
    target[-1] = target[-1] if N == 1 else -100
    options = Options(inplace=True, return_stats=True, softcap=softcap)
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        logits = input.clone()
        loss, grad, _, stats = cpu.forward(Call(logits, target, None, options), "fused")
        got = [bits(t) for t in (loss, grad, *stats)]
        if count == 1:
            expected = got
        assert all(map(torch.equal, got, expected))


def target_for(kind: str, *shape: int) -> Tensor:
    return p(*shape, dtype=torch.float32) if kind == "probabilities" else y(shape[0], *shape[2:], C=shape[1])


@every_isa
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(5, 20011), (301, 7, 16, 2), (33, 300, 5)], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_threads_do_not_matter_for_any_form(kind: str, shape: tuple[int, ...]) -> None:
    input, target = x(*shape, dtype=torch.float32), target_for(kind, *shape)
    for layout in (lambda t: t, lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1)):  # and channels last
        torch.set_num_threads(1)
        expected = everything(layout(input), target, Options(label_smoothing=0.1))
        for count in (2, 3, 4):
            torch.set_num_threads(count)
            got = everything(layout(input), target, Options(label_smoothing=0.1))
            assert all(map(torch.equal, got, expected))


@every_isa
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(9, 5, 4), (9, 70, 3, 3), (9, 130)], ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_batch_and_address_do_not_matter_for_any_form(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    input, target = x(*shape, dtype=dtype), target_for(kind, *shape)
    options = Options(reduction="none", **EVERYTHING)
    expected = everything(input, target, options)
    assert all(map(torch.equal, everything(misaligned(input), target, options), expected))
    assert all(map(torch.equal, everything(rows_apart(input), target, options), expected))
    pixels = len(expected[0].flatten()) // len(input)
    for images in (slice(4, 5), slice(2, 7), slice(None, None, 3)):
        got = everything(input[images], target[images], options)
        for mine, of_all in zip(got, expected, strict=True):
            rows = of_all if of_all.shape[0] == len(input) else of_all.view(len(input), pixels, -1)
            assert torch.equal(mine.flatten(), rows[images].flatten())


@every_isa
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_row_without_a_batch_is_the_same(dtype: torch.dtype) -> None:
    input, target = x(4, 100, dtype=dtype), y(4)
    batch = everything(input, target, Options(reduction="none"))
    alone = everything(input[1], target[1], Options(reduction="none"))
    assert all(torch.equal(mine.reshape(-1), its[1].reshape(-1)) for mine, its in zip(alone, batch, strict=True))


@every_isa
def test_nothing_is_written_for_a_bad_target() -> None:
    input, target = x(3, 5), torch.tensor([0, 5, 1])
    _, _, saved, _ = cpu.forward(Call(input, y(3), None, Options()), "recompute")
    before = bits(saved).clone()
    for bad in (5, -1, 2**60):
        target[1] = bad
        with pytest.raises(IndexError, match=rf"^Target {bad} is out of bounds\.$"):
            cpu.forward(Call(input, target, None, Options()), "fused")
        # The target was changed after forward: backward must not read past the row either.
        with pytest.raises(IndexError, match=rf"^Target {bad} is out of bounds\.$"):
            cpu.backward(Call(input, target, None, Options()), None, saved, Upstream(torch.ones(())), True, False)
    assert torch.equal(bits(saved), before)


def test_names(isa: str) -> None:
    assert cpu._C.isa() == isa
    assert cpu._C.isa_names()[-1] == "base"
    with pytest.raises(ValueError, match=r"instruction set must be one of .*, got 'sse9'"):
        cpu._C.set_isa("sse9")
    assert cpu._C.isa() == isa


def test_the_variable_chooses() -> None:
    slowest = cpu._C.isa_names()[-1]
    code = "from fused_ce import _C; print(_C.isa())"
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"FUSED_CE_ISA": slowest}, capture_output=True, text=True
    )
    assert result.stdout.strip() == slowest, result.stderr


APART = {
    "every second class": lambda rows: torch.stack([rows, rows], 2).flatten(1)[:, ::2],
    "transposed": lambda rows: rows.t().contiguous().t(),
    "pixels": lambda rows: rows.t().contiguous()[None],
    "pixels, classes last": lambda rows: rows[None].movedim(1, 2),
}


@every_isa
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("keywords", [{}, {"softcap": 3.0, "label_smoothing": 0.1, "lse_square_scale": 0.1}], ids=str)
@pytest.mark.parametrize("layout", APART)
def test_few_rows_whose_classes_lie_apart(layout: str, keywords: dict[str, Any], kind: str, dtype: torch.dtype) -> None:
    """The same bits as of rows that lie side by side."""
    rows, w = (
        x(5, 4099, dtype=dtype),
        torch.rand(4099, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
    )
    target = target_for(kind, 5, 4099)
    if kind == "indices":
        target[2] = -100
    upstream = torch.rand(5, dtype=dtype)
    results = []
    for logits in (rows, APART[layout](rows)):
        pixels = logits.dim() == 3
        t = target if not pixels else target.t()[None] if kind == "probabilities" else target[None]
        leaves = [logits.detach().requires_grad_()]
        if kind == "probabilities":
            t = t.detach().requires_grad_()
            leaves.append(t)
        loss = cross_entropy(leaves[0], t, w.to(dtype), reduction="none", backend="cpu", **keywords)
        grads = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype).reshape(loss.shape))
        results.append([bits(loss.detach().reshape(5)), *(bits(g[0].t() if pixels else g) for g in grads)])
        assert all(grad.is_contiguous() for grad in grads)
    assert all(map(torch.equal, *results))


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_gradients(dtype: torch.dtype) -> None:
    """Of a call so large that its gradient is written past the caches, rows have the bits that they have alone."""
    C = 32003
    N = (36 << 20) // C // dtype.itemsize
    logits, target = x(N, C, dtype=dtype).requires_grad_(), y(N, C=C)
    for _ in range(2):  # then in memory that holds the first
        grad = torch.autograd.grad(cross_entropy(logits, target, reduction="sum", backend="cpu"), logits)[0]
        for row in (0, 1, N // 2, N - 1):
            one = logits[row : row + 1].detach().requires_grad_()
            loss = cross_entropy(one, target[row : row + 1], reduction="sum", backend="cpu")
            assert torch.equal(bits(grad[row]), bits(torch.autograd.grad(loss, one)[0][0]))
        del grad
