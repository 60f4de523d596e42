"""The blocks of docs/integrations.md and docs/logging.md run, and give what the frameworks give without fused_ce."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ce

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(not DOCS.exists(), reason="not a checkout"),
]
PACKAGES = ("accelerate", "lightning", "timm", "torchmetrics", "transformers", "trl")


def blocks() -> Iterator[tuple[str, str]]:
    for name in ("integrations.md", "logging.md"):
        for heading, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (DOCS / name).read_text(), re.S | re.M):
            code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.S))
            if code:
                yield f"{name}: {heading}", code


BLOCKS = dict(blocks()) if DOCS.exists() else {}


def run(name: str) -> dict[str, Any]:
    """What a section of the docs defines; skipped where it imports what is not installed."""
    for package in PACKAGES:
        if re.search(rf"import {package}\b|from {package}\b|integrations\.{package}\b", BLOCKS[name]):
            if find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    __import__(package)
                except Exception as error:
                    pytest.skip(f"{package} does not import here: {error}")
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[name], name, "exec"), names)
    return names


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_run(name: str) -> None:
    torch.manual_seed(0)
    run(name)
    assert not fused_ce.is_patched()


def data(rows: int, inputs: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, inputs, generator=generator), torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(precision: str, tmp_path: Path) -> None:
    names = run("integrations.md: Lightning")
    lightning = names["lightning"]
    rows = torch.utils.data.TensorDataset(*data(32, 16, 10))
    curves = []
    for loss in (None, nn.CrossEntropyLoss()):
        torch.manual_seed(0)
        classifier = names["Classifier"]()
        classifier.loss = loss or classifier.loss
        curve: list[float] = []
        classifier.loss.register_forward_hook(lambda _, __, out, curve=curve: curve.append(float(out)))
        keywords = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", precision=precision, default_root_dir=tmp_path, **keywords
        )
        trainer.fit(classifier, torch.utils.data.DataLoader(rows, batch_size=8))
        curves.append(curve)
    assert len(curves[0]) == 8
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=2e-6, atol=0)


def test_metrics_in_lightning(tmp_path: Path) -> None:
    names = run("logging.md: Lightning")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50))
    ids = torch.randint(50, (4, 6))
    target = ids.roll(-1, 1)
    target[:, -1] = -100
    batches = torch.utils.data.DataLoader([{"input": i, "target": t} for i, t in zip(ids, target, strict=True)], 4)
    logits = net(ids).detach().double().flatten(0, 1)
    keywords = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = names["lightning"].Trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path, **keywords)
    trainer.fit(names["LanguageModel"](net), batches)
    assert_metrics({k: float(v) for k, v in trainer.logged_metrics.items()}, logits, target.flatten(), 1e-4)


def assert_metrics(logged: dict[str, float], logits: Tensor, target: Tensor, scale: float) -> None:
    """As out of float64 and torch."""
    kept = target != -100
    logps = logits[kept].log_softmax(-1)
    exact = {
        "accuracy": (logps.argmax(-1) == target[kept]).double().mean(),
        "perplexity": F.nll_loss(logps, target[kept]).exp(),
        "entropy": -(logps.exp() * logps).sum(-1).mean(),
        "z_loss": scale * logits[kept].logsumexp(-1).square().mean(),
    }
    for name, value in exact.items():
        assert logged[name] == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.parametrize("scale", [0.0, 1e-2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_metrics_in_trainer(scale: float, accumulation: int, tmp_path: Path) -> None:
    names = run("logging.md: transformers' Trainer")
    from hf_models import batch, model, transformers

    patched = model()
    rows = [{name: value[0] for name, value in batch(1, seed).items()} for seed in range(2 * accumulation)]
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    logits = patched(ids).logits.detach().double()[:, :-1].flatten(0, 1)
    metrics = names["Metrics"](patched, scale)
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=patched, args=settings, train_dataset=rows, callbacks=[metrics])
    trainer.train()
    (logged,) = [log for log in trainer.state.log_history if "loss" in log]
    assert_metrics(logged, logits, labels[:, 1:].flatten(), scale)


def test_torchtitans_loss() -> None:
    loss_function = run("integrations.md: torchtitan")["loss_function"]
    pred, labels = torch.randn(2, 5, 11, requires_grad=True), torch.randint(11, (2, 5))
    labels[0, 1] = -100
    expected = F.cross_entropy(pred.flatten(0, 1).float(), labels.flatten(), reduction="sum", ignore_index=-100)
    torch.testing.assert_close(loss_function(pred, labels), expected, rtol=1e-6, atol=0)


def test_segmentation_leaves_255_out() -> None:
    names = run("integrations.md: Segmentation")
    net, images, labels = names["net"], names["images"], names["labels"]
    logits = net(images)
    ours, theirs = (
        torch.autograd.grad(loss(logits, labels), logits, retain_graph=True)[0]
        for loss in (names["criterion"], nn.CrossEntropyLoss(ignore_index=255))
    )
    assert bool((ours[:, :, :4] == 0).all())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-12)
