"""The suites. A new one is one file: a module with the names below, and a line in SUITES.

METHODS     name -> what it is; the rows of its table
REFERENCE   the method that differences and p-values are taken against, or None; where each
            method has its own, a mapping from method to reference
PUBLISHED   file in leaderboards/published shown beside it, or None
PUBLISHED_NOTE
            what the published numbers are and why they differ, shown above them
units(recipe) -> float
            one seed's work in epochs of vanilla tuning, for the time left; `run` advances as many
run(context, seed, wanted) -> Iterator[Outcome]
            yields every wanted method as soon as it is scored

and, where the defaults do not fit:

STUDY       True: the suite runs at the size of the recipe's study, not of the recipe itself
trained_on(study, whole) -> names
            the sets that are trained on, out of the study's and the recipe's names, if not the
            study's; both are what was chosen by hand where something was
unavailable(plan) -> what it lacks here, or None; `--all` then leaves it out and says so
evaluated(plan, datasets) -> datasets
            the sets that are scored, if not those that are trained on
averaged(name) -> bool
            whether a scored set counts in the average; by default all do
images_of(name) -> name
            the set whose images a scored set shows in another way: they are resampled and
            swapped as one, and counted once; by default a set shows its own
lost_against(name) -> metric -> (set, its metric)
            of the metrics in the outcomes' values those that are another set's metric minus this
            set's own, of the same images: they get intervals and tests; by default none are
measured(values, weights) -> metric -> (k,)
            the suite's own metrics of its outcomes' items; by default the mean of each name
RANKED      metric -> names of the items' values that it only compares, together: they are swapped
            as ranks; by default none
BORROWED    other suites whose models or recipes it takes: their sources are part of its keys
LIBRARIES   what it alone computes with: their versions are part of its records and their keys
TABLES      metric -> title: the tables of its page
sections(records, answers) -> list of (title, Markdown), further parts of its page, made of the
            records and of the answers (bench.table.Answers) that they were scored by
figures(frame), plots(records) -> file name -> SVG text
            charts of its table or of what its records hold, shown on its page

A machine suite measures the machine that it runs on, needs no data, and is no part of `--all`:

measure(device, note, trace) -> Iterator[Measured]
            rows of its table so far, what is missing, and what came out beside the targets

Modules are imported when they are needed: the command line lists them without torch.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from bench.items import Items
    from bench.plan import Plan
    from bench.progress import Advancing
    from vitask.data.spec import Dataset
    from vitask.recipes import Recipe
    from vitask.score import Prediction

SUITES = {
    name: f"bench.suites.{name}"
    for name in (
        "main", "ablation", "exemplars", "ranking", "external", "instructions",
        "corruptions", "baselines", "sensitivity", "data_fraction", "architectures", "calibration",
        "retention", "cost",
    )
}  # fmt: skip
MACHINE_SUITES = {  # what they measure; their modules have these names
    "kernels": "fused losses against eager, compiled and other fused ones",
    "step": "training step and scoring: one forward for all branches against three",
}


@dataclass(frozen=True)
class Outcome:
    """One method scored on the test parts.

    predictions: answers to every test image, from which all metrics are computed
    items:       dataset -> one value an image (or question) of each name, from which the suite's
                 own metrics are computed, with intervals and tests
    values:      dataset -> metric -> value, for what nothing else says (parameters, seconds);
                 those that differ from run to run are named in `measured`
    extras:      what is worth keeping of the way there (validation curves, losses), JSON-able;
                 `changed`: what the method's model has in other ways than the suite's recipe
    """

    method: str
    predictions: "list[Prediction]"
    extras: dict[str, Any] = field(default_factory=dict)
    items: "dict[str, Items]" = field(default_factory=dict)
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    measured: tuple[str, ...] = ()


@dataclass
class Context:
    """What a suite works with. `cache` keeps what all seeds and suites of a run share.

    datasets:  what is trained on; evaluated: what is scored (often the same)
    identity:  what decides a model besides recipe, seed and data: limit, sources, versions
    prefix:    of the names of this suite's checkpoints
    """

    suite: str
    recipe: "Recipe"
    datasets: "dict[str, Dataset]"
    evaluated: "dict[str, Dataset]"
    folder: Path
    identity: dict[str, Any]
    device: str
    progress: "Advancing"
    prefix: str = ""
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


class Rows(Protocol):
    """The rows of a table, and what they are compared with."""

    METHODS: dict[str, str]
    REFERENCE: str | Mapping[str, str] | None


class Suite(Rows, Protocol):
    """A module of this package, as the docstring above describes it."""

    __file__: str
    PUBLISHED: str | None
    PUBLISHED_NOTE: str

    @staticmethod
    def units(recipe: "Recipe") -> float: ...

    @staticmethod
    def run(context: Context, seed: int, wanted: Collection[str]) -> Iterator[Outcome]: ...


@dataclass(frozen=True)
class Measured:
    """What a machine suite found.

    rows:    of the long table, the suite's COLUMNS each
    missing: what could not be measured here -> why
    targets: (what was aimed at, what came out, whether it was reached: None if not measured)
    notes:   what else the reader has to know, JSON-able
    """

    rows: list[dict[str, Any]]
    missing: dict[str, str]
    targets: list[tuple[str, str, bool | None]]
    notes: dict[str, Any] = field(default_factory=dict)


class MachineSuite(Protocol):
    """A module of this package, as the docstring above describes it."""

    COLUMNS: tuple[str, ...]

    @staticmethod
    def measure(
        device: str, note: Callable[[str], None], trace: Path | None = None
    ) -> Iterator[Measured]: ...


def machine_suite(name: str) -> MachineSuite:
    return cast(MachineSuite, import_module(f"bench.suites.{name}"))


def suite(name: str) -> Suite:
    """The suite's module; ValueError names the nearest."""
    if name not in SUITES:
        near = get_close_matches(name, SUITES) or list(SUITES)
        raise ValueError(f"no suite {name!r}; did you mean {' or '.join(near)}?")
    return cast(Suite, import_module(SUITES[name]))


def images_of(module: Rows, name: str) -> str:
    """The set whose images a scored set shows."""
    own: Callable[[str], str] = getattr(module, "images_of", lambda name: name)
    return own(name)


def lacking(module: Suite, plan: "Plan") -> str | None:
    """What the suite lacks here, None if it can run."""
    own: Callable[[Plan], str | None] = getattr(module, "unavailable", lambda plan: None)
    return own(plan)


def reference_of(module: Rows, method: str) -> str | None:
    """The method that this one is compared with; None for none, and for the reference itself."""
    reference = module.REFERENCE
    if isinstance(reference, Mapping):
        return reference.get(method)
    return None if method == reference else reference
