"""The benchmarks run, write what they measured, and time nobody whose values are wrong. How fast is never tested."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import runpy
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from fused_ce.backends import cpu

pytest.importorskip("rich")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
needs_kernels = pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built")
OURS = ["fused_ce", "fused_ce inplace"]
if cpu._C:  # the slowest last: afterwards the best must be chosen again
    OURS += [f"fused_ce {isa}" for isa in ("avx2", "base") if isa in cpu._C.isa_names()]


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    """The benchmarks can be imported, run few rounds, and wait for no second thread when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.setattr(import_module("timing"), "LEAST", 2)
        yield patch
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def benchmark_cli(patch: pytest.MonkeyPatch) -> ModuleType:
    return import_module("cross_entropy")


@needs_kernels
def test_command_line_writes_json(patch: pytest.MonkeyPatch) -> None:
    suite = import_module("cpu_suite")
    options = ["--shapes", "8x10", "--dtype", "f32", "--peers", "torch,fused_ce", "--seconds", "0"]
    result = suite.outcome(suite.Run("huge pages", True, ["--threads", "1"]), options)
    facts = "date commit cpu cores threads load instruction_set huge_pages python torch triton fused_ce"
    assert set(facts.split()) <= set(result["machine"])
    assert result["machine"]["threads"] == 1
    assert result["machine"]["huge_pages"].endswith("THP_MEM_ALLOC_ENABLE=1")
    assert (result["title"], result["yardstick"]) == ("huge pages", "torch")
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


@pytest.mark.parametrize("program", ["cross_entropy", "cpu_suite", "accuracy", "never_slower"])
@pytest.mark.parametrize("as_module", [False, True])
def test_programs_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str, as_module: bool
) -> None:
    for module in ("benchmarks", *(path.stem for path in BENCHMARKS.glob("[!_]*.py"))):
        monkeypatch.setitem(sys.modules, module, None)  # back to what it was, afterwards
        del sys.modules[module]  # found again, from where the program looks
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    elsewhere = [path for path in sys.path if path != str(BENCHMARKS)]
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS.parent if as_module else BENCHMARKS), *elsewhere])
    run, name = runpy.run_path, f"{BENCHMARKS}/{program}.py"
    if as_module:
        run, name = runpy.run_module, f"benchmarks.{program}"
    with pytest.raises(SystemExit, match=r"^0$"):
        run(name, run_name="__main__")
    assert capsys.readouterr().out.startswith("usage: ")


def altered(loss_factor: float, grad_factor: float) -> Any:
    def stranger(problem: Any) -> Any:
        right = import_module("peers").PEERS["torch"](problem)

        def run() -> tuple[Any, Any]:
            loss, grad = right.run()
            return loss * loss_factor, grad * grad_factor

        return right._replace(run=run)

    return stranger


def absent(problem: Any) -> Any:
    import a_package_that_nobody_has

    return a_package_that_nobody_has


def foreign(problem: Any) -> Any:
    """Its results are no tensors."""
    right = import_module("peers").PEERS["torch"](problem)

    def run() -> tuple[Any, Any]:
        loss, grad = right.run()
        return loss.detach().numpy() if loss.dim() else loss.item(), grad.numpy()

    return right._replace(run=run)


def destructive(problem: Any) -> Any:
    """It needs its logits restored before each run."""
    logits = problem.input.detach().clone().requires_grad_()
    right = import_module("peers").PEERS["torch"](problem._replace(input=logits))

    def run() -> tuple[Any, Any]:
        assert logits.isfinite().all()
        loss, grad = right.run()
        logits.data.fill_(torch.nan)
        return loss, grad

    return right._replace(run=run, before=lambda: logits.data.copy_(problem.input))


WRONG = {"loss": altered(1.001, 1), "gradient": altered(1, 0.999), "gradient nan": altered(1, torch.nan)}
WRONG["gradient twice"] = altered(1, 2)
STRANGERS = {"absent": absent, "foreign": foreign, "destructive": destructive, **WRONG}


class Outcome(NamedTuple):
    reduction: str
    upstream: float
    rows: dict[str, dict[str, Any]]  # by peer
    printed: str


