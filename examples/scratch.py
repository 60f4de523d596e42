"""Cross entropy and its network from scratch, as the learner wrote them, the flaw included.

Two roads to the same number stand here side by side:

- `logsumexp`, `log_softmax` and `nll`: the logarithm is taken of a sum that is at least 1, so it is always finite.
- `CrossEntropy`, the module with `forward` and `bwd`: softmax first, then its logarithm.

THE FLAW is in `CrossEntropy.forward`, in the line marked below. In float32 exp(x) rounds to exactly 0 for
x < -103.97, so a logit that far below the largest of its row has probability 0 and log-probability -inf. The
one-hot then multiplies -inf by 0, which is NaN, for ANY class, not only the target. Subtracting the row maximum
prevents overflow, not this. The hand-written `bwd` never takes a logarithm and stays finite: training goes on
while the printed loss is NaN. Under autograd the gradient of that line is NaN too, and so are the weights.

Every `bwd` OVERWRITES the gradients it computes. Autograd ADDS to them. A loop that never resets gradients
therefore does two different things; see `mnist_training.fit`.

Nothing here is how fused_ce works; it is where it came from.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logsumexp(x: Tensor) -> Tensor:  # (N, C) -> (N,)
    m = x.max(-1)[0]
    return m + (x - m[:, None]).exp().sum(-1).log()


def log_softmax(x: Tensor) -> Tensor:  # (N, C) -> (N, C)
    return x - logsumexp(x)[:, None]


def nll(log_probs: Tensor, target: Tensor) -> Tensor:  # (N, C), (N,) -> ()
    return -log_probs[torch.arange(len(target), device=target.device), target].mean()


def softmax(x: Tensor) -> Tensor:  # (N, C) -> (N, C)
    e = (x - x.max(-1, keepdim=True)[0]).exp()
    return e / e.sum(-1, keepdim=True)


def one_hot(target: Tensor, classes: int) -> Tensor:  # (N,) -> (N, C)
    return (target[:, None] == torch.arange(classes, device=target.device)).float()


class CrossEntropy:
    """The mean cross entropy of logits (N, C) and class indices (N,); `bwd` sets the logits' gradient."""

    def __call__(self, inp: Tensor, targ: Tensor) -> Tensor:
        return self.forward(inp, targ)

    def forward(self, inp: Tensor, targ: Tensor) -> Tensor:  # (N, C), (N,) -> ()
        self.inp = inp
        self.softmax = softmax(inp)
        self.one_hot = one_hot(targ, inp.shape[-1])
        return -(self.one_hot * self.softmax.log()).sum(-1).mean()  # the flaw: 0 * log(0) is NaN

    def bwd(self) -> None:
        self.inp.grad = (self.softmax - self.one_hot) / len(self.inp)


class Linear:
    """inp @ w + b, drawn as torch.nn.Linear draws its own: uniform within 1 / sqrt(inputs)."""

    def __init__(self, n_in: int, n_out: int, generator: torch.Generator) -> None:
        bound = n_in**-0.5
        self.w = (torch.rand(n_in, n_out, generator=generator) * 2 - 1) * bound
        self.b = (torch.rand(n_out, generator=generator) * 2 - 1) * bound

    def __call__(self, inp: Tensor) -> Tensor:  # (N, n_in) -> (N, n_out)
        self.inp = inp
        self.out = inp @ self.w + self.b
        return self.out

    def bwd(self) -> None:
        self.inp.grad = self.out.grad @ self.w.t()
        self.w.grad = self.inp.t() @ self.out.grad
        self.b.grad = self.out.grad.sum(0)


class ReLU:
    """max(inp, 0)."""

    def __call__(self, inp: Tensor) -> Tensor:
        self.inp = inp
        self.out = inp.relu()
        return self.out

    def bwd(self) -> None:
        self.inp.grad = (self.inp > 0).float() * self.out.grad
