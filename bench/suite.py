"""What a suite is: a question, its methods and metrics, the models it trains, and how it scores.

To add a suite, add a file to `bench/suites/` that ends with `SUITE = MySuite()`, and its page of
prose. The first line of the file's docstring is the question, all of it the introduction of its
page. Suites are found by their file, and imported when they run.
"""

import ast
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from vitask.errors import InputError
from vitask.recipes import Recipe, vanilla

if TYPE_CHECKING:
    import numpy as np

    from bench.report.answers import Answers
    from bench.runs.plan import Plan
    from bench.runs.records import Record
    from bench.runs.work import Work
    from bench.stats.items import Items, Values
    from vitask.data.spec import Dataset
    from vitask.score import Prediction

Names = tuple[str, ...]

SUITES = {  # name -> module; the paper's table 1 first
    path.stem: f"bench.suites.{path.stem}"
    for path in sorted(
        (Path(__file__).parent / "suites").glob("[a-z]*.py"), key=lambda p: (p.stem != "main", p)
    )
}
MACHINE_SUITES = {name: f"bench.machine.{name}" for name in ("kernels", "step")}


@dataclass(frozen=True)
class Method:
    """A row of a suite's table.

    against:  the method that it is compared with
    model:    the name, in `Suite.models`, of the model that answers; "" for a suite's own way
    exemplar: it answers with the exemplar
    """

    name: str
    text: str
    against: str | None = None
    model: str = ""
    exemplar: bool = False


@dataclass(frozen=True)
class Metric:
    """A quantity of a table.

    biased:    noise moves it to one side (sums of distances), so its resamples are moved back
    averaged:  its mean over datasets has a meaning
    ranks:     names of the items' values that it only compares: these are swapped as ranks
    secondary: shown beside the primary metrics, never in their place
    """

    name: str
    title: str
    lower_is_better: bool = False
    biased: bool = False
    averaged: bool = True
    ranks: Names = ()
    secondary: bool = False


MACRO_F1 = Metric("macro_f1", "Macro-F1 over the fixed label set, by constrained scoring")
ACCURACY = Metric("accuracy", "Accuracy, by constrained scoring")
AUC = Metric("auc", "AUC, as MedMNIST's evaluator computes it")
BALANCED_ACCURACY = Metric("balanced_accuracy", "Balanced accuracy")
ECE = Metric(
    "ece", "Expected calibration error (15 bins; lower is better)",
    lower_is_better=True, biased=True,
)  # fmt: skip
QWK = Metric("qwk", "Quadratic weighted kappa", averaged=False)
OF_TWO_CLASSES = (  # the positive class is label 1, as in AUC
    Metric(
        "sensitivity", "Sensitivity at the threshold chosen on validation data (class of label 1)",
        averaged=False,
    ),
    Metric("specificity", "Specificity at the same threshold", averaged=False),
    Metric("patient_auc", "AUC per patient, by the mean over a patient's images", averaged=False),
    Metric("patient_sensitivity", "Sensitivity per patient, at the same threshold", averaged=False),
    Metric("patient_specificity", "Specificity per patient, at the same threshold", averaged=False),
)  # fmt: skip
STANDARD = (
    MACRO_F1, ACCURACY, AUC, BALANCED_ACCURACY, ECE, QWK, *OF_TWO_CLASSES,
    Metric("gen_macro_f1", "Generated answers: macro-F1 (secondary)", secondary=True),
    Metric(
        "gen_invalid", "Generated answers: share of invalid ones, counted as wrong, never guessed",
        lower_is_better=True, secondary=True,
    ),
)  # fmt: skip
NOT_SHOWN = (  # in the CSV alone
    Metric("medmnist_acc", "Accuracy, as MedMNIST's evaluator computes it"),
    Metric("gen_accuracy", "Generated answers: accuracy (secondary)", secondary=True),
    Metric("recall", "Recall of a class", averaged=False),
)


@dataclass(frozen=True)
class Published:
    """A table of leaderboards/published, and why its numbers differ from ours."""

    file: str
    note: str


