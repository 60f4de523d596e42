"""fused_ce.integrations.transformers: the same losses, gradients and curves, or a refusal in words."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[integrations]'")

from hf_models import NAMES, VERSION, V, assert_same, batch, gradients, model, trained

from fused_ce.integrations import transformers as hf

pytestmark = pytest.mark.filterwarnings("default")
loss_utils = pytest.importorskip("transformers.loss.loss_utils")
WAYS = pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
CLOSE = 2e-6


@functools.cache
def stock_curve(name: str, dtype: torch.dtype) -> list[float]:
    return trained(model(name, dtype), 12, "/tmp/fused_ce_curves")


@WAYS
@pytest.mark.parametrize("name", NAMES)
def test_equal_curves(name: str, linear: bool, tmp_path: Path) -> None:
    curve = trained(hf.patch(model(name), linear=linear), 12, tmp_path)
    expected = stock_curve(name, torch.float32)
    assert len(curve) == len(expected) == 48
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), rtol=5e-6, atol=0)


@WAYS
def test_equal_curves_in_bfloat16(linear: bool, tmp_path: Path) -> None:
    curve = trained(hf.patch(model("Llama", torch.bfloat16), linear=linear), 12, tmp_path)
    expected = stock_curve("Llama", torch.bfloat16)
    # A head's product of bfloat16 is rounded alike either way, and so are the gradients; which way ties go is not.
    torch.testing.assert_close(torch.tensor(curve), torch.tensor(expected), rtol=2e-3 if linear else 5e-4, atol=0)


@WAYS
def test_the_divisor_is_trainers(linear: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer counts labels[:, 1:] where LOSS_MAPPING holds transformers' own function, and all labels elsewhere."""
    (first, *_) = trained(model(), 1, tmp_path)
    (patched, *_) = trained(hf.patch(model(), linear=linear), 1, tmp_path)
    assert abs(patched / first - 1) <= CLOSE
    monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", hf.causal_lm_loss)
    (trap, *_) = trained(model(), 1, tmp_path)
    if VERSION >= (5, 12):
        assert abs(trap / first - 1) > 1e-3, "replacing LOSS_MAPPING changes the divisor"


@WAYS
@pytest.mark.parametrize("name", NAMES)
def test_equal_gradients(name: str, linear: bool) -> None:
    stock = model(name, torch.float64)
    for keywords in (
        {},
        {"num_items_in_batch": 50},
        {"num_items_in_batch": torch.tensor([50])},
        {"shift_labels": batch()["labels"]} if VERSION >= (4, 51) else {},
    ):
        expected = gradients(stock, **_scalar(keywords))
        # transformers casts float64 logits to float32.
        assert_same(gradients(hf.patch(model(name, torch.float64), linear=linear), **keywords), expected, 1e-6)


def _scalar(keywords: dict[str, Any]) -> dict[str, Any]:
    """What transformers' own loss gives a scalar for."""
    return {k: v.reshape(()) if k == "num_items_in_batch" and isinstance(v, Tensor) else v for k, v in keywords.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7), torch.tensor([7]), 0], ids=str)
@pytest.mark.parametrize("kind", ["causal", "shifted", "masked"])
def test_losses_are_transformers_own(kind: str, items: Any, dtype: torch.dtype) -> None:
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    labels = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(1))
    labels[0, 2] = -100
    keywords: dict[str, Any] = {"vocab_size": 11, "output_attentions": True}
    if kind == "shifted":
        keywords["shift_labels"] = labels.roll(-1, 1)
    theirs, ours = loss_utils.ForCausalLMLoss, hf.causal_lm_loss
    if kind == "masked":
        theirs, ours = loss_utils.ForMaskedLMLoss, hf.masked_lm_loss
    one = items.reshape(()) if isinstance(items, Tensor) else items
    if VERSION < (4, 51):
        keywords.pop("shift_labels", None)
    expected = theirs(logits, labels, num_items_in_batch=one, **keywords)
    found = ours(logits, labels, num_items_in_batch=items, **keywords)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)
    if items != 0:
        grads = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
        rtol = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
        torch.testing.assert_close(grads[0], grads[1], rtol=rtol, atol=1e-8)


