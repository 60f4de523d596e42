"""`linear_cross_entropy` of a DTensor weight whose classes are sharded: `vocab_parallel_linear_cross_entropy` on parts.

Reached from `linear/functional.py` for DTensors alone, by a late import.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ..functional import CrossEntropyOutput
from ..options import FLOATS
from . import exchange, status
from .layout import ranks_of
from .linear import vocab_parallel_linear_cross_entropy

Placements = tuple[Placement, ...]


def class_dim(linear_weight: DTensor) -> int | None:  # (V, H)
    """The mesh dimension that shards the classes, where one does and all others replicate them."""
    dims = [i for i, place in enumerate(linear_weight.placements) if not place.is_replicate()]
    if linear_weight.dim() != 2 or len(dims) != 1:
        return None
    place = linear_weight.placements[dims[0]]
    return dims[0] if type(place) is Shard and place.dim == 0 else None


def linear_cross_entropy(
    input: Tensor,  # (..., H)
    linear_weight: DTensor,  # (V, H)
    target: Tensor,  # (...)
    keywords: dict[str, Any],
) -> Tensor | CrossEntropyOutput:
    """See `fused_ce.linear_cross_entropy`. Beside a plain input what comes is plain, else a DTensor.

    Scalars are replicated, what is one number a row is placed as the rows.

    The weight's gradient is placed as the weight; where rows are sharded over another mesh dimension it is Partial
    there, as torch's own linear leaves it.

    Raises:
        what `vocab_parallel_linear_cross_entropy` raises.
        ValueError: tensors on other meshes, or a plain tensor of which rows nobody knows.
        NotImplementedError: rows are sharded over more than one mesh dimension.
    """
    if torch.compiler.is_compiling():
        # A graph does not hold the exchange of statuses: it is left for this call.
        return torch.compiler.disable(_run)(input, linear_weight, target, keywords)  # type: ignore[no-any-return, no-untyped-call]
    return _run(input, linear_weight, target, keywords)


def _run(
    input: Tensor, linear_weight: DTensor, target: Tensor, keywords: dict[str, Any]
) -> Tensor | CrossEntropyOutput:
    mesh, dim = linear_weight.device_mesh, class_dim(linear_weight)
    assert dim is not None
    for name, tensor in (("input", input), ("target", target), ("linear_bias", keywords["linear_bias"])):
        if isinstance(tensor, DTensor) and tensor.device_mesh != mesh:
            raise ValueError(f"expected {name} on the linear_weight's mesh, {mesh}, got {tensor.device_mesh}")
    rows = _rows(input, mesh, dim)
    row_dims = [i for i, place in enumerate(rows) if place.is_shard()]
    if len(row_dims) > 1:
        raise NotImplementedError(f"expected rows sharded over one mesh dimension beside the classes', got {rows}")
    if row_dims and not isinstance(target, DTensor):
        raise ValueError(
            "expected target as a DTensor beside an input with sharded rows, got a plain tensor, of which rows or of "
            f"all nobody knows; wrap it by DTensor.from_local or distribute_tensor, with placements {rows}"
        )
    # The sum over the class dimension is made already; that over rows is left to whoever uses the gradient.
    shared: Placements = tuple(
        Partial() if i in row_dims else place for i, place in enumerate(linear_weight.placements)
    )
    bias = keywords["linear_bias"]
    if bias is not None:
        if not isinstance(bias, DTensor):
            raise ValueError(
                "expected linear_bias as a DTensor, as linear_weight is, got a plain tensor; distribute it"
            )
        keywords["linear_bias"] = _local(bias, linear_weight.placements, shared)
    for name in ("weight", "num_items", "grad_scale"):
        if isinstance(keywords[name], DTensor):
            keywords[name] = keywords[name].full_tensor()
    label = _local(target, rows, rows)
    dtype = keywords["dtype"]
    is_sum = bool(row_dims) and keywords["reduction"] in ("mean", "sum")
    if is_sum:
        keywords |= _share_of_sum(label, keywords, mesh.get_group(row_dims[0]))
        dtype = dtype if dtype in FLOATS else input.dtype
        keywords["dtype"] = torch.promote_types(dtype, torch.float32)
    groups = [mesh.get_group(i) for i in row_dims]
    call = (_local(input, rows, rows), _local(linear_weight, linear_weight.placements, shared), label)
    result = _together(call, keywords | {"group": mesh.get_group(dim), "vocab_size": linear_weight.shape[0]}, groups)
    if not isinstance(input, DTensor):
        return result

    def scalar(value: Tensor, dtype: torch.dtype) -> Tensor:
        parts: Placements = tuple(Partial() if is_sum and i in row_dims else Replicate() for i in range(mesh.ndim))
        whole = DTensor.from_local(value, mesh, parts, run_check=False)
        return whole.redistribute(placements=(Replicate(),) * mesh.ndim).to(dtype)

    def of_rows(value: Tensor) -> Tensor:
        return _global(value, mesh, rows, input.shape[:-1])

    none = keywords["reduction"] == "none"
    loss, *stats = result if isinstance(result, CrossEntropyOutput) else (result,)
    loss = of_rows(loss) if none else scalar(loss, dtype if is_sum else loss.dtype)
    if not stats:
        return loss
    lse, z_loss, argmax, correct, entropy = stats
    z_loss = of_rows(z_loss) if none else scalar(z_loss, z_loss.dtype)
    return CrossEntropyOutput(loss, of_rows(lse), z_loss, of_rows(argmax), of_rows(correct), of_rows(entropy))


def _rows(input: Tensor, mesh: DeviceMesh, class_dim: int) -> Placements:
    """How rows lie: sharded where the input's are, but not over the ranks that share the classes: each needs all."""
    if not isinstance(input, DTensor):
        if mesh.ndim > 1:
            raise ValueError(
                f"expected input as a DTensor beside a linear_weight on {mesh}, got a plain tensor, of which nobody "
                "knows whether all ranks hold the same rows; wrap it by DTensor.from_local"
            )
        return (Replicate(),)
    return tuple(
        place if i != class_dim and type(place) is Shard and place.dim < input.dim() - 1 else Replicate()
        for i, place in enumerate(input.placements)
    )


