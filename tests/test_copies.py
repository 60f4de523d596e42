"""Two copies of the package in one process: what loaders of kernels make, that give each its own name, or a program
that imports it again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "fused_ce"
PROGRAM = """
import shutil, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
shutil.copytree(sys.argv[1] + "/fused_ce", sys.argv[2] + "/another", ignore=shutil.ignore_patterns("__pycache__"))

import fused_ce, another, torch
for name in [name for name in sys.modules if name.partition(".")[0] == "fused_ce"]:
    del sys.modules[name]
import fused_ce as again

torch.manual_seed(0)
x, y = torch.randn(40, 1000, requires_grad=True), torch.randint(1000, (40,))
weight, h = torch.randn(1000, 16), torch.randn(40, 16)
copies = fused_ce, another, again
assert len({copy.cross_entropy for copy in copies}) == 3
for call in (lambda of: of.cross_entropy(x, y), lambda of: of.linear_cross_entropy(h, weight, y)):
    assert len({call(copy).item() for copy in copies}) == 1
# A patch of one is not another's to take back.
with another.patched():
    assert another.is_patched() and not again.is_patched()
    torch.nn.functional.cross_entropy(x, y).backward()
compiled = torch.compile(another.cross_entropy, fullgraph=True, backend="aot_eager")
assert compiled(x, y).item() == again.cross_entropy(x, y).item()
from another import ops as theirs
from fused_ce import ops as ours
assert theirs.LIBRARY.ns != ours.LIBRARY.ns
assert fused_ce.__version__.replace(".", "_") in theirs.LIBRARY.ns
"""


def test_copies_share_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(PACKAGE.parent), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_hub_loader_takes_it_beside_the_installed_one(tmp_path: Path) -> None:
    """The layout that docs/platforms.md describes, with the `kernels` package of Hugging Face."""
    pytest.importorskip("kernels")
    variant = tmp_path / "build" / "torch-cpu"
    shutil.copytree(PACKAGE, variant, ignore=shutil.ignore_patterns("__pycache__"))
    facts = {"id": "fused_ce_of_a_test", "name": "fused-ce", "version": 1, "license": "MIT", "python-depends": []}
    (variant / "metadata.json").write_text(json.dumps({**facts, "backend": {"type": "cpu"}}))
    program = (
        "import pathlib, sys, torch, kernels, fused_ce\n"
        "loaded = kernels.get_local_kernel(pathlib.Path(sys.argv[1]), backend='cpu')\n"
        "x, y = torch.randn(64, 1000, requires_grad=True), torch.randint(1000, (64,))\n"
        "assert loaded.cross_entropy is not fused_ce.cross_entropy\n"
        "assert loaded.cross_entropy(x, y).item() == fused_ce.cross_entropy(x, y).item()\n"
        "compiled = torch.compile(loaded.cross_entropy, fullgraph=True, backend='aot_eager')\n"
        "assert compiled(x, y).item() == fused_ce.cross_entropy(x, y).item()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
