"""How a call is cut into programs and tiles, and what of it is settled when compiling."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...contract import Call
from .arguments import Tiling, Traits
from .rows import Matrix, alignment, congruent

MANY = 1 << 30
ODD = 4096  # rows that begin anywhere are cut at boundaries of the memory if they have more classes


class Device(NamedTuple):
    """What a plan has to know of the device."""

    capability: tuple[int, int] | None  # None: not NVIDIA's
    multiprocessors: int
    l2_bytes: int
    clusters: bool  # whether Triton can spread one program over several multiprocessors


class Plan(NamedTuple):
    """How `forward` cuts the rows."""

    rows: int  # that a program takes at a time
    block: int  # classes of a tile
    pieces: int  # tiles that a row is held in; 0: it is walked, and read a second time for its gradient
    warps: int
    ctas: int  # of a cluster
    programs: int  # at most


class Cut(NamedTuple):
    """A plan as the kernels are told of it."""

    traits: Traits
    tiling: Tiling
    groups: int  # of rows
    programs: int  # at most
    shares: bool  # whether rows are so few that programs share them
    settings: dict[str, Any]  # of the launch

    def as_in(self, other: Cut) -> Cut:
        """This call by the kernel of another with the same strides, which has more rows."""
        return other._replace(groups=self.groups, programs=min(self.groups, other.programs))


def plan(C: int, dtype: torch.dtype, side: int, extra: int, held: bool, device: Device) -> Plan:
    """Pick the tile: many rows whole if they are short, one in registers if it fits, and the longest in steps.

    `side`: how many rows lie side by side in memory, 1 where it is the classes that do; `extra`: how much more than its
    exponential a class needs in registers; not `held`: for backward, which keeps nothing. Sized by what the compiled
    kernels take (at most 128 registers without extra, no spills); not yet tuned on a GPU. The number of rows has no
    part in it, so that no row's bits depend on the others.
    """
    side, warp = min(32, _power_of_2(side)), 32 if device.capability else 64
    if held and side == 1 and C > 512:
        values = max(16, 2048 // warp >> extra)  # that a thread holds
        clusters = ((8, 2), (8, 4), (8, 8), (16, 8)) if device.clusters else ((16, 1),)
        for warps, ctas in ((1, 1), (2, 1), (4, 1), (8, 1), *clusters):
            threads = ctas * warps * warp
            if threads * values >= C:
                block = threads * 16 // dtype.itemsize  # a load of 16 bytes for each
                return Plan(1, block, -(-C // block), warps, ctas, MANY)
    whole, piece, values = (4096, 2048, 8) if extra else (16384, 4096, 16)
    piece *= 1 + held  # two sweeps run few rows at once: widen the tile
    walked = side * C > (piece if side == 1 else whole)
    block = piece // side if walked else _power_of_2(max(C, 2))
    rows = max(side, 1024 // block)
    # The second reading of a row should find it in the cache, but no multiprocessor should be without work for that.
    resident = max(device.multiprocessors, device.l2_bytes // 2 // (rows * C * dtype.itemsize))
    warps = min(16, max(4, rows * block // (values * warp)))
    return Plan(rows, block, int(not walked), warps, 1, resident if walked else MANY)


def cut(call: Call, sizes: Sequence[int], views: Sequence[Matrix | None], held: bool, again: bool = False) -> Cut:
    """The plan of a call whose tensors lie like these; `again`: backward's, for an unexpected upstream gradient."""
    input, _, weight, options = call
    logits, _, grad, *_ = views
    assert logits is not None
    C = call.classes
    # Pixels lie side by side in the gradient at least; rows of classes that lie apart may.
    pixels = call.row_shape[1:].numel()
    side = pixels if pixels > 1 else 1 if logits.col is None else 32
    dense, softcap = call.has_probs or options.smoothing > 0, options.softcap is not None
    weighted = dense and not call.has_probs and weight is not None
    changed = options.logit_scale != 1 or softcap
    wide = input.dtype == torch.float64 or (input.dtype == torch.float32 and changed)  # see `formula.Options`
    extra = wide + softcap + dense + call.has_probs + weighted + options.return_stats
    where = device(input)
    chosen, align = plan(C, input.dtype, side, extra, held, where), alignment(C, sizes[-1], views)
    vector = 16 // input.itemsize
    odd = grad is not None and logits.col is grad.col is None and align < vector and C > ODD
    same = grad is not None and odd and congruent(logits, grad, vector)
    groups = math.prod(sizes[:-1]) * -(-sizes[-1] // chosen.rows)
    settings: dict[str, Any] = {"num_warps": chosen.warps}
    if chosen.ctas > 1:
        settings["num_ctas"] = chosen.ctas
    return Cut(
        Traits(
            DENSE=dense,
            PROBS=call.has_probs,
            SCALED=options.logit_scale != 1,
            SOFTCAP=softcap,
            Z_LOSS=options.lse_square_scale != 0,
            STATS=held and options.return_stats,
            INPLACE=options.inplace,
            UNLESS_EXPECTED=again,
        ),
        Tiling(
            ALIGN=align,
            VECTOR=vector if odd else 1,
            SAME=same,
            ROWS=chosen.rows,
            BLOCK=chosen.block,
            PIECES=chosen.pieces if held else 0,
            STEP=0,
        ),
        groups,
        min(groups, chosen.programs),
        not chosen.pieces and chosen.rows == 1 and 2 * groups <= where.multiprocessors and not options.inplace,
        settings,
    )


def device(tensor: Tensor) -> Device:
    """The device that a launch on this tensor runs on."""
    return _device(tensor.device.index) if tensor.is_cuda else Device(None, 1, 0, False)


@functools.cache
def _device(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    capability = None if torch.version.hip else (found.major, found.minor)
    return Device(capability, found.multi_processor_count, found.L2_cache_size, has_clusters(capability))


def has_clusters(capability: tuple[int, int] | None) -> bool:
    """Triton 3.8 leaves a cluster without waiting for it, and the launch fails."""
    import triton

    version = tuple(int(number) for number in triton.__version__.split(".")[:2])
    return capability is not None and capability >= (9, 0) and version >= (3, 9)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
