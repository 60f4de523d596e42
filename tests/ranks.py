"""Ranks of a gloo group, each a process, that run functions of the tests.

They are started once a session, for a rank takes seconds to import torch; FUSED_CE_RANKS says how many (default 2).
"""

from __future__ import annotations

import datetime
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

SIZE = int(os.environ.get("FUSED_CE_RANKS", "2"))


class Ranks:
    """Call one with a function of a module: each rank runs `function(rank, size, *arguments)`."""

    def __init__(self, size: int = SIZE, timeout: float = 120.0) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        where = str(Path(self._folder.name) / "store")
        pairs = [context.Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=_serve, args=(rank, size, where, timeout, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()
        self.size = size

    def outcomes(self, function: Callable[..., Any], *arguments: Any, patience: float = 120.0) -> list[Any]:
        """What each rank returned or raised, in order; None where it died."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        return [_answer(pipe, patience) for pipe in self._pipes]

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank returned.

        Raises:
            AssertionError: a rank raised; the message is its traceback.
        """
        results = self.outcomes(function, *arguments)
        for rank, result in enumerate(results):
            if isinstance(result, BaseException):
                told = "\n".join(getattr(result, "__notes__", [])) or repr(result)
                raise AssertionError(f"rank {rank} raised:\n{told}")
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self._folder.cleanup()


def _answer(pipe: Any, patience: float) -> Any:
    try:
        assert pipe.poll(patience), f"a rank did not answer within {patience} s"
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return None


def _serve(rank: int, size: int, where: str, timeout: float, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{where}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(function(rank, size, *arguments))
        except BaseException as error:
            error.__notes__ = [traceback.format_exc()]
            pipe.send(error.with_traceback(None))
