"""Times and peak memory of variants that run side by side in one process.

Milliseconds: median with the 20 % and 80 % quantiles over rounds. Each round runs every variant
once, so a machine that is warming up or busy slows all of them alike. On CUDA, events on the
stream, after a flush of the caches; on the CPU, wall-clock time.
Memory: the most that one call allocates at once, beyond the memory allocated before it: by CUDA's
counter, or on the CPU by the profiler's allocation events.
"""

import gc
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from vitask.memory import MIB

FLUSHED = 256 * MIB  # bytes written before each measurement on CUDA; more than any L2 cache holds
ROUNDS = (5, 30)  # at least, at most
BUDGET_SECONDS = 6.0  # for all rounds of one comparison; the least rounds may exceed it
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}

Call = Callable[[], list[float]]  # runs a variant once and returns the milliseconds of its passes


class Spread(NamedTuple):
    """Median with the 20 % and 80 % quantiles."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float] | np.ndarray) -> "Spread":
        return cls(float(np.median(samples)), *map(float, np.quantile(samples, [0.2, 0.8])))


def figure(quantity: str, found: float | np.ndarray) -> dict[str, Any]:
    """The columns quantity, value, low and high, from one value or from samples."""
    if isinstance(found, np.ndarray):
        return {"quantity": quantity} | Spread.of(found)._asdict()
    return {"quantity": quantity, "value": found, "low": None, "high": None}


class Clock:
    """Times the passes of one call on a device."""

    def __init__(self, device: str) -> None:
        cuda = device == "cuda"
        self._flush = torch.empty(FLUSHED, dtype=torch.int8, device=device) if cuda else None

    def __call__(self, *passes: Callable[[], object]) -> list[float]:
        """Run the passes in order; returns the milliseconds of each."""
        if self._flush is None:
            marks = [time.perf_counter()]
            for one in passes:
                one()
                marks.append(time.perf_counter())
            return [1e3 * (b - a) for a, b in pairwise(marks)]
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
    """Each variant's milliseconds, a list per round, after one round to warm up."""
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
    """The most memory that one call allocates at once, beyond the memory allocated before it."""
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
    text = place.read_text("utf-8") if place.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """A name that fits into a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
