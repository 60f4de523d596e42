"""Bytes that a loss holds and peaks at, in copies of the logits, beside torch's in a process of the same form.

A process each, because the peak of one never falls. Resident memory rather than an allocator's count: the kernels
allocate outside of torch, too. The bounds leave a quarter of a copy to all else (stacks, the allocator's slack).
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from fused_ce.backends import cpu

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc"),
    pytest.mark.skipif(cpu._C is None, reason="fused_ce._C is not built"),
]
SPARE = 0.25

# "name of a form, whose loss" -> copies of the logits held between forward and backward, and at most until the end,
# both beyond the logits themselves. `clear_refs` sets the peak back to what is held.
CODE = """
import gc, os, sys
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
import fused_ce
torch.set_num_threads(1)
form, who = sys.argv[1:]
loss_of = fused_ce.cross_entropy if who == "ours" else F.cross_entropy

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

def one(x, **keywords):
    return loss_of(x[0], torch.arange(len(x[0])), **keywords)

def chunks(x):
    total = 0.0
    for i in range(4):
        # The logits of a chunk are made inside, as a head of a model makes them.
        chunk = lambda w: loss_of(w.expand(ROWS, CLASSES) * 1.0, torch.arange(ROWS))
        total = total + checkpoint(chunk, x[i], use_reentrant=False)
    return total

FORMS = {
    "one": lambda x: one(x),
    "none": lambda x: one(x, reduction="none").sum(),
    "four": lambda x: sum(one([part]) for part in x),
    "four made": lambda x: sum(one([part * 1.0]) for part in x),
    "stats": lambda x: one(x, return_stats=True).loss,
    "inplace": lambda x: one([x[0] * 1.0], inplace=True),
    "chunks": chunks,
}
def inputs():
    rows, many = 1 if form == "chunks" else ROWS, 4 if form in ("four", "four made", "chunks") else 1
    return [torch.ones(rows, CLASSES, requires_grad=True) for _ in range(many)]

def run(x):
    loss = FORMS[form](x)
    held = resident()
    loss.backward()
    return held

ROWS, full = 8, ROWS
run(inputs())  # code, thread pools and the first arena
ROWS = full
x = inputs()
before = resident()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
held = run(x)
print((held - before) / (ROWS * CLASSES * 4), (peak() - before) / (ROWS * CLASSES * 4))
"""
# 39 MiB of float32: from 32 MiB on glibc gives memory back as soon as it is freed.
ROWS, CLASSES = 320, 32000


@cache
def copies(form: str, who: str) -> tuple[float, float]:
    """Held between forward and backward, and at most, beyond the logits of the caller."""
    code = f"ROWS, CLASSES = {ROWS}, {CLASSES}\n" + CODE
    command = [sys.executable, "-c", code, form, who]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if "clear_refs" in result.stderr:
        pytest.skip("the kernel does not let a process set its peak back")
    assert result.returncode == 0, result.stderr
    held, peak = result.stdout.split()
    return float(held), float(peak)


# Copies of the logits: the least that the form can do with, as its reason says.
BOUNDS = {
    "one": (1, 1),  # the gradient, made in forward
    "none": (0, 1),  # the gradient, made in backward: forward does not know the rows' upstream gradients
    "four": (1, 4),  # the gradient of the first; those of the others are made in backward
    "stats": (1, 1),  # statistics are a few numbers a row
    "inplace": (1, 2),  # the product that is handed over; its own gradient goes into x.grad as another
}


@pytest.mark.parametrize("form", BOUNDS)
def test_copies_of_the_logits(form: str) -> None:
    held, peak = copies(form, "ours")
    most_held, most = BOUNDS[form]
    assert held <= most_held + SPARE, (held, peak)
    assert peak <= most + SPARE, (held, peak)


@pytest.mark.parametrize("form", ["one", "none", "four"])
def test_no_more_than_torch(form: str) -> None:
    """torch holds its log-probabilities and makes a gradient beside them."""
    ours, theirs = copies(form, "ours"), copies(form, "torch")
    assert ours[1] <= theirs[1] + SPARE, (ours, theirs)


def test_losses_that_wait_for_one_backward() -> None:
    """Whose logits nobody else holds: four of them, and the gradient of the first."""
    ours, theirs = copies("four made", "ours"), copies("four made", "torch")
    assert ours[0] <= 1.25 * theirs[0] + SPARE, (ours, theirs)


def test_checkpointed_chunks() -> None:
    """No chunk's logits stay after forward; one chunk at a time is made again, with its gradient and its factor's."""
    ours, theirs = copies("chunks", "ours"), copies("chunks", "torch")
    assert ours[0] <= SPARE, (ours, theirs)
    assert ours[1] <= min(3, theirs[1]) + SPARE, (ours, theirs)
