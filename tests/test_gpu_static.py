"""The Triton kernels compiled for devices that are not here: no spills, wide loads and stores, one exponential a class.

How much they take, never how fast they are. In processes of their own, since here Triton interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
ALIGNED, ODD = (1000, 128256), 50257
NVIDIA = ("sm_80", "sm_90", "sm_100")
Rows = list[dict[str, Any]]


def python(*arguments: object) -> str:
    # What is on the path already comes first: tests and benchmarks both have an accuracy.py.
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT), str(ROOT / "benchmarks")]))
    environment = os.environ | {"PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("gpu_static") / "out.json"
    classes = ",".join(map(str, (*ALIGNED, ODD)))
    python(ROOT / "benchmarks" / "gpu_static.py", "--classes", classes, "--kernel", "forward,backward", "--json", file)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def rows(report: dict[str, Any]) -> Rows:
    return report["rows"]


def narrow(widths: dict[str, int]) -> int:
    """Loads or stores of less than 16 bytes; what there is one of a row takes a few."""
    return sum(number for bits, number in widths.items() if int(bits) < 128)


def sums_of_a_shard(row: dict[str, Any]) -> bool:
    return (row["kernel"], row["schedule"]) == ("forward", "shard")


def test_every_kernel_is_there(report: dict[str, Any]) -> None:
    wanted = {
        (target, dtype, V) for target in (*NVIDIA, "gfx942") for dtype in ("bf16", "f32") for V in (*ALIGNED, ODD)
    }
    kinds = {("forward", "loss"), ("forward", "fused"), ("forward", "recompute"), ("backward", "recompute")}
    kinds |= {("forward", "shard"), ("backward", "shard")}
    found: dict[Any, set[Any]] = {}
    for row in report["rows"]:
        found.setdefault((row["target"], row["dtype"], row["V"]), set()).add((row["kernel"], row["schedule"]))
        assert row["regs"] > 0
        assert row["ldg"]
        assert row["stg"]
        assert row["ex2"] > 0
    assert set(found) == wanted
    assert all(kinds <= kernels for kernels in found.values())
    size = 8192 * 128256 * 2
    floors = next(line for line in report["model"] if (line["V"], line["dtype"]) == (128256, "bf16"))
    assert floors["gb"]["2"] == pytest.approx(2 * size / 1e9)
    assert floors["floor_us"]["H100"]["3"] == pytest.approx(3 * size / 3.35e12 * 1e6)


def test_nothing_spills(rows: Rows) -> None:
    # Of a shard that is held whole, one number of the row: its code has no loop over classes.
    assert [row for row in rows if row["inner_spill"] > (sums_of_a_shard(row) and row["num_ctas"] > 1)] == []
    # Where rows are not held, ptxas may put a few of a row's own values aside, outside of the loop over classes.
    assert [row for row in rows if row["spill"] and row["schedule"] == "fused" and row["reads"] == 1] == []
    assert max(row["spill"] for row in rows) <= 8


def test_registers_leave_room_for_16_warps(rows: Rows) -> None:
    # What hides the latency of memory: half the bandwidth of an H100 is lost with much less.
    assert [row for row in rows if row["target"] in NVIDIA and row["resident_warps"] < 16] == []


def test_aligned_rows_move_16_bytes_at_a_time(rows: Rows) -> None:
    for row in rows:
        if row["V"] in ALIGNED and row["target"] in NVIDIA:
            assert row["ldg"].get("128", 0) > 0, row
            assert narrow(row["ldg"]) <= 8, row
            assert narrow(row["stg"]) <= (9 if sums_of_a_shard(row) else 6), row  # eight sums, and a bad target
            assert row["writes"] == 0 or row["stg"].get("128", 0) > 0, row


def test_odd_rows_are_stored_16_bytes_at_a_time(rows: Rows) -> None:
    for row in rows:
        if row["V"] == ODD and row["writes"]:
            assert row["stg"].get("128", 0) > 0, row
            assert narrow(row["stg"]) <= 8, row
            assert row["ldg"].get("128", 0) > 0, row


def test_one_exponential_each_time_a_logit_is_read(rows: Rows) -> None:
    for row in rows:
        if row["target"] in NVIDIA:
            assert row["reads"] - 0.05 <= row["exps"] <= row["reads"] + 0.15, row


def test_logits_are_read_once_where_a_row_fits(report: dict[str, Any], rows: Rows) -> None:
    clusters = tuple(int(number) for number in report["machine"]["triton"].split(".")[:2]) >= (3, 9)
    fused = [row for row in rows if (row["kernel"], row["schedule"]) == ("forward", "fused")]
    passes = {(row["target"], row["V"], row["dtype"]): (row["reads"], row["writes"]) for row in fused}
    ctas = {(row["target"], row["V"], row["dtype"]): row["num_ctas"] for row in fused}
    for dtype in ("bf16", "f32"):
        assert all(passes[target, 1000, dtype] == (1, 1) for target in (*NVIDIA, "gfx942"))
        for target in ("sm_90", "sm_100"):
            assert passes[target, 128256, dtype] == ((1, 1) if clusters else (2, 1))
            assert (ctas[target, 128256, dtype] > 1) == clusters
        assert passes["sm_80", 128256, dtype] == (2, 1)
    assert {row["num_ctas"] for row in rows if row["target"] in ("sm_80", "gfx942")} == {1}


SCRIPT = """
import json
import torch
from gpu_code import figures_of
from gpu_static import TARGETS, compiled, launches
from fused_ce.options import Options

def forward(**options):
    calls = launches(8192, 1000, torch.bfloat16, TARGETS["sm_90"], Options(**options))
    return next(call for call in calls if call.schedule == "fused" and call.kernel == "forward")

def code(**options):
    return compiled(forward(**options), TARGETS["sm_90"]).hash

cramped = compiled(forward(), TARGETS["sm_90"], maxnreg=32)
other = {"label_smoothing": 0.1, "lse_square_scale": 1e-4, "softcap": 30.0, "logit_scale": 0.5}
print(json.dumps({
    "spill": figures_of(cramped, 2)["inner_spill"],
    "again": [code(**{name: value}) == code(**{name: value * 1.5}) for name, value in other.items()],
    "ignored": code(ignore_index=-100) == code(ignore_index=1) == code(ignore_index=16),
}))
"""


def test_spills_are_seen_and_values_do_not_compile_again() -> None:
    found = json.loads(python("-c", SCRIPT))
    assert found["spill"] > 0
    assert found["again"] == [True] * 4
    assert found["ignored"]
