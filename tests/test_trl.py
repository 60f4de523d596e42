"""fused_ce.integrations.trl: TRL's helpers by signature, and its trainers with and without the patch."""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import relative_error
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("trl", reason="trl is not installed: pip install -e '.[integrations]'")

import hf_models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl.trainer import utils

from fused_ce.integrations import trl as ours

pytestmark = pytest.mark.filterwarnings("default")
THEIRS = dict(ours._THEIRS)
ROWS, CLASSES = (3, 7), 50
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of products this small, more cost more than they give
    yield
    torch.set_num_threads(threads)
    ours.unpatch()
    assert all(vars(utils)[name] is theirs for name, theirs in THEIRS.items())


def made(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(scale).to(dtype).requires_grad_()


def indices(*shape: int, below: int = CLASSES) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(1))


def close(dtype: torch.dtype) -> float:
    """In 16 bits ours are as exact as in float32; TRL's are rounded."""
    return 1e-13 if dtype == torch.float64 else 3e-6


def test_signatures_are_trls() -> None:
    for name in ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy"):
        mine, theirs = (inspect.signature(f).parameters for f in (getattr(ours, name), THEIRS[name]))
        assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in theirs.values()]
    assert ours._arguments(ours.ChunkedLogProb) == ours._arguments(THEIRS["_ChunkedLogProbFunction"])


@DTYPES
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_selective_log_softmax(dtype: torch.dtype, several: bool, masked: bool, temperature: float) -> None:
    z, index = made(*ROWS, CLASSES, dtype=dtype), indices(*ROWS, *([4] if several else []))
    mask = indices(*index.shape, below=2) if masked else None
    double = z.detach().double().requires_grad_()
    expected = THEIRS["selective_log_softmax"](double, index, temperature, mask)
    found = ours.selective_log_softmax(z, index, temperature, mask)
    assert found.shape == index.shape
    # Several are differences, z - lse, and their gradient in 16 bits the sum of two that are rounded.
    largest = float(z.detach().abs().max()) / temperature
    torch.testing.assert_close(found.double(), expected, rtol=close(dtype), atol=several * close(dtype) / 10 * largest)
    (grad,), (exact,) = torch.autograd.grad(found.sum(), z), torch.autograd.grad(expected.sum(), double)
    terms = 4 * (double.detach() / temperature).softmax(-1) + exact.abs()
    twice = 2**-8 if several and dtype == torch.bfloat16 else 0.0
    assert relative_error(grad, exact, terms) <= close(dtype) + twice


@DTYPES
def test_entropies(dtype: torch.dtype) -> None:
    z, index, mask = made(*ROWS, CLASSES, dtype=dtype), indices(*ROWS), indices(*ROWS, below=2)
    double = z.detach().double().requires_grad_()
    expected = THEIRS["entropy_from_logits"](double)
    entropy = ours.entropy_from_logits(z.detach())
    # docs/contract.md: where one class is all but certain, right to 1e-7.
    near = {"rtol": close(dtype), "atol": 3e-7 if dtype != torch.float64 else 1e-14}
    torch.testing.assert_close(entropy.double(), expected, **near)
    _, expected = THEIRS["selective_log_softmax_and_entropy"](double, index, True, 0.7, mask)
    found = ours.selective_log_softmax_and_entropy(z, index, False, 0.7, mask)
    assert not found[1].requires_grad
    torch.testing.assert_close(found[1].double(), expected, **near)
    # Where a gradient is wanted, there is one.
    for entropy in (
        ours.entropy_from_logits(z / 0.7).masked_fill(mask == 0, 0),
        ours.selective_log_softmax_and_entropy(z, index, True, 0.7, mask)[1],
    ):
        (grad,), (exact,) = (
            torch.autograd.grad(e.sum(), x, retain_graph=True) for e, x in ((entropy, z), (expected, double))
        )
        rtol = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
        assert float((grad - exact).norm() / exact.norm()) < rtol


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_from_hidden_states(softcap: float | None, with_bias: bool) -> None:
    hidden, W = made(9, 16, dtype=torch.float32), made(CLASSES, 16, dtype=torch.float32, seed=1, scale=0.3)
    bias = made(CLASSES, dtype=torch.float32) if with_bias else None
    wanted = tuple(name for name in ("entropy", "mean_logits", "is_top1") if not (softcap and name == "mean_logits"))
    arguments = (bias, indices(9), 0.7, 32, softcap, 1.3)
    expected = THEIRS["_ChunkedLogProbFunction"].apply(hidden, W, *arguments, wanted)
    found = ours.ChunkedLogProb.apply(hidden, W, *arguments, wanted)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and mine.dtype == torch.bool:
            assert torch.equal(mine, theirs)
        elif mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-5 * float(theirs.detach().abs().max()))
    inputs = [t for t in (hidden, W, bias) if t is not None]
    # Of log-probabilities, of entropy: there TRL's are 1e-5 from float64, and ours 1e-6.
    for i, near in ((0, 1e-5), (1, 3e-5)):
        grads = (torch.autograd.grad(outputs[i].sum(), inputs, retain_graph=True) for outputs in (found, expected))
        for mine, theirs in zip(*grads, strict=True):
            assert float((mine - theirs).norm() / theirs.norm()) < near


