"""`python -m fused_ce`: what is installed, which backend takes which call and why not, and a check against float64."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import __version__, cross_entropy, missing
from .backends import dispatch
from .backends.cpu import _C
from .backends.triton import self_check as first_look
from .contract import Call
from .linear import products
from .options import Options

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
SHAPES = ((1, 1), (4, 10), (7, 17), (3, 1000))  # one class, MNIST, just above a vector, ImageNet
# In ULP, the distance between neighbouring numbers of the dtype. One rounding costs half of one, which is all that a
# 16-bit result may lose; float32 also pays for rounding x - m, and the float64 truth is itself rounded.
BOUNDS = {torch.float32: 16.0, torch.float64: 32.0, torch.bfloat16: 0.51, torch.float16: 0.51}


class Variant(NamedTuple):
    """One implementation that can run here."""

    backend: str  # or "torch", to compare with
    isa: str  # "" where there is nothing to choose
    device: str

    def __str__(self) -> str:
        return " ".join(filter(None, (self.backend, self.isa, "" if self.device == "cpu" else self.device)))


def main() -> int:
    line = ""
    for part in (installed(), backends(), matrix_products(), self_check()):
        for line in part:
            print(line)
        print()
    return 0 if line == "pass" else 1


def installed() -> Iterator[str]:
    yield f"fused_ce {__version__}"
    yield f"  Python       {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield f"  torch        {torch.__version__}, {torch.get_num_threads()} threads (torch.set_num_threads changes it)"
    try:
        yield f"  triton       {metadata.version('triton')}"
    except metadata.PackageNotFoundError:
        yield "  triton       not installed: calls on a GPU run torch's own operators; pip install triton"
    for i in range(torch.cuda.device_count()):
        yield f"  GPU {i}        {torch.cuda.get_device_name(i)}"
    if _C is None:
        yield "  C++ kernels  missing: calls on the CPU run torch's own operators; the last line says what helps"
    else:
        compiler = f", by {_C.compiler}" if hasattr(_C, "compiler") else ""
        yield f"  C++ kernels  instruction set {_C.isa()}, of {', '.join(_C.isa_names())} (FUSED_CE_ISA forces one)"
        yield f"               {'with' if _C.openmp else 'without'} OpenMP{compiler}"
    for variable in ("FUSED_CE_ISA", "FUSED_CE_BACKEND", "FUSED_CE_SELF_CHECK", "TRITON_INTERPRET"):
        if variable in os.environ:
            yield f"  environment  {variable}={os.environ[variable]}"


def backends() -> Iterator[str]:
    """Which backend `cross_entropy(input, target)` takes, and what the others have against it."""
    yield "Backend of a call, by device and dtype of the logits (torch: torch's own operators)"
    yield "  device" + "".join(f"{name(dtype):>10}" for dtype in DTYPES)
    reasons: dict[str, list[str]] = {}
    for device in DEVICES:
        row = f"  {device:6}"
        for dtype in DTYPES:
            call = _small_call(device, dtype)
            try:
                taken = dispatch.name_of(dispatch.choose(call, None))
            except (NotImplementedError, ValueError):
                taken = "error"
            row += f"{taken:>10}"
            for other, module in dispatch.BACKENDS.items():
                for reason in module.unsupported(call):
                    reasons.setdefault(f"backend {other} declines {device} tensors: {reason}", []).append(name(dtype))
        yield row
    for reason, dtypes in reasons.items():
        yield f"  {reason}" + ("" if len(dtypes) == len(DTYPES) else f" ({', '.join(dtypes)})")
    if forced := os.environ.get("FUSED_CE_BACKEND"):
        yield f"  FUSED_CE_BACKEND forces {forced!r}, of {', '.join(dispatch.BACKENDS)}; error: such calls raise"
    yield '  backend reference is slower than torch and runs only when asked for: backend="reference"'


def matrix_products() -> Iterator[str]:
    """Where `linear_cross_entropy` on the CPU has its products from, why, and how fast either is here."""
    yield "Matrix products of linear_cross_entropy on the CPU, float32: GFLOP/s just measured"
    for product, (torchs, onednn) in products.rates().items():
        taken = "oneDNN" if product in products.chosen() else "torch.mm"
        by_onednn = "not to be called" if onednn is None else f"{onednn:.0f}"
        yield f"  {product:12} {taken:9} torch.mm {torchs:.0f}, oneDNN {by_onednn}"
    why = (
        products.why_not() or "AMD with AVX-512, which MKL leaves unused; by the processor's family, not by these rates"
    )
    yield f"  why: {why}"
    for dtype in (torch.bfloat16, torch.float16):
        widened = products.computed_in(dtype, torch.device("cpu")) != dtype
        yield f"  {name(dtype)}: {'float32, for this processor has no such products' if widened else 'torch.mm'}"


def self_check() -> Iterator[str]:
    """Hold every implementation that runs here against torch in float64; the last line says pass or FAIL."""
    yield "Self-check: largest error of loss / gradient against float64, in units of the dtype's last digit (ULP)"
    yield f"{'':16}" + "".join(f"{name(dtype):>16}" for dtype in DTYPES)
    yield f"{'  allowed':16}" + "".join(f"{BOUNDS[dtype]:16.2f}" for dtype in DTYPES)
    failed, chosen_isa = [], _C and _C.isa()
    for variant in variants():
        if variant.isa:
            _C.set_isa(variant.isa)
        row = f"  {variant!s:14}"
        for dtype in DTYPES:
            try:
                loss, grad = (max(errors) for errors in zip(*errors_of(variant, dtype), strict=True))
            except Exception as error:  # a compiler that Triton misses, say: the others are checked all the same
                row += f"{'error':>16}"
                failed.append(f"{variant} {name(dtype)} ({type(error).__name__}: {error})")
                continue
            # Triton's interpreter on the CPU cuts float32 off to make bfloat16, where a GPU rounds.
            cuts = variant.backend == "triton" and variant.device == "cpu" and dtype == torch.bfloat16
            if variant.backend != "torch" and max(loss, grad) > (1.01 if cuts else BOUNDS[dtype]):
                failed.append(f"{variant} {name(dtype)} (more than allowed)")
            truth = variant.backend == "torch" and dtype == torch.float64
            row += f"{'the truth' if truth else f'{loss:.2f} / {grad:.2f}':>16}"
        yield row
    if chosen_isa:
        _C.set_isa(chosen_isa)
    yield from first_launches()
    if failed:
        yield f"FAIL: {', '.join(failed)}. Please report this output."
    elif _C is None:
        yield f"FAIL: {missing.reason()}."
    else:
        yield "pass"


def first_launches() -> Iterator[str]:
    """Which Triton kernels agreed with torch when they were first launched, here and just now."""
    found = list(first_look.report())
    if found:
        yield "Triton kernels at their first launch, against torch (FUSED_CE_SELF_CHECK=0 turns it off)"
        yield from (f"  {line}" for line in found)


def variants() -> Iterator[Variant]:
    for device in DEVICES:
        yield Variant("torch", "", device)
        for backend, module in dispatch.BACKENDS.items():
            if not module.unsupported(_small_call(device, torch.float32)):
                for isa_name in _C.isa_names() if backend == "cpu" else [""]:
                    yield Variant(backend, isa_name, device)


def _small_call(device: str, dtype: torch.dtype) -> Call:
    target = torch.zeros(2, dtype=torch.int64, device=device)
    return Call(torch.zeros(2, 3, dtype=dtype, device=device), target, None, Options())


def errors_of(variant: Variant, dtype: torch.dtype) -> Iterator[tuple[float, float]]:
    """Error of loss and gradient, in ULP, over shapes and both ways to the gradient: in forward, or in backward."""
    seed = torch.Generator().manual_seed(0)
    for N, C in SHAPES:
        x = torch.randn(N, C, generator=seed).to(variant.device, dtype).requires_grad_()
        target = torch.randint(C, (N,), generator=seed).to(variant.device)
        for reduction, upstream in (("mean", torch.tensor(1.0)), ("none", torch.linspace(0.5, 2, N))):
            if variant.backend == "torch":
                loss = F.cross_entropy(x, target, reduction=reduction)
            else:
                loss = cross_entropy(x, target, reduction=reduction, backend=variant.backend)
            (grad,) = torch.autograd.grad(loss, x, upstream.to(loss))
            exact_x = x.detach().cpu().double().requires_grad_()
            exact = F.cross_entropy(exact_x, target.cpu(), reduction=reduction)
            (exact_grad,) = torch.autograd.grad(exact, exact_x, upstream.to(dtype).double())
            yield ulps(loss.detach(), exact.detach()), ulps(grad, exact_grad)


def ulps(got: Tensor, exact: Tensor) -> float:
    """Largest distance in units of the spacing of the dtype of `got`; infinite if it is NaN."""
    info = torch.finfo(got.dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.tiny)).exponent - 1
    spacing = torch.ldexp(torch.full_like(exact, info.eps), exponent)
    return float(((got.cpu().double() - exact).abs() / spacing).nan_to_num(nan=torch.inf).max())


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
