"""Types of csrc/bindings.cpp. Tensors come as views, or as addresses where 0 stands for none."""

from collections.abc import Sequence

from .contract import RowSums
from .options import Options

View = tuple[int, int, Sequence[int], Sequence[int]]  # address, dtype as in cpu.py, sizes, strides in elements
Given = tuple[
    View, View, int
]  # input (N, C, d1..dk) or (C); target (N, d1..dk) or (), or the input's shape; weight (C) acc
Upstream = tuple[int, float, int]  # (rows) acc of the loss, 0: one for all; what multiplies them; (rows) acc of lse

openmp: bool  # False: built without OpenMP, so on one thread only
compiler: str
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

def forward(
    given: Given,
    options: Options,
    num_items: float,  # NaN: not given
    scale: float,  # the upstream gradient that grad is made for
    loss: tuple[int, int],  # address of () or (N, d1..dk), and its dtype
    grad: View | None,  # the input's shape
    saved: int,  # (columns, rows) float64
    stats: int,  # (rows, stats_size) float64
    threads: int,
    /,
) -> None:
    """Write the loss, and what else has an address. IndexError for a target out of range."""

def backward(
    given: Given,
    options: Options,
    num_items: float,
    upstream: Upstream,
    grad: View | None,
    d_target: View | None,  # the target's shape
    saved: int,
    threads: int,
    /,
) -> None:
    """Write the gradients. IndexError for a target out of range."""
