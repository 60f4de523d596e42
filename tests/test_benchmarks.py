"""The benchmark runs, writes what it measured, and times nobody whose values are wrong. How fast is never tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fused_ce.backends.dispatch import BACKENDS

pytest.importorskip("rich")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark_cli(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import cross_entropy

    return cross_entropy


@pytest.mark.skipif(BACKENDS["cpu"]._C is None, reason="fused_ce._C is not built")
def test_command_line_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    options = ["--shapes", "8x10", "--dtype", "f32", "--peers", "torch,fused_ce", "--seconds", "0.01", "--json", file]
    subprocess.run([sys.executable, BENCHMARKS / "cross_entropy.py", *options], check=True, capture_output=True)
    result = json.loads(file.read_text())
    facts = "date commit cpu cores threads load instruction_set huge_pages python torch triton fused_ce"
    assert set(facts.split()) <= set(result["machine"])
    assert result["yardstick"] == "torch"
    torch_row, fused_row, copy_row = result["rows"]
    for row in result["rows"]:
        assert row["status"] == "timed", row["reason"]
        assert (row["N"], row["C"], row["dtype"], row["mode"]) == (8, 10, "float32", "fwd_bwd")
        assert row["rounds"] >= 7
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_s"] / 1e9)
        assert row["of_bound"] == pytest.approx(copy_row["median_s"] / row["median_s"])
    assert fused_row["ratio"] == pytest.approx(torch_row["median_s"] / fused_row["median_s"])
    assert (torch_row["schedule"], fused_row["schedule"], copy_row["schedule"]) == ("3R+3W", "1R+1W", "1R+1W")
    assert fused_row["bytes"] == 2 * 8 * 10 * 4
    assert fused_row["grad_error_ulp"] < 16


def rows_with(
    peer: Any, benchmark_cli: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *options: str
) -> dict[str, Any]:
    monkeypatch.setitem(benchmark_cli.PEERS, "stranger", peer)
    file = tmp_path / "out.json"
    arguments = ["--shapes", "5x7", "--dtype", "f32", "--peers", "torch,stranger", "--seconds", "0", *options]
    assert benchmark_cli.main([*arguments, "--json", str(file)]) == 0
    return {row["peer"]: row for row in json.loads(file.read_text())["rows"]}


def altered(benchmark_cli: ModuleType, loss_factor: float, grad_factor: float) -> Any:
    def stranger(problem: Any) -> Any:
        right = benchmark_cli.PEERS["torch"](problem)

        def run() -> tuple[Any, Any]:
            loss, grad = right.run()
            return loss * loss_factor, grad * grad_factor

        return right._replace(run=run)

    return stranger


@pytest.mark.parametrize(
    ("reduction", "loss", "grad", "named"),
    [("mean", 1.001, 1, "loss"), ("sum", 1, torch.nan, "gradient"), ("none", 1, 0.999, "gradient")],
)
def test_wrong_peer_is_refused(
    benchmark_cli: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reduction: str,
    loss: float,
    grad: float,
    named: str,
) -> None:
    wrong = altered(benchmark_cli, loss, grad)
    rows = rows_with(wrong, benchmark_cli, monkeypatch, tmp_path, "--reduction", reduction)
    assert rows["torch"]["status"] == "timed"
    assert rows["stranger"]["status"] == "refused"
    assert rows["stranger"]["median_s"] is None
    assert rows["stranger"]["reason"].startswith(f"wrong: {named} is")
    assert "refused: stranger on 5x7 float32: wrong" in capsys.readouterr().out


def test_absent_peer_is_skipped(benchmark_cli: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(problem: Any) -> Any:
        import a_package_that_nobody_has

        return a_package_that_nobody_has

    row = rows_with(absent, benchmark_cli, monkeypatch, tmp_path)["stranger"]
    assert row["status"] == "skipped"
    assert row["reason"] == "ModuleNotFoundError: No module named 'a_package_that_nobody_has'"


def test_results_of_other_libraries_are_read(
    benchmark_cli: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stranger(problem: Any) -> Any:
        right = benchmark_cli.PEERS["torch"](problem)

        def run() -> tuple[Any, Any]:
            loss, grad = right.run()
            return loss.item(), grad.numpy()

        return right._replace(run=run)

    row = rows_with(stranger, benchmark_cli, monkeypatch, tmp_path)["stranger"]
    assert row["status"] == "timed", row["reason"]


def test_upstream_gradient_and_what_comes_before_a_run(
    benchmark_cli: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stranger(problem: Any) -> Any:
        logits = problem.input.detach().clone().requires_grad_()
        right = benchmark_cli.PEERS["torch"](problem._replace(input=logits))

        def run() -> tuple[Any, Any]:
            assert logits.isfinite().all()
            loss, grad = right.run()
            logits.data.fill_(torch.nan)
            return loss, grad

        return right._replace(run=run, before=lambda: logits.data.copy_(problem.input))

    for reduction in ("mean", "sum"):
        options = "--reduction", reduction, "--upstream", "0.3"
        rows = rows_with(stranger, benchmark_cli, monkeypatch, tmp_path, *options)
        for row in rows.values():
            assert row["status"] == "timed", row["reason"]
            assert row["upstream"] == 0.3
    wrong = altered(benchmark_cli, 1, 2)
    assert rows_with(wrong, benchmark_cli, monkeypatch, tmp_path, *options)["stranger"]["status"] == "refused"


@pytest.mark.skipif(BACKENDS["cpu"]._C is None, reason="fused_ce._C is not built")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("upstream", ["1", "0.3"])
def test_peers_of_the_cpu_are_right(benchmark_cli: ModuleType, tmp_path: Path, reduction: str, upstream: str) -> None:
    file = tmp_path / "out.json"
    isas = [name for name in benchmark_cli.PEERS if name.removeprefix("fused_ce ") in BACKENDS["cpu"]._C.isa_names()]
    names = ["torch", "numpy", "fused_ce", "fused_ce inplace", *isas]
    arguments = ["--shapes", "33x70", "--dtype", "f32", "--peers", ",".join(names), "--seconds", "0"]
    arguments += ["--reduction", reduction, "--upstream", upstream, "--json", str(file)]
    assert benchmark_cli.main(arguments) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["peer"]: row["reason"] for row in rows} == {name: "" for name in [*names, "copy_ (bound)"]}


def test_goals_tell_hits_from_misses(benchmark_cli: ModuleType) -> None:
    from cpu_suite import goals
    from report import BOUND

    def rows(mode: str, **seconds: float) -> dict[str, Any]:
        medians = {"torch": 9.0, "torch.compile": 3.0, BOUND: 1.0} | {"fused_ce": 1.0} | seconds
        shape = {"N": 256, "C": 128256, "dtype": "float32", "mode": mode}
        return {"rows": [shape | {"peer": peer, "median_s": median} for peer, median in medians.items()]}

    table = goals([rows("fwd_bwd", **{"fused_ce inplace": 1.5}), rows("fwd", fused_ce=0.9)])
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert cells == [
        ("256x128256 float32", "fused_ce", "9.00 (>= 8)", "3.00 (>= 4, missed)", "1.00 (<= 2.5)"),
        ("256x128256 float32", "fused_ce inplace", "6.00", "2.00", "1.50 (<= 1.4, missed)"),
        ("256x128256 float32", "fused_ce, no gradient", "10.00", "3.33", "0.90 (<= 1)"),
    ]
