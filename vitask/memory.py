"""Memory that work holds."""

import ctypes
import gc
import re
import resource
from contextlib import suppress
from pathlib import Path

import torch

MIB = 2**20


def reset_peak() -> None:
    """Measure the peak anew from here, where the system can (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "utf-8")


def peak_mib() -> float:
    """Largest resident memory of this process since `reset_peak`, or since its start."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text("utf-8")) if status.is_file() else None
    kib = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 1024


class Held:
    """As a context: the most memory that the work inside held beyond the memory held before, MiB.

    On CUDA by the allocator's count. Else by the pages of the process, after freed pages have been
    given back to the system (with glibc; elsewhere reused pages hide what is allocated in them).
    """

    mib = 0.0

    def __enter__(self) -> "Held":
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / MIB
        else:
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            reset_peak()
            self._before = peak_mib()
        return self

    def __exit__(self, *_: object) -> None:
        cuda = torch.cuda.is_available()
        self.mib = (torch.cuda.max_memory_allocated() / MIB if cuda else peak_mib()) - self._before
