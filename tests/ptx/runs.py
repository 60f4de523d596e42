"""The ways to the kernels, each with what was wrong with its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
from accuracy import ulp
from fuzz_calls import Drawn
from fuzz_exact import Exact, answers, as_rows
from fuzz_judge import differs, gradient_faults, stats_faults
from torch import Tensor

from fused_ce import check_targets, cross_entropy, linear_cross_entropy
from fused_ce.backends.triton import launch, self_check
from fused_ce.contract import Call, Upstream
from fused_ce.linear import chunks, products
from fused_ce.options import Options, Shard

from .calls import Computed, without

Run = Callable[[Drawn], Iterator[str]]
WORST: dict[tuple[torch.dtype, str], float] = {}  # ULP, of the plain calls so far


def keep_worst(call: Drawn, name: str, got: Tensor, exact: Exact) -> None:
    """Of calls in whose gradients nothing cancels, and of numbers that no exponential is flushed for."""
    plain = Options(**call.keywords)._replace(return_stats=False).is_plain
    if not plain or call.keywords["label_smoothing"] or call.target.is_floating_point() or call.g_lse is not None:
        return
    truth = torch.from_numpy(np.asarray(exact.value, np.float64))
    error = (got.double() - truth).abs() / ulp(truth, got.dtype)
    error = error[truth.isfinite() & (truth.abs() > 1000 * torch.finfo(got.dtype).tiny)]
    if error.numel():
        WORST[got.dtype, name] = max(WORST.get((got.dtype, name), 0.0), float(error.max()))


def public(call: Drawn) -> Iterator[str]:
    """`cross_entropy`, and autograd."""
    words, keywords, before = call.notes.get("words", []), call.keywords, call.input.clone()
    wants_grad = "loss" not in words
    leaf = (before if keywords["inplace"] else call.input.detach()).requires_grad_(wants_grad)
    target = call.target.detach().requires_grad_() if call.wants_target else call.target
    logits = Computed.apply(leaf, words) if keywords["inplace"] else leaf
    result = cross_entropy(logits, target, call.weight, **keywords, backend="triton")
    stats = result if keywords["return_stats"] else None
    loss = result if stats is None else stats.loss
    exact = answers(call._replace(input=before), 1.0, False)
    loss_of_rows = loss.detach().reshape(exact.loss.value.shape)
    keep_worst(call, "loss", loss_of_rows, exact.loss)
    yield from differs("loss", loss_of_rows, exact.loss)
    if stats is not None:
        yield from stats_faults(call, stats, exact)
    if wants_grad:
        outputs, upstream = [loss], [call.upstream.to(loss.dtype)]
        if call.g_lse is not None:
            assert stats is not None
            outputs, upstream = [loss, stats.lse], [*upstream, call.g_lse]
        grads = torch.autograd.grad(outputs, [leaf, target] if call.wants_target else [leaf], upstream)
        keep_worst(call, "gradient", torch.from_numpy(as_rows(grads[0])).to(leaf.dtype), exact.grad)
        yield from gradient_faults(call, grads[0], exact, None)
        if call.wants_target:
            got = torch.from_numpy(as_rows(grads[1])).to(target.dtype)
            yield from differs("gradient of the target", got, exact.d_target)
    if not torch.equal(call.input.nan_to_num(7.0), before.detach().nan_to_num(7.0)):
        yield "the logits were changed"


def fused(call: Drawn) -> Iterator[str]:
    """The backend's forward, as the loop of linear cross entropy calls it, 16 bits in place too; what it saved."""
    exact = answers(call._replace(upstream=torch.ones(())), 1.0, False)
    whole, before = Call(call.input, call.target, call.weight, Options(**call.keywords)), call.input.clone()
    result = launch.forward(whole, "fused")
    assert result.grad is not None
    if call.keywords["inplace"] and result.grad.data_ptr() != call.input.data_ptr():
        yield "the gradient is not in place"
    yield from differs("loss", result.loss.reshape(exact.loss.value.shape), exact.loss)
    yield from gradient_faults(call, result.grad, exact, None)
    if result.stats is not None:
        for name in ("lse", "entropy"):
            yield from differs(name, getattr(result.stats, name), getattr(exact, name))
    if result.saved is not None:
        whole = whole._replace(input=before, options=whole.options._replace(inplace=False))
        again = launch.backward(whole, None, result.saved, Upstream(torch.ones_like(result.loss)), True, False)
        yield from gradient_faults(call, again.input, exact, None)


def bad(call: Drawn) -> Iterator[str]:
    """A target out of range: NaN in its row, the others as ever, and `check_targets` tells of it."""
    leaf, beyond = call.input.detach().requires_grad_(), call.target >= call.input.shape[1]
    loss = cross_entropy(leaf, call.target, call.weight, **call.keywords, backend="triton")
    (grad,) = torch.autograd.grad(loss, leaf, call.upstream)
    if not (loss[beyond].isnan().all() and grad[beyond].isnan().all()):
        yield "the row of a target out of range is not NaN"
    exact, rest = answers(without(call, beyond), 1.0, False), (~beyond).numpy()
    yield from differs("loss", loss.detach(), exact.loss, where=rest)
    yield from differs("gradient", grad, exact.grad, where=np.broadcast_to(rest[:, None], grad.shape).copy())
    try:
        check_targets()
        yield "check_targets tells of nothing"
    except IndexError as error:
        if str(int(call.target[beyond])) not in str(error):
            yield f"check_targets tells of another target: {error}"


