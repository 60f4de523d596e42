"""`Options` and the keywords that torch does not have: what they refuse, and in which words."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from calls import x, y

from fused_ce import cross_entropy
from fused_ce.options import REDUCTIONS, Options, check_keywords

REFUSED = [
    ({"logit_scale": torch.inf}, "logit_scale must be a finite number, got inf"),
    ({"logit_scale": torch.nan}, "logit_scale must be a finite number, got nan"),
    ({"softcap": 0.0}, "softcap must be a positive finite number or None (no softcap), got 0.0"),
    ({"softcap": -30.0}, "softcap must be a positive finite number or None (no softcap), got -30.0"),
    ({"softcap": torch.inf}, "softcap must be a positive finite number or None (no softcap), got inf"),
    ({"softcap": torch.nan}, "softcap must be a positive finite number or None (no softcap), got nan"),
    ({"lse_square_scale": -torch.inf}, "lse_square_scale must be a finite number, got -inf"),
    ({"num_items": 0}, "num_items must be a positive finite number, got 0"),
    ({"num_items": torch.ones(2)}, "num_items must be a number or a 0-d tensor, got a tensor of shape (2,)"),
    ({"grad_scale": -1.0}, "grad_scale must be a positive finite number, got -1.0"),
    ({"grad_scale": torch.inf}, "grad_scale must be a positive finite number, got inf"),
    ({"grad_scale": torch.ones(1, 2)}, "grad_scale must be a number or a 0-d tensor, got a tensor of shape (1, 2)"),
    ({"num_items": 3, "reduction": "sum"}, 'num_items replaces the divisor of reduction="mean", got reduction="sum"'),
    ({"num_items": 3, "reduction": "none"}, 'num_items replaces the divisor of reduction="mean", got reduction="none"'),
]


@pytest.mark.parametrize(("keywords", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refuses(keywords: dict[str, Any], message: str) -> None:
    for refuse in (lambda: check_keywords(Options(**keywords)), lambda: cross_entropy(x(3, 5), y(3), **keywords)):
        with pytest.raises(ValueError, match="got") as error:
            refuse()
        assert str(error.value).startswith(message)


WRONG_TYPES = [
    {"dtype": "float32"},
    {"softcap": "30"},
    {"logit_scale": None},
    {"logit_scale": torch.tensor(1.0)},
    {"lse_square_scale": torch.tensor(0.0)},
    {"num_items": "3"},
    {"num_items": torch.tensor(1j)},
]
NOT_IN_FLOAT32 = [{"softcap": 1e39}, {"softcap": 1e-39}, {"logit_scale": 1e39}, {"lse_square_scale": -1e39}]


@pytest.mark.parametrize("keywords", WRONG_TYPES, ids=str)
def test_refuses_other_types(keywords: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"must be .*, got"):
        cross_entropy(x(3, 5), y(3), **keywords)


@pytest.mark.parametrize("keywords", NOT_IN_FLOAT32, ids=str)
def test_refuses_what_float32_cannot_hold(keywords: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="float32, got"):
        cross_entropy(x(3, 5, dtype=torch.float32), y(3), **keywords)
    assert cross_entropy(x(3, 5), y(3), **keywords).isfinite()  # float64 holds it


@pytest.mark.parametrize("number", [10**400, float("nan"), 0])
def test_refuses_numbers_of_items_that_are_none(number: float) -> None:
    with pytest.raises(ValueError, match="num_items must be a positive finite number"):
        cross_entropy(x(3, 5), y(3), num_items=number)
    assert cross_entropy(x(3, 5), y(3), num_items=torch.tensor(torch.nan)).isnan()  # a tensor's value is not looked at


@pytest.mark.parametrize(
    "keywords",
    [{"logit_scale": -2.0}, {"logit_scale": 0.0}, {"softcap": 1e-3}, {"lse_square_scale": -0.1}, {"num_items": 0.5}],
    ids=str,
)
def test_accepts(keywords: dict[str, Any]) -> None:
    check_keywords(Options(**keywords))
    assert cross_entropy(x(3, 5), y(3), **keywords).isfinite()


def test_defaults_are_those_of_the_public_function() -> None:
    defaults = {name: given.default for name, given in inspect.signature(cross_entropy).parameters.items()}
    for name, value in Options().keywords().items():
        assert defaults[name] == value


@pytest.mark.parametrize(
    ("keywords", "plain"),
    [
        ({}, True),
        ({"label_smoothing": 0.1, "ignore_index": 3, "reduction": "sum", "dtype": torch.float32}, True),
        ({"logit_scale": 2.0}, False),
        ({"softcap": 5.0}, False),
        ({"lse_square_scale": 1e-4}, False),
        ({"num_items": 2}, False),
        ({"return_stats": True}, False),
        ({"grad_scale": 3.0, "inplace": True}, True),
    ],
    ids=str,
)
def test_is_plain(keywords: dict[str, Any], plain: bool) -> None:
    assert Options(**keywords).is_plain == plain


def test_reductions_in_the_order_of_the_kernels() -> None:
    assert REDUCTIONS == ("none", "mean", "sum")  # csrc/cross_entropy.h counts the same way
