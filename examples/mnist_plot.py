"""The picture: gradients reset every step on the left, the loop as posted on the right."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mnist_answer import by_name, coincide, ends_worse, epochs_ahead, spread, unharmed
from mnist_training import SAMPLES_PER_EPOCH, Run

# From the widest to the sparsest, so that curves that coincide can all be seen.
STYLES = {
    "torch": {"color": "#8ec5ea", "lw": 6, "solid_capstyle": "round"},
    "fused_ce": {"color": "#b8430f", "lw": 1.8, "ls": (0, (4, 1.5))},
    "scratch formula, autograd": {"color": "#7a3fa0", "lw": 3},
    "scratch": {"color": "black", "lw": 0, "marker": "o", "ms": 4.5, "mfc": "white", "markevery": SAMPLES_PER_EPOCH},
}
NAN_COLOR = STYLES["scratch formula, autograd"]["color"]


def draw(reset: list[Run], posted: list[Run], settings: str, path: Path) -> None:
    """Write both panels to `path`. A bare Figure draws with Agg: no window, no display."""
    figure = Figure(figsize=(13.5, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, runs, title in ((left, reset, _left_title(reset)), (right, posted, _right_title(reset, posted))):
        _curves(axes, runs)
        axes.set_title(title, loc="left", fontsize=11.5)
    left.set_ylabel("cross entropy on training digits (nats, mean)")
    left.legend(frameon=False, loc="upper right", fontsize=10, handlelength=3)
    _mark_nan(right, posted)
    figure.supxlabel(settings, fontsize=8.5, color="0.35")
    figure.savefig(path, dpi=110)


def _curves(axes: Axes, runs: list[Run]) -> None:
    for name, style in STYLES.items():
        if name in by_name(runs):
            h = by_name(runs)[name].history
            axes.plot(h.epochs, h.losses, label=_label(name), **style)
    last = max(run.history.epochs[-1] for run in runs)
    highest = max((loss for run in runs for loss in run.history.losses if math.isfinite(loss)), default=1.0)
    axes.set(
        xlabel="epoch (passes over the training digits)", xlim=(0, last * 1.2), ylim=(0, min(1.08 * highest, 10.0))
    )
    axes.set_xticks([t for t in axes.get_xticks() if t <= last])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    _end_labels(axes, runs, last)


def _end_labels(axes: Axes, runs: list[Run], last: float) -> None:
    """Write the name and last loss beside each curve's end, moved apart where they would overlap."""
    ends = sorted((run.history.losses[-1], run.name) for run in runs if math.isfinite(run.history.losses[-1]))
    gap, lowest = 0.055 * axes.get_ylim()[1], -math.inf
    if len(runs) == 3 and coincide(runs):
        ends = [(ends[0][0], "all three")]
    for loss, name in ends:
        lowest = max(min(loss, 0.97 * axes.get_ylim()[1]), lowest + gap)
        color = {"torch": "#3f87b5"}.get(name, STYLES.get(name, {}).get("color", "black"))
        axes.text(last * 1.015, lowest, f"{name} {loss:.2f}", color=color, va="center", fontsize=10)


def _mark_nan(axes: Axes, posted: list[Run]) -> None:
    for run in posted:
        if run.history.first_nan is None:
            continue
        h = run.history
        where = (h.first_nan - 1) / (len(h.printed) / h.epochs[-1])
        finite = [loss for loss in h.losses if math.isfinite(loss)]
        axes.plot(where, finite[-1], "X", ms=11, color=NAN_COLOR, mec="white", zorder=5)
        axes.annotate(
            f"{run.name}:\nNaN from step {h.first_nan} on",
            (where, finite[-1]),
            (0.16, 0.93),
            textcoords="axes fraction",
            color=NAN_COLOR,
            va="top",
            arrowprops={"arrowstyle": "-", "color": NAN_COLOR, "shrinkB": 6},
        )


def _label(name: str) -> str:
    return {"scratch": "scratch (own bwd)", "torch": "torch"}.get(name, name)


def _left_title(reset: list[Run]) -> str:
    title = "Gradients reset every step"
    if coincide(reset):
        return f"{title}: all three curves coincide\n(largest difference {spread(reset):.0e} of the loss)"
    return f"{title}: the curves part\n(largest difference {spread(reset):.0e} of the loss)"


def _right_title(reset: list[Run], posted: list[Run]) -> str:
    ahead, worse = epochs_ahead(posted), ends_worse(posted)
    title = "Never reset, as posted: autograd's gradients add up"
    finding = ", ".join(text for text, holds in (("faster at first", ahead), ("then unstable", worse)) if holds)
    if finding and unharmed(reset, posted):
        finding += "; the hand-written bwd overwrites them"
    return f"{title}\n({finding})" if finding else title
