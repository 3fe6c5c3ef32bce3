"""A plan: the request. A job: one suite of it, at its size, with its data."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.runs import ingredients as of
from bench.runs.environment import versions
from bench.runs.records import Record
from bench.runs.work import SCORED_IMAGE, check_models, images_of, training_units
from bench.suite import Suite, suite
from vitask.data import load
from vitask.data.check import torn_groups
from vitask.data.spec import Dataset
from vitask.data.subset import subset
from vitask.errors import InputError
from vitask.prompts import instruction, sha256
from vitask.recipes import Recipe, check_seeds

LABEL = 40  # characters of the settings in a folder's name; longer ones become a hash
JUDGED_IMAGE = 0.25  # bootstrap and tests of a method, per test image and seed, in training samples


@dataclass(frozen=True)
class Plan:
    """A request, as `bench.run` or the command line takes it.

    settings: fields that a recipe file or `--set` gives; they hold in studies too
    by_hand:  those of `--set` alone, which the folder's name shows
    seeds:    empty for the recipe's
    """

    recipe: Recipe
    source: str  # phantom | medmnist
    names: tuple[str, ...]  # datasets
    roots: tuple[Path, ...] = ()
    allow_unverified: tuple[str, ...] = ()
    limit: int | None = None
    out: Path = Path("leaderboards")
    seeds: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    by_hand: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_seeds("seeds", self.seeds)

    @property
    def folder(self) -> Path:
        """OUT/<recipe>[+settings]-<data>[-limitN][-hash of other datasets]."""
        name = self.recipe.name
        if self.by_hand:
            label = ",".join(f"{field}={value}" for field, value in sorted(self.by_hand.items()))
            plain = all(c.isalnum() or c in "=,._-" for c in label)
            name += f"+{label if len(label) <= LABEL and plain else _hash(label)}"
        name += f"-{self.source}"
        if self.limit is not None:
            name += f"-limit{self.limit}"
        if set(self.names) != set(self.recipe.datasets(self.source)):
            name += f"-{_hash(','.join(sorted(self.names)))}"
        return self.out / name

    def datasets(self) -> dict[str, Dataset]:
        """All datasets, checked before anything is computed, cut to the recipe's size."""
        if self.limit is not None and self.limit < 2:
            raise InputError(
                f"--limit {self.limit} leaves one image a split; expected 2 or more: losses and "
                "checks compare images with each other"
            )
        found = {}
        for name in self.names:
            dataset = load(
                name, source=self.source, roots=self.roots, size=self.recipe.source_size,
                allow_unverified=self.allow_unverified,
                phantom_sizes=self.recipe.samples("phantom"),
            )  # fmt: skip
            if torn := torn_groups(dataset):
                raise InputError(
                    f"{name}: {len(torn)} group(s) have images in two splits ({torn[0]}, ...), so "
                    "the test images are not new to the models; split the dataset by group"
                )
            dataset = subset(dataset, train=self.recipe.train_limit, val=self.recipe.val_limit)
            if self.limit is not None:
                dataset = subset(dataset, train=self.limit, val=self.limit, test=self.limit)
            found[name] = dataset
        return found