def checked(call: Drawn) -> Iterator[str]:
    """With the look that a kernel gets at its first launch on a device, those of shards too."""
    run = shards if "shards" in call.notes["words"] else public
    self_check._is_wanted.cache_clear()
    agreed = len(self_check.PASSED) + len(self_check.UNCOMPARED)
    with mock.patch.object(self_check, "SETTING", "1"), mock.patch.object(self_check, "_settled", set()):
        yield from run(call)
    self_check._is_wanted.cache_clear()
    if len(self_check.PASSED) + len(self_check.UNCOMPARED) == agreed:
        yield "nothing was compared"
    yield from self_check.DECLINED.values()
    self_check.DECLINED.clear()


def linear(call: Drawn) -> Iterator[str]:
    """`linear_cross_entropy` as on a GPU: chunks of 2 rows, whose logits hold their gradient."""
    seed, H = torch.Generator().manual_seed(7), 24
    R, C = call.input.shape
    x = torch.randn(R, H, generator=seed).to(call.input.dtype).requires_grad_()
    W = (torch.randn(C, H, generator=seed) * 0.3).to(call.input.dtype).requires_grad_()
    keywords = {name: call.keywords[name] for name in ("reduction", "label_smoothing", "ignore_index")}
    patches = (
        mock.patch.object(chunks, "can_wait", return_value=False),
        mock.patch.object(products, "computed_in", lambda dtype, device: dtype),
    )
    with patches[0], patches[1]:
        loss = linear_cross_entropy(x, W, call.target, weight=call.weight, chunk_rows=2, backend="triton", **keywords)
        assert isinstance(loss, Tensor)
        dx, dW = torch.autograd.grad(loss, [x, W], call.upstream)
    exact = answers(call._replace(input=x.detach() @ W.detach().T), 1.0, False)
    xs, Ws, dz = as_rows(x), as_rows(W), np.asarray(exact.grad.value, np.float64)
    # A product that is accumulated elsewhere gives other logits, by a rounding.
    rounded = 1 + np.sqrt(np.mean(exact.z**2))
    for name, got, truth in (("input", dx, dz @ Ws), ("linear_weight", dW, dz.T @ xs)):
        error = np.sqrt(np.mean((as_rows(got) - truth) ** 2) / np.mean(truth**2))
        if not error <= (8 + rounded) * torch.finfo(got.dtype).eps:
            yield f"gradient of {name}: {error:.3g} of its root of mean squares"
    moved = torch.finfo(call.input.dtype).eps * (1 + np.abs(exact.z).max())
    allowed = exact.loss.bound + moved * (1 + np.abs(exact.loss.value))
    yield from differs("loss", loss.detach().reshape(exact.loss.value.shape), Exact(exact.loss.value, allowed))


def shards(call: Drawn) -> Iterator[str]:
    """`part` of two shards of the classes, their sums joined here, `finish` of each."""
    R, C = call.input.shape
    cut, options = C // 3 + 1, Options(**call.keywords)
    pieces = [(0, call.input[:, :cut]), (cut, call.input[:, cut:])]
    alone = options._replace(inplace=False)
    calls = [Call(z, call.target, call.weight, alone._replace(shard=Shard(first, C))) for first, z in pieces]
    sums = joined([launch.part(each) for each in calls])
    exact = answers(call, 1.0, False)
    D = 1.0
    if options.reduction == "mean":
        ones = np.ones(C) if call.weight is None else call.weight.double().numpy()
        D = float(ones[call.target[torch.from_numpy(exact.counted)]].sum())
    upstream = Upstream(torch.broadcast_to(call.upstream.to(sums.dtype) / D, (R,)).contiguous(), None)
    grads = []
    for each in calls:
        into = each.input if call.keywords["inplace"] else torch.empty_like(each.input)
        launch.finish(each, sums, upstream, into)
        grads.append(into)
    yield from gradient_faults(call, torch.cat(grads, 1), exact, None)
    m, so, z_y, q_y, q_others, q_drop, e_drop, argmax = sums.numpy()
    with np.errstate(all="ignore"):  # of ignored rows
        e_y = np.exp(z_y - m)
        lse, spread = m + np.log(so + e_y), e_drop + np.where(e_y > 0, e_y * (m - z_y), 0)
        entropy = lse - m + spread / (so + e_y)
    if options.return_stats:
        wide = torch.float64 if call.input.dtype == torch.float64 else torch.float32
        for name, got in (("lse", lse), ("entropy", entropy)):
            yield from differs(name, torch.from_numpy(got).to(wide), getattr(exact, name), where=exact.counted)
        if (argmax != np.where(exact.counted, exact.z.argmax(1), -1)).any():
            yield "argmax"
    loss = np.where(exact.counted, q_y * (lse - z_y) + q_others * (lse - m) + q_drop, 0)
    yield from differs("loss", torch.tensor(loss.sum() / D if D != 1 else loss).to(call.input.dtype), exact.loss)


def joined(parts: list[Tensor]) -> Tensor:  # (8, R) each
    """The sums of rows from those of their parts, the first of which holds the first classes."""
    each = np.stack([part.double().numpy() for part in parts])  # (parts, 8, R)
    m = each[:, 0].max(0)
    rise = np.where(np.isneginf(each[:, 0]), 0, m - each[:, 0])
    sums = [m, (each[:, 1] * np.exp(-rise)).sum(0), each[:, 2].max(0), each[:, 3].sum(0), each[:, 4].sum(0)]
    sums += [(each[:, 5] + each[:, 4] * rise).sum(0), ((each[:, 6] + each[:, 1] * rise) * np.exp(-rise)).sum(0)]
    sums += [np.take_along_axis(each[:, 7], each[:, 0].argmax(0)[None], 0)[0]]
    return torch.from_numpy(np.stack(sums))


RUNS: dict[str, Run] = {run.__name__: run for run in (public, fused, bad, checked, linear, shards)}
