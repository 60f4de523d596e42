"""Draws the figures of docs/mathematics.md: python docs/figures.py [FOLDER], by default docs/figures.

Numbers are computed here, not typed in. Colours are of a middle tone and the ground is transparent, so that one file
serves light and dark pages.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from torch import Tensor

import fused_ce

INK, TORCH, OURS, FAINT = "#7f8894", "#4a90d9", "#e0652b", "#80879140"
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "fused_ce",  # the same file from the same drawing
        "svg.fonttype": "none",  # text stays text: the reader's fonts, and found by a search
        "font.family": "sans-serif",
        "font.size": 11,
        **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    }
)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "figures"
    folder.mkdir(exist_ok=True)
    for draw in (confident, passes, shards, chunks):
        figure = draw()
        figure.savefig(folder / f"{draw.__name__}.svg", transparent=True, metadata={"Date": None, "Creator": None})


def plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=FAINT, linewidth=0.6)


def confident() -> Figure:
    """Errors of loss and of the target's gradient, in float32, as the target's logit rises above nine others."""
    margins = torch.arange(0, 40.5, 0.5, dtype=torch.float64)
    logits = torch.zeros(len(margins), 10, dtype=torch.float64)
    logits[:, 0] = margins
    target = torch.zeros(len(margins), dtype=torch.int64)

    def results(loss: object, x: Tensor) -> tuple[Tensor, Tensor]:  # (N, C) -> (N,), (N,)
        x = x.clone().requires_grad_()
        rows = loss(x, target, reduction="none")  # type: ignore[operator]
        rows.sum().backward()
        return rows.detach().double(), x.grad[:, 0].double()

    # torch loses the same digits in float64 from a margin of 37 on; the formula's own float64 does not.
    exact = results(lambda *a, **k: fused_ce.cross_entropy(*a, backend="reference", **k), logits)
    figure = Figure(figsize=(7.2, 3.3), layout="constrained")
    titles = ("loss", "gradient of the target's logit")
    for which, (axes, title) in enumerate(zip(figure.subplots(1, 2, sharey=True), titles, strict=True)):
        for name, loss, color in (("torch", F.cross_entropy, TORCH), ("fused_ce", fused_ce.cross_entropy, OURS)):
            error = (results(loss, logits.float())[which] / exact[which] - 1).abs().clamp(min=3e-9)
            axes.semilogy(margins, error, color=color, linewidth=2, label=f"{name}, float32")
        axes.set(title=title, xlabel="margin of the target's logit", ylim=(2e-9, 3))
        plain(axes)
    figure.axes[0].set_ylabel("relative error")
    figure.axes[0].legend(frameon=False, loc="center right")
    figure.axes[1].annotate(
        "all digits lost", (30, 1), (19, 0.02), color=INK, arrowprops={"arrowstyle": "-", "color": INK}
    )
    return figure


def passes() -> Figure:
    """How often each reads and writes the logits, as benchmarks/peers.py counts them."""
    rows = [("torch, eager", 3, 3), ("torch.compile", 2, 1), ("fused_ce, none", 2, 1), ("fused_ce, mean or sum", 1, 1)]
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    axes = figure.subplots()
    names = [name for name, _, _ in rows]
    colors = [OURS if name.startswith("fused_ce") else TORCH for name in names]
    axes.barh(names, [read for _, read, _ in rows], color=colors)
    axes.barh(names, [w for _, _, w in rows], left=[read for _, read, _ in rows], color=colors, alpha=0.5)
    for i, (_, read, write) in enumerate(rows):
        axes.text(read + write + 0.08, i, f"{read} R + {write} W", va="center")
    axes.invert_yaxis()
    axes.set(xlabel="passes over the logits, forward and backward (full: read, pale: written)", xlim=(0, 7))
    plain(axes)
    axes.grid(axis="y", visible=False)
    return figure


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 7.2 * height / width), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.set_axis_off()
    return figure, axes


def box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str, filled: float = 0.2
) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, alpha=filled, edgecolor="none"))
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=color, linewidth=1.5))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, shrinkA=2, shrinkB=2))
    axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.22, text, ha="center", fontsize=10)


def shards() -> Figure:
    figure, axes = canvas(14, 5.4)
    for rank in range(4):
        left = 3.5 * rank + 0.15
        box(axes, left, 2.7, 3.2, 2, f"rank {rank}\nits classes", TORCH)
        arrow(axes, (left + 1.6, 2.7), (left + 1.6, 1.25))
        box(axes, left + 1.35, 0.75, 0.5, 0.5, "", OURS, 0.7)
    axes.text(7, 5, "logits of all rows: they stay", ha="center")
    axes.text(7, 0.15, "sums of its part of each row, 48 bytes: gathered by all, and joined", ha="center")
    return figure


def chunks() -> Figure:
    figure, axes = canvas(14, 5.8)
    box(axes, 0.2, 1.2, 1.5, 3.6, "", TORCH)
    box(axes, 0.2, 3.3, 1.5, 0.8, "chunk", OURS, 0.5)
    axes.text(0.95, 5.05, "H (N, H)", ha="center")
    arrow(axes, (1.7, 3.7), (4.1, 3.7), "times W")
    axes.add_patch(Rectangle((4.1, 1.2), 5.4, 3.6, fill=False, edgecolor=INK, linestyle=(0, (3, 3))))
    box(axes, 4.1, 3.3, 5.4, 0.8, "its logits, then their gradient", OURS, 0.5)
    axes.text(6.8, 5.05, "logits (N, V)", ha="center")
    axes.text(6.8, 2.2, "never made whole", ha="center")
    arrow(axes, (9.5, 3.9), (11.3, 4.5))
    arrow(axes, (9.5, 3.5), (11.3, 2.1))
    box(axes, 11.3, 4.1, 2.5, 0.8, "gradient of H", TORCH)
    box(axes, 11.3, 1.2, 2.5, 1.6, "gradient of W,\nsummed", TORCH)
    axes.text(7, 0.45, "memory for one chunk of logits, whatever N is", ha="center")
    return figure


if __name__ == "__main__":
    main()