@dataclass(frozen=True)
class Job:
    """One suite of a run: the plan at its size and its data, checked before anything runs.

    datasets: what is trained on; evaluated: what is scored
    """

    suite: Suite
    plan: Plan
    datasets: dict[str, Dataset]
    evaluated: dict[str, Dataset]

    @classmethod
    def of(
        cls, suite: Suite, plan: Plan, loaded: dict[Any, dict[str, Dataset]] | None = None
    ) -> "Job":
        """`plan` has the suite's size already (`sized`, or from a record); `loaded` caches data
        that several suites share."""
        loaded = {} if loaded is None else loaded
        if lacks := suite.lacking(plan):
            raise InputError(f"suite {suite.name}: {lacks}")
        key = (plan.names, plan.recipe.train_limit, plan.recipe.val_limit)
        if key not in loaded:
            loaded[key] = plan.datasets()
        datasets = loaded[key]
        return cls(suite, plan, datasets, suite.evaluated(plan, datasets))

    def check_models(self, checked: set[Any]) -> None:
        """InputError for a model that cannot be used; `checked`: by earlier suites of a run."""
        models = self.suite.models(self.plan.recipe)
        check_models(models, images_of(self.datasets), checked)

    @property
    def notes(self) -> list[str]:
        """What was done to the files of the data, for the user."""
        everything = self.datasets | self.evaluated
        return [f"{name}: {text}" for name, found in everything.items() for text in found.notes]

    @property
    def units(self) -> float:
        """One seed's training and scoring, in samples of vanilla tuning."""
        models = self.suite.models(self.plan.recipe).values()
        images = images_of(self.datasets)
        scored = SCORED_IMAGE * len(self.suite.methods) * self.test_images
        return sum(training_units(one, images) for one in models) + self.suite.scorings * scored

    @property
    def prefix(self) -> str:
        """Of models' names: other sizes and other training data have names of their own."""
        if type(self.suite).trained_on is not Suite.trained_on:
            return f"{self.suite.name}-"
        return "study-" if self.suite.study else ""

    @property
    def test_images(self) -> int:
        return images_of(self.evaluated, ("test",))

    @property
    def judging_units(self) -> float:
        """Bootstrap, tests and tables over all seeds."""
        return JUDGED_IMAGE * len(self.suite.methods) * self.test_images * len(self.plan.seeds)

    @cached_property
    def versions(self) -> dict[str, str]:
        return versions() | versions(self.suite.libraries)

    @cached_property
    def ingredients(self) -> dict[str, Any]:
        """What decides the results, but for method and seed."""
        module = type(self.suite).__module__
        return of.set_ingredients(
            module, self.plan.recipe, self.datasets, self.evaluated, self.versions
        )

    @cached_property
    def key(self) -> str:
        """Of the set of its records."""
        return of.set_key(self.suite.name, self.ingredients)

    def data_cards(self) -> dict[str, Any]:
        """The fields of a record that say what was asked, of which images."""
        everything = self.datasets | self.evaluated
        plan = self.plan
        return {
            "recipe": asdict(plan.recipe),
            "plan": {
                "source": plan.source,
                "names": list(plan.names),
                "limit": plan.limit,
                "settings": dict(plan.settings),
                "by_hand": dict(plan.by_hand),
            },
            "data": {n: d.card() for n, d in self.evaluated.items()},
            "trained_on": {n: d.card() for n, d in self.datasets.items()},
            "prompts": (prompts := {n: instruction(d.spec) for n, d in everything.items()}),
            "prompts_sha256": sha256(prompts),
            "versions": self.versions,
        }


def sized(plan: Plan, suite: Suite) -> Plan:
    """The plan at a suite's size; datasets, seeds and settings that were chosen by hand stay."""
    source = plan.source
    if not suite.study:
        return replace(plan, seeds=plan.seeds or plan.recipe.seeds(source))
    recipe = replace(plan.recipe.study(source), **plan.settings)
    chosen = set(plan.names) != set(plan.recipe.datasets(source))
    names = plan.names if chosen else recipe.datasets(source)
    return replace(
        plan,
        recipe=recipe,
        names=suite.trained_on(names, plan.names),
        seeds=plan.seeds or recipe.seeds(source),
    )


def plan_of(
    record: Record, *, roots: Sequence[Path], allow_unverified: Sequence[str], folder: Path
) -> Plan:
    """The plan that a record was made by, for loading its data again."""
    asked = record.plan
    return Plan(
        Recipe.of_json(record.recipe), asked["source"], tuple(asked["names"]), tuple(roots),
        tuple(allow_unverified), asked["limit"], folder.parent, (record.seed,),
        asked.get("settings", {}), asked.get("by_hand", {}),
    )  # fmt: skip


def job_of(record: Record, loaded: dict[Any, dict[str, Dataset]], **data: Any) -> Job:
    """The job that a record was made by, its data loaded again."""
    return Job.of(suite(record.suite), plan_of(record, **data), loaded)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