@WAYS
def test_options(linear: bool, tmp_path: Path) -> None:
    """Smoothing here equals TrainingArguments' own; each option reaches the loss; a second patch replaces the first."""
    stock = trained(model(), 2, tmp_path, label_smoothing_factor=0.1)
    patched = hf.patch(model(), linear=linear, label_smoothing=0.1)
    if VERSION >= (5, 12):  # before, it divided each micro-batch by its own count
        torch.testing.assert_close(torch.tensor(trained(patched, 2, tmp_path)), torch.tensor(stock), rtol=5e-6, atol=0)
    plain, _ = gradients(hf.patch(model(), linear=linear))
    for options in ({"softcap": 0.1}, {"logit_scale": 0.5}, {"lse_square_scale": 0.1}, {"label_smoothing": 0.5}):
        both = [gradients(hf.patch(model(), linear=way, **options)) for way in (linear, not linear)]
        assert abs(both[0][0] / plain - 1) > 1e-4
        assert_same(both[0], both[1], CLOSE)
    once_more = hf.patch(hf.patch(model(), linear=linear, softcap=0.1), linear=linear)
    assert gradients(once_more)[0] == plain


def test_options_apply_to_capped_logits() -> None:
    for scale in (0.5, -2.0):
        both = [gradients(hf.patch(model("Gemma2"), linear=way, logit_scale=scale)) for way in (False, True)]
        assert_same(both[1], both[0], CLOSE)


@pytest.mark.parametrize("linear", [False, True])
def test_unpatch_leaves_nothing(linear: bool) -> None:
    stock = model()
    before, cls = dict(vars(stock)), type(stock)
    hf.patch(stock, linear=linear)
    assert type(stock).__name__ == cls.__name__
    assert isinstance(stock, cls)
    assert hf.unpatch(stock) is stock
    hf.unpatch(stock)
    assert vars(stock).keys() == before.keys()
    assert type(stock) is cls
    assert stock.loss_function is loss_utils.ForCausalLMLoss


@WAYS
def test_copies_are_patched_too(linear: bool) -> None:
    patched = hf.patch(model(), linear=linear)
    expected = gradients(patched)
    for copied in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert type(copied) is type(patched)
        assert copied.lm_head is not patched.lm_head
        assert_same(gradients(copied), expected, 0)
    replica = patched._replicate_for_data_parallel()
    replica._modules["lm_head"] = nn.Linear(32, V, bias=False)
    if linear:
        assert float(replica(**batch()).loss) != expected[0], "a replica uses its own head"


@WAYS
def test_gradient_checkpointing(linear: bool) -> None:
    expected = gradients(model().train())
    patched = hf.patch(model().train(), linear=linear)
    patched.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(gradients(patched), expected, CLOSE)


@WAYS
@pytest.mark.skipif(VERSION < (5, 0), reason="transformers 4.49 itself does not compile whole on torch 2.13")
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_compiled_whole(name: str, linear: bool) -> None:
    expected = gradients(model(name))
    torch._dynamo.reset()
    patched = hf.patch(model(name), linear=linear)
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)
    compiled.zero_grad()
    loss = compiled(**batch(), use_cache=False).loss
    loss.backward()
    found = float(loss), {name: p.grad for name, p in patched.named_parameters() if p.grad is not None}
    assert_same(found, expected, CLOSE)
    assert hf.unpatch(compiled) is compiled
    assert not hf._is_ours(patched.loss_function)


@WAYS
def test_ddp(linear: bool) -> None:
    expected = gradients(model())
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(hf.patch(model(), linear=linear))
        loss, grads = gradients(wrapped)
        assert_same((loss, {name.removeprefix("module."): grad for name, grad in grads.items()}), expected, CLOSE)
        hf.unpatch(wrapped)
        assert not hf._is_ours(wrapped.module.loss_function)
    finally:
        torch.distributed.destroy_process_group()


@WAYS
def test_autocast(linear: bool) -> None:
    """The loss is float32, of products of bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model())
        patched = hf.patch(model(), linear=linear)
        assert patched(**batch()).loss.dtype == torch.float32
        assert_same(gradients(patched), expected, 1e-3)
