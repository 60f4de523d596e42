"""`python -m fused_ce` tells the truth about the installation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch

import fused_ce
from fused_ce import __main__ as main
from fused_ce.backends import cpu
from fused_ce.backends.dispatch import BACKENDS
from fused_ce.contract import Forward


@cache
def run(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "fused_ce"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_passes_here() -> None:
    result = run()
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[0] == f"fused_ce {fused_ce.__version__}"
    assert torch.__version__ in result.stdout
    assert result.stdout.rstrip().endswith("pass")
    if cpu._C is not None:
        assert all(f"cpu {isa}" in result.stdout for isa in cpu._C.isa_names())
        assert f"instruction set {cpu._C.isa()}" in result.stdout


def test_prints_measured_errors_within_the_bounds() -> None:
    pairs = re.findall(r"([\d.]+) / ([\d.]+)", run().stdout)
    assert len(pairs) >= len(main.DTYPES)
    assert any(float(grad) > 0 for _, grad in pairs)


def test_a_forced_instruction_set_is_named() -> None:
    if cpu._C is None:
        pytest.skip("fused_ce._C is not built")
    slowest = cpu._C.isa_names()[-1]
    result = run(FUSED_CE_ISA=slowest)
    assert result.returncode == 0
    assert f"instruction set {slowest}" in result.stdout
    assert f"FUSED_CE_ISA={slowest}" in result.stdout
    refused = run(FUSED_CE_ISA="nonsense")
    assert "got 'nonsense'" in refused.stdout + refused.stderr


def test_fails_when_a_backend_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = BACKENDS["reference"].forward

    def wrong(*arguments: Any) -> Forward:
        result = right(*arguments)
        return result._replace(loss=result.loss * 1.01)

    monkeypatch.setattr(BACKENDS["reference"], "forward", wrong)
    assert main.main() != 0
    assert "FAIL" in capsys.readouterr().out
