"""`fused_ce.cross_entropy` of DTensors: the kernels on every rank's own rows and classes, and sums over the ranks.

Reached from `functional.py` for DTensors alone, by a late import.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from .. import gate
from ..contract import Call, row_shape
from ..functional import CrossEntropyOutput
from ..functional import cross_entropy as of_all_classes
from ..options import FLOATS
from . import status
from .exchange import gather
from .functional import vocab_parallel_cross_entropy
from .gate import class_dim as class_dim_of
from .layout import ranks_of

Placements = tuple[Placement, ...]


class Layout(NamedTuple):
    """How the tensors of a call lie on a mesh: a placement for each of its dimensions."""

    mesh: DeviceMesh
    logits: Placements
    rows: Placements  # of class indices, and of what a call gives for each row
    class_dim: int | None  # the mesh dimension that shards the classes
    row_dims: list[int]  # the mesh dimensions that shard rows


def cross_entropy(call: Call, backend: str | None) -> Tensor | CrossEntropyOutput:
    """See `fused_ce.cross_entropy`. What is one number a row is placed as the rows; scalars are replicated.

    Not Partial, as which a sum over sharded rows comes cheaper: `item()` of one gives this rank's part of it.

    Raises:
        what `fused_ce.cross_entropy` and `vocab_parallel_cross_entropy` raise; on a CPU on all ranks, if on one.
        TypeError: the target is no tensor.
        ValueError: it has another shape or lies on another mesh, or rows are sharded and it is no DTensor.
        NotImplementedError: class weights want a gradient.
    """
    if torch.compiler.is_compiling():
        # A graph does not hold the exchange of statuses: it is left for this call.
        return torch.compiler.disable(_run)(call, backend)  # type: ignore[no-any-return, no-untyped-call]
    return _run(call, backend)


def _run(call: Call, backend: str | None) -> Tensor | CrossEntropyOutput:
    input, target, weight, options = call
    if not isinstance(target, Tensor):
        raise TypeError(f"expected targets as a tensor, got {type(target).__name__}")
    wants_grad = torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)
    if options.inplace and wants_grad:
        gate.check_no_leaf(input)
    has_probs = target.shape == input.shape
    layout = _layout(input, has_probs)
    target = _placed(input, target, layout.logits if has_probs else layout.rows, layout)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("expected class weights without a gradient beside DTensors; detach them")
    options = options._replace(num_items=_whole(options.num_items), grad_scale=_whole(options.grad_scale))
    logits = input if input.placements == layout.logits else input.redistribute(placements=layout.logits)  # type: ignore[attr-defined]
    read = [] if options.inplace else [tensor for tensor in (logits, target) if isinstance(tensor, DTensor)]
    mine = Call(_own(logits, *read), _own(target, *read), _whole(weight), options)
    dtype = gate.with_loss_dtype(mine).options.dtype or input.dtype
    is_sum = bool(layout.row_dims) and options.reduction != "none" and dtype in FLOATS
    result = _together(_share_of_sum(mine, dtype, layout) if is_sum else mine, layout, input, backend)
    if options.inplace and wants_grad:
        torch.autograd.graph.increment_version(input)  # of the DTensor, which counts apart from its local tensor

    def scalar(value: Tensor, dtype: torch.dtype) -> Tensor:
        if is_sum:  # in float64, rounded once
            value = _Sum.apply(value.double(), layout).to(dtype)  # type: ignore[no-untyped-call]
        return _global(value, (Replicate(),) * layout.mesh.ndim, value.shape, layout)

    def rows(value: Tensor) -> Tensor:
        return _global(value, layout.rows, row_shape(input), layout)

    loss, *stats = result if isinstance(result, CrossEntropyOutput) else (result,)
    loss = rows(loss) if options.reduction == "none" else scalar(loss, dtype)
    if not stats:
        return loss
    lse, z_loss, argmax, correct, entropy = stats
    z_loss = rows(z_loss) if options.reduction == "none" else scalar(z_loss, z_loss.dtype)
    return CrossEntropyOutput(loss, rows(lse), z_loss, rows(argmax), rows(correct), rows(entropy))


def _layout(input: Any, has_probs: bool) -> Layout:
    """Classes stay sharded over one mesh dimension, rows over any; all else is gathered, and partial sums are summed.

    Probabilities, which vocab-parallel cross entropy does not take, lie as the logits, with all classes.
    """
    class_dim = class_dim_of(input)
    logits: list[Placement] = []
    rows: list[Placement] = []
    layout = Layout(input.device_mesh, (), (), None, [])
    for i, place in enumerate(input.placements):
        dim = getattr(place, "dim", None)  # a flattened sequence is sharded by a placement of torch's own, no Shard
        row = place
        if dim == class_dim and type(place) is Shard and layout.class_dim is None and not has_probs:
            layout, row = layout._replace(class_dim=i), Replicate()
        elif dim is not None and (dim < class_dim or (dim > class_dim and type(place) is Shard)):
            layout.row_dims.append(i)
            row = place if dim < class_dim else Shard(dim - 1)
        else:
            place = row = Replicate()
        logits.append(place)
        rows.append(row)
    return layout._replace(logits=tuple(logits), rows=tuple(rows))


def _placed(input: Tensor, target: Any, wanted: Placements, layout: Layout) -> Any:
    """The target as it has to lie beside the logits."""
    if target.shape not in (row_shape(input), input.shape):
        raise ValueError(
            f"expected targets of shape {tuple(row_shape(input))} for logits (N, C, d1..dk) of shape "
            f"{tuple(input.shape)}, got {tuple(target.shape)}; flatten leading dimensions of both first"
        )
    if isinstance(target, DTensor):
        if target.device_mesh != layout.mesh:
            raise ValueError(f"expected targets on the logits' mesh, {layout.mesh}, got {target.device_mesh}")
        return target if target.placements == wanted else target.redistribute(placements=wanted)
    if layout.row_dims:
        raise ValueError(
            f"expected targets as a DTensor beside logits with sharded rows, got a plain tensor, of which rows or of "
            f"all nobody knows; wrap it by DTensor.from_local or distribute_tensor, with placements {wanted}"
        )
    return target


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


class _Own(torch.autograd.Function):
    """This rank's part of a DTensor. Its gradient is that of the same part: nothing is left to be summed.

    `read`: what backward reads parts of. A DTensor alone counts changes of it in place, and is saved to be asked.
    """

    @staticmethod
    def forward(ctx: Any, tensor: DTensor, *read: DTensor) -> Tensor:
        ctx.mesh, ctx.placements, ctx.shape = tensor.device_mesh, tensor.placements, tensor.shape
        ctx.save_for_backward(*read)
        local: Any = tensor.to_local()
        if hasattr(local, "wait"):  # still on its way, from a redistribution that nobody has waited for
            local = local.wait()
        data: Tensor = local.data
        return data  # not a view, which a Function must not return where it may be written to

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        unchanged = ctx.saved_tensors  # or a RuntimeError
        return _from_local(grad, ctx.mesh, ctx.placements, ctx.shape), *(None for _ in unchanged)


def _own(tensor: Tensor, *read: Tensor) -> Tensor:
    return _Own.apply(tensor, *read) if isinstance(tensor, DTensor) else tensor  # type: ignore[no-untyped-call]


def _global(local: Tensor, placements: Placements, shape: torch.Size, layout: Layout) -> Tensor:
    return _from_local(local, layout.mesh, placements, shape)


def _from_local(local: Tensor, mesh: DeviceMesh, placements: Placements, shape: torch.Size) -> Tensor:
    # Said, because parts of different sizes do not tell it.
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=strides)


class _Sum(torch.autograd.Function):
    """A sum of parts that the ranks hold, known to all of them; so is its gradient, which is that of each part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, layout: Layout) -> Tensor:  # ()
        return _over_rows(part.clone(), layout)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _share_of_sum(call: Call, dtype: torch.dtype, layout: Layout) -> Call:
    """The part of a sum or mean over all rows that is this rank's, in a dtype to be added up in.

    Class weights of a mean are multiplied by what makes them 1 on average over the rows: that leaves one divisor for
    the cross entropy and the z-loss.
    """
    input, target, weight, options = call
    options = options._replace(dtype=torch.promote_types(dtype, torch.float32))
    if options.reduction != "mean" or options.num_items is not None:
        return call._replace(options=options)
    if target.shape == input.shape:
        rows = torch.ones(row_shape(input), device=input.device, dtype=torch.bool)
        return call._replace(options=options._replace(num_items=_over_rows(rows.sum().double(), layout)))
    label = target.long()  # a uint8 of 156 equals -100
    counted = label != options.ignore_index
    count = counted.sum().double()
    if weight is None:
        return call._replace(options=options._replace(num_items=_over_rows(count, layout)))
    # A target that is no class is told by the kernels.
    w_y = torch.where(counted, weight.double()[torch.where(counted, label, 0).clamp(0, len(weight) - 1)], 0)
    count, total = _over_rows(torch.stack([count, w_y.sum()]), layout)
    weight = (weight.double() * (count / total)).to(torch.promote_types(weight.dtype, torch.float32))
    return call._replace(weight=weight, options=options._replace(num_items=count))


