"""DTensors for the tests: meshes, and how logits and targets lie on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

EPS = torch.finfo(torch.float32).eps
ROWS, CLASSES, PIXELS, COPY, PART = "rows", "classes", "pixels", "copy", "part"
# What the dimensions of a mesh shard; a second one has two ranks.
LAYOUTS = [
    (ROWS,),
    (CLASSES,),
    (PIXELS,),
    (COPY,),
    (PART,),
    (ROWS, CLASSES),
    (CLASSES, ROWS),
    (PIXELS, CLASSES),
    (ROWS, ROWS),
    (CLASSES, CLASSES),
    (ROWS, COPY),
    (PART, CLASSES),
]
_meshes: dict[tuple[int, ...], DeviceMesh] = {}


def mesh_of(size: int, layout: tuple[str, ...] = (ROWS,)) -> DeviceMesh:
    shape = (size,) if len(layout) == 1 else (size // 2, 2)
    if shape not in _meshes:
        _meshes[shape] = DeviceMesh("cpu", torch.arange(size).view(shape))
    return _meshes[shape]


def placed(whole: Tensor, layout: tuple[str, ...], size: int, has_classes: bool = True) -> DTensor:
    """Logits (N, C, d1..dk) or, without classes, targets, placed as the logits' layout has it."""
    mesh, dims = mesh_of(size, layout), whole.dim() + (not has_classes)
    places: list[Any] = []
    for what in layout:
        dim = {ROWS: 0 if dims > 1 else None, CLASSES: min(1, dims - 1), PIXELS: 2 if dims > 2 else None}.get(what)
        if not has_classes and dim is not None:
            dim = None if what == CLASSES else max(0, dim - 1)
        places.append(Replicate() if dim is None else Shard(dim))
    if not has_classes or PART not in layout:
        return distribute_tensor(whole, mesh, places)
    local = distribute_tensor(whole, mesh, places).to_local()
    local = local if mesh.get_coordinate()[0] == 0 else torch.zeros_like(local)
    places[0] = Partial()
    return DTensor.from_local(local, mesh, places, shape=whole.shape, stride=whole.contiguous().stride())


def target_of(target: Tensor, layout: tuple[str, ...], size: int, has_probs: bool = False) -> DTensor:
    layout = tuple(COPY if what == PART else what for what in layout)
    return placed(target, layout, size, has_classes=has_probs)


def uneven(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (7, 10), of which the last rows, and so the last ranks', are nearly all ignored; targets and weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 10, generator=generator, dtype=torch.float64) * 3
    y = torch.tensor([3, 9, 0, 5, -100, -100, 2])
    return x.to(dtype), y, torch.linspace(0.01, 3, 10, dtype=torch.float64).to(dtype)
