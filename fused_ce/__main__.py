"""`python -m fused_ce`: what is installed, which backend takes which call and why not, and a check against float64.

With --json, the same as one JSON object, for reports of bugs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

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

VARIABLES = ("FUSED_CE_ISA", "FUSED_CE_BACKEND", "FUSED_CE_POOL", "FUSED_CE_SELF_CHECK", "TRITON_INTERPRET")


class Variant(NamedTuple):
    """One implementation that can run here."""

    backend: str  # or "torch", to compare with
    isa: str  # "" where there is nothing to choose
    device: str

    def __str__(self) -> str:
        return " ".join(filter(None, (self.backend, self.isa, "" if self.device == "cpu" else self.device)))


class Checked(NamedTuple):
    """Largest errors of one implementation in one dtype, in ULP; NaN where it raised."""

    variant: Variant
    dtype: torch.dtype
    loss: float
    grad: float
    problem: str  # "" where there is none

    @property
    def is_truth(self) -> bool:
        return self.variant.backend == "torch" and self.dtype == torch.float64


def main(arguments: list[str] | None = None) -> int:
    about = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m fused_ce", description=__doc__, formatter_class=about)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the tables")
    if parser.parse_args(arguments).json:
        found = as_json()
        print(json.dumps(found, indent=1, allow_nan=False))
        return 0 if found["passed"] else 1
    line = ""
    for part in (installed(), backends(), matrix_products(), self_check()):
        for line in part:
            print(line)
        print()
    return 0 if line == "pass" else 1


def as_json() -> dict[str, Any]:
    """All that the tables hold; errors in ULP as [loss, gradient], null where they are not finite."""
    results = [result for row in checks() for result in row]
    errors: dict[str, dict[str, list[float | None]]] = {}
    for result in results:
        pair = [number if math.isfinite(number) else None for number in (result.loss, result.grad)]
        errors.setdefault(str(result.variant), {})[name(result.dtype)] = pair
    problems = [*(result.problem for result in results if result.problem), *lacking()]
    taken, declined = choices()
    return {
        **facts(),
        "backends": taken,
        "declined": declined,
        "matrix_products": list(matrix_products()),
        "errors_in_ulp": errors,
        "first_launches": list(first_look.report()),
        "problems": problems,
        "passed": not problems,
    }


def lacking() -> list[str]:
    """That the kernels are missing, where nobody left them out on purpose."""
    return [missing.reason()] if _C is None and not missing.left_out() else []


def facts() -> dict[str, Any]:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    kernels = None
    if _C is not None:
        isas = list(_C.isa_names())
        kernels = {"isa": _C.isa(), "isas": isas, "openmp": bool(_C.openmp), "compiler": _C.compiler}
    return {
        "fused_ce": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "triton": triton,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "kernels": kernels,
        "environment": {variable: os.environ[variable] for variable in VARIABLES if variable in os.environ},
    }


def installed() -> Iterator[str]:
    here = facts()
    yield f"fused_ce {__version__}"
    yield f"  Python       {here['python']} on {here['system']}"
    yield f"  torch        {here['torch']}, {here['threads']} threads (torch.set_num_threads changes it)"
    without = "not installed: calls on a GPU run torch's own operators; pip install triton"
    yield f"  triton       {here['triton'] or without}"
    for i, gpu in enumerate(here["gpus"]):
        yield f"  GPU {i}        {gpu}"
    if kernels := here["kernels"]:
        isas = ", ".join(kernels["isas"])
        yield f"  C++ kernels  instruction set {kernels['isa']}, of {isas} (FUSED_CE_ISA forces one)"
        yield f"               {'with' if kernels['openmp'] else 'without'} OpenMP, by {kernels['compiler']}"
    else:
        why = "the last line says what helps" if lacking() else "the package was built so (FUSED_CE_BUILD=0)"
        yield f"  C++ kernels  missing: calls on the CPU run torch's own operators; {why}"
    for variable, value in here["environment"].items():
        yield f"  environment  {variable}={value}"


def choices() -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
    """By device and dtype, the backend that `cross_entropy(input, target)` takes; by reason, the dtypes declined."""
    taken: dict[str, dict[str, str]] = {device: {} for device in DEVICES}
    reasons: dict[str, list[str]] = {}
    for device in DEVICES:
        for dtype in DTYPES:
            call = _small_call(device, dtype)
            try:
                taken[device][name(dtype)] = dispatch.name_of(dispatch.choose(call, None))
            except (NotImplementedError, ValueError):
                taken[device][name(dtype)] = "error"
            for other, module in dispatch.BACKENDS.items():
                for reason in module.unsupported(call):
                    reasons.setdefault(f"backend {other} declines {device} tensors: {reason}", []).append(name(dtype))
    return taken, reasons


def backends() -> Iterator[str]:
    """Which backend `cross_entropy(input, target)` takes, and what the others have against it."""
    yield "Backend of a call, by device and dtype of the logits (torch: torch's own operators)"
    yield "  device" + "".join(f"{name(dtype):>10}" for dtype in DTYPES)
    taken, reasons = choices()
    for device, by_dtype in taken.items():
        yield f"  {device:6}" + "".join(f"{backend:>10}" for backend in by_dtype.values())
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
    failed = []
    for results in checks():
        cells = (
            "error" if math.isnan(its.loss) else "the truth" if its.is_truth else f"{its.loss:.2f} / {its.grad:.2f}"
            for its in results
        )
        yield f"  {results[0].variant!s:14}" + "".join(f"{cell:>16}" for cell in cells)
        failed += [result.problem for result in results if result.problem]
    yield from first_launches()
    if failed:
        yield f"FAIL: {', '.join(failed)}. Please report this output."
    elif lacking():
        yield f"FAIL: {lacking()[0]}."
    else:
        yield "pass"


def checks() -> Iterator[list[Checked]]:
    """Every implementation that runs here, one list of all dtypes after another."""
    chosen_isa = _C and _C.isa()
    for variant in variants():
        if variant.isa:
            _C.set_isa(variant.isa)
        yield [check(variant, dtype) for dtype in DTYPES]
    if chosen_isa:
        _C.set_isa(chosen_isa)


def check(variant: Variant, dtype: torch.dtype) -> Checked:
    try:
        loss, grad = (max(errors) for errors in zip(*errors_of(variant, dtype), strict=True))
    except Exception as error:  # a compiler that Triton misses, say: the others are checked all the same
        problem = f"{variant} {name(dtype)} ({type(error).__name__}: {error})"
        return Checked(variant, dtype, math.nan, math.nan, problem)
    # Triton's interpreter on the CPU cuts float32 off to make bfloat16, where a GPU rounds.
    cuts = variant.backend == "triton" and variant.device == "cpu" and dtype == torch.bfloat16
    wrong = variant.backend != "torch" and max(loss, grad) > (1.01 if cuts else BOUNDS[dtype])
    return Checked(variant, dtype, loss, grad, f"{variant} {name(dtype)} (more than allowed)" if wrong else "")


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
