"""Fixtures: the backends under test, poisoned memory, and a Triton interpreter that rounds as hardware does."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ranks import Ranks

from fused_ce.backends.dispatch import BACKENDS
from fused_ce.backends.triton import kernels, targets
from fused_ce.contract import Backend as Contract

_C = BACKENDS["cpu"]._C
ISAS = _C.isa_names() if _C else []
HAS_TRITON = find_spec("triton") is not None
INTERPRET = HAS_TRITON and not torch.cuda.is_available()
if INTERPRET:
    # Read where triton is imported, and by launch.py. Only tests that ask for Triton see it again: an ordinary call on
    # the CPU does not know of the interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
    kernels.table()
    import_module("row_sums_kernel")
    del os.environ["TRITON_INTERPRET"]


def pytest_configure(config: pytest.Config) -> None:
    # torch's own: when forward-mode differentiation is first used (a FutureWarning from 2.14 on), and in opcheck.
    for name in ("DeprecationWarning", "FutureWarning"):
        for function in ("script", "trace"):
            config.addinivalue_line("filterwarnings", f"ignore:.torch.jit.{function}:{name}")
    config.addinivalue_line("filterwarnings", r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")


class Backend(NamedTuple):
    """One implementation of `fused_ce.contract.Backend`, and where its tensors live."""

    name: str
    module: Contract
    device: str


def _backend_params() -> list[Any]:
    cpu = [f"cpu[{isa}]" for isa in ISAS] or [pytest.param("cpu", marks=pytest.mark.skip("fused_ce._C is not built"))]
    triton = "triton" if HAS_TRITON else pytest.param("triton", marks=pytest.mark.skip("triton is not installed"))
    return ["reference", *cpu, triton]


@pytest.fixture(params=_backend_params())
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Every backend that runs on this machine; the C++ one once for each instruction set."""
    name, _, isa = request.param.rstrip("]").partition("[")
    with ExitStack() as stack:
        if isa:
            stack.callback(_C.set_isa, _C.isa())
            _C.set_isa(isa)
        if name == "triton" and INTERPRET:
            stack.enter_context(pytest.MonkeyPatch.context()).setenv("TRITON_INTERPRET", "1")
            stack.enter_context(np.errstate(all="ignore"))  # the interpreter is NumPy; inf - inf is silent on a GPU
        yield Backend(name, BACKENDS[name], "cuda" if name == "triton" and not INTERPRET else "cpu")


@pytest.fixture(params=ISAS or [pytest.param("", marks=pytest.mark.skip("fused_ce._C is not built"))])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of the C++ backend that this processor runs."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised tensors hold NaN or a huge integer, so that an element nobody wrote is seen."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_and_fill(*args: Any, **kwargs: Any) -> torch.Tensor:
            result = allocate(*args, **kwargs)
            if torch.compiler.is_compiling():
                return result
            with torch.no_grad():
                if result.is_floating_point():
                    result.fill_(torch.nan)
                elif result.dtype in (torch.uint8, torch.int32, torch.int64):
                    result.fill_(torch.iinfo(result.dtype).max)
            return result

        return allocate_and_fill

    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True, scope="session")
def triton_rounds_like_hardware() -> Iterator[None]:
    if not INTERPRET:
        yield
        return
    from interpreter import like_hardware

    with like_hardware():
        yield


@pytest.fixture(autouse=True)
def forgotten_targets() -> None:
    """Another test's target out of range is not this one's."""
    for met in targets._FLAGS.values():
        met.zero_()


@pytest.fixture
def own_pool() -> Iterator[None]:
    """A pool that is on and empty, and of which nothing is in use any more at the end."""
    gc.collect()
    _C.keep_at_most(1 << 32)
    _C.empty_cache()
    used = _C.held()[0]
    yield
    gc.collect()
    _C.keep_at_most(1 << 32)
    _C.empty_cache()
    assert _C.held()[0] == used  # nothing outlives its tensor


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """The ranks of a gloo group."""
    started = Ranks()
    yield started
    started.stop()
