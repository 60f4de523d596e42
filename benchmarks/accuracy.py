"""How exact loss and gradient are: every kernel that runs here beside torch, against float64.

    python benchmarks/accuracy.py            prints the tables
    python benchmarks/accuracy.py --write    writes them to docs/accuracy.md too; some minutes

Distances are in ULP, the spacing of the dtype's numbers at the exact value: a correctly rounded result is at most half
of one away.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from report import machine
from torch import Tensor

import fused_ce
from fused_ce.backends import cpu, reference
from fused_ce.backends.triton import kernels, launch
from fused_ce.contract import Call
from fused_ce.options import Options

PAGE = Path(__file__).parent.parent / "docs" / "accuracy.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLASSES = (1, 2, 10, 63, 64, 65, 1000, 4097, 32000, 50257, 128256, 262144)
INTERPRETED = (65, 4097)  # for Triton, whose interpreter takes seconds where a GPU takes microseconds
FLUSHED = math.exp(-87.3)  # the kernels' exp gives 0 below; float32's smallest normal number is about the same
ELEMENTS, MOST_ROWS, INTERPRETED_ROWS = 1 << 18, 1 << 16, 64
LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of standard normal x (N, C) and targets (N)
    "normal": lambda x, y: x,
    "times 10": lambda x, y: x * 10,
    "plus 1000": lambda x, y: x + 1000,
    "target 15 above": lambda x, y: x.scatter(1, y[:, None], x.amax(1, keepdim=True) + 15),
    "target 25 above": lambda x, y: x.scatter(1, y[:, None], x.amax(1, keepdim=True) + 25),
}
UPSTREAM = {"1": 1.0, "1/3": 1 / 3, "65536": 65536.0}  # the last is a loss scaler's; float16 only


class Figures(NamedTuple):
    """One implementation on one problem."""

    rounded: float  # share of the gradient's elements that are correctly rounded
    grad: float  # its largest error, in ULP of its dtype
    loss: float  # largest error of a row's loss, in ULP of float32


class Problem(NamedTuple):
    dtype: str
    C: int
    logits: str
    upstream: str


def errors(got: Tensor, exact: Tensor, flush: float = 0.0) -> Tensor:
    """In ULP; infinite for a NaN. An error of `flush` is free."""
    info = torch.finfo(got.dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.tiny)).exponent - 1
    distance = ((got.double() - exact).abs() - flush).clamp(min=0)
    return (distance / torch.ldexp(torch.full_like(exact, info.eps), exponent)).nan_to_num(nan=torch.inf)


def measure(dtype_name: str, C: int, logits: str, names: Iterable[str]) -> Iterator[tuple[Problem, str, Figures]]:
    """The implementations on the same logits, for every upstream gradient that suits them."""
    seed = torch.Generator().manual_seed(C)
    dtype = DTYPES[dtype_name]
    N = max(2, min(MOST_ROWS, ELEMENTS // C))
    target = torch.randint(C, (N,), generator=seed)
    x = torch.randn(N, C, generator=seed, dtype=torch.float64)
    x = LOGITS[logits](x, target).to(dtype)
    for few in (False, True):
        if few:
            x, target = x[:INTERPRETED_ROWS], target[:INTERPRETED_ROWS]
        rows = Call(x.double(), target, None, Options(reduction="none"))
        exact_losses = reference.forward(rows, "loss").loss
        exact_grad = reference.forward(rows._replace(options=Options()), "fused").grad
        for name in names:
            if (name == "triton") != few or (few and C not in INTERPRETED):
                continue
            loss_error = errors(losses(name, x, target).float(), exact_losses).max()
            for upstream, value in UPSTREAM.items():
                # The others with normal logits only, and 65536 only where it is used.
                if upstream != "1" and (logits != "normal" or (upstream == "65536" and dtype_name != "float16")):
                    continue
                given, grad = gradient(name, x, target, value)
                distance = errors(grad, exact_grad * given, FLUSHED * given / len(x))
                share = float((distance <= 0.5).double().mean())
                yield (
                    Problem(dtype_name, C, logits, upstream),
                    name,
                    Figures(share, float(distance.max()), float(loss_error)),
                )


def losses(name: str, x: Tensor, target: Tensor) -> Tensor:  # (N, C), (N) -> (N)
    if name.startswith("torch"):
        return F.cross_entropy(x.float() if name != "torch" else x, target, reduction="none")
    return fused_ce.cross_entropy(x, target, reduction="none", dtype=torch.float32, backend=backend(name))


def gradient(name: str, x: Tensor, target: Tensor, upstream: float) -> tuple[float, Tensor]:
    """The upstream gradient as its dtype holds it, and the logits' gradient for it."""
    x = x.clone().requires_grad_()
    # 65536 is no float16: the loss is asked for in float32, as mixed precision has it.
    dtype = torch.float32 if upstream > 65504 else x.dtype
    if name.startswith("torch"):
        loss = F.cross_entropy(x.to(torch.float32 if name != "torch" else dtype), target)
    else:
        loss = fused_ce.cross_entropy(x, target, dtype=dtype, backend=backend(name))
    given = torch.tensor(upstream, dtype=loss.dtype)
    return given.item(), torch.autograd.grad(loss, x, given)[0]


