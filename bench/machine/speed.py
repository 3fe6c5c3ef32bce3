"""Measuring speed and memory: variants side by side in one process, ratios within one run.

Milliseconds: median, 20 % and 80 % quantile over rounds in which all variants take turns, so that
a machine that warms up or is busy for a while treats them alike. On CUDA between events on the
stream, with the caches flushed before each; on the CPU wall-clock.
Memory: the largest sum of what was allocated and not yet freed during one call, beyond what was
there before: by CUDA's own counter, on the CPU by the profiler's allocation events. Of work that
takes too long for a profiler: by the system's counter of the process.
"""

import gc
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from bench.runs.memory import MIB

FLUSHED = 256 * MIB  # bytes written before a measurement on CUDA: more than any L2 cache
ROUNDS = (5, 30)  # at least, at most
BUDGET_SECONDS = 6.0  # of all variants of one comparison, once the least rounds are done

Call = Callable[[], list[float]]  # runs once; milliseconds of its passes


class Spread(NamedTuple):
    """Median with the 20 % and 80 % quantiles."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> "Spread":
        low, high = np.quantile(samples, [0.2, 0.8])
        return cls(statistics.median(samples), float(low), float(high))


class Clock:
    """Times the passes of one call on a device."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._flush = torch.empty(FLUSHED, dtype=torch.int8, device=device) if self._cuda else None

    def __call__(self, *passes: Callable[[], object]) -> list[float]:
        """Milliseconds of each pass; they run one after the other."""
        if not self._cuda:
            marks = [time.perf_counter()]
            for one in passes:
                one()
                marks.append(time.perf_counter())
            return [1e3 * (b - a) for a, b in pairwise(marks)]
        assert self._flush is not None
        self._flush.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(passes) + 1)]
        events[0].record()
        for one, event in zip(passes, events[1:], strict=True):
            one()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)]


def interleaved(
    variants: Mapping[str, Call],
    *,
    rounds: tuple[int, int] = ROUNDS,
    budget_seconds: float = BUDGET_SECONDS,
) -> dict[str, list[list[float]]]:
    """Each variant's milliseconds, one list a round; a round runs every variant once.

    One more round at first is for warming up and is not kept.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    start = time.perf_counter()
    least, most = rounds
    for number in range(most):
        if number >= least and time.perf_counter() - start > budget_seconds:
            break
        for name, call in variants.items():
            found[name].append(call())
    return found


def peak_mib(call: Callable[[], object], device: str) -> float:
    """Largest memory that one call holds beyond what was held before it."""
    call()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([0, *(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))])
    return float(held.max()) / MIB


def device_name() -> str:
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    place = Path("/proc/cpuinfo")
    found = (
        re.search(r"^model name\s*:\s*(.+)$", place.read_text(), re.M) if place.exists() else None
    )
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
