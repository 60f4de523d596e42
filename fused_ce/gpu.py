"""Backend "triton": launches `kernels.py` on CUDA tensors (and, under TRITON_INTERPRET=1, on CPU tensors).

Nothing here waits for the device: every number that decides something is read by a kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .options import Options

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHUNK = 32768  # rows one program sums; more rows take a second launch
SUMS = {"CHUNK": CHUNK, "BLOCK": 4096, "num_warps": 8}


class Matrix(NamedTuple):
    """A matrix and its strides, as one kernel argument."""

    ptr: Tensor  # (N, C)
    row: int
    col: int


class Rows(NamedTuple):
    """One value a row, as one kernel argument; a step of 0 is one value for all rows."""

    ptr: Tensor  # (N,) or ()
    step: int


class Out(NamedTuple):
    """What `kernels.forward` writes; None: not asked for."""

    loss: Tensor  # (N,)
    stats: Tensor | None  # (N, 2)
    grad: Tensor | None  # (N, C)


class Tile(NamedTuple):
    """How much of the logits a program takes at a time, and how many warps share it."""

    rows: int
    block: int
    warps: int


def tile(C: int, dtype: torch.dtype, options: Options) -> Tile:
    """Pick the tile: a short row whole (several of them if very short), a long one in pieces.

    Sized by the registers the compiled kernels take (at most 128, next to no spills); not yet tuned on a GPU.
    """
    heavy = dtype == torch.float64 or options.softcap is not None  # more registers for each value
    whole, piece, per_warp = (4096, 2048, 256) if heavy else (16384, 4096, 512)
    block = _power_of_2(max(C, 2)) if whole >= C else piece
    rows = max(1, 1024 // block)
    return Tile(rows, block, min(16, max(4, rows * block // per_warp)))


def unsupported(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> list[str]:
    """Why the kernels cannot take the call, in words; empty if they can."""
    reasons = []
    if input.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append("triton on CPU tensors runs only under TRITON_INTERPRET=1")
    elif input.device.type == "cuda" and not torch.cuda.is_available():
        reasons.append("no CUDA device was found")
    elif input.device.type not in ("cpu", "cuda"):
        reasons.append(f"triton takes CUDA tensors, got {input.device.type}")
    if not _is_installed():
        reasons.append("triton is not installed (pip install triton)")
    if input.dtype not in FLOATS:
        reasons.append(f"input must be float32, float64, bfloat16 or float16, got {input.dtype}")
    if target.dtype not in (torch.int64, torch.uint8):
        reasons.append(f"target must hold class indices, int64 or uint8, got {target.dtype}")
    if input.dim() not in (1, 2) or target.shape != input.shape[:-1]:
        reasons.append(f"input must be (N, C) or (C,), got {tuple(input.shape)} and target {tuple(target.shape)}")
    elif input.shape[-1] == 0:
        reasons.append("input has no classes")
    if weight is not None and (weight.dtype != input.dtype or weight.shape != input.shape[-1:]):
        reasons.append(f"weight must be (C,) of {input.dtype}, got {tuple(weight.shape)} of {weight.dtype}")
    if any(t.device != input.device for t in (target, weight) if t is not None):
        reasons.append("input, target and weight must be on one device")
    if options.dtype not in (None, input.dtype, _acc(input.dtype)):
        reasons.append(f"a loss of {options.dtype} from an input of {input.dtype} is not supported")
    for name in ("grad_scale", "inplace", "return_stats"):
        if getattr(options, name):
            reasons.append(f"{name} is not written for triton yet")
    return reasons


def forward(
    input: Tensor,  # (N, C) or (C,)
    target: Tensor,  # (N,) or ()
    weight: Tensor | None,  # (C,)
    options: Options,
    schedule: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    """Loss, gradient (schedule "fused") and stats (all but "loss"); see the backend contract in `dispatch.py`."""
    N, C = target.numel(), input.shape[-1]
    acc, dtype = _acc(input.dtype), options.dtype or input.dtype
    none = options.reduction == "none"
    loss = input.new_empty(target.shape if none else (N,), dtype=dtype if none else acc)
    stats = None if schedule == "loss" else input.new_empty((N, 2), dtype=acc)
    grad = input.new_empty(input.shape) if schedule == "fused" else None
    norm = _norm(target, weight, options, C)
    shape = tile(C, input.dtype, options)
    if N:
        _launch(
            "forward",
            (-(-N // shape.rows),),
            *_problem(input, target, weight, norm),
            Out(loss, stats, grad),
            *_scalars(N, C, options),
            **_flags(input, options),
            ROWS=shape.rows,
            BLOCK=shape.block,
            MANY=shape.block < C,
            num_warps=shape.warps,
        )
    return loss if none else _total(loss, norm, dtype), grad, stats, None


def backward(
    grad_output: Tensor,  # () or the shape of target
    g_lse: None,
    input: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
    grad: Tensor | None,  # (N, C)
    stats: Tensor | None,  # (N, 2)
    keep: bool,
    wants_target: bool,
) -> tuple[Tensor, None]:  # (N, C)
    """The gradient of the input: recomputed, or the fused one made right for an upstream gradient that is not 1."""
    if grad is not None and (input is None or grad.dtype in (torch.float32, torch.float64)):
        return _rescale(grad, grad_output, keep), None
    assert input is not None
    assert stats is not None
    N, C = target.numel(), input.shape[-1]
    unless_one = grad is not None and not keep
    dx = grad if grad is not None and not keep else input.new_empty(input.shape)
    shape = tile(C, input.dtype, options)
    programs = min(-(-N // shape.rows), 2048)
    if N:
        _launch(
            "backward",
            (programs, max(1, min(-(-C // shape.block), 2048 // programs))),
            *_problem(input, target, weight, _norm(target, weight, options, C)),
            Rows(grad_output, grad_output.stride(0) if grad_output.dim() else 0),
            stats,
            dx,
            *_scalars(N, C, options),
            **_flags(input, options),
            ROWS=shape.rows,
            BLOCK=shape.block,
            UNLESS_ONE=unless_one,
            num_warps=shape.warps,
        )
    return dx, None


def _rescale(grad: Tensor, grad_output: Tensor, keep: bool) -> Tensor:
    out = torch.empty_like(grad) if keep else grad
    n = grad.numel()
    if n:
        programs = min(-(-n // 4096), 2048)
        _launch("rescale", (programs,), grad, grad_output, out, n, IN_PLACE=not keep, BLOCK=4096, num_warps=8)
    return out


def _norm(target: Tensor, weight: Tensor | None, options: Options, C: int) -> Tensor | None:
    """(3,) float64: divisor of the cross entropy, divisor of the z-loss, sum of the weights. None: 1, 1, C."""
    needs_weight_sum = weight is not None and options.label_smoothing > 0
    mean = options.reduction == "mean"
    if not mean and not needs_weight_sum:
        return None
    if (mean and options.num_items is None) or needs_weight_sum:
        N = target.numel()
        parts = target.new_empty((_chunks(N), 3), dtype=torch.float64)
        labels = Rows(target, target.stride(0) if target.dim() else 0)
        _launch("prepare", (len(parts),), labels, _packed(weight), parts, N, C, options.ignore_index, **SUMS)
        norm = parts[0] if len(parts) == 1 else _total(parts, None, torch.float64)
    else:
        norm = target.new_empty(3, dtype=torch.float64)
    if not mean:
        norm[:2] = 1.0
    elif options.num_items is not None:
        norm[:2] = options.num_items
    return norm


def _total(terms: Tensor, norm: Tensor | None, dtype: torch.dtype) -> Tensor:  # (N,) -> (), (N, 3) -> (3,)
    """Sum over the first dimension, divided by norm[0] if given; a long one in two steps."""
    columns = math.prod(terms.shape[1:])
    if len(terms) > CHUNK:
        parts = terms.new_empty((_chunks(len(terms)), *terms.shape[1:]), dtype=torch.float64)
        _launch("total", (len(parts), columns), terms, None, parts, len(terms), **SUMS)
        terms = parts
    out = terms.new_empty(terms.shape[1:], dtype=dtype)
    _launch("total", (1, columns), terms, norm, out, len(terms), **(SUMS | {"CHUNK": 1 << 30}))
    return out


def _problem(input: Tensor, target: Tensor, weight: Tensor | None, norm: Tensor | None) -> tuple[Any, ...]:
    rows = input if input.dim() == 2 else input.unsqueeze(0)
    labels = Rows(target, target.stride(0) if target.dim() else 0)
    return Matrix(rows, rows.stride(0), rows.stride(1)), labels, _packed(weight), norm


def _scalars(N: int, C: int, options: Options) -> tuple[Any, ...]:
    k, s, L = options.logit_scale, options.softcap, options.lse_square_scale
    return N, C, options.ignore_index, options.label_smoothing, k, 1.0 if s is None else s, L


def _flags(input: Tensor, options: Options) -> dict[str, int]:
    align = math.gcd(input.shape[-1], input.stride(0) if input.dim() == 2 else 0, 16)
    return {"SMOOTHING": options.label_smoothing > 0, "SOFTCAP": options.softcap is not None, "ALIGN": align}


def _launch(kernel: str, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    tensor = args[0] if isinstance(args[0], Tensor) else args[0].ptr
    with torch.cuda.device_of(tensor):  # type: ignore[no-untyped-call]  # triton launches on the current device
        getattr(_kernels(), kernel)[grid](*args, **meta, enable_fp_fusion=True)


@functools.cache
def _kernels() -> ModuleType:
    from . import kernels  # here, because triton is optional and slow to import

    return kernels


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _packed(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunks(n: int) -> int:
    return max(1, -(-n // CHUNK))


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
