"""Compares this machine with the project's needs."""

import os
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from bench.errors import ROOT

MEMORY_GIB = 6  # enough for `run --all` with the embedded recipe
PROJECT = "vitask"
HUB_DISTRIBUTION = "kernels"  # our package `kernels` belongs to the distribution `vitask`


@dataclass(frozen=True)
class Finding:
    """A line of the report; `ok` is None where it is neither good nor bad."""

    what: str
    value: str
    ok: bool | None = None


def examine(roots: Sequence[Path]) -> list[Finding]:
    """Versions, the hub package, memory, cores, disk, accelerator, pocket weights, data."""
    return [*_versions(), _hub(), *_machine(), _pocket(), *(_root(Path(root)) for root in roots)]


def _versions() -> list[Finding]:
    """Installed versions against the ranges in the project's metadata."""
    found = []
    try:
        needed = [Requirement(text) for text in requires(PROJECT) or []]
    except PackageNotFoundError:
        hint = "not installed; run `pip install -c constraints.txt -e .` in the checkout"
        found.append(Finding(PROJECT, hint, False))
        project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
        needed = [Requirement(text) for text in project["dependencies"]]
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = str(requirement.specifier) or "any"
        have = _installed(requirement.name)
        if have is None:
            found.append(Finding(requirement.name, f"missing, needed {wanted}", False))
            continue
        ok = requirement.specifier.contains(have, prereleases=True)
        found.append(Finding(requirement.name, f"{have} (needed {wanted})", ok))
    return found


def _hub() -> Finding:
    """The Hugging Face package `kernels`, which vitask/guard.py refuses to start beside."""
    found = _installed(HUB_DISTRIBUTION)
    if found is None:
        return Finding("hub package kernels", "not installed, as it should be", True)
    text = f"{found} is installed and shadows ours: pip uninstall kernels"
    return Finding("hub package kernels", text, False)


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _machine() -> list[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return [
        Finding("memory", f"{memory:.1f} GiB (needed {MEMORY_GIB})", memory >= MEMORY_GIB),
        Finding("cores", str(len(os.sched_getaffinity(0)))),
        Finding("free disk here", f"{free:.1f} GiB"),
        Finding("accelerator", _accelerator()),
    ]


def _accelerator() -> str:
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported: {error}"
    if not torch.cuda.is_available():
        return f"none; torch {torch.__version__} computes on the CPU"
    return f"{torch.cuda.get_device_name()} (CUDA {torch.version.cuda})"


def _pocket() -> Finding:
    import vitask

    weights = Path(vitask.__file__).parent / "pocket" / "weights" / "model.safetensors"
    if weights.is_file():
        return Finding("pocket weights", f"{weights.stat().st_size / 1e6:.1f} MB", True)
    return Finding("pocket weights", "missing; `python -m vitask.pocket` makes them", False)


def _root(root: Path) -> Finding:
    if not root.is_dir():
        return Finding(f"data root {root}", "no such folder", False)
    files = sorted(path.name for path in root.glob("*.npz"))
    return Finding(f"data root {root}", ", ".join(files) or "no .npz file", bool(files))
