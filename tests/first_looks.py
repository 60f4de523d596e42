"""Kernels that nobody has looked at yet, and what makes them wrong: for the tests of `self_check`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fused_ce.backends.triton import kernels, self_check
from fused_ce.contract import RowSums


@pytest.fixture(autouse=True)
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Under the interpreter too, and nothing is settled yet."""
    monkeypatch.setattr(self_check, "SETTING", "1")
    for name, empty in (("PASSED", []), ("UNCOMPARED", []), ("_settled", set()), ("DECLINED", {}), ("_tried", {})):
        monkeypatch.setattr(self_check, name, empty)
    self_check._is_wanted.cache_clear()
    yield
    self_check._is_wanted.cache_clear()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are launched from here on."""
    launched, launch_all = [], kernels.launch

    def noted(kernel: str, *args: Any, **meta: Any) -> None:
        launched.append(kernel)
        launch_all(kernel, *args, **meta)

    monkeypatch.setattr(kernels, "launch", noted)
    return launched


def make_wrong(monkeypatch: pytest.MonkeyPatch, broken: str, what: str, factor: float = 1.01) -> None:
    """After this kernel, what it wrote is off by a factor."""
    launch_all = kernels.launch

    def wrong(kernel: str, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        launch_all(kernel, grid, *args, **meta)
        if kernel != broken:
            return
        if kernel == "forward":
            out = args[2]
            written = {"loss": out.loss, "grad": out.grad.ptr, "lse": out.stats and out.stats.lse}
            written |= {} if out.sums is None else dict(zip(RowSums._fields, out.sums, strict=True))
            written = written[what]
        elif kernel == "backward":
            written = {"grad": args[2].input.ptr, "target": args[2].target.ptr}[what]
        else:
            written = args[2] if kernel in ("prepare", "total") else args[3]
        if written is not None:
            written.mul_(factor)

    monkeypatch.setattr(kernels, "launch", wrong)
