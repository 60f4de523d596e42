"""A backend is added as CONTRIBUTING says: written, registered, held to the contract for what it takes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy_backend
import pytest
import torch
from calls import x, y
from cases import CASES, Case
from conftest import Backend
from test_backends import holds

from fused_ce import cross_entropy
from fused_ce.backends.dispatch import BACKENDS, choose


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(BACKENDS, "numpy", numpy_backend)
    with np.errstate(all="ignore"):
        yield


def taken(case: Case) -> bool:
    return not numpy_backend.unsupported(case.build())


@pytest.mark.parametrize("case", [case for case in CASES if taken(case)], ids=str)
def test_the_contract_for_what_it_takes(case: Case) -> None:
    holds(Backend("numpy", numpy_backend, "cpu"), case)


def test_the_rest_is_declined_in_words() -> None:
    declined = [case for case in CASES if not taken(case)]
    assert 0 < len(declined) < len(CASES)
    for case in declined:
        call = case.build()
        with pytest.raises(NotImplementedError, match="backend 'numpy' cannot take") as error:
            choose(call, "numpy")
        assert all(reason in str(error.value) for reason in numpy_backend.unsupported(call))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_users_reach_it_by_name_alone(reduction: str) -> None:
    target = y(4)
    grads = []
    for keywords in ({"backend": "numpy"}, {}):
        input = x(4, 5).requires_grad_()
        loss = cross_entropy(input, target, reduction=reduction, **keywords)
        grads.append(torch.autograd.grad(loss.sum(), input)[0])
    torch.testing.assert_close(*grads, rtol=1e-13, atol=0)
    assert choose(Case("plain").build(), None) is not numpy_backend


def test_a_compiled_graph_asks_it_what_is_saved() -> None:
    torch._dynamo.reset()
    target = y(4)
    compiled = torch.compile(lambda input: cross_entropy(input, target, backend="numpy"), fullgraph=True)
    grads = []
    for function in (compiled, lambda input: torch.nn.functional.cross_entropy(input, target)):
        input = x(4, 5).requires_grad_()
        grads.append(torch.autograd.grad(function(input), input)[0])
    torch.testing.assert_close(*grads, rtol=1e-13, atol=0)
