"""Seconds of several calls, taken in turns: A B C A B C ..., so that a slow moment of the machine hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

LEAST = 7  # rounds, however slow the calls
WARM_UP = 2  # rounds thrown away


class Timing(NamedTuple):
    median: float  # seconds
    best: float
    spread: float  # between the quartiles, as a share of the median
    rounds: int


Calls = dict[str, tuple[Callable[[], object], Callable[[], object]]]  # what comes before the call, and the call


def interleaved(calls: Calls, device: str, seconds: float) -> dict[str, Timing]:
    """Time each call for about `seconds`, results thrown away within the time: freeing them is part of the cost.

    On a CPU each turn begins with one call that is not timed: the one before leaves caches, an allocator and threads
    still looking for work (OpenMP's beside jax's), which would be charged to whoever comes next.
    """
    clock = cuda_clock() if device == "cuda" else cpu_clock
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM_UP):
        for before, call in calls.values():
            before()
            clock(call)
    gc.collect()
    gc.disable()  # a collection would fall on whoever comes next
    try:
        end = time.perf_counter() + seconds * len(calls) * (2 if device == "cpu" else 1)
        rounds = 0
        while rounds < LEAST or time.perf_counter() < end:
            for name, (before, call) in calls.items():
                if device == "cpu":
                    before()
                    call()
                before()
                samples[name].append(clock(call))
            rounds += 1
    finally:
        gc.enable()
    return {name: summary(times) for name, times in samples.items()}


def cpu_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_clock() -> Callable[[Callable[[], object]], float]:
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flush = torch.empty(max(4 * cache, 1 << 26), dtype=torch.uint8, device="cuda")

    def clock(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # logits of the call before must not lie in the cache
        torch.cuda._sleep(1_000_000)  # half a millisecond in which Python runs ahead, as it does in training
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return clock


def summary(times: list[float]) -> Timing:
    first, median, third = statistics.quantiles(times, n=4)
    return Timing(median, min(times), (third - first) / median, len(times))
