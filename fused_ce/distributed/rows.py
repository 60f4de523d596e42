"""What every rank knows of all rows from their targets and the class weights; and the loss, once it has their sums.

float64 throughout: these are a few numbers a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..contract import Call, RowSums, Stats, Upstream
from ..formula import minus_m, row_loss, row_stats


class Rows(NamedTuple):
    """The rows of a call, whose class indices are of all classes."""

    call: Call
    counted: Tensor  # (R,) bool, rows that are not ignored
    y: Tensor  # (R,), 0 where ignored
    w_y: Tensor  # (R,)
    D: Tensor | float  # (), divisor of the cross entropy
    z_D: Tensor | float  # (), and of the z-loss

    @property
    def q_y(self) -> Tensor:  # (R,)
        e, total = self.call.options.smoothing, self.call.shard.total
        return torch.where(self.counted, ((1 - e) + e / total) * self.w_y, 0)

    def q_others(self, first: Tensor | int, held: Tensor | int) -> Tensor:  # (P, 1) each -> (P, R)
        """Of the classes [first, first + held) other than y."""
        e, weight, y = self.call.options.smoothing, self.call.weight, self.y
        if e == 0:
            return torch.zeros_like(self.w_y)
        W: Tensor | int = held
        if weight is not None:
            below = torch.nn.functional.pad(weight.double().cumsum(0), (1, 0))
            W = below[first + held] - below[first]
        holds = (first <= y) & (y < first + held)
        return torch.where(self.counted, (e / self.call.shard.total) * (W - torch.where(holds, self.w_y, 0)), 0)

    def loss(self, sums: RowSums) -> Tensor:  # () or R
        options = self.call.options
        loss, z_loss = row_loss(sums, options)
        if options.reduction == "none":
            total = (loss + z_loss).reshape(self.call.row_shape)
        else:
            total = loss.sum() / self.D + z_loss.sum() / self.z_D
        return total.to(options.dtype or self.call.input.dtype)

    def stats(self, sums: RowSums) -> Stats:
        lse, z_loss, argmax, entropy = row_stats(sums, self.call.options)
        lse, z_loss, entropy = (value.to(self.call.acc) for value in (lse, z_loss, entropy))
        return Stats(*(value.reshape(self.call.row_shape) for value in (lse, z_loss, argmax.long(), entropy)))

    def upstream(
        self,
        sums: RowSums,
        grad_output: Tensor | None,  # () or R
        g_lse: Tensor | None,  # R
        g_entropy: Tensor | None,  # R
    ) -> Upstream:
        """For `Backend.finish`: divided, and that of the z-loss within that of lse."""
        L = self.call.options.lse_square_scale
        nothing = self.w_y.new_zeros(())
        g = nothing if grad_output is None else grad_output.reshape(-1 if grad_output.dim() else ()).double()
        of_lse, of_entropy = (None if g_row is None else g_row.reshape(-1).double() for g_row in (g_lse, g_entropy))
        if L:
            of_z = 2 * L * (sums.m + minus_m(sums)) * (g / self.z_D)
            of_lse = of_z if of_lse is None else of_lse + of_z
        return Upstream(g / self.D, of_lse, of_entropy)


def rows_of(call: Call) -> Rows:
    """The rows; under a mean, with class weights multiplied by the power of two that makes them some 1 on average.

    Only their ratios count there, and float32 could not hold an upstream gradient divided by weights of 1e-40.
    """
    _, target, weight, options = call
    target = target.reshape(-1).long()  # a uint8 of 156 equals -100
    counted = target != options.ignore_index
    y = torch.where(counted, target, 0)
    count: Tensor | float = 1.0
    if options.reduction == "mean":
        count = counted.sum().double() if options.num_items is None else options.num_items
    if weight is None:
        return Rows(call, counted, y, counted.double(), count, count)
    # A target that is no class is told by the backend.
    w_y = torch.where(counted, weight.double()[y.clamp(0, len(weight) - 1)], 0)
    if options.reduction != "mean" or options.num_items is not None:
        return Rows(call, counted, y, w_y, count, count)
    total = w_y.sum()
    exponent = torch.frexp(total / count).exponent
    factor = torch.where(total.isfinite() & (total > 0), torch.ldexp(torch.ones_like(total), -exponent), 1.0)
    weight = (weight.double() * factor).to(torch.promote_types(weight.dtype, torch.float32))
    return Rows(call._replace(weight=weight), counted, y, w_y * factor, total * factor, count)