@dataclass(frozen=True)
class Chart:
    """A figure of a suite's page, drawn by the report."""

    file: str
    kind: Literal["bars", "densities"]
    title: str


@dataclass(frozen=True)
class Training:
    """A model that a suite trains. Models are shared by what made them, not by name.

    tsm:      the name, in `Suite.models`, of the TSM that a VLM is tuned with
    share:    of the training images, 1 for all
    exemplar: "constant" gives every image the same feature in the place of the TSM's
    """

    name: str
    recipe: Recipe
    kind: Literal["tsm", "vlm"] = "vlm"
    tsm: str = "tsm"
    share: float = 1.0
    exemplar: Literal["tsm", "constant"] = "tsm"


@dataclass(frozen=True)
class Outcome:
    """One method scored on the test splits.

    predictions: answers to every test image, from which all metrics are computed
    items:       dataset -> one value an image (or question) of each name, from which the suite's
                 own metrics are computed, with intervals and tests
    values:      dataset -> metric -> value that no image's answer decides (parameters, seconds);
                 `measured` names those that differ from run to run
    extras:      JSON-able details worth keeping (validation curves, losses);
                 `changed`: how the method's recipe differs from the suite's
    thresholds:  two-class dataset -> the probability of its second class from which it is the
                 answer, chosen on the val split
    """

    method: str
    predictions: "list[Prediction]"
    extras: dict[str, Any] = field(default_factory=dict)
    items: "dict[str, Items]" = field(default_factory=dict)
    values: dict[str, dict[str, float]] = field(default_factory=dict)
    measured: Names = ()
    thresholds: dict[str, float] = field(default_factory=dict)


class Suite:
    """A question and the experiment that answers it. Subclasses give what has no default."""

    name: ClassVar[str]  # the file's
    methods: tuple[Method, ...]
    metrics: tuple[Metric, ...] = STANDARD  # the tables of its page, in their order
    published: Published | None = None
    charts: tuple[Chart, ...] = ()
    study: bool = True  # at the size of the recipe's study, not of the recipe itself
    libraries: Names = ()  # what it alone computes with: their versions enter keys and records
    scorings: float = 1.0  # cost of scoring a method; 1: constrained and generated answers
    writes: bool = True  # answers are generated too, beside constrained scoring

    def models(self, recipe: Recipe) -> dict[str, Training]:
        """What is trained, by a name of the suite's choice."""
        return tsm_vanilla_vitask(recipe)

    def run(self, work: "Work", wanted: Collection[str]) -> Iterator[Outcome]:
        """Every wanted method as soon as it is scored; by default each by its model."""
        return work.by_model(self, wanted)

    def lacking(self, plan: "Plan") -> str | None:
        """What the suite needs and this machine or plan lacks; None if it can run."""
        return None

    def trained_on(self, study: Names, whole: Names) -> Names:
        """The datasets that are trained on, out of the study's and the recipe's."""
        return study

    def evaluated(self, plan: "Plan", datasets: "dict[str, Dataset]") -> "dict[str, Dataset]":
        """The datasets that are scored."""
        return datasets

    def averaged(self, dataset: str) -> bool:
        """Whether a scored dataset counts in the average."""
        return True

    def images_of(self, dataset: str) -> str:
        """The dataset whose images this one shows: these are resampled together, counted once."""
        return dataset

    def lost_against(self, dataset: str) -> dict[str, tuple[str, str]]:
        """Metrics that are another dataset's metric less this one's: name -> (dataset, metric)."""
        return {}

    def measured(self, values: "Values", weights: "np.ndarray") -> "dict[str, np.ndarray]":
        """The suite's own metrics of its items, (k,) each; weights (k, n)."""
        return {name: weights @ array / weights.sum(1) for name, array in values.items()}

    def sections(self, records: "Sequence[Record]", answers: "Answers") -> list[tuple[str, str]]:
        """Further parts of the page: (title, Markdown), tables by `table`."""
        return []

    # What follows from these

    @property
    def about(self) -> str:
        """The docstring of the suite's file."""
        return (import_module(type(self).__module__).__doc__ or "").strip()

    def method(self, name: str) -> Method:
        """ValueError names the nearest."""
        known = {method.name: method for method in self.methods}
        if name not in known:
            near = get_close_matches(name, known) or list(known)
            raise InputError(
                f"suite {self.name!r} has no method {name!r}; did you mean {' or '.join(near)}?"
            )
        return known[name]

    def metric(self, name: str) -> Metric:
        """A metric by name, the suite's own first; `recall:<class>` is `recall`."""
        kind = name.partition(":")[0]
        for metric in (*self.metrics, *STANDARD, *NOT_SHOWN):
            if metric.name == kind:
                return metric
        return Metric(name, name)

    def pair(self, method: str, reference: str) -> Self:
        """This suite with two methods alone, the first compared with the second."""
        other = copy(self)
        other.methods = (Method(reference, ""), Method(method, "", against=reference))
        return other


