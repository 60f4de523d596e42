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

from hf_models import NAMES, VERSION, T, V, assert_same, batch, gradients, model, trained, transformers

from fused_ce.integrations import linear_head
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


def test_linear_makes_no_logits_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    forward = nn.Linear.forward

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        made.extend([x.shape[-2]] * (self.out_features == V))
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    patched = hf.patch(model().train(), linear=True)
    inputs = batch()
    assert patched(**inputs).logits is None
    assert patched(**inputs, output_hidden_states=True).hidden_states is not None
    loss, *rest = patched(inputs["input_ids"], labels=inputs["labels"], return_dict=False)
    assert loss.dim() == 0
    assert all(not isinstance(part, Tensor) or part.shape[-1] != V for part in rest)
    assert made == []
    assert patched(**inputs, skip_logits=False).logits.shape == (2, T, V)
    assert patched(inputs["input_ids"]).logits.shape == (2, T, V)
    kept = {"logits_to_keep": 5, "labels": inputs["labels"][:, -5:]}
    assert patched(inputs["input_ids"], **kept).logits.shape == (2, 5, V)
    assert made == [T, T, 5]
    patched.eval()
    assert patched(**inputs).logits.shape == (2, T, V)
    assert patched(**inputs, skip_logits=True).logits is None
    assert len(made) == 4
    patched.generate(inputs["input_ids"], max_new_tokens=2, do_sample=False, pad_token_id=0)


def test_linear_takes_positional_arguments() -> None:
    inputs, patched = batch(), hf.patch(model().train(), linear=True)
    mask = torch.ones_like(inputs["input_ids"])
    loss = patched(inputs["input_ids"], mask, labels=inputs["labels"]).loss
    assert torch.equal(loss, patched(**inputs, attention_mask=mask).loss)


def other_forward() -> Any:
    class Scaled(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **keywords: Any) -> Any:
            output = super().forward(*args, **keywords)
            output.loss = 2 * output.loss
            return output

    return Scaled(model().config)


def hooked_head() -> Any:
    made = model()
    made.lm_head.register_forward_hook(lambda *_: None)
    return made


def replaced_forward() -> Any:
    made = model()
    made.forward = functools.partial(type(made).forward, made)
    return made


def with_loss(loss: Any) -> Any:
    made = model()
    made.loss_function = loss
    return made


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": V}


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=V, **sizes))


def classifier() -> Any:
    return transformers.LlamaForSequenceClassification(model().config)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "typo": (model, {"label_smooting": 0.1}, "no option label_smooting; expected some of backend, inplace, label"),
    "inplace, linear": (model, {"inplace": True, "linear": True}, "no option inplace with linear=True"),
    "T5": (t5, {}, "T5ForConditionalGeneration does not compute its loss by loss_function"),
    "classifier": (classifier, {}, "expected (that of )?a causal or masked"),
    "another loss": (lambda: with_loss(len), {}, "the loss of LlamaForCausalLM is len; expected"),
    "no model": (lambda: len, {}, "expected a model of transformers, got builtin_function_or_method"),
    "plain module": (lambda: nn.Linear(2, 2), {}, "Linear does not compute its loss by loss_function"),
    "own forward": (other_forward, {}, "Scaled does not compute its loss by loss_function"),
    "MoE": (lambda: model("Mixtral"), {"linear": True}, "not that of MixtralForCausalLM, which may do something else"),
    "scaled head": (lambda: model("Cohere"), {"linear": True}, "not that of CohereForCausalLM"),
    "hooks": (hooked_head, {"linear": True}, "lm_head is one with hooks"),
    "replaced forward": (replaced_forward, {"linear": True}, "the forward of this LlamaForCausalLM was replaced"),
    "two softcaps": (lambda: model("Gemma2"), {"linear": True, "softcap": 3.0}, "expected no softcap, since Gemma2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    make, options, words = REFUSED[name]
    made = make()
    before, cls = dict(getattr(made, "__dict__", {})), type(made)
    with pytest.raises(TypeError, match=words):
        hf.patch(made, **options)
    assert dict(getattr(made, "__dict__", {})) == before, "nothing was changed"
    assert type(made) is cls


def test_before_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.PreTrainedModel, "loss_function")
    with pytest.raises(RuntimeError, match=rf"expected transformers 4.49 or later.*got {transformers.__version__}"):
        hf.patch(model())


def test_models_with_the_same_forward_are_taken() -> None:
    read = {linear_head._code(getattr(transformers, name)) for name in linear_head._READ}
    assert 2 <= len(read) <= len(linear_head._READ)
    for name in ("Phi3ForCausalLM", "OlmoForCausalLM"):
        assert linear_head._code(getattr(transformers, name)) in read


class TestPeft:
    """LoRA: the base model is found, a trained head heeded, an adapter of the head refused for linear."""

    @pytest.fixture(autouse=True)
    def needs_peft(self) -> None:
        pytest.importorskip("peft", reason="peft is not installed")

    @staticmethod
    def lora(base: Any, **config: Any) -> Any:
        import peft

        torch.manual_seed(3)
        settings = {"target_modules": ["q_proj"], "r": 2, "init_lora_weights": False} | config
        return peft.get_peft_model(base, peft.LoraConfig(**settings))

    @WAYS
    @pytest.mark.parametrize("trained_head", [False, True])
    def test_equal_gradients(self, linear: bool, trained_head: bool) -> None:
        config = {"modules_to_save": ["lm_head"]} if trained_head else {}
        expected = gradients(self.lora(model(), **config))
        assert any("lm_head" in name for name in expected[1]) == trained_head
        after = hf.patch(self.lora(model(), **config), linear=linear)
        assert_same(gradients(after), expected, CLOSE)
        before = self.lora(hf.patch(model(), linear=linear), **config)
        assert_same(gradients(before), expected, CLOSE)
        with before.disable_adapter(), torch.no_grad():
            assert float(before(**batch()).loss) == pytest.approx(float(model()(**batch()).loss), rel=CLOSE)
        hf.unpatch(after)
        assert not hf._is_ours(after.get_base_model().loss_function)

    @WAYS
    def test_equal_curves(self, linear: bool, tmp_path: Path) -> None:
        curves = [trained(self.lora(model()), 3, tmp_path)]
        curves.append(trained(hf.patch(self.lora(model()), linear=linear), 3, tmp_path))
        torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=5e-6, atol=0)

    def test_an_adapter_of_the_head(self) -> None:
        config = {"target_modules": ["lm_head"]}
        with pytest.raises(TypeError, match="the model's lm_head is Linear"):
            hf.patch(self.lora(model(), **config), linear=True)
        later = self.lora(hf.patch(model(), linear=True), **config).train()
        with pytest.raises(TypeError, match="call unpatch"):
            later(**batch())
        assert_same(gradients(hf.patch(hf.unpatch(later))), gradients(self.lora(model(), **config)), CLOSE)