def backend(name: str) -> str:
    """Sets what `name` needs to run."""
    backend, _, isa = name.partition(" ")
    if isa:
        cpu._C.set_isa(isa)
    os.environ["TRITON_INTERPRET"] = "1" if backend == "triton" else "0"
    return backend


def implementations(dtype: str) -> list[str]:
    names = ["torch"] if dtype == "float32" else ["torch", "torch on float32"]
    names += [f"cpu {isa}" for isa in (cpu._C.isa_names() if cpu._C else [])]
    if launch.INSTALLED and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read where triton is imported
        kernels.table()
        # The interpreter cuts float32 off to make bfloat16, where a GPU rounds: its figure would be of no use.
        names += ["triton"] if dtype != "bfloat16" else []
    return names


def worst(found: list[Figures]) -> str:
    if not found:
        return ""
    share, grad, loss = min(f.rounded for f in found), max(f.grad for f in found), max(f.loss for f in found)
    return f"{percent(share)} / {number(grad)} / {number(loss)}"


def percent(share: float) -> str:
    """Never rounded up: 100 % means all."""
    return "100 %" if share == 1 else f"{int(share * 1e5) / 1e3:.3f} %" if share > 0.99 else f"{share:.1%}"


def number(ulps: float) -> str:
    return f"{ulps:.3f}" if ulps < 1 else f"{ulps:.1f}" if ulps < 100 else f"{ulps:.3g}"


def tables(results: dict[tuple[Problem, str], Figures]) -> Iterator[str]:
    for dtype in DTYPES:
        names = list(dict.fromkeys(name for problem, name in results if problem.dtype == dtype))
        yield f"\n## {dtype}\n"
        kinds = {(p.logits, p.upstream): None for p, _ in results if p.dtype == dtype}
        classes = {p.C: None for p, _ in results if p.dtype == dtype}
        for title, groups in (("logits, upstream gradient", kinds), ("classes", classes)):
            yield f"| {title} | " + " | ".join(names) + " |"
            yield "| --- |" + " ---: |" * len(names)
            for group in groups:
                fits = [p for p, _ in results if p.dtype == dtype and group in (p.C, (p.logits, p.upstream))]
                cells = [worst([results[p, name] for p in fits if (p, name) in results]) for name in names]
                label = group if isinstance(group, int) else ", ".join(group)
                yield f"| {label} | " + " | ".join(cells) + " |"
            yield ""


def page(results: dict[tuple[Problem, str], Figures]) -> str:
    facts = machine("cpu")
    where = f"{facts['cpu']}, {facts['date'][:10]}, Python {facts['python']}, torch {facts['torch']}"
    return f"""# How exact the results are

Written by `python benchmarks/accuracy.py --write`; do not edit. {where}, triton {facts["triton"]}, fused_ce
{facts["fused_ce"]}.

Each cell: share of the gradient's elements that are correctly rounded / largest error of an element of the gradient /
largest error of a row's loss; the worst of all problems of its line. Errors are in ULP, the spacing of the numbers of
the gradient's dtype at the exact value (below the smallest normal number, the spacing there), and of float32 for the
loss, which fused_ce was asked for in float32 (`dtype=torch.float32`). Correctly rounded: at most half an ULP away.
Exact: `fused_ce/formula.py` in float64, which tests/test_reference.py holds against 320 decimals. Not counted as an
error, for anyone: a probability below exp(-87.3) = 1.2e-38, about float32's smallest normal number, that became 0.

torch: `F.cross_entropy` on the same logits; its loss for 16-bit logits is rounded to 16 bits. torch on float32: the
logits cast to float32 first, which costs a copy. cpu: the C++ kernels, by instruction set. triton: the Triton kernels
in Triton's interpreter, not on a GPU, and only for {" and ".join(map(str, INTERPRETED))} classes and {INTERPRETED_ROWS}
rows; its bfloat16 is left out because the interpreter cuts off where a GPU rounds. The gradient is that of the mean
over {ELEMENTS} / C rows (2 to {MOST_ROWS}); an upstream gradient other than 1 takes the way through backward. With
65536, which is no float16, the loss is float32.
{chr(10).join(tables(results))}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} in docs/")
    parser.add_argument("--classes", type=int, nargs="+", default=CLASSES, help="numbers of classes")
    options = parser.parse_args()
    results = {
        (problem, name): found
        for dtype in DTYPES
        for C in options.classes
        for logits in LOGITS
        for problem, name, found in measure(dtype, C, logits, implementations(dtype))
    }
    text = page(results)
    print(text)
    if options.write:
        # Linear cross entropy's figures are another program's.
        _, mark, linear = PAGE.read_text().partition("\n\n# Linear cross entropy")
        PAGE.write_text(text.rstrip() + "\n" + mark + linear)


if __name__ == "__main__":
    main()
