"""Types of csrc/bindings.cpp. Tensors come as addresses (0: absent) or views, reductions as the numbers in cpu.py."""

from collections.abc import Sequence

View = tuple[int, int, Sequence[int], Sequence[int]]  # address, dtype as in cpu.py, sizes, strides in elements
KernelOptions = tuple[int, float, float, float, float]  # the first five fields of Options; no softcap: 0

openmp: bool  # False: built without OpenMP, so on one thread only
compiler: str
stats_size: int  # doubles a row
extras_size: int  # doubles a row

def isa_names() -> list[str]:
    """The instruction sets that this processor can run, best first."""

def isa() -> str:
    """The instruction set in use."""

def set_isa(name: str) -> None:
    """Take one of `isa_names()`, as the variable FUSED_CE_ISA does at import. ValueError for any other name."""

def forward(
    input: View,  # (N, C, d1..dk) or (C)
    target: View,  # (N, d1..dk) or (), or the input's shape
    weight: int,  # (C) acc
    options: KernelOptions,
    reduction: int,
    num_items: float,  # NaN: not given
    scale: float,  # the upstream gradient that grad is made for
    loss: int,  # () or (N, d1..dk)
    loss_dtype: int,
    grad: View | None,  # the input's shape
    stats: int,  # (rows, stats_size) float64
    extras: int,  # (rows, extras_size) float64
    threads: int,
    /,
) -> None:
    """Write the loss, and what else has an address. IndexError for a target out of range."""

def backward(
    input: View,
    target: View,
    weight: int,
    options: KernelOptions,
    reduction: int,
    num_items: float,
    upstream: int,  # (rows) acc; 0: one for all rows
    scale: float,  # multiplies it
    g_lse: int,  # (rows) acc
    grad: View | None,
    d_target: View | None,  # the target's shape
    stats: int,
    threads: int,
    /,
) -> None:
    """Write the gradients. IndexError for a target out of range."""
