"""The currency: sums of parts of a row, joined by `combine` in all three languages, are the sums of the whole row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import HAS_TRITON, INTERPRET
from torch import Tensor

from fused_ce import formula
from fused_ce.backends import cpu
from fused_ce.contract import RowSums

inf = torch.inf
Combine = Callable[[RowSums, RowSums, bool], RowSums]


def by_formula(a: RowSums, b: RowSums, probs: bool) -> RowSums:
    return formula.combine(a, b, probs)


def by_cpp(a: RowSums, b: RowSums, probs: bool) -> RowSums:
    rows = zip(*(torch.stack([field.double() for field in part], 1).tolist() for part in (a, b)), strict=True)
    joined = torch.tensor(
        [cpu._C.combine(*(RowSums(*part) for part in row), probs) for row in rows], dtype=torch.float64
    )
    return RowSums(*joined.T)._replace(argmax=joined[:, 7].long())


def by_triton(a: RowSums, b: RowSums, probs: bool) -> RowSums:
    from row_sums_kernel import join

    parts = torch.stack([torch.stack([field.double() for field in part], 1) for part in (a, b)])
    parts = parts.to("cpu" if INTERPRET else "cuda")
    joined = torch.empty_like(parts[0])
    with ExitStack() as stack:
        if INTERPRET:
            stack.enter_context(pytest.MonkeyPatch.context()).setenv("TRITON_INTERPRET", "1")
            stack.enter_context(np.errstate(all="ignore"))
        join[(1,)](parts[0], parts[1], joined, len(joined), probs, 16)
    return RowSums(*joined.cpu().T)._replace(argmax=joined[:, 7].long().cpu())


JOINED_BY = [
    pytest.param(by_formula, id="formula"),
    pytest.param(by_cpp, id="cpp", marks=pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built")),
    pytest.param(by_triton, id="triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")),
]


def rows(probs: bool) -> tuple[Tensor, Tensor, Tensor]:
    """z (R, C), the targets (R,) and q (R, C): ordinary rows, and rows that a careless join would spoil."""
    seed = torch.Generator().manual_seed(0)
    R, C = 10, 37
    z = 3 * torch.randn(R, C, generator=seed, dtype=torch.float64)
    y = torch.tensor([0, 5, 36, 17, 1, 20, 36, 3, 18, 9])
    z[1] += 1000
    z[2, 36] = z[2].amax() + 60  # confident
    z[3] = 0  # equal
    z[4, :18] = -inf  # whole parts without a class, with the target among them
    z[5, 18:] = -inf
    z[6] = torch.arange(C) * 40.0  # each part far above the one before
    z[7] = torch.arange(C).flip(0) * 40.0
    z[8, 18] = -inf  # the target alone
    q = torch.rand(R, C, generator=seed, dtype=torch.float64)
    q[:, ::3] = 0
    q = torch.where(z == -inf, 0.25 if not probs else 0.0, q)
    return z, z.argmax(1) if probs else y, q


def part_of(z: Tensor, y: Tensor, q: Tensor, begin: int, end: int, probs: bool) -> RowSums:
    """The sums of classes [begin, end); under probabilities each part leaves out a largest class of its own."""
    z_part, q_part = z[:, begin:end], q[:, begin:end]
    at = z_part.argmax(1) if probs else y - begin
    q_y = (q_part if probs else q).gather(1, (at if probs else y)[:, None]).squeeze(1)
    part = formula.row_lse(z_part, at, q_y, q_part, wants_stats=True)
    return part._replace(argmax=part.argmax + begin)


def cuts(C: int) -> Iterator[tuple[int, ...]]:
    """Borders of parts: one class at either end, around vectors and the middle, many parts, every class for itself."""
    yield from ((0, at, C) for at in (1, 2, 15, 16, 17, 18, 19, C - 1))
    yield from ((0, 1, 2, C - 2, C - 1, C), (0, 8, 16, 24, 32, C), (*range(C), C))


@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
@pytest.mark.parametrize("combine", JOINED_BY)
def test_parts_join_to_the_whole(combine: Combine, probs: bool) -> None:
    z, y, q = rows(probs)
    whole = part_of(z, y, q, 0, z.shape[1], probs)
    for borders in cuts(z.shape[1]):
        joined, *others = (part_of(z, y, q, begin, end, probs) for begin, end in pairwise(borders))
        for part in others:
            joined = combine(joined, part, probs)
        for name, got, wanted in zip(RowSums._fields, joined, whole, strict=True):
            where = f"{name}, cut at {borders[1:-1]}"
            torch.testing.assert_close(
                got, wanted, rtol=1e-13, atol=0, equal_nan=True, msg=lambda m, w=where: f"{w}: {m}"
            )


@pytest.mark.parametrize("isa", cpu._C.isa_names() if cpu._C else [])
def test_every_instruction_set_joins_alike(isa: str) -> None:
    before = cpu._C.isa()
    cpu._C.set_isa(isa)
    try:
        test_parts_join_to_the_whole(by_cpp, False)
        test_parts_join_to_the_whole(by_cpp, True)
    finally:
        cpu._C.set_isa(before)


@pytest.mark.parametrize("combine", JOINED_BY)
def test_nothing_joins_to_nothing(combine: Combine) -> None:
    # A row of -inf alone leaves so = 0 in every part, not NaN; the loss of the whole row is NaN all the same.
    z, y = torch.full((1, 6), -inf, dtype=torch.float64), torch.tensor([4])
    parts = [part_of(z, y, torch.zeros_like(z), *ends, False) for ends in ((0, 3), (3, 6))]
    joined = combine(*parts, False)
    assert joined.so.item() == 0
    assert joined.m.item() == -inf
    assert formula.minus_m(joined).isnan().all()


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.parametrize("probs", [False, True], ids=["index", "probs"])
def test_a_part_with_nan_is_the_higher_one(probs: bool) -> None:
    nan = torch.nan
    m = [(nan, 1.0), (1.0, nan), (nan, nan), (-inf, nan), (nan, -inf), (inf, nan), (1.0, 2.0), (2.0, 2.0)]
    a, b = (RowSums(*torch.zeros(8, len(m), dtype=torch.float64)) for _ in range(2))
    a = a._replace(m=torch.tensor([one for one, _ in m]), argmax=torch.full((len(m),), 3))
    b = b._replace(m=torch.tensor([other for _, other in m]), argmax=torch.full((len(m),), 7))
    joined = by_triton(a, b, probs)
    assert joined.m.isnan().tolist() == [True] * 6 + [False] * 2
    assert joined.argmax.tolist() == [3, 7, 3, 7, 3, 7, 7, 3]
