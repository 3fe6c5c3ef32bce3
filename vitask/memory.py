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


def available(device: str | torch.device = "cpu") -> int | None:
    """Bytes that this process can still take on a device; None where the system does not say."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [_number(Path("/proc/meminfo"), r"MemAvailable:\s*(\d+) kB", 1024)]
    for most, used, old in (  # of a container, in both versions of control groups
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        groups = Path("/sys/fs/cgroup")
        limit, taken = _number(groups / most), _number(groups / used)
        if limit is not None and taken is not None:
            stat = (groups / used).with_name("memory.stat")
            limits.append(limit - taken + (_number(stat, rf"(?m)^{old} (\d+)") or 0))
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY:
        limits.append(
            space - (_number(Path("/proc/self/status"), r"VmSize:\s*(\d+) kB", 1024) or 0)
        )
    return min((limit for limit in limits if limit is not None), default=None)


def _number(path: Path, pattern: str = r"^(\d+)", unit: int = 1) -> int | None:
    """The number that a pattern finds in a file of the system."""
    try:
        found = re.search(pattern, path.read_text("utf-8"))
    except OSError:
        return None
    return int(found[1]) * unit if found else None


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
