"""The matrix products of linear cross entropy, and where they come from: torch.mm but where another is known faster.

On AMD processors with AVX-512, MKL (behind torch.mm in float32) uses AVX2 alone, and oneDNN, which torch carries too,
all of it. Which products gain differs by generation (docs/performance.md has what was measured). The choice follows the
processor, not a clock at run time: the same machine gives the same bits in every process.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import _torch

# Products with fewer rows, or sums of fewer terms, are torch's: copying what oneDNN gives would cost what it gains.
_ROWS, _TERMS = 16, 192
# Classes at once, where a product cannot be written into, or added to, memory that is there: what it gives is then
# copied while it lies in the caches.
_TILE = 4096
# Classes that oneDNN sums at once for the input's gradient: its own sums of 512 and more are less exact than MKL's.
_SUMMED = 256
LOGITS, INPUT_GRAD, WEIGHT_GRAD = "logits", "input_grad", "weight_grad"
# By the family of an AMD processor with AVX-512: the float32 products that oneDNN makes faster than MKL.
_BY_FAMILY = {25: (LOGITS,), 26: (LOGITS, INPUT_GRAD, WEIGHT_GRAD)}  # Zen 4; Zen 5


def computed_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to make products of `dtype` in: float32 for 16 bits that the processor has no instructions for.

    torch's own products of such dtypes run at a hundredth of the speed of float32 (docs/performance.md).
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return dtype if _torch.has_products(dtype) else torch.float32


def logits(
    x: Tensor,  # (n, H)
    W: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    out: Tensor,  # (n, V)
) -> Tensor:
    """out = x @ W.T + bias"""
    if _by_onednn(LOGITS, x):
        for v in range(0, len(W), _TILE):
            part = slice(v, v + _TILE)
            out[:, part].copy_(_torch.linear(x, W[part], None if bias is None else bias[part]))
        return out
    return torch.mm(x, W.t(), out=out) if bias is None else torch.addmm(bias, x, W.t(), out=out)


def input_grad(
    g: Tensor,  # (n, V)
    W: Tensor,  # (V, H)
    out: Tensor,  # (n, H), of the dtype of g and W or wider
) -> Tensor:
    """out = g @ W"""
    if out.dtype != g.dtype:
        if out.is_cuda and _torch.ADDS_IN_FLOAT32:
            return torch.addmm(out.zero_(), g, W, out.dtype, out=out)
        return out.copy_(torch.mm(g, W, out=g.new_empty(out.shape)))
    if _by_onednn(INPUT_GRAD, g):
        for v in range(0, len(W), _SUMMED):
            part = slice(v, v + _SUMMED)
            term = _torch.linear(g[:, part], W[part].t(), None)
            out = out.add_(term) if v else out.copy_(term)
        return out
    return torch.mm(g, W, out=out)


def add_weight_grad(
    total: Tensor,  # (V, H), of the dtype of g and x or wider
    g: Tensor,  # (n, V)
    x: Tensor,  # (n, H)
    first: bool,
) -> None:
    """total += g.T @ x; the first of all sets it."""
    onednn = _by_onednn(WEIGHT_GRAD, g.t())
    if total.dtype == g.dtype and not onednn:
        torch.mm(g.t(), x, out=total) if first else total.addmm_(g.t(), x)
        return
    if total.is_cuda and _torch.ADDS_IN_FLOAT32:
        if first:
            total.zero_()
        torch.addmm(total, g.t(), x, total.dtype, out=total)
        return
    for v in range(0, g.shape[1], _TILE):
        part = slice(v, v + _TILE)
        rows = g[:, part].t()
        term = _torch.linear(rows, x.t(), None) if onednn else torch.mm(rows, x)
        total[part].copy_(term) if first else total[part].add_(term)


def add_bias_grad(total: Tensor, g: Tensor) -> None:  # (V,), (n, V)
    """total += g.sum(0), in the dtype of the total."""
    for v in range(0, g.shape[1], _TILE):  # all at once, g would be copied in that dtype first
        part = slice(v, v + _TILE)
        total[part] += g[:, part].sum(0, dtype=total.dtype)


def _by_onednn(product: str, left: Tensor) -> bool:  # (rows, terms)
    if left.dtype != torch.float32 or not left.is_cpu or left.shape[0] < _ROWS or left.shape[1] < _TERMS:
        return False
    return product in chosen()


@functools.cache
def chosen() -> tuple[str, ...]:
    """The float32 products on the CPU that are oneDNN's."""
    return () if why_not() else _BY_FAMILY[_family()]


@functools.cache
def why_not() -> str:
    """Why no product is oneDNN's, in words; "" where some are."""
    vendor = _cpuinfo("vendor_id")
    if vendor != "AuthenticAMD":
        return f"MKL uses all of this processor ({vendor or 'of no known vendor'})"
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return f"torch runs with {torch.backends.cpu.get_cpu_capability()}, not AVX-512"
    if _family() not in _BY_FAMILY:
        return f"nobody has measured AMD processors of family {_family()}"
    if not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return "torch was built without MKL"
    return _torch.why_no_linear()


def rates() -> dict[str, tuple[float, float | None]]:
    """GFLOP/s of each float32 product by torch.mm and by oneDNN (None: not to be called), of a chunk, here and now."""
    n, H, V = 256, 512, 8192
    x, W, g = (torch.full(shape, 0.5, device="cpu") for shape in ((n, H), (V, H), (n, V)))
    factors = {LOGITS: (x, W.t()), INPUT_GRAD: (g, W), WEIGHT_GRAD: (g.t(), x)}

    def rate(call: Callable[[], Tensor]) -> float:
        best = math.inf
        for _ in range(3):
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
        return 2 * n * H * V / best / 1e9

    missing = _torch.why_no_linear()
    return {
        name: (rate(lambda: torch.mm(a, b)), None if missing else rate(lambda: _torch.linear(a, b.t(), None)))  # noqa: B023
        for name, (a, b) in factors.items()
    }


def _family() -> int:
    text = _cpuinfo("cpu family")
    return int(text) if text.isdigit() else 0


@functools.cache
def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key), "")
