"""Calls cut along their classes, and what their parts owe the whole.

Sums are held against those of float64 shards, the loss and the gradients that come of them against the whole call in
float64.
"""

from __future__ import annotations

from typing import Any

import torch
from accuracy import HALF, acc_dtype, bits, relative_error
from cases import EVERYTHING, confident, ramp
from conftest import Backend
from judge import GRAD, LOSS
from oracle import as_rows, double, terms
from shards import joined, shards
from torch import Tensor

from fused_ce import formula, operators
from fused_ce.backends import reference
from fused_ce.contract import Call, RowSums, Stats, Upstream


def exactly(call: Call) -> Call:
    return call._replace(input=double(call.input), target=call.target.cpu(), weight=double(call.weight))


def gradient(backend: Backend, call: Call, sums: RowSums, upstream: Upstream) -> Tensor:
    into = torch.empty_like(call.input)
    on_device = (None if t is None else t.to(call.input.device) for t in upstream)
    backend.module.finish(call, torch.stack(sums).to(call.input.device), Upstream(*on_device), into)
    return into.cpu()


def check_parts(parts: list[Tensor], calls: list[Call]) -> None:
    """Sums that are 0 or not finite are so in float64 too; all others are near."""
    for part, call in zip(parts, calls, strict=True):
        assert part.shape == (8, call.rows)
        assert part.dtype == torch.float64
        assert part.is_contiguous()
        exact = reference.part(exactly(call))
        acc = acc_dtype(call.input.dtype)
        for name, got, wanted in zip(RowSums._fields, part.cpu(), exact, strict=True):
            assert torch.equal(got == 0, wanted == 0) or acc == torch.float32, name
            error = relative_error(got, wanted, flush=call.classes * 128 * torch.finfo(acc).tiny)
            allowed = 0 if name == "argmax" else 2e-6 if call.input.dtype in HALF else LOSS[acc]  # see `math.exp`
            assert error <= allowed, (name, call.options.shard, got, wanted)


def check_whole(backend: Backend, whole: Call, borders: tuple[int, ...], g_lse: bool = True) -> None:
    """Everything that sharded classes owe, of the call as one of reduction "none"."""
    whole = whole._replace(options=whole.options._replace(reduction="none", inplace=False))
    calls = list(shards(whole, borders))
    parts = [backend.module.part(call) for call in calls]
    check_parts(parts, calls)
    sums, exact = joined(parts), exactly(whole)
    seed = torch.Generator().manual_seed(1)
    upstream = Upstream(*(torch.rand(2, sums.m.numel(), generator=seed).double() + 0.25))
    rows = operators.rows_of(exact)
    options = whole.options
    loss = torch.where(rows.counted, formula.row_loss(sums, options)[0], 0)
    stats = Stats(*(torch.where(rows.counted, value, 0) for value in formula.row_stats(sums, options)))
    acc = acc_dtype(whole.input.dtype)
    exact_loss, _, _, exact_stats = reference.forward(
        exact._replace(options=options._replace(return_stats=True, lse_square_scale=0.0)), "loss"
    )
    assert exact_stats is not None
    assert relative_error(loss, exact_loss.reshape(-1)) <= 2 * LOSS[acc]
    if options.return_stats:
        assert relative_error(stats.entropy, exact_stats.entropy.reshape(-1), 1 + exact_stats.entropy.reshape(-1)) <= (
            2 * LOSS[acc]
        )
        wanted = torch.where(rows.counted, exact_stats.argmax.reshape(-1), 0)
        assert torch.equal(stats.argmax.long(), wanted)
    if not g_lse:
        upstream = Upstream(upstream.loss)
    plain = exact._replace(options=options._replace(lse_square_scale=0.0))
    shaped = Upstream(*(None if t is None else t.reshape(whole.row_shape) for t in upstream))
    exact_grad = reference.backward(plain, None, None, shaped, True, False).input
    size = as_rows(terms(upstream.loss, *plain))
    if upstream.lse is not None:
        p_lse = torch.exp(rows.z - formula.row_stats(rows.sums, options).lse[:, None]) * upstream.lse[:, None]
        size = size + torch.where(rows.counted[:, None], p_lse * abs(options.logit_scale), 0)
    for call in calls:
        first, before = call.shard.first, call.input.clone()
        got = gradient(backend, call, sums, upstream)
        assert torch.equal(bits(call.input), bits(before))
        got, columns = as_rows(got), slice(first, first + call.classes)
        assert not got[~rows.counted].any()
        flush = 4 * torch.finfo(acc).tiny
        assert relative_error(got, as_rows(exact_grad)[:, columns], size[:, columns], flush) <= GRAD[acc]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {"weight": ramp},
    "smoothing": {"options": {"label_smoothing": 0.1}},
    "smoothing-weight": {"options": {"label_smoothing": 0.3}, "weight": ramp},
    "softcap": {"options": {"softcap": 2.0}},
    "scale": {"options": {"logit_scale": -1.5}},
    "statistics": {"options": {"return_stats": True}},
    "z-loss-mean": {"options": {"lse_square_scale": 1e-2, "num_items": 7.0, "grad_scale": 3.0}},
    "everything": {"options": EVERYTHING | {"return_stats": True, "label_smoothing": 0.1}, "weight": ramp},
    "certain": {"logits": confident(20), "options": {"return_stats": True}},
}
