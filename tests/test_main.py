"""`python -m fused_ce` tells the truth about the installation."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
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
        assert main.main([]) == (1 if cpu._C is None else 0)
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
    assert main.main([]) == 1
    assert "FAIL: reference float32 (more than allowed). Please" in capsys.readouterr().out
    assert main.main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    assert "reference float32 (more than allowed)" in found["problems"]
    assert found["errors_in_ulp"]["reference"]["float32"][0] > main.BOUNDS[torch.float32]


def test_an_error_that_is_not_finite_is_valid_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = BACKENDS["reference"].forward

    def raises(call: Any, schedule: Any) -> Forward:
        if call.input.dtype == torch.float64:
            raise ArithmeticError("no float64 today")
        result = forward(call, schedule)
        return result._replace(loss=result.loss * torch.nan)

    monkeypatch.setattr(BACKENDS["reference"], "forward", raises)
    monkeypatch.setattr(main, "DTYPES", (torch.float32, torch.float64))
    assert main.main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["errors_in_ulp"]["reference"] == {"float32": [None, pytest.approx(0, abs=16)], "float64": [None, None]}
    assert "reference float64 (ArithmeticError: no float64 today)" in found["problems"]


def test_json_says_what_the_tables_say(printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--json"]) == (1 if cpu._C is None else 0)
    found = json.loads(capsys.readouterr().out)
    assert found["fused_ce"] == fused_ce.__version__
    assert found["torch"] == torch.__version__
    assert found["passed"] == (cpu._C is not None)
    assert (found["kernels"] is None) == (cpu._C is None)
    table = printed.partition("Self-check")[2].splitlines()
    for variant, by_dtype in found["errors_in_ulp"].items():
        row = next(line for line in table if line.startswith(f"  {variant} "))
        for dtype, (loss, grad) in by_dtype.items():
            assert (variant, dtype) == ("torch", "float64") or f"{loss:.2f} / {grad:.2f}" in row
    for reason in found["declined"]:
        assert reason in printed
    if cpu._C is not None:
        assert found["kernels"]["isa"] == cpu._C.isa()
        assert found["backends"]["cpu"] == dict.fromkeys(map(main.name, main.DTYPES), "cpu")


def test_says_where_products_come_from_and_why(printed: str) -> None:
    part = printed.partition("Matrix products of linear_cross_entropy")[2].partition("\n\n")[0]
    for product in (products.LOGITS, products.INPUT_GRAD, products.WEIGHT_GRAD):
        assert f"{product} " in part
        assert re.search(rf"{product} +{'oneDNN' if product in products.chosen() else 'torch.mm'}", part)
    assert products.why_not() in part
