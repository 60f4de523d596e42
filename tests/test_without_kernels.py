"""The package of Python alone (FUSED_CE_BUILD=0): it is installed without a compiler, and says what it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from apart import run

ROOT = Path(__file__).parents[1]
NEEDED = ("pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in NEEDED:
        shutil.copy(ROOT / name, source)
    for name in ("fused_ce", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", str(folder)]
    # A compiler that fails: none is asked for.
    environment = os.environ | {"FUSED_CE_BUILD": "0", "CXX": "false"}
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_is_for_any_platform(installed: Path) -> None:
    (wheel,) = installed.glob("fused_ce-*.dist-info/WHEEL")
    assert "Tag: py3-none-any" in wheel.read_text()
    assert not [*installed.glob("fused_ce/_C*.so")]


def test_nothing_is_said_on_import_and_the_loss_is_torchs(installed: Path) -> None:
    program = (
        "import fused_ce, torch, torch.nn.functional as F\n"
        f"assert fused_ce.__file__.startswith({str(installed)!r}), fused_ce.__file__\n"
        "x, y = torch.randn(4, 5, requires_grad=True), torch.tensor([1, 2, 3, -100])\n"
        "loss = fused_ce.cross_entropy(x, y)\n"
        "assert torch.equal(loss, F.cross_entropy(x, y))\n"
        "loss.backward()\n"
    )
    done = run(installed, "-W", "error", "-c", program)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_program_says_so_and_passes(installed: Path) -> None:
    done = run(installed, "-m", "fused_ce")
    assert "C++ kernels  missing" in done.stdout
    assert "the package was built so (FUSED_CE_BUILD=0)" in done.stdout
    assert done.returncode == 0, done.stdout
