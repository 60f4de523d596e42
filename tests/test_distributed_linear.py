"""Linear heads of sharded vocabularies, on ranks: numbers, layouts, what autograd asks for. One test for each check."""

from __future__ import annotations

from typing import Any

import linear_rank_dtensors  # noqa: F401
import linear_rank_failures  # noqa: F401
import pytest
import torch
import torch.distributed as dist
from linear_cases import CASES, Case, H, distance, gradients, in_float64
from linear_ranks import CHECKS, LAYOUTS, RANKS, check, close, local, ours, run, same_everywhere

from fused_ce import linear_cross_entropy
from fused_ce.distributed import exchange, vocab_parallel_linear_cross_entropy
from fused_ce.linear import products

f32, f64, bf16 = torch.float32, torch.float64, torch.bfloat16


def compare(rank: int, case: Case, layout: str, **keywords: Any) -> None:
    """Loss and gradients against float64, and against what one process gives."""
    whole = case.build()
    exact = in_float64(whole)
    single = case.ours(whole, **keywords)
    own, shard, mine = local(rank, layout, whole)
    loss = ours(case, own, **shard, **keywords)
    found = gradients(loss, own, case.upstream)
    right, of_one = gradients(case.exact(exact), exact, case.upstream), gradients(single, whole, case.upstream)
    close(loss, case.exact(exact), single, 1.2, 2 * torch.finfo(loss.dtype).eps)
    same_everywhere(loss, *(found[name] for name in ("input",) if name in found))
    assert found.keys() == right.keys()
    for name, got in found.items():
        wide = case.dtype in (f32, f64)
        # Of 16 bits each rank's term of the input's gradient is rounded, and then their sum.
        slack, least = 2.0 if name == "input" and not wide else 1.2, 4 * torch.finfo(case.dtype).eps if wide else 0.0
        if name == "input":
            close(got, right[name], of_one[name], slack, least)
            continue
        held = len(right[name][mine])
        assert torch.equal(got[held:], torch.zeros_like(got[held:]))
        if held > 1:
            close(got[:held], right[name][mine], of_one[name][mine], slack, least)


def _row_of_table(case: Case, layout: str) -> Any:
    def row(rank: int) -> None:
        compare(rank, case, layout)

    return row


for i, case in enumerate(case for case in CASES if not case.probs):
    CHECKS[f"{case}-{LAYOUTS[i % 3]}"] = _row_of_table(case, LAYOUTS[i % 3])


def _case(id: str) -> Case:
    return next(case for case in CASES if case.id == id)


@check
def both_exchanges(rank: int) -> None:
    """Reductions give the same where a gather would take too long."""
    most, exchange.MOST_GATHERED = exchange.MOST_GATHERED, 0
    try:
        for layout in LAYOUTS:
            compare(rank, _case("mean-everything-weight"), layout)
            compare(rank, _case("none-float32"), layout)
    finally:
        exchange.MOST_GATHERED = most


@check
def statistics(rank: int) -> None:
    """Each equals that of one process, and lse carries a gradient."""
    for id in ("mean-everything-weight", "none-everything", "sum-bfloat16", "all-ignored-none"):
        whole = _case(id).build()
        own, shard, mine = local(rank, "uneven", whole)
        found = ours(_case(id), own, **shard, return_stats=True)
        right = linear_cross_entropy(**whole, **_case(id).options, chunk_rows=8, return_stats=True)
        for name in ("lse", "z_loss", "entropy"):
            torch.testing.assert_close(getattr(found, name), getattr(right, name), rtol=1e-5, atol=1e-6)
        assert torch.equal(found.argmax, right.argmax)
        assert torch.equal(found.correct, right.correct)
        same_everywhere(*found)
        of, of_whole = ((out.loss.sum() + out.lse.square().sum()) for out in (found, right))
        got, exact = gradients(of, own, 1.0), gradients(of_whole, whole, 1.0)
        most = 1e-2 if own["input"].dtype == bf16 else 1e-6
        assert distance(got["input"], exact["input"].double()) <= most
        held = len(exact["linear_weight"][mine])
        if held > 1:
            assert distance(got["linear_weight"][:held], exact["linear_weight"][mine].double()) <= most


