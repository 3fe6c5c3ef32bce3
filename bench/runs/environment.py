"""What a result was made with: versions, commit, hardware, memory, command."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.errors import ROOT

LIBRARIES = (
    "torch", "torchvision", "transformers", "peft", "timm", "medmnist", "triton", "accelerate",
    "scikit-learn", "scipy", "numpy", "pandas", "pyarrow", "pillow", "safetensors", "tokenizers",
)  # fmt: skip


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of Python and of libraries, "missing" for those that are not installed."""
    found = {"python": platform.python_version()}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "missing"
    return found


def commit() -> str:
    """The checkout's commit, with "-dirty" if sources differ; "unknown" without git."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", "bench", "kernels", "vitask")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", check=True
    )
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and accelerator."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30),
        "gpu": gpu,
    }


def command_line(roots: Sequence[Path], out: Path, arguments: Sequence[str] | None = None) -> str:
    """The command as given, with DATA_ROOT and OUT in the place of paths, and files by name.

    `--resume` and `--fresh` decide about files, not about results: left out.
    """
    names = {str(path): name for path, name in [*((r, "DATA_ROOT") for r in roots), (out, "OUT")]}
    words = []
    for word in sys.argv[1:] if arguments is None else arguments:
        option, equals, value = word.partition("=")
        given = value if equals else word
        named = names.get(str(Path(given)), given) if given else given  # ./a, a// and a/./ are a
        word = f"{option}={named}" if equals else named
        if word not in ("--resume", "--fresh"):
            words.append(Path(word).name if word.endswith(".toml") else word)
    return " ".join(["python -m bench", *words])
