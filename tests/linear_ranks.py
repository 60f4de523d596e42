"""Runs checks on gloo ranks, 2 or as many as FUSED_CE_RANKS says, that start once; and what the checks share.

Each rank runs every function of CHECKS, all in the same order, and what one of them raises is that check's failure.
"""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from linear_cases import Case, V, distance
from torch import Tensor

from fused_ce.distributed import vocab_parallel_linear_cross_entropy

RANKS = int(os.environ.get("FUSED_CE_RANKS", "2"))
TIMEOUT = 60  # seconds; what is raised after them was a rank left alone
CHECKS: dict[str, Callable[[int], None]] = {}
PADDING = 7  # rows at the end of a padded weight, at least
LAYOUTS = ("even", "padded", "uneven")


def check(function: Callable[[int], None]) -> Callable[[int], None]:
    CHECKS[function.__name__] = function
    return function


def run(module: str) -> list[dict[str, str]]:
    """What failed on each rank, by the name of the check; the module fills CHECKS where it is imported."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (folder, module), nprocs=RANKS)
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(RANKS)]


def _rank(rank: int, folder: str, module: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/ranks",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    failed: dict[str, str] = {}
    import_module(module)
    for name, function in CHECKS.items():
        start = time.monotonic()
        try:
            function(rank)
        except BaseException:
            failed[name] = f"rank {rank}: {traceback.format_exc()}"
        if name in failed and time.monotonic() - start > TIMEOUT:
            break  # the ranks are no longer at the same check
    Path(folder, f"{rank}.json").write_text(json.dumps(failed))


def shard_of(rank: int, layout: str) -> tuple[slice, dict[str, Any]]:
    """This rank's classes, and how a call says so."""
    if layout == "uneven":  # one rank has a class, another none where there are more than two, the last the most
        borders = [*(min(i, 1) for i in range(RANKS)), V]
        return slice(borders[rank], borders[rank + 1]), {"vocab_start": borders[rank], "vocab_size": V}
    n = -(-V // RANKS) + (PADDING if layout == "padded" else 0)
    return slice(min(V, rank * n), min(V, rank * n + n)), {"vocab_size": V}


def local(rank: int, layout: str, whole: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any], slice]:
    """This rank's tensors, leaves each, the keywords that say where its classes are, and these.

    Rows of padding hold NaN: nobody is to read them.
    """
    mine, keywords = shard_of(rank, layout)
    own = {}
    for name, tensor in whole.items():
        part = tensor.detach().clone()
        if name in ("linear_weight", "linear_bias"):
            part = part[mine]
            if layout == "padded":
                rows = -(-V // RANKS) + PADDING - len(part)
                part = torch.cat([part, part.new_full((rows, *part.shape[1:]), torch.nan)])
        own[name] = part.clone().requires_grad_(tensor.requires_grad)
    return own, keywords, mine


def ours(case: Case, tensors: dict[str, Tensor], **keywords: Any) -> Any:
    given: dict[str, Any] = {"chunk_rows": case.chunk_rows, **case.options, **keywords}
    return vocab_parallel_linear_cross_entropy(**tensors, **given)


def same_everywhere(*tensors: Tensor) -> None:
    for tensor in tensors:
        of_first = tensor.detach().clone()
        dist.broadcast(of_first, 0)
        assert torch.equal(of_first.nan_to_num(7), tensor.detach().nan_to_num(7))


def close(got: Tensor, exact: Tensor, single: Tensor, slack: float, least: float) -> None:
    """No further from float64 than `slack` times what one process gives, or than `least`."""
    assert (got.shape, got.dtype) == (single.shape, single.dtype)
    assert torch.equal(got.isfinite(), exact.isfinite())
    got, exact, single = (tensor.detach().nan_to_num(1.0) for tensor in (got, exact, single))
    errors = distance(got, exact), distance(single, exact)
    assert errors[0] <= max(slack * errors[1], least), errors


@contextmanager
def raises_everywhere(kind: type[Exception], *words: str) -> Iterator[None]:
    """All ranks raise it: one that waited for another would raise the engine's error, after its timeout."""
    caught = None
    try:
        yield
    except Exception as error:
        caught = error
    dist.barrier()
    assert isinstance(caught, kind), repr(caught)
    for word in words:
        assert word in str(caught), str(caught)
