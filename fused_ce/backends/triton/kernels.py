"""The kernels by name, and how a call that is cut already is handed to those that walk the logits."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...contract import Call, RowSums
from ...options import Options
from .arguments import Given, Grads, Out, Received, Shared
from .plan import Cut
from .readable import number, packed
from .rows import Matrix, rows
from .targets import flag


def launch(kernel: str, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    first = args[0].logits if isinstance(args[0], Given) else args[0]
    with torch.cuda.device_of(getattr(first, "ptr", first)):  # type: ignore[no-untyped-call]  # triton launches there
        table()[kernel][grid](*args, **meta, enable_fp_fusion=True)


@functools.cache
def table() -> dict[str, Any]:
    from .backward import backward  # here, because triton is optional and slow to import
    from .forward import forward
    from .reduce import prepare, rescale_grad, total

    kernels = (forward, backward, prepare, total, rescale_grad)
    return {kernel.__name__: kernel for kernel in kernels}


def run_forward(
    call: Call, plan: Cut, sizes: list[int], views: list[Matrix | None], norm: Tensor | None, out: Out
) -> None:
    """The forward kernel, once, or twice where programs share rows."""
    input, _, _, options = call
    parts: Tensor | None = None
    grids: dict[int, tuple[int, ...]] = {0: (plan.programs,)}
    if plan.shares:
        # Few rows: one program a tile, and then one to join the tiles' sums in the same order as ever.
        tiles = -(-call.classes // plan.tiling.BLOCK)
        parts = input.new_empty((plan.groups, tiles, len(RowSums._fields)), dtype=torch.float64)
        grids = {1: (plan.groups, tiles), 2: (plan.groups, 1 if out.grad.ptr is None else tiles)}
    for step, grid in grids.items():
        settings = plan.settings
        if step == 2:
            # Every thread joins the sums of all tiles, and none adds to another's: half as many leave the same bits.
            settings = settings | {"num_warps": max(4, settings["num_warps"] // 2)}
        launch(
            "forward",
            grid,
            _given(call, sizes, views),
            Shared(
                norm,
                number(options.grad_scale, options.dtype or input.dtype, input.device),
                None if call.has_probs else flag(input.device),
                parts,
            ),
            out,
            plan.groups,
            sizes[-1],
            *_scalars(options),
            TRAITS=plan.traits,
            TILING=plan.tiling._replace(STEP=step),
            **settings,
        )


def run_backward(
    call: Call, plan: Cut, sizes: list[int], views: list[Matrix | None], received: Received, grads: Grads
) -> None:
    programs = min(plan.groups, 2048)
    # In place, a row is one program's: another might overwrite x_y before it is read.
    pieces = 1 if call.options.inplace else min(-(-call.classes // plan.tiling.BLOCK), 2048 // programs)
    launch(
        "backward",
        (programs, pieces),
        _given(call, sizes, views),
        received,
        grads,
        plan.groups,
        sizes[-1],
        *_scalars(call.options),
        TRAITS=plan.traits,
        TILING=plan.tiling,
        **plan.settings,
    )


def _given(call: Call, sizes: list[int], views: list[Matrix | None]) -> Given:
    logits, probs, *_ = views
    assert logits is not None
    C, weight, shard = call.classes, packed(call.weight), call.options.shard
    if weight is not None and shard is not None:
        weight = weight[shard.first : shard.first + C]
    outer = tuple(sizes[-2::-1]) or None
    return Given(logits, probs or rows(call.target), weight, shard, C, outer)


def _scalars(options: Options) -> tuple[Any, ...]:
    s = 1.0 if options.softcap is None else options.softcap
    return options.ignore_index, options.smoothing, options.logit_scale, s, options.lse_square_scale
