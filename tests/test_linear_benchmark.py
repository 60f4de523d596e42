"""benchmarks/linear_cross_entropy.py runs and prints the goals with outcomes; not how fast anything is."""

from __future__ import annotations

import contextlib
import io
import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

from fused_ce.backends import cpu

pytest.importorskip("rich")


@pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built")
def test_prints_goals_and_outcomes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    program = import_module("linear_cross_entropy")
    easy, hard = program.Case(8, 16, 50, times=1e-9, floors=1e9), program.Case(8, 16, 60, times=1e9)
    monkeypatch.setattr(program, "CASES", (easy, hard))
    monkeypatch.setattr(program, "SWEEP", [(8, 16, 50)])
    monkeypatch.setattr(torch, "compile", lambda function: function)  # seconds, and tested elsewhere
    threads, file = torch.get_num_threads(), tmp_path / "out.json"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert program.main(["--threads=1", "--rounds=1", "--only=x16x", f"--json={file}"]) == 0
        assert program.main(["--threads=1", "--sweep"]) == 0
    torch.set_num_threads(threads)
    rows = json.loads(file.read_text())["rows"]
    assert [row["outcome"] for row in rows] == ["met, met", "missed"]
    assert {"linear + torch", "linear + fused_ce", "fused_ce", "three torch.mm"} <= set(rows[0]["seconds"])
    assert "8x16x60 float32" in printed.getvalue()
    assert "of 1 below 0.95" in printed.getvalue()
