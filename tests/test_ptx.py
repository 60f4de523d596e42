"""A share of `python -m ptx`: the PTX of the kernels, executed, and some of it broken, which must be reported.

In a process of its own, since here Triton interprets. `make ptx` runs all of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("triton")
from test_gpu_static import python


@pytest.fixture(autouse=True)
def tests_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


IN_PLACE = ("--target", "sm_90", "--dtype", "bf16", "--only", "inplace", "--classes", "19,1000,4099")


@pytest.mark.parametrize("which", [("--share",), IN_PLACE], ids=["share", "in_place"])
def test_compiled_code_is_right(which: tuple[str, ...]) -> None:
    """Clusters, rows that begin anywhere, rows read twice, one-warp rows, pixels; in place, where threads may race."""
    assert " 0 with faults" in python("-m", "ptx", *which)


def test_broken_code_is_reported() -> None:
    assert "\n0 missed" in python("-m", "ptx", "--mutants", "--share")
