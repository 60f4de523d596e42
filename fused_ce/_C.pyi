"""Types of csrc/bindings.cpp, csrc/arguments.cpp and csrc/tensors.cpp."""

from collections.abc import Callable

from torch import Tensor

from .contract import Call, RowSums
from .options import Options

openmp: bool  # False: built without OpenMP, so on one thread only
compiler: str
few_classes: int  # rows of up to so many leave nothing to backward
stats_size: int  # doubles a row

def isa_names() -> list[str]:
    """The instruction sets that this processor can run, best first."""

def isa() -> str:
    """The instruction set in use."""

def set_isa(name: str) -> None:
    """Take one of `isa_names()`, as the variable FUSED_CE_ISA does at import. ValueError for any other name."""

def combine(sums: RowSums, after: RowSums, probs: bool, /) -> tuple[float, ...]:
    """`formula.combine` of numbers, as the instruction set in use compiles it."""

def empty(sizes: tuple[int, ...], dtype: int, /) -> object | None:
    """A contiguous tensor in memory of the pool, as a capsule for `from_dlpack`; None where the pool does not serve."""

def keep_at_most(bytes: int, /) -> None:
    """How many bytes the pool keeps idle; 0: there is no pool."""

def empty_cache() -> None:
    """Give what is idle back to the operating system."""

def held() -> tuple[int, int]:
    """Bytes of the pool: in use, idle."""

def meet(tensor: type[Tensor], parameter: type[Tensor], /) -> None:
    """Once, before the functions below: the only types of tensors that `is_common` takes."""

Watchers = tuple[Callable[[], object], ...]

def is_common(call: Call, watchers: Watchers, of_halves: Watchers, /) -> bool:
    """Whether the kernels take the call, and nothing else need be asked: no watcher answers with something true.

    `of_halves` are asked for logits of 16 bits.
    """

def forward(
    input: Tensor,  # (N, C, d1..dk) or (C)
    target: Tensor,  # (N, d1..dk) or (), or the input's shape
    weight: Tensor | None,  # (C,) acc
    options: Options,
    num_items: float,  # minus infinity: not given
    scale: float,  # the upstream gradient that grad is made for
    loss: Tensor,  # () or (N, d1..dk)
    grad: Tensor | None,  # the input's shape
    saved: Tensor | None,  # (columns, rows) float64
    stats: Tensor | None,  # (rows, stats_size) float64
    threads: int,
    /,
) -> None:
    """Write the loss, and what else is given. IndexError for a target out of range."""

def backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,  # (C,) acc
    options: Options,
    num_items: float,
    upstream: Tensor | None,  # (rows) acc, of the loss; None: one for all
    scale: float,  # what multiplies them
    of_lse: Tensor | None,  # (rows) acc, of lse
    of_entropy: Tensor | None,  # (rows) acc, of the entropy
    grad: Tensor,  # the input's shape
    d_target: Tensor | None,  # the target's shape
    saved: Tensor,
    threads: int,
    /,
) -> None:
    """Write the gradients. IndexError for a target out of range."""

def part(
    input: Tensor,  # (N, C, d1..dk) or (C), the classes that options.shard names
    target: Tensor,  # (N, d1..dk) or ()
    weight: Tensor | None,  # (total,) acc
    options: Options,
    sums: Tensor,  # (8, rows) float64
    threads: int,
    /,
) -> None:
    """Write the sums. IndexError for a target outside of all classes."""

def finish(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,  # (total,) acc
    options: Options,
    sums: Tensor,  # (8, rows) float64, of whole rows
    upstream: Tensor | None,  # (rows) acc, of the cross entropy; None: one for all
    scale: float,  # what multiplies them
    of_lse: Tensor | None,  # (rows) acc, of lse
    of_entropy: Tensor | None,  # (rows) acc, of the entropy
    grad: Tensor,  # the input's shape
    threads: int,
    /,
) -> None:
    """Write the gradient. IndexError for a target outside of all classes."""
