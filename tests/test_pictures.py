"""The pictures of benchmarks/: what they say of what was measured, and of what was not."""

from __future__ import annotations

import json
import os
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("rich")
matplotlib = pytest.importorskip("matplotlib")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FACTS = {"cpu": "Abacus 3", "instruction_set": "beads", "threads": 7, "torch": "2.99", "date": "2031-02-03"}
FACTS |= {"commit": "abc123", "load": 0.1}


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # so that text is found
    return import_module("report")


def texts(picture: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)", picture.read_text())


def test_speed_names_everyone_and_who_is_missing(report: ModuleType, tmp_path: Path) -> None:
    def row(peer: str, dtype: str, ratio: float | None) -> Any:
        status = "skipped" if ratio is None else "timed"
        return report.Row(512, 32000, dtype, "fwd_bwd", "mean", peer, status=status, ratio=ratio)

    rows = [row("torch", "float32", 1.0), row("numpy", "float32", 0.5), row("fused_ce", "float32", 7.25)]
    rows += [row("torch", "bfloat16", 1.0), row("numpy", "bfloat16", None), row("fused_ce", "bfloat16", 2.5)]
    rows += [row("jax", "float32", None), row("jax", "bfloat16", None)]
    report.plot(str(tmp_path / "out.svg"), FACTS, rows, "torch")
    found = texts(tmp_path / "out.svg")
    for text in ("512 x 32000", "0.5", "7.2", "2.5", "numpy", "fused_ce", "float32", "bfloat16", "loss and gradient"):
        assert text in found, text
    assert found.count("times as fast as torch") == 2
    assert "logits: rows x classes" in found
    assert "Abacus 3, beads, 7 threads, torch 2.99, 2031-02-03, commit abc123, load 0.1" in found
    assert "not measured: numpy in bfloat16; jax" in found


def test_a_kept_measurement_is_drawn_again(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = import_module("cpu_suite")
    monkeypatch.setattr(suite, "outcome", pytest.fail)
    kept = max((BENCHMARKS / "results").glob("cpu-*.json"))
    assert suite.main(["--redraw", str(kept), "--plot", str(tmp_path / "out.svg")]) == 0
    rows = json.loads(kept.read_text())["runs"][0]["rows"]
    found = texts(tmp_path / "out.svg")
    for row in rows:
        if row["peer"] == "fused_ce":
            assert f"{row['ratio']:.1f}" in found
    assert "measured (goal)" in capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="resident memory is read from /proc")
def test_memory(report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = import_module("memory")
    monkeypatch.setattr(memory, "PEERS", dict(list(memory.PEERS.items())[::3]))  # the first and the last
    out, N, V = tmp_path / "out.json", 512, 20000
    sizes = ["--rows", str(N), "--features", "8", "--vocabularies", str(V)]
    assert memory.main([*sizes, "--json", str(out), "--plot", str(tmp_path / "out.svg")]) == 0
    found = json.loads(out.read_text())
    (whole,), (never_whole,) = found["MB"].values()
    logits = N * V * 4 / 1e6
    assert whole > 1.9 * logits  # logits and their gradient, or log-softmax
    assert 0 < never_whole < 0.9 * logits
    labels = texts(tmp_path / "out.svg")
    assert f"F.linear + F.cross_entropy: {whole:.0f} MB" in labels
    assert {"classes of the vocabulary, k = 1024", "peak memory, MB"} <= set(labels)
