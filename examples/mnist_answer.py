"""The answer to the question that was left open, in words: each sentence is printed only if this run bears it out."""

from __future__ import annotations

import math

from mnist_evidence import AtTheNaN
from mnist_training import Run

QUESTION = "torch's cross_entropy trains faster (better loss with less epochs) ... any clues?"

SAME = 1e-3  # relative; curves closer than this cannot be told apart in print
VISIBLE = 1e-2
FASTER = 0.9
UNSTABLE = 1.2


def by_name(runs: list[Run]) -> dict[str, Run]:
    return {run.name: run for run in runs}


def spread(runs: list[Run]) -> float:
    """The largest difference between two of the curves at one time, relative to the loss there; inf if one is NaN."""
    moments = list(zip(*(run.history.losses for run in runs), strict=True))
    if not all(math.isfinite(loss) for losses in moments for loss in losses):
        return math.inf
    return max((max(losses) - min(losses)) / max(losses) for losses in moments)


def coincide(reset: list[Run]) -> bool:
    return spread(reset) < SAME


def at_epochs(run: Run) -> list[float]:
    """The loss after each whole epoch, the untrained network's first."""
    h = run.history
    return [loss for epoch, loss in zip(h.epochs, h.losses, strict=True) if epoch == int(epoch)]


def epochs_ahead(posted: list[Run]) -> int:
    """How many epochs, from the first on, torch's accumulating run is clearly below the scratch run."""
    runs = by_name(posted)
    pairs = list(zip(at_epochs(runs["torch"]), at_epochs(runs["scratch"]), strict=True))[1:]
    return next((i for i, (torch, scratch) in enumerate(pairs) if not torch < FASTER * scratch), len(pairs))


def ends_worse(posted: list[Run]) -> bool:
    """Whether the accumulating runs end clearly above the scratch run."""
    runs = by_name(posted)
    scratch = runs["scratch"].history.losses[-1]
    return all(not runs[name].history.losses[-1] < UNSTABLE * scratch for name in ("torch", "fused_ce"))


def parted(posted: list[Run]) -> float | None:
    """The epoch from which torch's and fused_ce's accumulating runs can be told apart on a plot, if ever."""
    torch, fused = (by_name(posted)[name].history for name in ("torch", "fused_ce"))
    for epoch, a, b in zip(torch.epochs, torch.losses, fused.losses, strict=True):
        if not abs(a - b) < VISIBLE * a:
            return epoch
    return None


def unharmed(reset: list[Run], posted: list[Run]) -> bool:
    """Whether the scratch run does the same in both loops, since its `bwd` overwrites."""
    return by_name(reset)["scratch"].history.losses == by_name(posted)["scratch"].history.losses


def answer(reset: list[Run], posted: list[Run], nan: AtTheNaN | None) -> list[str]:
    """The sentences, one finding each."""
    return [_when_reset(reset), *_as_posted(reset, posted), _about_nan(posted, nan)]


def _when_reset(reset: list[Run]) -> str:
    difference, steps = spread(reset), len(reset[0].history.printed)
    if coincide(reset):
        return (
            "It does not. With gradients reset every step, scratch, torch and fused_ce trace one curve: over "
            f"{steps:,} steps their losses differ by at most {difference:.1e} of the loss."
        )
    return (
        f"With these settings the curves part even when gradients are reset: by up to {difference:.1e} of the loss in "
        f"{steps:,} steps. Rounding differences grow when training is unstable; a smaller --lr shows the plain case."
    )


def _as_posted(reset: list[Run], posted: list[Run]) -> list[str]:
    runs, sentences = by_name(posted), []
    torch, scratch = at_epochs(runs["torch"]), at_epochs(runs["scratch"])
    if unharmed(reset, posted) and at_epochs(by_name(reset)["torch"]) != torch:
        sentences.append(
            "The difference is in the fit loop, which never resets gradients. The scratch bwd overwrites them, so its "
            "curve is the same, bit for bit, in both loops. Under autograd they add up from step to step, like "
            "momentum without friction."
        )
    ahead = epochs_ahead(posted)
    if ahead:
        times = "epoch" if ahead == 1 else f"{ahead} epochs"
        sentences.append(
            f"That is faster at first: for the first {times} torch's loss is the lower one (after epoch 1 "
            f"{torch[1]:.2f} against {scratch[1]:.2f}; held-out accuracy {_accuracy(runs['torch'], 1):.0%} against "
            f"{_accuracy(runs['scratch'], 1):.0%})."
        )
    else:
        sentences.append(
            f"With these settings adding up is not faster: after epoch 1 torch's loss is {torch[1]:.2f} and scratch's "
            f"{scratch[1]:.2f}."
        )
    if ends_worse(posted):
        end = f"after epoch {len(torch) - 1} torch's loss is {torch[-1]:.2f}, fused_ce's "
        end += f"{at_epochs(runs['fused_ce'])[-1]:.2f} and scratch's {scratch[-1]:.2f}."
        sentences.append(f"{'And then unstable' if ahead else 'It is unstable'}: {end}")
    epoch = parted(posted)
    if epoch is not None and coincide(reset):
        sentences.append(
            f"The two autograd curves part by more than {VISIBLE:.0%} from epoch {epoch:.1f} on: unstable training "
            "magnifies the last digits in which their gradients differ. Neither is the better one there."
        )
    return sentences


def _about_nan(posted: list[Run], nan: AtTheNaN | None) -> str:
    if nan is None:
        return "The scratch loss did not become NaN in this run; a larger --lr or more --epochs brings it about."
    stable = [run for run in posted if run.name in ("torch", "fused_ce")]
    text = f"The scratch loss formula under the same adding gradients is NaN from step {nan.step} on"
    if nan.zeros and math.isfinite(nan.gap):
        text += (
            f": a logit there lies {nan.gap:.1f} below the largest of its row, so its probability is exactly 0 in "
            f"float32 (zeros in that batch: {nan.zeros}), and 0 * log(0) is NaN"
        )
    text += f". On the same logits torch gives {nan.torch:.4f} and fused_ce {nan.fused_ce:.4f}"
    if all(math.isfinite(loss) for run in stable for loss in run.history.printed):
        text += f"; both stay finite for all {len(stable[0].history.printed):,} steps"
    return f"{text}."


def _accuracy(run: Run, epoch: int) -> float:
    return run.history.accuracies[run.history.epochs.index(epoch)]
