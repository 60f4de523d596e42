"""`python -m fused_ce` tells the truth about the installation."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

import fused_ce
from fused_ce import __main__ as main
from fused_ce.backends import cpu
from fused_ce.backends.dispatch import BACKENDS
from fused_ce.contract import Forward
from fused_ce.linear import products


@pytest.fixture(scope="module")
def printed() -> str:
    """What the program prints here; it ends well where nothing is missing."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main.main() == (1 if cpu._C is None else 0)
    return output.getvalue()


def test_passes_here(printed: str) -> None:
    assert printed.splitlines()[0] == f"fused_ce {fused_ce.__version__}"
    assert torch.__version__ in printed
    if cpu._C is None:
        assert printed.splitlines()[-2].startswith("FAIL: the C++ kernels")
    else:
        assert printed.rstrip().endswith("pass")
        assert all(f"cpu {isa}" in printed for isa in cpu._C.isa_names())
        assert f"instruction set {cpu._C.isa()}" in printed


def test_prints_measured_errors_within_the_bounds(printed: str) -> None:
    pairs = re.findall(r"([\d.]+) / ([\d.]+)", printed)
    assert len(pairs) >= len(main.DTYPES)
    assert any(float(grad) > 0 for _, grad in pairs)


def test_as_a_program_with_a_forced_instruction_set() -> None:
    if cpu._C is None:
        pytest.skip("fused_ce._C is not built")
    slowest = cpu._C.isa_names()[-1]
    command = [sys.executable, "-W", "error", "-m", "fused_ce"]
    environment = os.environ | {"FUSED_CE_ISA": slowest, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"instruction set {slowest}" in result.stdout
    assert f"FUSED_CE_ISA={slowest}" in result.stdout
    assert result.stdout.rstrip().endswith("pass")


def test_a_wrong_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu._C is None:
        pytest.skip("fused_ce._C is not built")
    monkeypatch.setenv("FUSED_CE_ISA", "nonsense")
    again = importlib.util.spec_from_file_location("fused_ce.backends.cpu_again", cpu.__file__)
    with pytest.raises(ValueError, match="got 'nonsense'"):
        again.loader.exec_module(importlib.util.module_from_spec(again))


def test_fails_when_a_backend_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = BACKENDS["reference"].forward

    def wrong(*arguments: Any) -> Forward:
        result = right(*arguments)
        return result._replace(loss=result.loss * 1.01)

    monkeypatch.setattr(BACKENDS["reference"], "forward", wrong)
    monkeypatch.setattr(main, "DTYPES", (torch.float32,))
    assert main.main() == 1
    assert "FAIL: reference float32 (more than allowed). Please" in capsys.readouterr().out


def test_says_where_products_come_from_and_why(printed: str) -> None:
    part = printed.partition("Matrix products of linear_cross_entropy")[2].partition("\n\n")[0]
    for product in (products.LOGITS, products.INPUT_GRAD, products.WEIGHT_GRAD):
        assert f"{product} " in part
        assert re.search(rf"{product} +{'oneDNN' if product in products.chosen() else 'torch.mm'}", part)
    assert products.why_not() in part