@check
def leading_dimensions(rank: int) -> None:
    whole = Case("leading", N=12).build()
    own, shard, _ = local(rank, "even", whole)
    x, W, y = own["input"], own["linear_weight"], own["target"]
    for shape in ((3, 4), (2, 3, 2), (12,)):
        loss = vocab_parallel_linear_cross_entropy(x.view(*shape, H), W, y.view(shape), reduction="none", **shard)
        assert loss.shape == shape
        right = linear_cross_entropy(whole["input"], whole["linear_weight"], y, reduction="none")
        torch.testing.assert_close(loss.flatten(), right)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert grad.shape == x.shape
    loss = vocab_parallel_linear_cross_entropy(x[0], W, y[0], **shard)
    torch.testing.assert_close(loss, linear_cross_entropy(whole["input"][0], whole["linear_weight"], y[0]))
    empty = vocab_parallel_linear_cross_entropy(x[:0], W, y[:0], **shard)
    assert empty.isnan()
    (grad,) = torch.autograd.grad(empty, W)
    assert not grad.any()


@check
def ignored_rows_reach_nothing(rank: int) -> None:
    whole = Case("ignored", ignored=0.4).build()
    for value in (torch.inf, torch.nan):
        own, shard, _ = local(rank, "even", whole)
        with torch.no_grad():
            own["input"][own["target"] == -100] = value
        loss = ours(Case("ignored"), own, **shard)
        torch.testing.assert_close(loss, Case("ignored").ours(whole))
        for grad in gradients(loss, own, 1.0).values():
            assert grad.isfinite().all()
        assert not torch.autograd.grad(loss, own["input"])[0][own["target"] == -100].any()


@check
def the_same_bits_again(rank: int) -> None:
    case = _case("mean-everything-weight")
    own, shard, _ = local(rank, "padded", case.build())
    first: list[torch.Tensor] = []
    for _ in range(5):
        loss = ours(case, own, **shard)
        found = [loss, *gradients(loss, own, 1.0).values()]
        first = first or found
        assert all(map(torch.equal, first, found))


@check
def terms_of_the_input_gradient(rank: int) -> None:
    """Without the sum, what each rank has adds up to it: as behind Megatron's own regions."""
    for id in ("mean-float32", "none-float32"):
        case = _case(id)
        own, shard, _ = local(rank, "even", case.build())
        whole, term = (
            gradients(ours(case, own, **shard, reduce_input_grad=reduces), own, 1.0)["input"]
            for reduces in (True, False)
        )
        assert distance(term, whole.double()) > 0.1
        dist.all_reduce(term)
        assert distance(term, whole.double()) < 1e-6


@check
def other_upstream_gradients(rank: int) -> None:
    """Also those that forward did not expect, twice, and with a hint."""
    for upstream, hint in ((1.0, None), (1e30, None), (4096.0, 4096.0), (3.0, 4096.0), (0.0, None)):
        for id in ("mean-bfloat16", "mean-float32"):
            case = _case(id)
            whole = case.build()
            exact = in_float64(whole)
            own, shard, _ = local(rank, "even", whole)
            loss = ours(case, own, **shard, grad_scale=hint, dtype=f32)
            right = torch.autograd.grad(case.exact(exact), exact["input"], torch.tensor(upstream).double())[0]
            for _ in range(2):
                (got,) = torch.autograd.grad(loss, own["input"], torch.tensor(upstream), retain_graph=True)
                assert distance(got, right) < (5e-3 if id == "mean-bfloat16" else 1e-6)


@check
def no_second_derivative(rank: int) -> None:
    """A first one is right under create_graph; a second raises, whatever it is of."""
    for id in ("mean-float32", "none-float32"):
        case = _case(id)
        own, shard, _ = local(rank, "even", case.build())
        scale = torch.tensor(2.0, requires_grad=True)
        loss = ours(case, own, **shard).sum()
        right = gradients(loss, own, 2.0)
        for name, of in (("input", own["linear_weight"]), ("linear_weight", own["input"]), ("input", scale)):
            (grad,) = torch.autograd.grad(loss * scale, own[name], create_graph=True)
            if id == "mean-float32":
                assert distance(grad.detach(), right[name].double()) < 1e-6
            with pytest.raises(RuntimeError, match="got a second one"):
                torch.autograd.grad(grad.square().sum() + of.sum(), of)
        with pytest.raises(RuntimeError, match="call backward in a loop"):
            torch.autograd.grad(loss, own["input"], torch.ones(3), is_grads_batched=True)
        without = {name: tensor for name, tensor in own.items() if name != "input"}
        with pytest.raises(RuntimeError, match=r"torch\.func"):
            torch.func.grad(lambda x, case, *rest: ours(case, {"input": x, **rest[0]}, **rest[1]).sum())(
                own["input"], case, without, shard
            )


