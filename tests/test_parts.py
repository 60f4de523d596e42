"""Shards of the classes: the sums that each leaves, and gradients from those of whole rows, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from accuracy import bits
from cases import CASES, EVERYTHING, OPTIONS, Case, ignore, ramp
from conftest import Backend
from judge import check, check_grad, expected_grad, expected_of
from oracle import as_rows, double
from shards import a_cut, assembled, cuts, joined, shards
from test_backends import for_triton
from torch import Tensor

from fused_ce.backends import cpu, reference
from fused_ce.contract import Call, RowSums, Upstream
from fused_ce.options import Options, Shard

f32, f64, bf16, f16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
inf, nan = torch.inf, torch.nan


@pytest.fixture(autouse=True)
def takes_shards(backend: Backend) -> None:
    if not hasattr(backend.module, "part"):
        pytest.skip("it does not take shards yet")
    torch.manual_seed(0)


INDEXED = [case for case in CASES if case.probs is None and not case.declined_by]


@pytest.mark.parametrize("case", INDEXED, ids=str)
def test_shards_make_the_whole(backend: Backend, case: Case) -> None:
    # With the bounds that one process is held to.
    case = for_triton(case) if backend.name == "triton" else case
    call = case.build(backend.device)
    exact_loss, exact_grad = expected_of(case)
    borders = a_cut(case.C, case.id)
    before = bits(call.input).clone()
    loss, grad = assembled(backend.module, call, borders)
    assert torch.equal(bits(call.input), before)
    check(loss, exact_loss)
    check_grad(grad, call, exact_grad)


def sums_of(backend: Backend, call: Call, borders: tuple[int, ...]) -> Iterator[tuple[RowSums, RowSums]]:
    """Those of each shard, and in float64."""
    for shard in shards(call, borders):
        exact = Call(double(shard.input), shard.target.cpu(), double(shard.weight), shard.options)
        yield RowSums(*backend.module.part(shard).cpu()), RowSums(*reference.part(exact))


@pytest.mark.parametrize("C", [7, 40, 1000, 5000])
@pytest.mark.parametrize("dtype", [f32, f64, bf16, f16], ids=str)
@pytest.mark.parametrize("name", ["plain", "smoothing", "scale-below-0", "everything"])
def test_sums_of_a_shard(backend: Backend, name: str, dtype: torch.dtype, C: int) -> None:
    if backend.name == "triton" and C > 1000:
        pytest.skip("wide rows take their time in the interpreter")
    for weight, stats in product((None, ramp), (False, True)):
        options = OPTIONS.get(name, {}) | {"return_stats": stats}
        case = Case(f"sums-{name}", C=C, dtype=dtype, weight=weight, target=ignore(1), options=options)
        call = case.build(backend.device)
        eps = torch.finfo(call.acc).eps
        single = a_cut(C, f"{name} {dtype} {C} {weight is None} {stats}")
        for borders in cuts(C) if backend.name != "triton" else [single]:  # which takes its time in the interpreter
            for got, exact in sums_of(backend, call, borders):
                for field, one, other in zip(RowSums._fields, got, exact, strict=True):
                    rtol = 0.0 if field == "argmax" else 64 * eps if call.acc == f64 else 8 * eps
                    torch.testing.assert_close(one, other, rtol=rtol, atol=0, msg=lambda m, f=field: f"{f}: {m}")


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("C", [6, 1000])
def test_sums_of_unusual_rows(backend: Backend, C: int, stats: bool) -> None:
    half = C // 2
    x = torch.randn(8, C)
    x[0] = -inf  # as a whole
    x[1, :half] = -inf  # one shard
    x[2, 1], x[2, 2] = 9, 9
    x[3, half + 1], x[3, half + 2] = nan, nan
    x[4, 1] = inf
    x[5] = nan  # ignored
    x[6, 2] = -inf  # the target
    target = torch.tensor([0, 0, C - 1, 0, 0, -100, 2, half])
    call = Call(x.to(backend.device), target.to(backend.device), None, Options(return_stats=stats))
    nans = ([False] * 4 + [True] + [False] * 3, [False] * 3 + [True] + [False] * 4)  # inf - inf
    largest = ([0, 0, 1, None, 1, -1, None, None], [half, None, None, half + 1, None, -1, None, None])
    for first, (got, exact) in enumerate(sums_of(backend, call, (0, half, C))):
        assert got.so.isnan().tolist() == nans[first]
        for one, other in zip(got, exact, strict=True):
            fine = ~torch.tensor(nans[first])
            torch.testing.assert_close(one[fine], other[fine], rtol=1e-6, atol=0)
        assert [field[5].item() for field in got] == [0] * 7 + [-1]
        assert (got.so[0].item(), got.m[0].item()) == (0, -inf)
        if not stats:
            assert (got.argmax == -1).all()
            continue
        assert got.m.isnan().tolist() == [first == 1 and i == 3 for i in range(8)]
        assert all(want in (None, at) for want, at in zip(largest[first], got.argmax.tolist(), strict=True))


FAR = [2**32, 2**31, 2**32 - 1, 2**33 + 5]


@pytest.mark.parametrize("C", [5, 1000])
def test_a_target_far_away_is_elsewhere(backend: Backend, C: int) -> None:
    # An index of 32 bits would take some of them for a class of the shard.
    x = torch.randn(len(FAR) + 1, C, device=backend.device)
    target = torch.tensor([*FAR, 2], device=backend.device)
    far = Call(x, target, None, Options(shard=Shard(0, 2**34)))
    got = RowSums(*backend.module.part(far).cpu())
    assert got.z_y[:-1].tolist() == [-inf] * len(FAR)
    assert got.z_y[-1] == x[-1, 2].cpu()
    assert got.q_y.tolist() == [0] * len(FAR) + [1]
    e = (double(x) - got.m[:, None]).exp()
    torch.testing.assert_close(got.so[:-1], e.sum(1)[:-1], rtol=1e-6, atol=0)
    # Of the rows whose targets lie elsewhere, the class with their number in this shard is one as any other.
    sums = torch.stack(tuple(got)).to(backend.device)
    sums[2, :-1], sums[3] = 3.0, 1.0
    grad = torch.empty_like(x)
    backend.module.finish(far, sums, Upstream(torch.ones((), device=backend.device)), grad)
    p = e / (got.so + (sums[2].cpu() - got.m).exp())[:, None]
    torch.testing.assert_close(double(grad[:-1]), p[:-1], rtol=2e-6, atol=0)


@pytest.mark.parametrize("target", [-1, 10, 2**62])
def test_a_target_out_of_range(backend: Backend, target: int) -> None:
    if backend.name == "triton":
        pytest.skip("a GPU does not know it in time")
    x, sums = torch.randn(3, 5), torch.zeros(8, 3, dtype=f64)
    call = Call(x, torch.tensor([1, target, 9]), None, Options(shard=Shard(5, 10), inplace=True))
    before = x.clone()
    with pytest.raises(IndexError, match=rf"^Target {target} is out of bounds\.$"):
        backend.module.part(call)
    if backend.name == "cpu":
        with pytest.raises(IndexError, match=rf"^Target {target} is out of bounds\.$"):
            cpu.finish(call, sums, Upstream(x.sum()), x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [f32, f64, bf16, f16], ids=str)
@pytest.mark.parametrize("pixels", [(), (3,), (17,)], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_upstream_of_rows(backend: Backend, pixels: tuple[int, ...], dtype: torch.dtype, inplace: bool) -> None:
    options = EVERYTHING | {"lse_square_scale": 0.0, "reduction": "none"}
    case = Case("upstream", N=6, C=40, pixels=pixels, dtype=dtype, weight=ramp, target=ignore(1, 4), options=options)
    call = case.build(backend.device)
    given = torch.linspace(-2, 3, call.rows, dtype=call.acc, device=backend.device).reshape(call.row_shape)
    exact, logits = expected_grad(given, call), call.input.clone()
    of_shards = shards(call._replace(input=logits), (0, 13, 40))
    stacked = torch.stack(tuple(joined([backend.module.part(shard) for shard in of_shards]))).to(backend.device)
    grad = logits if inplace else torch.empty_like(logits)
    for shard, into in zip(of_shards, shards(call._replace(input=grad), (0, 13, 40)), strict=True):
        backend.module.finish(shard, stacked, Upstream(given), into.input)
    check_grad(grad, call, exact)


def test_upstream_of_lse(backend: Backend) -> None:
    case = Case("of-lse", N=5, C=900, options=OPTIONS["smoothing"] | {"reduction": "none"}, target=ignore(2))
    call = case.build(backend.device)
    of_shards = shards(call, (0, 100, 899, 900))
    sums = torch.stack(tuple(joined([backend.module.part(shard) for shard in of_shards]))).to(backend.device)
    g, of_lse = (torch.linspace(*ends, 5, device=backend.device) for ends in ((1, 2), (-3, 1)))
    grad = torch.empty_like(call.input)
    for shard, into in zip(of_shards, shards(call._replace(input=grad), (0, 100, 899, 900)), strict=True):
        backend.module.finish(shard, sums, Upstream(g, of_lse), into.input)
    wide = call._replace(input=double(call.input), target=call.target.cpu())
    exact = reference.backward(wide, None, None, Upstream(double(g), double(of_lse)), True, False).input
    torch.testing.assert_close(double(grad), exact, rtol=2e-6, atol=1e-9)


def test_shapes_and_targets(backend: Backend) -> None:
    x, y = torch.randn(4, 200, device=backend.device), torch.tensor([0, 156, 199, 20], device=backend.device)
    exact = assembled(backend.module, Call(x, y, None, Options(reduction="none")), (0, 50, 200))
    narrow = assembled(backend.module, Call(x, y.to(torch.uint8), None, Options(reduction="none")), (0, 50, 200))
    assert all(torch.equal(one, other) for one, other in zip(exact, narrow, strict=True))
    for i in range(4):
        loss, grad = assembled(backend.module, Call(x[i], y[i], None, Options()), (0, 50, 200))
        assert torch.equal(loss, exact[0][i])
        assert torch.equal(grad, exact[1][i])
    empty = Call(x[:0], y[:0], None, Options(shard=Shard(3, 300)))
    assert backend.module.part(empty).shape == (8, 0)
    backend.module.finish(empty, torch.empty(8, 0, dtype=f64), Upstream(x.new_ones(())), x[:0])


def on_threads(threads: int, function: object, *arguments: object) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function(*arguments)  # type: ignore[operator]
    finally:
        torch.set_num_threads(before)


CPP = [
    (Case("few", N=5000, C=9), (0, 4, 9)),
    (Case("shared", N=3, C=90_000, options={"return_stats": True} | EVERYTHING, weight=ramp), (0, 45_000, 90_000)),
    (Case("chunks", N=1, C=140_000, pixels=(17,), options={"return_stats": True}), (0, 70_000, 140_000)),
]


@pytest.mark.parametrize(("case", "borders"), CPP, ids=lambda value: str(value) if isinstance(value, Case) else "")
def test_any_number_of_threads(backend: Backend, case: Case, borders: tuple[int, ...]) -> None:
    if backend.name != "cpu":
        pytest.skip("it is the C++ whose threads share rows")
    call = case.build()
    one, two = (on_threads(threads, assembled, backend.module, call, borders) for threads in (1, 3))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(one, two, strict=True))
    exact_loss, exact_grad = expected_of(case)
    check(one[0], exact_loss)
    check_grad(one[1], call, exact_grad)
    argmax = joined([cpu.part(shard) for shard in shards(call, borders)]).argmax
    assert not call.options.return_stats or torch.equal(argmax, as_rows(call.input).argmax(1).double())


def test_the_cpp_declines_and_refuses(backend: Backend) -> None:
    if backend.name != "cpu":
        pytest.skip("it is about the C++")
    x, y, sums = torch.randn(3, 5), torch.tensor([0, 1, 2]), torch.zeros(8, 3, dtype=f64)
    probabilities = Call(x, x.softmax(1), None, Options(shard=Shard(0, 9)))
    assert any("shard" in reason for reason in cpu.unsupported(probabilities))
    assert not cpu.unsupported(probabilities._replace(target=y))
    for shard in (Shard(-1, 9), Shard(5, 9), Shard(0, 4)):
        with pytest.raises(ValueError, match="shard"):
            cpu.part(Call(x, y, None, Options(shard=shard)))
    call = Call(x, y, None, Options(shard=Shard(0, 9)))
    with pytest.raises(ValueError, match="shard"):
        cpu.part(probabilities)
    with pytest.raises(ValueError, match="9 contiguous"):
        cpu.part(call._replace(weight=torch.ones(5)))
    for wrong in (sums[:, :2], sums.float(), sums.T.contiguous().T):
        with pytest.raises(ValueError, match="24 contiguous"):
            cpu.finish(call, wrong, Upstream(torch.ones(())), torch.empty(3, 5))
    with pytest.raises(ValueError, match="3 contiguous"):
        cpu.finish(call, sums, Upstream(torch.ones(4)), torch.empty(3, 5))
    for wrong in (torch.empty(3, 6), torch.empty(3, 5, dtype=f64), None):
        with pytest.raises(ValueError, match=r"expected|differ"):
            cpu.finish(call, sums, Upstream(torch.ones(())), wrong)
