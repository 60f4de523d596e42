"""Types of csrc/bindings.cpp. Tensors come as addresses (0: absent), dtypes and reductions as the numbers in cpu.py."""

openmp: bool  # False: built without OpenMP, so on one thread only

def isa_names() -> list[str]:
    """The instruction sets that this processor can run, best first."""

def isa() -> str:
    """The instruction set in use."""

def set_isa(name: str) -> None:
    """Take one of `isa_names()`, as the variable FUSED_CE_ISA does at import. ValueError for any other name."""

def forward(
    input: int,  # (N, C)
    dtype: int,
    N: int,
    C: int,
    input_stride: int,
    target: int,  # (N)
    target_is_bytes: bool,
    target_stride: int,
    weight: int,  # (C)
    options: tuple[int, float, float, float, float],  # the first five fields of Options
    reduction: int,
    num_items: float,  # NaN: not given
    loss: int,  # () or (N)
    loss_dtype: int,
    grad: int,  # (N, C)
    stats: int,  # (N, 2)
    threads: int,
    /,
) -> None:
    """Write the loss, and what else has an address. IndexError for a target out of range."""

def backward(
    input: int,  # (N, C)
    dtype: int,
    N: int,
    C: int,
    input_stride: int,
    target: int,  # (N)
    target_is_bytes: bool,
    target_stride: int,
    weight: int,  # (C)
    options: tuple[int, float, float, float, float],  # the first five fields of Options
    reduction: int,
    num_items: float,  # NaN: not given
    upstream: int,  # (N)
    scale: float,
    grad: int,  # (N, C)
    stats: int,  # (N, 2)
    threads: int,
    /,
) -> None:
    """Write the gradient. IndexError for a target out of range."""
