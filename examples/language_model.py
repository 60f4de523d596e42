"""A small language model on text that ships with Python, trained with either loss: the same curve, less memory.

    python examples/language_model.py            # a few minutes on two cores
    python examples/language_model.py --steps 20

The text is the source of Python's standard library, cut into words; the model reads the eight words before and guesses
the next. Its head has more classes than all the rest has parameters, as the heads of language models do. Each loss
trains in a process of its own, whose peak of resident memory is printed beside its curve.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_ce

CONTEXT, FEATURES, BATCH = 8, 128, 1024
LOSSES = ("F.linear + F.cross_entropy", "fused_ce.linear_cross_entropy")


class Text(NamedTuple):
    words: Tensor  # (length,) int64
    size: int  # of the vocabulary


def read(vocabulary: int, files: int) -> Text:
    """The words of the first modules of the standard library, the rare ones all as number 0."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in folder.glob("*.py") if path.stat().st_size > 2000)[:files]
    found = [word for path in paths for word in re.findall(r"\w+|[^\w\s]", path.read_text(errors="ignore"))]
    known = {word: i for i, (word, _) in enumerate(Counter(found).most_common(vocabulary - 1), start=1)}
    return Text(torch.tensor([known.get(word, 0) for word in found]), vocabulary)


class Model(nn.Module):
    """Words to features, a hidden layer, and a head tied to the embedding."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, FEATURES)
        self.hidden = nn.Linear(CONTEXT * FEATURES, FEATURES)
        nn.init.normal_(self.embedding.weight, std=FEATURES**-0.5)

    def forward(self, words: Tensor) -> Tensor:  # (N, CONTEXT) -> (N, FEATURES)
        return F.gelu(self.hidden(self.embedding(words).flatten(1)))

    def loss(self, words: Tensor, following: Tensor, which: str) -> Tensor:  # (N, CONTEXT), (N,) -> ()
        features, head = self(words), self.embedding.weight
        if which == LOSSES[0]:
            return F.cross_entropy(F.linear(features, head), following)
        return fused_ce.linear_cross_entropy(features, head, following)


def train(which: str, text: Text, steps: int) -> Iterator[float]:
    """The loss of each step."""
    torch.manual_seed(0)
    model = Model(text.size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    choose = torch.Generator().manual_seed(1)
    for _ in range(steps):
        starts = torch.randint(len(text.words) - CONTEXT, (BATCH,), generator=choose)
        windows = text.words[starts[:, None] + torch.arange(CONTEXT + 1)]
        loss = model.loss(windows[:, :-1], windows[:, -1], which)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def report(which: str, vocabulary: int, files: int, steps: int) -> None:
    """One loss in this process: its curve, seconds, and the peak of resident memory in MB, as JSON."""
    text = read(vocabulary, files)
    start = time.perf_counter()
    curve = list(train(which, text, steps))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1) / 1e6
    print(json.dumps({"curve": curve, "seconds": seconds, "peak": peak}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="[300]")
    parser.add_argument("--vocabulary", type=int, default=16000, help="[16000]")
    parser.add_argument("--files", type=int, default=150, help="modules of the standard library to read [150]")
    parser.add_argument("--only", choices=LOSSES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        report(args.only, args.vocabulary, args.files, args.steps)
        return 0
    numbers = [f"--{name}={getattr(args, name)}" for name in ("steps", "vocabulary", "files")]
    found = []
    for which in LOSSES:
        command = [sys.executable, __file__, *numbers, "--only", which]
        found.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    print(f"{'step':>6}" + "".join(f"{which:>32}" for which in LOSSES))
    for step in sorted({0, *range(0, args.steps, max(1, args.steps // 10)), args.steps - 1}):
        print(f"{step:6}" + "".join(f"{run['curve'][step]:32.6f}" for run in found))
    for name, unit in (("seconds", "s"), ("peak", "MB")):
        print(f"{name:>6}" + "".join(f"{run[name]:29.1f} {unit:2}" for run in found))
    furthest = max(abs(a / b - 1) for a, b in zip(*(run["curve"] for run in found), strict=True))
    print(f"furthest apart: {furthest:.1e} of the loss")
    return 0


if __name__ == "__main__":
    sys.exit(main())
