"""Which models and heads fused_ce.integrations.transformers takes; what linear=True makes of them, and of PEFT's."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is not installed: pip install -e '.[integrations]'")

from hf_models import T, V, assert_same, batch, gradients, model, trained, transformers

from fused_ce.integrations import linear_head
from fused_ce.integrations import transformers as hf

pytestmark = pytest.mark.filterwarnings("default")
WAYS = pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
CLOSE = 2e-6


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
    with pytest.raises(TypeError, match="input_ids"):
        patched(inputs["input_ids"], **inputs)


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