def test_what_the_kernels_do_not_give_is_trls() -> None:
    hidden, W = made(9, 16, dtype=torch.float32), made(CLASSES, 16, dtype=torch.float32)
    arguments = (hidden, W, None, indices(9), 0.7, 32, None, 1.0)
    expected = THEIRS["_ChunkedLogProbFunction"].apply(*arguments)
    for mine, theirs in zip(ours.ChunkedLogProb.apply(*arguments), expected, strict=True):
        assert torch.equal(mine, theirs)


def test_no_rows() -> None:
    """A micro-batch without labels contributes a zero that backward can go through."""
    W = made(CLASSES, 16, dtype=torch.float32)
    found = ours.ChunkedLogProb.apply(torch.zeros(0, 16, requires_grad=True), W, None, indices(0), 1.0, 32)
    assert found[0] is not None
    assert found[0].shape == (0,)
    found = ours.ChunkedLogProb.apply(
        torch.zeros(0, 16, requires_grad=True), W, None, indices(0), 1.0, 32, None, 1.0, ("entropy",)
    )
    found[0].sum().backward()
    assert W.grad is not None
    assert not W.grad.any()


def test_patch_reaches_every_module_and_goes_back() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import trl.experimental.sdpo.loss_utils as early
    ours.patch()
    ours.patch()
    assert early.selective_log_softmax is utils.selective_log_softmax is ours.selective_log_softmax
    assert utils._ChunkedLogProbFunction is ours.ChunkedLogProb
    kernels = sys.modules["trl.kernels.chunked_logprob"]
    assert kernels.ChunkedLogProbFunction is THEIRS["_ChunkedLogProbFunction"], "the kernels keep their own"
    assert kernels._use_triton is THEIRS["_use_triton"]
    ours.unpatch()
    assert early.selective_log_softmax is THEIRS["selective_log_softmax"]


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ours._THEIRS, "entropy_from_logits", lambda logits, size: None)
    with pytest.raises(
        RuntimeError, match=r"expected trl.trainer.utils.entropy_from_logits with arguments \['logits', "
    ):
        ours.patch()
    assert utils._ChunkedLogProbFunction is not ours.ChunkedLogProb


WORDS = [f"w{i}" for i in range(60)]


def tokenizer() -> Any:
    ids = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def text(words: int, seed: int) -> str:
    return " ".join(WORDS[i] for i in indices(words, below=60) + 0 * seed) + f" {WORDS[seed % 60]} "


def language_model() -> Any:
    return hf_models.model("Llama", vocab_size=63, pad_token_id=0, eos_token_id=1, bos_token_id=1)


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(completion.split())) % 3) for completion in completions]


def logs(kind: str, folder: Path, **config: Any) -> list[dict[str, float]]:
    """What a trainer logs of three steps on made-up data."""
    settings = {
        "output_dir": str(folder), "max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1,
        "save_strategy": "no", "use_cpu": True, "learning_rate": 1e-2, "disable_tqdm": True, "bf16": False,
        "report_to": [],
    } | config  # fmt: skip
    rows: list[dict[str, str]] = [{"text": text(8 + i % 5, i)} for i in range(16)]
    more: dict[str, Any] = {}
    if kind == "DPO":
        rows = [{"prompt": text(4, i), "chosen": text(5, i), "rejected": text(6, i + 1)} for i in range(16)]
        more["ref_model"] = language_model()
    if kind == "GRPO":
        rows = [{"prompt": text(4, i)} for i in range(16)]
        settings |= {"num_generations": 4, "max_completion_length": 8}
        more["reward_funcs"] = reward
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = getattr(trl, f"{kind}Trainer")(
            language_model(), args=getattr(trl, f"{kind}Config")(**settings), train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(), **more,
        )  # fmt: skip
        trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(("kind", "more"), [("SFT", {}), ("DPO", {}), ("GRPO", {}), ("GRPO", {"entropy_coef": 0.1})])
def test_trainers_log_the_same(kind: str, more: dict[str, float], tmp_path: Path) -> None:
    expected = logs(kind, tmp_path, **more)
    ours.patch()
    calls = []
    forward = ours.linear_cross_entropy
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ours, "linear_cross_entropy", lambda *a, **k: (calls.append(len(a[0])), forward(*a, **k))[1])
        found = logs(kind, tmp_path, **more)
    assert calls
    for mine, theirs in zip(found, expected, strict=True):
        for name in theirs:
            if not is_timed(name):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=2e-5), name
    if kind == "SFT":
        assert max(calls) < 4 * 14, "rows whose label is -100 are left out"


def is_timed(name: str) -> bool:
    return "time" in name or "per_second" in name or "runtime" in name
