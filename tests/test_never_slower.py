"""benchmarks/never_slower.py calls fused_ce and torch alike, and tells what is below its bar; not how fast it is."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fused_ce.backends import cpu

pytest.importorskip("rich")


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The program, which runs few rounds."""
    threads = torch.get_num_threads()
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.setattr(import_module("timing"), "LEAST", 2)
    yield import_module("never_slower")
    torch.set_num_threads(threads)


@pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built")
def test_never_slower_tells_what_is_below_the_bar(
    sweep: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    words = ["--threads", "1", "--seconds", "0.001", "--only", "8x2, every", "--json", str(file)]
    for bar in (0.0, float("inf")):
        with monkeypatch.context() as changed, contextlib.redirect_stdout(io.StringIO()) as printed:
            changed.setattr(sweep, "BAR", bar)
            assert sweep.main(words) == (bar > 0)
        found = json.loads(file.read_text())["calls"]
        below = len(found) if bar else 0
        assert f"{below} of {len(found)} calls below {bar}" in printed.getvalue()
    assert len(found) == sum("8x2, every" in str(case) for case in sweep.cases())
    for row in found:
        assert row["ratio"] == pytest.approx(row["torch_seconds"] / row["seconds"])
    assert [row["ratio"] for row in found] == sorted(row["ratio"] for row in found)


@pytest.mark.parametrize("option", ["plain", "probabilities that want a gradient", "weight, none", "no gradient"])
def test_never_slower_calls_both_alike(sweep: ModuleType, option: str) -> None:
    for layout in ("contiguous", "transposed", "every second class", "every second row", "columns of more"):
        ours, theirs = (call() for call in sweep.calls(sweep.Case((6, 10), layout, option)))
        for mine, of_torch in zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]:
            torch.testing.assert_close(mine, of_torch)