FOUR = (  # the methods of most suites
    Method("tsm", "the task-specific model", "vanilla", model="tsm"),
    Method("vanilla", "the VLM tuned by instructions alone (Van)", model="vanilla"),
    Method("vitask_without_ep", "VITask without the exemplar", "vanilla", model="vitask"),
    Method("vitask_with_ep", "VITask with the exemplar", "vanilla", model="vitask", exemplar=True),
)


def pick(*names: str) -> tuple[Metric, ...]:
    """Some of the standard metrics, in this order."""
    return tuple(next(metric for metric in STANDARD if metric.name == name) for name in names)


def tsm_vanilla_vitask(recipe: Recipe) -> dict[str, Training]:
    """The three models of most suites."""
    return {
        "tsm": Training("tsm", recipe, kind="tsm"),
        "vanilla": Training("vanilla", vanilla(recipe)),
        "vitask": Training("vitask", recipe),
    }


_MARKUP = re.compile(r"[\\`*<>|\[\]&~]|(?<![^\W_])_|_(?![^\W_])")  # not the _ inside a word


def shown(text: str) -> str:
    r"""A user's text as Markdown that shows it, in one line: `a|b` becomes `a\|b`."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table as Markdown. Its cells are Markdown: names of datasets come through `shown`."""
    rule = "|---" * len(head) + "|"
    return "\n".join(["| " + " | ".join(head) + " |", rule,
                      *("| " + " | ".join(line) + " |" for line in lines)])  # fmt: skip


def question(name: str) -> str:
    """The first line of a suite's file, read without importing it."""
    spec = find_spec((SUITES | MACHINE_SUITES)[name])
    assert spec is not None
    assert spec.origin is not None
    return (ast.get_docstring(ast.parse(Path(spec.origin).read_text("utf-8"))) or "").split("\n")[0]


def suite(name: str) -> Suite:
    """The suite of that name; ValueError names the nearest."""
    if name not in SUITES:
        near = get_close_matches(name, SUITES) or list(SUITES)
        raise InputError(f"no suite {name!r}; did you mean {' or '.join(near)}?")
    return import_module(SUITES[name]).SUITE


@dataclass(frozen=True)
class Measured:
    """What a machine suite found.

    rows:    of the long table, the suite's COLUMNS each
    missing: what could not be measured here -> why
    targets: (aim, result, whether it was reached: None if not measured)
    notes:   what else the reader must know, JSON-able
    """

    rows: list[dict[str, Any]]
    missing: Mapping[str, str]
    targets: list[tuple[str, str, bool | None]]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MachineSuite:
    """Measures this machine; needs no data, and is not part of `--all`.

    measure(device, note, trace): all that is measured so far, again and again
    """

    columns: Names
    about: str
    measure: Callable[[str, Callable[[str], None], Path | None], Iterator[Measured]]


def machine_suite(name: str) -> MachineSuite:
    return import_module(MACHINE_SUITES[name]).SUITE