@pytest.fixture(
    scope="module", params=[("mean", 1.0), ("mean", 0.3), ("sum", 1.0), ("sum", 0.3), ("none", 1.0)], ids=str
)
def outcome(
    request: pytest.FixtureRequest,
    patch: pytest.MonkeyPatch,
    benchmark_cli: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> Outcome:
    """One run of the program, with peers that are right, wrong, absent and odd."""
    reduction, upstream = request.param
    for name, stranger in STRANGERS.items():
        patch.setitem(benchmark_cli.PEERS, name, stranger)
    peers = ["torch", "numpy", *OURS, *STRANGERS]
    file = tmp_path_factory.mktemp("benchmarks") / "out.json"
    arguments = ["--shapes", "33x70", "--dtype", "f32", "--peers", ",".join(peers), "--seconds", "0"]
    arguments += ["--reduction", reduction, "--upstream", str(upstream), "--json", str(file)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        isa = cpu._C and cpu._C.isa()
        assert benchmark_cli.main(arguments) == 0
        assert isa == (cpu._C and cpu._C.isa())
    rows = {row["peer"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == [*peers, "copy_ (bound)"]
    return Outcome(reduction, upstream, rows, printed.getvalue())


@pytest.mark.parametrize("peer", ["torch", "numpy", "foreign", "destructive", "copy_ (bound)"])
def test_right_peers_are_timed(outcome: Outcome, peer: str) -> None:
    row = outcome.rows[peer]
    if (outcome.reduction, peer) == ("none", "numpy"):
        assert (row["status"], row["reason"][:26]) == ("skipped", "only the mean and the sum,")
        return
    assert row["status"] == "timed", row["reason"]
    assert row["upstream"] == outcome.upstream
    assert row["median_s"] > 0


@needs_kernels
def test_fused_ce_is_right_and_timed(outcome: Outcome) -> None:
    assert {peer: outcome.rows[peer]["reason"] for peer in OURS} == dict.fromkeys(OURS, "")
    backends = {peer: outcome.rows[peer]["backend"] for peer in OURS}
    assert backends == {p: "cpu" if p in OURS[:2] else p.replace("fused_ce", "cpu") for p in OURS}
    passes = "2R+1W" if outcome.reduction == "none" else "1R+1W" if outcome.upstream == 1 else "2R+2W"
    assert outcome.rows["fused_ce"]["schedule"] == passes


@pytest.mark.parametrize("peer", WRONG)
def test_wrong_peers_are_refused(outcome: Outcome, peer: str) -> None:
    row = outcome.rows[peer]
    assert row["status"] == "refused"
    assert row["median_s"] is None
    assert row["reason"].startswith(f"wrong: {peer.split()[0]} is")
    assert f"refused: {peer} on 33x70 float32: wrong" in outcome.printed


def test_absent_peer_is_skipped(outcome: Outcome) -> None:
    row = outcome.rows["absent"]
    assert row["status"] == "skipped"
    assert row["reason"] == "ModuleNotFoundError: No module named 'a_package_that_nobody_has'"


def test_without_a_gradient(benchmark_cli: ModuleType) -> None:
    names = ["torch", "numpy", *OURS]
    arguments = ["--mode", "fwd", "--dtype", "f32", "--peers", ",".join(names), "--seconds", "0"]
    rows = benchmark_cli.measure(33, 70, "float32", benchmark_cli.parse(arguments))
    for row in rows:
        expected = "skipped" if row.peer == "fused_ce inplace" or (cpu._C is None and row.peer in OURS) else "timed"
        assert row.status == expected, row.reason
        assert row.grad_error_ulp is None
        assert row.schedule in (("1R+1W",) if row.peer.startswith("copy_") else ("1R", "1R+1W", "4R+2W", ""))


def test_goals_tell_hits_from_misses(patch: pytest.MonkeyPatch) -> None:
    goals, BOUND = import_module("cpu_suite").goals, import_module("report").BOUND

    def rows(mode: str, **seconds: float) -> dict[str, Any]:
        medians = {"torch": 13.0, "torch.compile": 3.0, BOUND: 1.0} | {"fused_ce": 1.0} | seconds
        shape = {"N": 256, "C": 128256, "dtype": "float32", "mode": mode}
        return {"rows": [shape | {"peer": peer, "median_s": median} for peer, median in medians.items()]}

    table = goals([rows("fwd_bwd", **{"fused_ce inplace": 1.5}), rows("fwd", fused_ce=0.5)])
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    assert cells == [
        ("256x128256 float32", "fused_ce", "13.00 (>= 13)", "3.00 (>= 6, missed)", "1.00 (<= 1.4)"),
        ("256x128256 float32", "fused_ce inplace", "8.67", "2.00", "1.50 (<= 1.15, missed)"),
        ("256x128256 float32", "fused_ce, no gradient", "26.00", "6.00", "0.50 (<= 0.6)"),
    ]


@pytest.fixture
def accuracy(patch: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/accuracy.py on few rows; tests/ has a module of that name too."""
    spec = importlib.util.spec_from_file_location("benchmarks_accuracy", BENCHMARKS / "accuracy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ELEMENTS", 4 * 65)
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # which it changes
    isa = cpu._C and cpu._C.isa()
    yield module
    if isa:
        cpu._C.set_isa(isa)


@needs_kernels
def test_accuracy_page(accuracy: ModuleType) -> None:
    with np.errstate(all="ignore"):  # Triton's interpreter is NumPy; inf - inf is silent on a GPU
        results = {
            (problem, name): found
            for dtype in accuracy.DTYPES
            for problem, name, found in accuracy.measure(dtype, 65, "normal", accuracy.implementations(dtype))
        }
    names = {name for _, name in results}
    assert {"torch", "torch on float32", *(f"cpu {isa}" for isa in cpu._C.isa_names())} <= names
    for (problem, name), found in results.items():
        if not name.startswith("torch"):
            assert found.grad < (16 if problem.dtype == "float32" else 0.51), (problem, name)
            assert found.loss < 16, (problem, name)
            assert found.rounded > (0 if problem.dtype == "float32" else 0.95), (problem, name)
    page = accuracy.page(results)
    lines = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("|")]
    for dtype in accuracy.DTYPES:
        assert f"\n## {dtype}\n" in page
    usual = ["logits, upstream gradient", "---", "normal, 1", "normal, 1/3", "classes", "---", "65"]
    assert lines == [*usual, *usual, *usual[:4], "normal, 65536", *usual[4:]]


def test_errors_in_ulp(accuracy: ModuleType) -> None:
    exact = torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=torch.float64)
    got = torch.tensor([1.0, 1 + 2**-23, 3 - 2**-22, torch.nan])
    assert accuracy.errors(got, exact).tolist() == [0, 1, 1, torch.inf]
    assert accuracy.errors(torch.zeros(2), torch.tensor([1e-38, 3e-38]).double(), 2e-38)[0] == 0
    assert accuracy.errors(torch.zeros(1), torch.tensor([3e-38]).double(), 2e-38) > 1