def _over_rows(numbers: Tensor, layout: Layout) -> Tensor:
    for dim in layout.row_dims if layout.mesh.get_coordinate() is not None else ():
        dist.all_reduce(numbers, group=layout.mesh.get_group(dim))
    return numbers


def _together(call: Call, layout: Layout, input: Tensor, backend: str | None) -> Tensor | CrossEntropyOutput:
    """The loss of this rank's part; on a CPU an error, if one of the ranks that hold other rows has one."""
    if layout.mesh.get_coordinate() is None:  # a rank outside the mesh has no part: DTensor asks for empty tensors
        nothing = call.input.sum()
        return CrossEntropyOutput(*(nothing,) * 6) if call.options.return_stats else nothing
    tells = bool(layout.row_dims) and call.input.is_cpu
    try:
        result = _of_part(call, layout, input, backend)
    except Exception as error:
        if tells:
            _worst(status.of_error(error), layout)
        raise
    if tells and (failure := status.error_of(_worst(status.Status(), layout))):
        raise failure
    return result


def _worst(mine: status.Status, layout: Layout) -> status.Status:
    """What the first of the ranks that hold other rows says that failed; `mine` where none did."""
    if mine.words:
        mine = mine._replace(words=f"{mine.words} (on rank {dist.get_rank()})")
    numbers = mine.numbers(torch.device("cpu"))
    for dim in layout.row_dims:
        numbers = status.first_failed(gather(numbers, ranks_of(layout.mesh.get_group(dim))))
    return status.read(numbers)


def _of_part(call: Call, layout: Layout, input: Tensor, backend: str | None) -> Tensor | CrossEntropyOutput:
    keywords = call.options.keywords()
    run: Any = of_all_classes
    if layout.class_dim is not None:
        run = vocab_parallel_cross_entropy
        keywords |= {"group": layout.mesh.get_group(layout.class_dim), "vocab_size": input.shape[class_dim_of(input)]}
    result: Tensor | CrossEntropyOutput = run(call.input, call.target, call.weight, backend=backend, **keywords)
    return result
