"""What gets installed: names, data files, ranges, and no quarrel with transformers."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("bench", "kernels", "vitask")
REQUIRED = [Requirement(line) for line in PROJECT["project"]["dependencies"]]
EXTRAS = {
    name: [Requirement(line) for line in lines]
    for name, lines in PROJECT["project"]["optional-dependencies"].items()
}
OPTIONAL = {"bench": "peers", "vitask": "xls"}  # imported where they are there
PINS = {
    canonicalize_name(name): version
    for name, version in (
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
}


def python(code: str) -> str:
    """Standard output of `code` in a fresh interpreter at the project's root."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_transformers_does_not_take_our_kernels_for_the_hub_package():
    found = python(
        "import importlib.util, pathlib, transformers\n"
        "from transformers.utils import is_kernels_available\n"
        "print(pathlib.Path(importlib.util.find_spec('kernels').origin).parent)\n"
        "print(is_kernels_available())\n"
    )
    assert found.splitlines() == [str(ROOT / "kernels"), "False"]


def test_our_version_stays_out_of_the_range_of_the_hub_package():
    """transformers reads the version of the distribution that brings `kernels`: vitask's."""
    low = python("from transformers.utils.import_utils import *; print(KERNELS_MIN_VERSION)")
    version = PROJECT["project"]["version"]
    assert version not in Requirement(f"kernels>={low}").specifier
    assert "__version__" not in (ROOT / "kernels" / "__init__.py").read_text()


ALL = {r.name: r for r in chain(REQUIRED, *EXTRAS.values())}


@pytest.mark.parametrize("requirement", ALL.values(), ids=ALL)
def test_constraints_lie_in_the_ranges(requirement):
    pinned = PINS.get(canonicalize_name(requirement.name))
    assert pinned, f"{requirement.name} has no pin in constraints.txt"
    assert requirement.specifier.contains(pinned)


def imported(package: str) -> set[str]:
    """Top-level names of all absolute imports in a package."""
    nodes = [n for p in (ROOT / package).rglob("*.py") for n in ast.walk(ast.parse(p.read_text()))]
    whole = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    parts = {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}
    return {name.split(".")[0] for name in whole | parts}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_is_a_declared_dependency(package):
    distributions = packages_distributions()
    optional = EXTRAS.get(OPTIONAL.get(package, ""), [])
    declared = {canonicalize_name(r.name) for r in [*REQUIRED, *optional]}
    if package == "vitask":
        declared.add("medmnistc")  # its pins contradict ours: data/corruption.py says how it comes
    foreign = imported(package) - set(sys.stdlib_module_names) - set(PACKAGES)
    undeclared = {
        name
        for name in foreign
        if not declared & {canonicalize_name(d) for d in distributions.get(name, [name])}
    }
    assert undeclared == set()


def test_the_wheel_holds_every_package_and_data_file():
    found = set(find_packages(str(ROOT), include=[f"{p}*" for p in PACKAGES]))
    data = PROJECT["tool"]["setuptools"]["package-data"]
    shipped = {
        path
        for package, patterns in data.items()
        for pattern in patterns
        for path in (ROOT / package).glob(pattern)
    }
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    for path in (ROOT / line for line in listed.stdout.splitlines()):
        if path.suffix == ".py":
            assert ".".join(path.parent.relative_to(ROOT).parts) in found, path
        elif path.exists():
            assert path in shipped, f"{path.relative_to(ROOT)} is in no package-data"


def test_the_embedded_model_is_small_and_complete():
    weights = ROOT / "vitask" / "pocket" / "weights"
    names = {path.name for path in weights.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "heldout.json"} <= names
    assert (weights / "model.safetensors").stat().st_size <= 10_000_000
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]


def test_lint_uses_the_same_commands_before_a_commit():
    tox = (ROOT / "tox.ini").read_text()
    lint = re.search(r"\[testenv:lint\].*?commands =\n(.*?)\n\n", tox, re.DOTALL)
    assert lint
    commands = [line.strip() for line in lint[1].splitlines()]
    hooks = re.findall(r"entry: (.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert commands == hooks


def test_the_oldest_constraints_are_the_lower_bounds_of_the_ranges():
    """`tox -e oldest` tests what pyproject.toml promises."""
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    oldest = dict(line.removesuffix(".*").split("==") for line in lines if not line.startswith("#"))
    lower = {
        r.name: next(one.version for one in r.specifier if one.operator == ">=")
        for r in chain(REQUIRED, EXTRAS["test"])
    }
    assert oldest == lower
