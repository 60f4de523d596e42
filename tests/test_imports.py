"""Who may import whom (the arrows of docs/design.md), and that nothing optional is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fused_ce

PACKAGE = Path(fused_ce.__file__).parent
ANYONE_MAY = {"options", "rows"}
ARROWS = {
    "__init__": {"functional", "gpu", "module"},
    "module": {"functional"},
    "functional": {"autograd", "dispatch", "ops", "reference"},
    "ops": {"dispatch", "reference"},
    "autograd": set(),
    "dispatch": {"cpu", "gpu", "reference"},
    "cpu": {"_C"},
    "gpu": {"kernels"},
    "kernels": set(),
    "reference": set(),
    "options": set(),
    "rows": set(),
}
OUTSIDE = {"kernels": {"triton"}} | {name: {"torch"} for name in ("autograd", "options", "reference", "rows")}


def imports(module: str) -> tuple[set[str], set[str]]:
    """Modules of the package, and packages from outside, that a file imports anywhere in it."""
    inside, outside = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = "fused_ce." if node.level else ""
            names = [f"{start}{node.module}"] if node.module else [f"{start}{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names = ["fused_ce" + argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        else:
            continue
        inside |= {name.split(".")[1] for name in names if name.startswith("fused_ce.")}
        outside |= {name.split(".")[0] for name in names} - {"fused_ce"}
    return inside, outside - set(sys.stdlib_module_names)


def modules() -> list[str]:
    return sorted(path.stem for path in PACKAGE.glob("*.py"))


@pytest.mark.parametrize("module", [name for name in modules() if name != "__main__"])
def test_arrows(module: str) -> None:
    inside, outside = imports(module)
    assert inside - ANYONE_MAY <= ARROWS[module]
    assert outside <= OUTSIDE.get(module, {"torch", "triton"} if module == "gpu" else {"torch"})


def test_every_arrow_is_used() -> None:
    for module, arrows in ARROWS.items():
        assert arrows - imports(module)[0] == set(), module


def test_autograd_names_no_device() -> None:
    nodes = ast.walk(ast.parse((PACKAGE / "autograd.py").read_text()))
    assert not {node.id for node in nodes if isinstance(node, ast.Name)} & {
        "cpu",
        "gpu",
        "cuda",
        "reference",
        "kernels",
    }


def python(code: str) -> str:
    """What a fresh interpreter prints; warnings are errors there too."""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


CHECK = """
import torch
from fused_ce import CrossEntropyLoss, cross_entropy
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for keywords in ({}, {"softcap": 2.0}, {"label_smoothing": 0.1}):
        x, y = torch.randn(6, 10, dtype=torch.float64).to(dtype).requires_grad_(), torch.arange(6)
        loss = cross_entropy(x, y, **keywords)
        loss.backward()
        z = x.detach().double().requires_grad_()
        cap = keywords.get("softcap")
        smoothing = keywords.get("label_smoothing", 0.0)
        exact = torch.nn.functional.cross_entropy(cap * torch.tanh(z / cap) if cap else z, y, label_smoothing=smoothing)
        exact.backward()
        close = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(loss.double(), exact, rtol=close, atol=0)
        torch.testing.assert_close(x.grad.double(), z.grad, rtol=close, atol=close / 100)
"""


@pytest.mark.parametrize("missing", [(), ("triton",), ("fused_ce._C",), ("triton", "fused_ce._C")], ids=str)
def test_works_without(missing: tuple[str, ...]) -> None:
    block = f"import sys\nfor name in {missing!r}: sys.modules[name] = None\n"
    used = "from fused_ce.backends import cpu\nassert (cpu._C is None) == " + str("fused_ce._C" in missing)
    assert python(block + CHECK + used) == ""


def test_import_loads_nothing_optional() -> None:
    code = "import sys, torch; before = set(sys.modules); import fused_ce; print(*(set(sys.modules) - before))"
    loaded = python(code)
    assert not {name.split(".")[0] for name in loaded.split()} & {"triton", "numpy", "sympy"}
