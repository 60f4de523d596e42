"""Who may import whom (the arrows of CONTRIBUTING.md), and that nothing optional is needed."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from apart import run

import fused_ce

PACKAGE = Path(fused_ce.__file__).parent
LAUNCHED = ("arguments", "kernels", "plan", "readable", "rows", "self_check")
ANYONE_MAY = {"__version__", "contract", "options"}
ARROWS = {
    "__init__": {
        "backends.pool",
        "backends.triton.launch",
        "functional",
        "linear.functional",
        "linear.module",
        "logprobs",
        "missing",
        "module",
        "patching",
    },
    "logprobs": {"functional", "linear.functional"},
    "patching": {"_torch", "functional", "linear.functional"},
    "integrations.__init__": set(),
    "integrations.linear_head": {"linear.functional"},
    "integrations.transformers": {"functional", "integrations.linear_head"},
    "integrations.trl": {"functional", "linear.functional", "logprobs"},
    "missing": set(),
    "module": {"functional"},
    "functional": {"_torch", "autograd", "distributed.dtensor", "gate", "ops"},
    "gate": {"_torch", "backends.dispatch", "operators"},
    "autograd": {"_torch", "operators"},
    "ops": {"_torch", "autograd", "backends.dispatch", "gate"},
    "formula": set(),
    "operators": {"formula"},
    "contract": set(),
    "options": set(),
    "_torch": set(),
    "linear.__init__": set(),
    "linear.module": {"functional", "linear.functional", "module"},
    "linear.functional": {
        "_torch",
        "distributed.linear_dtensor",
        "functional",
        *(f"linear.{name}" for name in ("autograd", "chunks", "composite", "contract", "gate", "ops")),
    },
    "linear.gate": {"_torch", "gate", "linear.contract", "linear.products"},
    "linear.ops": {"_torch", "linear.autograd", "linear.chunks", "linear.composite", "linear.contract", "ops"},
    "linear.autograd": {
        "_torch",
        "autograd",
        *(f"linear.{name}" for name in ("chunks", "composite", "contract", "products")),
    },
    "linear.composite": {"linear.contract", "linear.products", "operators"},
    "linear.chunks": {"_torch", "backends.pool", "linear.contract", "linear.products"},
    "linear.products": {"_torch"},
    "linear.contract": set(),
    "distributed.__init__": {"distributed.functional", "distributed.linear"},
    "distributed.linear": {
        "functional",
        *(f"distributed.{name}" for name in ("layout", "linear_gate", "linear_loop")),
        *(f"linear.{name}" for name in ("autograd", "contract", "functional")),
    },
    "distributed.linear_dtensor": {
        "functional",
        *(f"distributed.{name}" for name in ("exchange", "layout", "linear", "status")),
    },
    "distributed.linear_gate": {
        "distributed.gate",
        "distributed.layout",
        *(f"linear.{name}" for name in ("chunks", "contract", "gate")),
    },
    "distributed.linear_loop": {
        "_torch",
        "backends.reference",
        *(
            f"distributed.{name}"
            for name in ("autograd", "exchange", "layout", "linear_gate", "rows", "status", "sums")
        ),
        *(f"linear.{name}" for name in ("autograd", "chunks", "contract", "functional")),
    },
    "distributed.functional": {"functional", *(f"distributed.{name}" for name in ("autograd", "layout", "sums"))},
    "distributed.dtensor": {
        "functional",
        "gate",
        *(f"distributed.{name}" for name in ("exchange", "functional", "gate", "layout", "status")),
    },
    "distributed.sums": {f"distributed.{name}" for name in ("exchange", "gate", "layout", "rows", "status")},
    "distributed.gate": {"_torch", "backends.dispatch", "distributed.layout", "gate"},
    "distributed.exchange": {"formula", *(f"distributed.{name}" for name in ("layout", "rows", "status"))},
    "distributed.autograd": {"_torch", "backends.pool", "distributed.gate", "distributed.rows"},
    "distributed.status": set(),
    "distributed.rows": {"formula"},
    "distributed.layout": set(),
    "backends.__init__": set(),
    "backends.dispatch": {"backends.cpu", "backends.reference", "backends.triton.launch"},
    "backends.reference": {"operators"},
    "backends.cpu": {"_C", "_torch", "backends.pool", "operators"},
    "backends.pool": {"_C", "_torch"},
    "backends.triton.__init__": set(),
    "backends.triton.launch": {
        "backends.reference",
        *(f"backends.triton.{name}" for name in (*LAUNCHED, "shards", "targets")),
    },
    "backends.triton.shards": {"backends.reference", *(f"backends.triton.{name}" for name in LAUNCHED)},
    "backends.triton.kernels": {
        f"backends.triton.{name}"
        for name in ("arguments", "backward", "forward", "plan", "readable", "reduce", "rows", "targets")
    },
    "backends.triton.self_check": {
        "backends.reference",
        *(f"backends.triton.{name}" for name in ("arguments", "compare", "plan", "readable", "rows", "targets")),
    },
    "backends.triton.compare": {"backends.reference", "formula"},
    "backends.triton.arguments": {"backends.triton.rows"},
    "backends.triton.plan": {"backends.triton.arguments", "backends.triton.rows"},
    "backends.triton.readable": {"_torch"},
    "backends.triton.rows": set(),
    "backends.triton.targets": set(),
    "backends.triton.forward": {f"backends.triton.{name}" for name in ("arguments", "formula", "sweep", "tiles")},
    "backends.triton.backward": {f"backends.triton.{name}" for name in ("formula", "sweep", "tiles")},
    "backends.triton.reduce": {"backends.triton.tiles"},
    "backends.triton.sweep": {f"backends.triton.{name}" for name in ("formula", "math", "tiles")},
    "backends.triton.tiles": {"backends.triton.formula"},
    "backends.triton.formula": {"backends.triton.math"},
    "backends.triton.math": set(),
}
# Imports of a single kind of call, when the first comes: not among those that must not go round.
LATE = {"functional": {"distributed.dtensor"}, "linear.functional": {"distributed.linear_dtensor"}}
KERNELS = {f"backends.triton.{name}" for name in ("backward", "formula", "forward", "math", "reduce", "sweep", "tiles")}


def imports(module: str) -> tuple[set[str], set[str]]:
    """Modules of the package, and packages from outside, that a file imports anywhere in it."""
    inside, outside = set(), set()
    folder = ["fused_ce", *module.split(".")][:-1]
    for node in ast.walk(ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join([*folder[: len(folder) + 1 - node.level], *filter(None, [node.module])])
            start = start if node.level else str(node.module)
            names = [f"{start}.{alias.name}" for alias in node.names] if start in PACKAGES else [start]
        else:
            continue
        inside |= {name.removeprefix("fused_ce.") for name in names if name.startswith("fused_ce.")}
        outside |= {name.split(".")[0] for name in names} - {"fused_ce"}
    return inside, outside - set(sys.stdlib_module_names)


PACKAGES = {
    "fused_ce",
    *(f"fused_ce.{name}" for name in ("backends", "backends.triton", "distributed", "integrations", "linear")),
}
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__main__"
)


def test_every_file_has_its_arrows() -> None:
    assert sorted(ARROWS) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_arrows(module: str) -> None:
    inside, outside = imports(module)
    assert inside - ANYONE_MAY == ARROWS[module] - ANYONE_MAY
    if module in KERNELS:
        allowed = {"triton"}
    elif module.startswith("backends.triton"):
        allowed = {"torch", "triton"}
    elif module.startswith("integrations"):
        allowed = {"torch", "transformers", "trl"}
    else:
        allowed = {"torch", "typing_extensions"}  # torch requires the second
    assert outside <= allowed


def test_no_cycles() -> None:
    graph = {module: imports(module)[0] & set(MODULES) - {"__init__"} - LATE.get(module, set()) for module in MODULES}
    assert list(TopologicalSorter(graph).static_order())


def test_files_are_short() -> None:
    sources = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "csrc").rglob("*.*")]
    assert [path for path in sources if len(path.read_text().splitlines()) > 300] == []


def test_the_map_holds_every_file() -> None:
    guide = PACKAGE.parent / "CONTRIBUTING.md"
    if not guide.exists():
        pytest.skip("not a checkout")
    house = guide.read_text().partition("## The house")[2].partition("\n## ")[0]
    for path in (*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "csrc").rglob("*.*")):
        if path.name != "__init__.py" and path.parent.name != "isa":
            assert re.search(rf"\b{path.name.partition('.')[0]}\b", house), path


def test_parallel_formulas() -> None:
    """The three formula files name the same functions in the same order."""
    names = (
        "transform",
        "transform_grad",
        "row_lse",
        "finite",
        "rescale",
        "put_back",
        "combine",
        "row_loss",
        "row_grad",
    )
    for file, declares in (
        (PACKAGE / "formula.py", r"^def (\w+)\("),
        (PACKAGE / "backends/triton/formula.py", r"^def (\w+)\("),
        (PACKAGE.parent / "csrc/formula.inl.h", r"^(?:template <[^;]*?> )?(?:INLINE )?(?:[\w:<>]+ )+(\w+)\("),
    ):
        if file.exists():  # csrc is not installed
            found = [name for name in re.findall(declares, file.read_text(), re.MULTILINE) if name in names]
            assert list(dict.fromkeys(found)) == list(names), file


def test_autograd_names_no_device() -> None:
    nodes = ast.walk(ast.parse((PACKAGE / "autograd.py").read_text()))
    assert not {node.id for node in nodes if isinstance(node, ast.Name)} & {
        "cpu",
        "cuda",
        "launch",
        "reference",
    }


ALLOWED = ("-W", "ignore:fused_ce.cross_entropy ran torch's own operators")


def python(code: str) -> str:
    """What a fresh interpreter prints; warnings are errors there too."""
    result = subprocess.run([sys.executable, "-W", "error", *ALLOWED, "-c", code], capture_output=True, text=True)
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
    block = f"import sys, warnings\nfor name in {missing!r}: sys.modules[name] = None\n"
    if "fused_ce._C" in missing:
        block += "warnings.filterwarnings('ignore', 'the C.. kernels of the fused_ce in', RuntimeWarning)\n"
    used = "from fused_ce.backends import cpu\nassert (cpu._C is None) == " + str("fused_ce._C" in missing)
    assert python(block + CHECK + used) == ""


def test_import_loads_nothing_optional() -> None:
    code = "import sys, torch; before = set(sys.modules); import fused_ce; print(*(set(sys.modules) - before))"
    loaded = python(code)
    assert not {name.split(".")[0] for name in loaded.split()} & {"triton", "numpy", "sympy", "transformers", "trl"}


@pytest.mark.parametrize("from_source", [True, False])
def test_says_once_that_the_kernels_are_missing(from_source: bool, tmp_path: Path) -> None:
    copy = tmp_path / "fused_ce"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    if from_source:
        (tmp_path / "setup.py").touch()
    (tmp_path / "program.py").write_text("import fused_ce, torch\nfrom fused_ce import cross_entropy\n")

    said = f"the C++ kernels of the fused_ce in {copy} cannot be loaded (No module named 'fused_ce._C')"
    advice = f"`pip install -e {tmp_path}`, or start Python in another folder" if from_source else "Install it again"
    program = run(tmp_path, "program.py")
    assert program.returncode == 0
    assert program.stderr.count("Warning") == 1
    assert f"program.py:1: RuntimeWarning: {said}. " in program.stderr
    assert advice in program.stderr
    main = run(tmp_path, "-m", "fused_ce")
    assert main.returncode == 1
    assert main.stdout.splitlines()[-2].startswith(f"FAIL: {said}. ")
    assert advice in main.stdout
