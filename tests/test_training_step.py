"""benchmarks/training_step.py runs each way and tells which goals were met; not how fast anything is."""

from __future__ import annotations

import contextlib
import io
import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")


def test_tells_goals_and_outcomes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    program = import_module("training_step")
    monkeypatch.setattr(program, "WIDTH", 16)
    easy, hard = program.Goal("fused_ce", "torch", 1e-9), program.Goal("linear", "torch", 1e9, 1e-9)
    cases = (
        program.Case("language model", (easy, hard), 60, 128),
        program.Case("language model", (program.Goal("fused_ce", "HF", 1e-9),), 60, 128, torch.bfloat16),
        program.Case("MNIST MLP", (easy,), 10, 8),
    )
    monkeypatch.setattr(program, "CASES", cases)
    monkeypatch.setattr(program, "in_a_fresh_process", lambda case, way, threads: max(1.0, program.growth(case, way)))
    threads, file = torch.get_num_threads(), tmp_path / "out.json"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        program.main(["--rounds=2", f"--json={file}"])
    torch.set_num_threads(threads)
    rows = json.loads(file.read_text())["rows"]
    assert [[line.rpartition(" ")[2].rstrip(")") for line in row["outcomes"]] for row in rows] == [
        ["met", "missed"],
        ["met"],
        ["met"],
    ]
    assert list(rows[1]["seconds"]) == ["torch", "HF", "fused_ce", "in place", "linear"]
    assert "language model, 128 x 60, float32" in printed.getvalue()


def test_every_way_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters after one step of each way, from the same start."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    program = import_module("training_step")
    monkeypatch.setattr(program, "WIDTH", 16)
    case = program.Case("language model", (), 60, 128)
    made: list[torch.nn.Module] = []
    model = program.LanguageModel
    monkeypatch.setattr(program, "LanguageModel", lambda *sizes: made.append(model(*sizes)) or made[-1])
    for way in program.steps(case):
        program.steps(case)[way]()
    weights = [m.embedding.weight.detach() for m in made[1:]]
    for found in weights[1:]:
        assert float((found - weights[0]).norm() / weights[0].norm()) < 1e-6
