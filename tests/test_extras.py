"""What a call gives or takes besides torch's arguments: return_stats, inplace and grad_scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import acc_dtype, relative_error, same_kind
from calls import p, w, x, y
from cases import EVERYTHING, Case, confident, ignore, misaligned, ramp
from conftest import Backend
from judge import check_grad, expected_grad
from oracle import as_rows, composed, double
from test_backends import for_triton
from torch import Tensor

from fused_ce import CrossEntropyLoss, CrossEntropyOutput, cross_entropy, formula
from fused_ce.backends import reference
from fused_ce.backends.dispatch import BACKENDS
from fused_ce.contract import Call, Upstream
from fused_ce.options import Options

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATS = [
    *(
        Case(f"C{C}-{str(dtype)[6:]}", C=C, dtype=dtype, interpreted={"N": 1} if C > 512 else {})
        for C in (1, 3, 65, 1025, 4097)
        for dtype in FLOATS
    ),
    Case("many-rows", N=70, C=300, interpreted={"N": 5}),
    Case("transposed", N=2, C=30000, layout=lambda x: x.T.contiguous().T, interpreted={"C": 600}),
    Case("everything", C=65, options=EVERYTHING, weight=ramp, target=ignore(1)),
    Case("none", C=65, options=EVERYTHING | {"reduction": "none"}, target=ignore(1)),
    Case("pixels", N=2, C=17, pixels=(3, 5), options=EVERYTHING, target=ignore(1, 7)),
    Case("wide-pixels", N=2, C=1030, pixels=(3,), options=EVERYTHING, layout=misaligned, interpreted={"N": 1}),
    Case("probabilities", C=33, probs=torch.float32, options=EVERYTHING),
    Case("confident", C=100, logits=confident(20)),
    Case("one-class-left", C=3, logits=lambda x, y: x.scatter(1, torch.tensor([[0, 1]] * 3), -torch.inf)),
]


@pytest.mark.parametrize("case", STATS, ids=str)
def test_stats(backend: Backend, case: Case) -> None:
    plain = (case if backend.name != "triton" else for_triton(case)).build(backend.device)
    input, target, _, options = plain
    loss, _, _, stats = backend.module.forward(plain._replace(options=options._replace(return_stats=True)), "loss")
    assert torch.equal(loss, backend.module.forward(plain, "loss").loss)
    is_index = target.shape != input.shape
    valid = target.cpu().reshape(-1) != options.ignore_index if is_index else torch.ones(len(as_rows(input))).bool()
    z = formula.transform(as_rows(double(input)), options)
    lse, p = z.logsumexp(1), z.softmax(1)
    entropy = -(p * z.log_softmax(1)).nan_to_num(nan=0.0).sum(1)  # 0 log 0 = 0
    exact = {"lse": lse, "z_loss": options.lse_square_scale * lse**2, "entropy": entropy}
    for name, value in exact.items():
        got = getattr(stats, name).cpu()
        assert got.dtype == acc_dtype(input.dtype)
        assert got.shape == (input.shape[:1] + input.shape[2:] if input.dim() > 1 else ())
        expected = torch.where(valid, value, 0)
        assert same_kind(got.reshape(-1), expected)
        assert relative_error(got.reshape(-1), expected) < 2e-6
    argmax = stats.argmax.cpu().reshape(-1)
    assert torch.equal(argmax < 0, ~valid)
    assert torch.equal(z.gather(1, argmax.clamp(min=0)[:, None])[valid, 0], z.amax(1)[valid])


@pytest.mark.parametrize("keywords", [{}, {"reduction": "sum"}, {"reduction": "none"}, {"num_items": 7.0}], ids=str)
def test_output(keywords: dict[str, Any]) -> None:
    input, target = x(6, 5), torch.tensor([0, 1, -100, 2, 3, 4])
    plain = cross_entropy(input, target, lse_square_scale=0.1, **keywords)
    output = cross_entropy(input, target, lse_square_scale=0.1, return_stats=True, **keywords)
    assert isinstance(output, CrossEntropyOutput)
    assert torch.equal(output.loss, plain)
    valid = target != -100
    torch.testing.assert_close(output.lse, torch.where(valid, input.logsumexp(1), 0))
    assert torch.equal(output.correct, (input.argmax(1) == target) & valid)
    squares = torch.where(valid, 0.1 * input.logsumexp(1) ** 2, 0)
    divisor = keywords.get("num_items", 5 if not keywords else 1)
    torch.testing.assert_close(output.z_loss, squares if keywords == {"reduction": "none"} else squares.sum() / divisor)
    torch.testing.assert_close(output.loss - output.z_loss, cross_entropy(input, target, **keywords))
    module = CrossEntropyLoss(lse_square_scale=0.1, return_stats=True, reduction=keywords.get("reduction", "mean"))
    assert torch.equal(module(input, target, keywords.get("num_items")).loss, plain)


def test_correct_under_probabilities() -> None:
    input, target = x(6, 5), p(6, 5)
    output = cross_entropy(input, target, return_stats=True)
    assert torch.equal(output.correct, input.argmax(1) == target.argmax(1))


@pytest.mark.parametrize("what", ["lse", "both"])
@pytest.mark.parametrize("keywords", [{}, {"reduction": "none"}, {"softcap": 2.0, "label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 3)], ids=str)
def test_lse_has_a_gradient(shape: tuple[int, ...], keywords: dict[str, Any], what: str) -> None:
    target = y(*shape[:1], *shape[2:]) if len(shape) > 1 else y()

    def ours(input: Tensor) -> Tensor:
        output = cross_entropy(input, target, return_stats=True, **keywords)
        return (output.lse**2).sum() + (output.loss.sum() if what == "both" else 0)

    def theirs(input: Tensor) -> Tensor:
        options = Options(**keywords)
        lse = torch.logsumexp(formula.transform(input, options), 0 if input.dim() == 1 else 1)
        return (lse**2).sum() + (composed(input, target, None, options).sum() if what == "both" else 0)

    for order in (ours, theirs):
        assert torch.autograd.gradcheck(order, x(*shape).requires_grad_())
    assert torch.autograd.gradgradcheck(ours, x(*shape).requires_grad_())
    grads = [torch.autograd.grad(function(input), input)[0] for function in (ours, theirs) for input in [leaf(shape)]]
    torch.testing.assert_close(*grads)


def leaf(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return x(*shape, dtype=dtype).requires_grad_()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("value", [1.0, -0.5, 1 / 3, 0.0])
def test_inplace(dtype: torch.dtype, reduction: str, value: float) -> None:
    logits = leaf((4, 65), dtype) * 1
    given: list[Tensor] = []
    logits.register_hook(given.append)
    call = Call(logits.detach().clone(), y(4), None, Options(reduction=reduction))
    loss = cross_entropy(logits, y(4), reduction=reduction, inplace=True)
    upstream = torch.full_like(loss, value)
    loss.backward(upstream)
    # What was rounded at forward is all there is when another upstream gradient comes.
    check_grad(given[0], call, expected_grad(upstream, call), roundings=1 if value == 1 else 2)
    assert given[0].data_ptr() == logits.data_ptr()


def test_inplace_with_the_graph_kept() -> None:
    ours, theirs = leaf((4, 65)), leaf((4, 65))
    loss, expected = cross_entropy(ours * 1, y(4), inplace=True), F.cross_entropy(theirs * 1, y(4))
    for _ in range(3):
        loss.backward(retain_graph=True)
        expected.backward(retain_graph=True)
        torch.testing.assert_close(ours.grad, theirs.grad)
    rows = cross_entropy(ours * 1, y(4), reduction="none", inplace=True).sum()
    rows.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rows.backward()  # the logits are gone


def test_inplace_is_loud_where_it_would_harm() -> None:
    with pytest.raises(RuntimeError, match="inplace=True would overwrite a leaf"):
        cross_entropy(leaf((4, 5)), y(4), inplace=True)
    with pytest.raises(RuntimeError, match="inplace=True needs contiguous logits"):
        cross_entropy((leaf((5, 4)) * 1).T, y(4), inplace=True)
    for view in (leaf((20,)).view(4, 5), leaf((6, 5))[1:5]):
        with pytest.raises(RuntimeError, match="inplace=True would overwrite a leaf"):
            cross_entropy(view, y(4), inplace=True)
    logits = leaf((4, 5)) * 1
    with pytest.raises(RuntimeError, match="inplace=True would overwrite the target"):
        cross_entropy(logits, logits.detach(), inplace=True)
    saved_elsewhere = logits.pow(2).sum()
    loss = cross_entropy(logits, y(4), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + saved_elsewhere).backward()


def test_inplace_touches_nothing_without_a_gradient() -> None:
    logits = x(4, 5)
    cross_entropy(logits, y(4), inplace=True)
    with torch.no_grad():
        cross_entropy(leaf((4, 5)), y(4), inplace=True)
    assert torch.equal(logits, x(4, 5))


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("upstream", [1.0, 3.0, 1024.0, 65536.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_grad_scale_is_only_a_hint(dtype: torch.dtype, upstream: float, as_tensor: bool) -> None:
    scale = torch.tensor(1024.0) if as_tensor else 1024.0
    options = Options(dtype=torch.promote_types(dtype, torch.float32))
    call = leaf((4, 65), dtype), y(4), None, options
    loss = cross_entropy(call[0], y(4), dtype=options.dtype, grad_scale=scale)
    assert torch.equal(loss, cross_entropy(call[0], y(4), dtype=options.dtype))
    given = torch.full_like(loss, upstream)
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss, call[0], given, retain_graph=True)
        check_grad(grad, call, expected_grad(given, call))


def test_grad_scale_keeps_small_float16_gradients() -> None:
    # Divided by N = 4096 before the loss scale comes in, nearly every element would flush to zero.
    input = (torch.arange(4096 * 100).view(4096, 100) % 7).half().requires_grad_()
    target, scale = torch.zeros(4096, dtype=torch.int64), 2.0**16
    loss = cross_entropy(input, target, dtype=torch.float32, grad_scale=scale)
    loss.backward(torch.tensor(scale))
    call = input, target, None, Options(dtype=torch.float32)
    check_grad(input.grad, call, expected_grad(torch.tensor(scale), call))
    assert (input.grad != 0).all()


@pytest.mark.parametrize("keywords", [{}, {"label_smoothing": 0.2}, {"softcap": 2.0, "reduction": "none"}], ids=str)
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 3), (3, 70)], ids=str)
def test_probabilities_get_a_gradient(shape: tuple[int, ...], keywords: dict[str, Any]) -> None:
    weight = w(5 if 5 in shape else 70)

    def ours(input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(input, target, weight, **keywords)

    results = []
    for function in (ours, lambda input, target: composed(input, target, weight, Options(**keywords))):
        input, target = leaf(shape), p(*shape).requires_grad_()
        (first, second) = torch.autograd.grad(function(input, target).sum(), (input, target))
        (alone,) = torch.autograd.grad(function(input.detach(), target).sum(), target)
        results.append((first, second, alone))
    torch.testing.assert_close(*results)
    if shape == (4, 5):
        assert torch.autograd.gradcheck(ours, (leaf(shape), p(*shape).requires_grad_()))
        assert torch.autograd.gradgradcheck(ours, (leaf(shape), p(*shape).requires_grad_()))


def made_by(monkeypatch: pytest.MonkeyPatch, backend: str = "cpu") -> list[str]:
    """The schedules of the forward calls from now on."""
    module, schedules = BACKENDS[backend], []
    forward = module.forward

    def record(*arguments: Any) -> Any:
        schedules.append(arguments[1])
        return forward(*arguments)

    monkeypatch.setattr(module, "forward", record)
    return schedules


@pytest.mark.parametrize(
    ("dtype", "keywords", "schedule"),
    [
        (torch.float32, {}, "fused"),
        (torch.bfloat16, {"grad_scale": 3.0}, "fused"),
        (torch.float16, {}, "recompute"),  # divided by N it would flush to zero
        (torch.float16, {"grad_scale": 1024.0}, "fused"),
        (torch.float16, {"grad_scale": torch.tensor(1024.0), "reduction": "sum"}, "fused"),
        (torch.float32, {"reduction": "none", "grad_scale": 3.0}, "recompute"),
    ],
    ids=str,
)
def test_schedule(dtype: torch.dtype, keywords: dict[str, Any], schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schedules = made_by(monkeypatch)
    input = leaf((4, 65), dtype)
    loss = cross_entropy(input, y(4), **keywords)
    assert schedules == [schedule]
    # float16 cannot hold the gradient for an upstream gradient of 1 and of 1024 alike: only the hint's is stored.
    given = torch.full_like(loss, float(keywords.get("grad_scale", 1.0)))
    loss.backward(given)
    call = input, y(4), None, Options(reduction=keywords.get("reduction", "mean"))
    check_grad(input.grad, call, expected_grad(given, call))
    assert schedules == [schedule]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_right_hint_hands_out_what_forward_made(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[Tensor] = []
    forward = BACKENDS["cpu"].forward

    def keep(*arguments: Any) -> Any:
        result = forward(*arguments)
        stored.append(result[1])
        return result

    monkeypatch.setattr(BACKENDS["cpu"], "forward", keep)
    input = leaf((4, 65), dtype)
    loss = cross_entropy(input, y(4), grad_scale=1024.0)
    (grad,) = torch.autograd.grad(loss, input, torch.full_like(loss, 1024.0))
    assert grad.data_ptr() == stored[0].data_ptr()  # no second pass, no copy
    assert torch.equal(grad, stored[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("upstream", [1024.0, 512.0, 3.0])
def test_hint_when_the_logits_changed_since(dtype: torch.dtype, upstream: float) -> None:
    logits = leaf((4, 65), dtype) * 1
    call = logits.detach().clone(), y(4), None, Options(reduction="sum")
    given: list[Tensor] = []
    logits.register_hook(given.append)
    loss = cross_entropy(logits, y(4), reduction="sum", grad_scale=1024.0)
    logits.zero_()
    loss.backward(torch.full_like(loss, upstream))
    check_grad(given[0], call, expected_grad(torch.full_like(loss, upstream), call), roundings=2)


def test_num_items_and_grad_scale_may_be_tensors_of_any_dtype() -> None:
    expected = cross_entropy(x(4, 5), y(4), reduction="sum") / 7
    for number in (7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor(7, dtype=torch.int32)):
        for dtype in FLOATS:
            input = leaf((4, 5), dtype)
            loss = cross_entropy(input, y(4), num_items=number, grad_scale=number)
            loss.backward(torch.full_like(loss, 7.0))
            call = input, y(4), None, Options(reduction="sum")
            assert loss.dtype == dtype
            check_grad(input.grad, call, expected_grad(torch.ones(()), call))
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_hints_as_they_were_at_forward(dtype: torch.dtype, reduction: str) -> None:
    # A loss scaler changes its scale in place.
    scale, count = torch.tensor(8.0), torch.tensor(7.0)
    numbers = {"num_items": count} if reduction == "mean" else {}
    input = leaf((4, 65), dtype)
    loss = cross_entropy(input, y(4), reduction=reduction, grad_scale=scale, **numbers)
    scale.mul_(3), count.mul_(5)
    given = torch.full_like(loss, 3.0)
    loss.backward(given)
    call = input, y(4), None, Options(reduction=reduction, num_items=7.0 if numbers else None)
    check_grad(input.grad, call, expected_grad(given, call))


def test_num_items_over_micro_batches() -> None:
    whole, parts = leaf((12, 33)), leaf((12, 33))
    target = y(12).index_fill(0, torch.tensor([1, 5, 6, 7]), -100)
    F.cross_entropy(whole, target, w(33)).backward()
    count = w(33)[target[target >= 0]].sum()  # what the whole batch's mean divides by
    for rows in (slice(0, 3), slice(3, 8), slice(8, 12)):
        cross_entropy(parts[rows], target[rows], w(33), num_items=count).backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize(
    ("dtype", "keywords", "at_forward"),
    [
        (torch.float32, {}, True),
        (torch.bfloat16, {"reduction": "sum"}, False),
        (torch.float16, {"grad_scale": 8.0}, False),
        (torch.float16, {}, False),
        (torch.float32, {"reduction": "none"}, False),
    ],
    ids=str,
)
def test_inplace_when(dtype: torch.dtype, keywords: dict[str, Any], at_forward: bool) -> None:
    logits = leaf((4, 65), dtype) * 1
    before, version = logits.detach().clone(), logits._version
    loss = cross_entropy(logits, y(4), inplace=True, **keywords)
    assert torch.equal(logits, before) == (not at_forward)
    loss.backward(torch.ones_like(loss))
    assert not torch.equal(logits, before)
    assert logits._version > version  # autograd can tell


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_gradient_is_outside_the_graph(reduction: str) -> None:
    logits = leaf((4, 65)) * 1
    (grad,) = torch.autograd.grad(cross_entropy(logits, y(4), reduction=reduction, inplace=True).sum(), logits)
    assert grad is not logits
    assert not grad.requires_grad


def test_inplace_and_a_second_derivative() -> None:
    for reduction in ("mean", "sum"):
        input = leaf((4, 65))
        loss = cross_entropy(input * 1, y(4), reduction=reduction, inplace=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, input, create_graph=True)


def test_inplace_takes_no_more_memory() -> None:
    sizes: list[int] = []
    empty = torch.empty

    def measure(*arguments: Any, **keywords: Any) -> Tensor:
        result = empty(*arguments, **keywords)
        sizes.append(result.nbytes)
        return result

    logits = leaf((64, 1000)) * 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", measure)
        patch.setattr(torch, "empty_like", lambda tensor, **_: measure(tensor.shape, dtype=tensor.dtype))
        cross_entropy(logits, y(64), inplace=True).backward()
    assert sum(sizes) < logits.nbytes / 100


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 5, 3)], ids=str)
def test_stats_shapes_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows = shape[:1] + shape[2:] if len(shape) > 1 else ()
    acc = acc_dtype(dtype)
    for reduction, of_loss in (("mean", ()), ("none", rows)):
        for target in (y(*rows), p(*shape, dtype=dtype)):
            output = cross_entropy(x(*shape, dtype=dtype), target, reduction=reduction, return_stats=True)
            expected = {"lse": acc, "argmax": torch.int64, "correct": torch.bool, "entropy": acc}
            assert {name: getattr(output, name).dtype for name in expected} == expected
            assert all(getattr(output, name).shape == rows for name in expected)
            assert (output.loss.shape, output.loss.dtype) == (of_loss, dtype)
            assert (output.z_loss.shape, output.z_loss.dtype) == (of_loss, acc)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3.0])
def test_stats_of_ignored_rows(value: float) -> None:
    input = x(3, 5)
    input[1] = value
    for ignored in (-100, -1):  # -1 is also the argmax of an ignored row
        keywords = EVERYTHING | {"ignore_index": ignored}
        rows = input.clone().requires_grad_()
        output = cross_entropy(rows, torch.tensor([0, ignored, 2]), return_stats=True, **keywords)
        assert [t[1].item() for t in (output.lse, output.argmax, output.correct, output.entropy)] == [0, -1, False, 0]
        assert output.loss.isfinite()
        (output.loss + output.lse.sum()).backward()
        assert not rows.grad[1].any()
        assert rows.grad.isfinite().all()


def test_which_statistics_carry_a_gradient() -> None:
    output = cross_entropy(leaf((4, 5)), y(4), lse_square_scale=0.1, return_stats=True)
    assert {name for name, value in output._asdict().items() if value.requires_grad} == {"loss", "lse", "entropy"}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_both_upstream_gradients_are_rounded_once(dtype: torch.dtype, reduction: str) -> None:
    input = leaf((4, 65), dtype)
    output = cross_entropy(input, y(4), reduction=reduction, return_stats=True)
    of_lse = torch.linspace(-1, 2, 4, dtype=output.lse.dtype)
    grads = torch.ones_like(output.loss), of_lse
    (grad,) = torch.autograd.grad((output.loss, output.lse), input, grads, retain_graph=True)
    call = Call(double(input), y(4), None, Options(reduction=reduction))
    exact, _ = reference.backward(call, None, None, Upstream(grads[0].double(), of_lse.double()), True, False)
    # A difference of terms of this size.
    assert relative_error(grad, exact, exact.abs() + 2 * double(input).softmax(1)) < 1e-6
    (alone,) = torch.autograd.grad(output.lse, input, of_lse, retain_graph=True)
    exact = double(input).softmax(1) * of_lse.double()[:, None]
    assert relative_error(alone, exact) < 5e-6
    (first,) = torch.autograd.grad(output.loss, input, grads[0])  # lse unused: the stored gradient will do
    call = call._replace(input=input)
    check_grad(first, call, expected_grad(grads[0], call))


def test_argmax_takes_the_first_of_equals() -> None:
    for C in (3, 64, 65, 4097):
        input = torch.zeros(2, C)
        input[1, C - 2 :] = 1
        for shaped in (input, input[:, :, None].expand(2, C, 3)):
            argmax = cross_entropy(shaped, torch.zeros(2, *shaped.shape[2:]).long(), return_stats=True).argmax
            assert torch.equal(argmax, shaped.argmax(1))


@pytest.mark.parametrize("C", [3, 100])
def test_argmax_of_a_row_with_nan_is_torchs(C: int) -> None:
    input = torch.zeros(2, C)
    input[0, C - 1] = torch.nan
    output = cross_entropy(input, torch.zeros(2, dtype=torch.int64), return_stats=True)
    assert torch.equal(output.argmax, input.argmax(1))
    assert output.correct.tolist() == [False, True]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtype_of_the_loss_with_stats_and_autocast(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    output = cross_entropy(x(4, 5, dtype=dtype), y(4), dtype=wide, return_stats=True)
    assert output.loss.dtype == wide
    with torch.autocast("cpu", torch.bfloat16):
        again = cross_entropy(x(4, 5, dtype=dtype), y(4), return_stats=True)
    torch.testing.assert_close(tuple(again), tuple(output))


@pytest.mark.parametrize("to", [torch.int64, torch.complex64], ids=str)
def test_dtype_that_no_loss_can_have(to: torch.dtype) -> None:
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        cross_entropy(x(4, 5), y(4), dtype=to)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("hint", [1e-9, 1e39])  # 0 or inf, in one of them
def test_a_hint_that_its_dtype_cannot_hold(dtype: torch.dtype, hint: float) -> None:
    input, target = x(4, 300, dtype=dtype), y(4, C=300)
    ours, theirs = input.clone().requires_grad_(), input.double().requires_grad_()
    cross_entropy(ours, target, reduction="sum", grad_scale=hint).backward()
    F.cross_entropy(theirs, target, reduction="sum").backward()
    assert relative_error(ours.grad, theirs.grad) < 1e-5