@check
def autocast(rank: int) -> None:
    case = Case("autocast", N=64)
    whole = case.build()
    own, shard, mine = local(rank, "even", whole)
    with torch.autocast("cpu", torch.bfloat16):
        loss, right = ours(case, own, **shard), case.ours(whole)
    assert loss.dtype == right.dtype == f32
    got, of_one = gradients(loss, own, 1.0), gradients(right, whole, 1.0)
    assert distance(got["input"], of_one["input"].double()) < 1e-2
    assert distance(got["linear_weight"], of_one["linear_weight"][mine].double()) < 1e-2


@check
def without_gradients(rank: int) -> None:
    case = _case("mean-float32")
    own, shard, _ = local(rank, "even", case.build())
    with torch.no_grad():
        loss = ours(case, own, **shard)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, ours(case, own, **shard).detach())


@check
def what_crosses(rank: int) -> None:
    """One gather a chunk, one before and one after; one sum of the hidden states' gradient; in backward nothing."""
    sent: list[tuple[str, int]] = []
    gather, reduce = exchange._all_gather, dist.all_reduce

    def count(name: str, function: Any) -> Any:
        def counted(*tensors: Any, **keywords: Any) -> Any:
            sent.append((name, tensors[1 if name == "gather" else 0].numel()))
            return function(*tensors, **keywords)

        return counted

    own, shard, _ = local(rank, "even", Case("crossing", N=32).build())
    exchange._all_gather, dist.all_reduce = count("gather", gather), count("reduce", reduce)
    try:
        loss = ours(Case("crossing", chunk_rows=8), own, **shard)
        told = sent[0][1]
        assert sent == [("gather", told), *[("gather", told + 6 * 8)] * 4, ("gather", told), ("reduce", 32 * H)]
        loss.backward()
        assert len(sent) == 7
    finally:
        exchange._all_gather, dist.all_reduce = gather, reduce


@check
def products_of_16_bits(rank: int) -> None:
    """As processors make them that have such instructions: their sum over the ranks is float32 all the same."""
    dtypes: list[torch.dtype] = []
    made_in, reduce = products.computed_in, dist.all_reduce

    def watched(tensor: torch.Tensor, *others: Any, **keywords: Any) -> Any:
        dtypes.append(tensor.dtype)
        return reduce(tensor, *others, **keywords)

    products.computed_in, dist.all_reduce = lambda dtype, device: dtype, watched
    try:
        compare(rank, _case("mean-bfloat16"), "even")
        compare(rank, _case("one-chunk-bfloat16"), "padded")
    finally:
        products.computed_in, dist.all_reduce = made_in, reduce
    assert dtypes == [f32] * 2


@check
def a_group_of_one(rank: int) -> None:
    alone = [dist.new_group([i]) for i in range(RANKS)][rank]
    case = _case("mean-everything-weight")
    whole = case.build()
    torch.testing.assert_close(ours(case, whole, group=alone), case.ours(whole))


@pytest.fixture(scope="module")
def failed() -> list[dict[str, str]]:
    return run(__name__)


@pytest.mark.parametrize("name", CHECKS)
def test_on_ranks(name: str, failed: list[dict[str, str]]) -> None:
    assert "\n".join(of[name] for of in failed if name in of) == ""


def test_compiled() -> None:
    """In a graph that breaks there; a process without torch.distributed is a group of one."""
    tensors = _case("mean-float32").build()
    step = torch.compile(lambda: vocab_parallel_linear_cross_entropy(**tensors, chunk_rows=8) * 2, backend="eager")
    torch.testing.assert_close(step(), _case("mean-float32").ours(tensors) * 2)
