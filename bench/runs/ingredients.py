"""What decides a model or a record: flat mappings from an ingredient's name to its value.

Equal ingredients give equal results; where they differ, `keys.changes` names the difference.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from bench.runs.keys import CODE, code, fields_read, key, weights
from vitask.data.spec import Dataset
from vitask.pocket import POCKET
from vitask.prompts import instruction
from vitask.recipes import Recipe

WORK = "bench/runs/work.py"
KERNELS = ("kernels.cpu", "kernels.cuda")  # loaded by name, in kernels/joint.py
COMPUTING = ("bench.runs.work", "bench.runs.judge")  # beside a suite's own file
LEFT_OUT = tuple(
    f"{name}.py"
    for name in (
        # data enter by their content, not by the code that reads or draws them
        *("vitask/data/archive", "vitask/data/card", "vitask/data/external", "vitask/data/loading"),
        *("vitask/data/looks", "vitask/data/medmnist", "vitask/data/phantom", "vitask/data/images"),
        # these compute no number
        *(
            "bench/errors",
            "vitask/errors",
            "vitask/files",
            "bench/runs/ingredients",
            "bench/runs/keys",
        ),
        *("bench/runs/models", "vitask/base", "vitask/memory", "vitask/sealed", "vitask/weights"),
    )
)
# Not decided by these: the name is a label, data enter by content, memory moves features only.
NEVER = {"name", "sources", "train_limit", "val_limit", "feature_memory_mib"}


def model_ingredients(
    module: str,
    recipe: Recipe,
    datasets: Mapping[str, Dataset],
    seed: int,
    versions: Mapping[str, str],
    *,
    tsm_key: str | None = None,
    exemplar: str = "tsm",
) -> dict[str, Any]:
    """Of a model that `module` trains. A TSM's own ingredients are in its key."""
    kernels = () if module == "vitask.tsm" else KERNELS
    found = _of(code([module, *kernels], LEFT_OUT), recipe, versions)
    if module != "vitask.tsm":
        found = {k: v for k, v in found.items() if not k.startswith("recipe.tsm")}
        found |= {"tsm": tsm_key, "exemplar": exemplar} | _weights(recipe)
    found[f"{CODE}{WORK}"] = code(["bench.runs.work"], LEFT_OUT)[
        WORK
    ]  # hands features to trainings
    for name, dataset in datasets.items():
        found[f"data.{name}"] = [*dataset.identity(("train", "val")), instruction(dataset.spec)]
    return found | {"seed": seed, "datasets": list(datasets)}


def set_ingredients(
    module: str,
    recipe: Recipe,
    datasets: Mapping[str, Dataset],
    evaluated: Mapping[str, Dataset],
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """Of all records of the suite in `module`, whatever their method and seed."""
    found = _of(code([module, *COMPUTING, *KERNELS], LEFT_OUT), recipe, versions) | _weights(recipe)
    for kind, some in (("data", datasets), ("evaluated", evaluated)):
        for name, dataset in some.items():
            found[f"{kind}.{name}"] = [*dataset.identity(), instruction(dataset.spec)]
    return found | {"datasets": [*datasets, *evaluated]}  # their order decides, too


def _of(modules: Mapping[str, str], recipe: Recipe, versions: Mapping[str, str]) -> dict[str, Any]:
    known = {one.name for one in fields(Recipe)} - NEVER
    read, values = fields_read(modules, known), asdict(recipe)
    return (
        {f"recipe.{name}": values[name] for name in sorted(read)}
        | {f"versions.{name}": version for name, version in versions.items()}
        | {f"{CODE}{path}": digest for path, digest in modules.items()}
    )


def _weights(recipe: Recipe) -> dict[str, str]:
    """The base VLM's files, where they are on this machine."""
    place = POCKET if recipe.vlm == "pocket" else Path(recipe.vlm)
    return {"weights": _digest(place)} if place.is_dir() else {}


@cache
def _digest(folder: Path) -> str:
    return weights(folder)


def set_key(suite: str, ingredients: Mapping[str, Any]) -> str:
    return key({"suite": suite, **ingredients})


def record_key(set_key: str, method: str, seed: int) -> str:
    """Equal keys, equal results."""
    return key({"set": set_key, "method": method, "seed": seed})