def _local(tensor: Tensor, placements: Placements, of_gradient: Placements) -> Tensor:
    """This rank's part of a tensor placed so, which a plain one is."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.placements != placements:
        tensor = tensor.redistribute(placements=placements)
    return _Local.apply(tensor, of_gradient)  # type: ignore[no-any-return, no-untyped-call]


class _Local(torch.autograd.Function):
    """As `DTensor.to_local`, whose result may be still on its way from another rank: no plain tensor yet."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor, of_gradient: Placements) -> Tensor:
        ctx.mesh, ctx.of_gradient, ctx.shape = tensor.device_mesh, of_gradient, tensor.shape
        local: Any = tensor.to_local()
        if hasattr(local, "wait"):
            local = local.wait()
        return local.view_as(local)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _global(grad, ctx.mesh, ctx.of_gradient, ctx.shape), None


def _global(local: Tensor, mesh: DeviceMesh, placements: Placements, shape: torch.Size) -> Tensor:
    # Said, because parts of different sizes do not tell it.
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=strides)


def _share_of_sum(target: Tensor, keywords: dict[str, Any], group: Any) -> dict[str, Any]:
    """The divisor of a mean over all ranks' rows, and class weights that are 1 on average over them.

    These leave one divisor for the cross entropy and the z-loss.
    """
    if keywords["reduction"] != "mean" or keywords["num_items"] is not None:
        return {}
    weight, ignore_index = keywords["weight"], keywords["ignore_index"]
    label = target.long()  # a uint8 of 156 equals -100
    counted = label != (-100 if ignore_index is None else ignore_index)
    numbers = counted.sum().double()[None]
    if weight is not None:
        # A target that is no class is told by the kernels.
        w_y = torch.where(counted, weight.double()[torch.where(counted, label, 0).clamp(0, len(weight) - 1)], 0)
        numbers = torch.cat([numbers, w_y.sum()[None]])
    dist.all_reduce(numbers, group=group)
    if weight is None:
        return {"num_items": numbers[0]}
    weight = (weight.double() * (numbers[0] / numbers[1])).to(torch.promote_types(weight.dtype, torch.float32))
    return {"num_items": numbers[0], "weight": weight}


def _together(call: tuple[Tensor, ...], keywords: dict[str, Any], groups: list[Any]) -> Tensor | CrossEntropyOutput:
    """The loss of this rank's rows; on a CPU an error, if one of the ranks that hold other rows has one."""
    tells = [ranks_of(group) for group in groups if call[0].is_cpu]
    try:
        result: Tensor | CrossEntropyOutput = vocab_parallel_linear_cross_entropy(*call, **keywords)
    except Exception as error:
        for ranks in tells:
            exchange.tell(status.of_error(error), ranks)
        raise
    for ranks in tells:
        status.check(exchange.tell(status.Status(), ranks))
    return result
