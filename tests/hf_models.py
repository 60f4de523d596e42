"""Tiny language models of transformers with random weights, and a few steps of its Trainer."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers import Trainer, TrainingArguments

import torch
from torch import Tensor

V, T = 257, 24
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0},
    "Phi": {},  # its head has a bias
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": V, **NO_DROPOUT},
}
NAMES = [name for name in CONFIGS if hasattr(transformers, f"{name}Config")]


def model(name: str = "Llama", dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    sizes = {} if name == "GPT2" else SIZES
    made = getattr(transformers, f"{name}Config")(**(sizes | CONFIGS.get(name, {}) | config))
    cls = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    torch.manual_seed(0)
    return cls(made).to(dtype)


def batch(rows: int = 2, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, V, (rows, T), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row in range(rows):
        labels[row, : (seed + row) % 2 * 5] = -100
    return {"input_ids": ids, "labels": labels}


class _Losses(Trainer):
    """Keeps the loss of every micro-batch, unrounded."""

    def compute_loss(self, *args: Any, **keywords: Any) -> Any:
        result = super().compute_loss(*args, **keywords)
        losses.append(float(result[0] if isinstance(result, tuple) else result))
        return result


losses: list[float] = []


def trained(model: Any, steps: int, folder: Any, accumulation: int = 4, **arguments: Any) -> list[float]:
    """The losses of the micro-batches."""
    settings = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **arguments,
    )
    # Of products this small, threads cost more than they give.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = [{name: value[0] for name, value in batch(1, seed).items()} for seed in range(24)]
    losses.clear()
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _Losses(model=model, args=settings, train_dataset=rows).train()
    torch.set_num_threads(threads)
    return list(losses)


def gradients(model: Any, **keywords: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss of a batch, and the gradients of every parameter that wants one."""
    model.zero_grad()
    loss = model(**(batch() | keywords)).loss
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]], rtol: float) -> None:
    """Equal losses; equal gradients, each relative to its own size."""
    assert abs(found[0] / expected[0] - 1) <= rtol, (found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for name, grad in found[1].items():
        error = float((grad - expected[1][name]).norm() / expected[1][name].norm().clamp(min=1e-20))
        assert error <= 10 * rtol, name
