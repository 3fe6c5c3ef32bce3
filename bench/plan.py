"""What was asked for: which data, which recipe, and what each suite makes of it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench import record as records
from bench.record import Record
from bench.suites import Suite, lacking, suite
from vitask.data import load, subset
from vitask.data.check import torn_groups
from vitask.data.spec import Dataset, DatasetSpec
from vitask.prompts import instruction
from vitask.recipes import Recipe


@dataclass(frozen=True)
class Plan:
    """What was asked for on the command line."""

    recipe: Recipe
    source: str  # phantom | medmnist
    names: tuple[str, ...]  # datasets
    roots: tuple[Path, ...] = ()
    allow_unverified: tuple[str, ...] = ()
    limit: int | None = None
    out: Path = Path("leaderboards")
    seeds: tuple[int, ...] = ()  # none: the recipe's own

    @property
    def folder(self) -> Path:
        """OUT/<recipe>-<data>, with what makes it another run: the limit, other datasets."""
        name = f"{self.recipe.name}-{self.source}"
        if self.limit is not None:
            name += f"-limit{self.limit}"
        if set(self.names) != set(self.recipe.datasets(self.source)):
            text = ",".join(sorted(self.names))
            name += f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        return self.out / name

    def datasets(self) -> dict[str, Dataset]:
        """All datasets, checked before anything is computed, cut to the recipe's size."""
        found = {}
        for name in self.names:
            dataset = load(
                name,
                source=self.source,
                roots=self.roots,
                size=self.recipe.source_size,
                allow_unverified=self.allow_unverified,
                phantom_sizes=self.recipe.phantom_samples,
            )
            if torn := torn_groups(dataset):
                raise ValueError(
                    f"{name}: {len(torn)} group(s) have images in two parts ({torn[0]}, ...), so "
                    "that the test part is not new to the models; divide the set by group"
                )
            dataset = subset(dataset, train=self.recipe.train_limit, val=self.recipe.val_limit)
            if self.limit is not None:
                dataset = subset(dataset, train=self.limit, val=self.limit, test=self.limit)
            found[name] = dataset
        return found


@dataclass(frozen=True)
class Job:
    """One suite of a run: its own size of the plan, its data, all checked before anything runs.

    datasets: what is trained on; evaluated: what is scored
    """

    name: str
    plan: Plan  # at the suite's own size
    datasets: dict[str, Dataset]
    evaluated: dict[str, Dataset]

    @classmethod
    def of(
        cls, name: str, plan: Plan, loaded: dict[Any, dict[str, Dataset]] | None = None
    ) -> "Job":
        """`plan` is at the suite's size already (`sized`, or out of a record); `loaded` keeps
        data that several suites share."""
        module, loaded = suite(name), {} if loaded is None else loaded
        if lacks := lacking(module, plan):
            raise ValueError(f"suite {name}: {lacks}")
        key = (plan.names, plan.recipe.train_limit, plan.recipe.val_limit)
        if key not in loaded:
            loaded[key] = plan.datasets()
        datasets = loaded[key]
        evaluated = getattr(module, "evaluated", lambda plan, datasets: datasets)
        return cls(name, plan, datasets, evaluated(plan, datasets))

    @property
    def module(self) -> Suite:
        return suite(self.name)

    @property
    def units(self) -> float:
        """One seed's work, in a measure that all suites of a run share: training samples seen."""
        samples = sum(len(dataset.splits["train"]) for dataset in self.datasets.values())
        return self.module.units(self.plan.recipe) * samples

    def identity(self) -> dict[str, Any]:
        """Everything that decides a result, but for suite, method and seed."""
        return self.base() | {
            "recipe": asdict(self.plan.recipe),
            "data": {n: [d.source, d.size, d.md5] for n, d in self.datasets.items()},
            "evaluated": {n: [d.source, d.size, d.md5] for n, d in self.evaluated.items()},
            "prompts": prompts_sha256(self.datasets | self.evaluated),
        }

    def base(self) -> dict[str, Any]:
        """What decides a model besides recipe, seed and data."""
        return {
            "limit": self.plan.limit,
            "sources": records.sources_sha256(),
            "versions": records.versions(),
        }


def sized(plan: Plan, module: Suite) -> Plan:
    """The plan at a suite's size; datasets and seeds that were chosen by hand stay."""
    source = plan.source
    if not getattr(module, "STUDY", False):
        return replace(plan, seeds=plan.seeds or plan.recipe.seeds(source))
    recipe = plan.recipe.study(source)
    chosen = set(plan.names) != set(plan.recipe.datasets(source))
    own = replace(
        plan,
        recipe=recipe,
        names=plan.names if chosen else recipe.datasets(source),
        seeds=plan.seeds or recipe.seeds(source),
    )
    if not hasattr(module, "trained_on"):
        return own
    names = module.trained_on(own.names, plan.names)
    datasets = {"phantom_datasets": names, "medmnist_datasets": names}
    return replace(own, recipe=replace(recipe, **datasets), names=names)


def prompts(datasets: dict[str, Dataset]) -> dict[str, str]:
    return {name: instruction(dataset.spec) for name, dataset in datasets.items()}


def prompts_sha256(datasets: dict[str, Dataset]) -> str:
    text = json.dumps(prompts(datasets), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def specs_of(record: Record) -> dict[str, DatasetSpec]:
    """The descriptions of a record's datasets, as they were when it was made."""
    return {name: DatasetSpec.of_json(card["spec"]) for name, card in record.data.items()}


def plan_of(
    record: Record, *, roots: Sequence[Path], allow_unverified: Sequence[str], folder: Path
) -> Plan:
    """The plan that a record was made by, for loading its data again."""
    return Plan(
        recipe=Recipe.of_json(record.recipe),
        source=record.plan["source"],
        names=tuple(record.plan["names"]),
        roots=tuple(roots),
        allow_unverified=tuple(allow_unverified),
        limit=record.plan["limit"],
        out=folder.parent,
        seeds=(record.seed,),
    )
