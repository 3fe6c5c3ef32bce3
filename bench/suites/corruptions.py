"""MedMNIST-C: how well do the models answer corrupted images?

Images are corrupted as images of their modality are.
NAME is the clean test split. NAME+CORRUPTION holds each of its images at severities 1 to 5, made
by the package medmnistc. `lost` is the balanced accuracy that the corruption costs. `be` and `rbe`
are MedMNIST-C's own errors, relative to its AlexNet at 224 pixels; datasets without one are named
below. An image is resampled together with its corrupted versions. The average is over the
corrupted sets alone.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from bench.runs.work import TrainedTSM, Tuned, Work, classified
from bench.stats.metrics import measure
from bench.stats.resampling import interval
from bench.suite import FOUR, Metric, Outcome, Suite, pick, shown, table
from vitask.data import corruption as medmnist_c
from vitask.data.corruption import MARK, base_of, described
from vitask.data.images import unmistakable
from vitask.data.spec import Dataset
from vitask.data.subset import subset
from vitask.decision import scored
from vitask.prompts import candidates
from vitask.score import Prediction

if TYPE_CHECKING:
    from bench.report.answers import Answers
    from bench.runs.plan import Plan
    from bench.runs.records import Record

LOST = (
    ("lost", "Balanced accuracy lost against the clean images"),
    ("be", "MedMNIST-C's balanced error relative to AlexNet's"),
    ("rbe", "MedMNIST-C's relative balanced error"),
)
BY_SEVERITY = (
    "Balanced accuracy by severity, mean over corruptions and seeds, and its 95 % interval"
)


class Corruptions(Suite):
    name = "corruptions"
    scorings = 0.4  # no generated answers
    methods = FOUR
    metrics = (
        *pick("macro_f1", "balanced_accuracy"),
        *(Metric(name, f"{title} (lower is better)", lower_is_better=True) for name, title in LOST),
    )
    libraries = ("medmnistc", "opencv-python-headless", "scikit-image", "wand")

    def averaged(self, dataset: str) -> bool:
        return MARK in dataset

    def images_of(self, dataset: str) -> str:
        return base_of(dataset)

    def lost_against(self, dataset: str) -> dict[str, tuple[str, str]]:
        clean = (base_of(dataset), "balanced_accuracy")
        return {"lost": clean} if MARK in dataset else {}

    def lacking(self, plan: "Plan") -> str | None:
        return medmnist_c.missing()

    def evaluated(self, plan: "Plan", datasets: dict[str, Dataset]) -> dict[str, Dataset]:
        """Clean and corrupted test splits; `run` makes the corrupted images, set by set."""
        found = {}
        for name, dataset in datasets.items():
            clean = subset(dataset, test=plan.recipe.corrupted_limit)
            found[name] = clean
            for corruption in medmnist_c.split_listed(dataset.spec)[0]:
                own = described(clean, corruption)
                found[own.spec.name] = own
        return found

    def run(self, work: Work, wanted: Collection[str]) -> Iterator[Outcome]:
        models = self.models(work.recipe)
        tsm = work.tsm(models["tsm"])
        vanilla, vitask = work.tuned(models["vanilla"]), work.tuned(models["vitask"], tsm)
        notes = {"tsm": tsm.note, "vanilla": vanilla.note}
        found: dict[str, list[Prediction]] = {method.name: [] for method in self.methods}
        for name in work.evaluated:
            for method, prediction in _answers(work, name, tsm, vanilla, vitask).items():
                found[method].append(prediction)
        lacking = {
            name: medmnist_c.split_listed(dataset.spec)[1]
            for name, dataset in work.datasets.items()
        }
        for method in (m.name for m in self.methods if m.name in wanted):
            outcome = work.outcome(method, found[method])
            values, steps = _judged(work, outcome.predictions)
            changed = notes.get(method, vitask.note)["changed"]
            extras = {"changed": changed, "unavailable": lacking, "severities": steps}
            yield replace(outcome, extras=extras, values=values)

    def sections(self, records: "Sequence[Record]", answers: "Answers") -> list[tuple[str, str]]:
        """By severity, and which corruptions or errors are missing."""
        first = records[0]
        head, lines = ["dataset", "method", "clean", "1", "2", "3", "4", "5"], []
        corrupted = {base_of(name) for name in first.extras["severities"]}
        for base in (name for name in first.trained_on if name in corrupted):
            weights = answers.weights(base).astype(float)
            for method in (m.name for m in self.methods):
                mine = [r for r in records if r.method == method]
                cells = _by_severity(mine, answers, base, weights)
                lines.append([shown(base), method, *cells])
        found = [(BY_SEVERITY, table(head, lines))] if lines else []
        if lacking := missing(first):
            rows = [[shown(base), what, shown(why)] for base, what, why in lacking]
            own = table(["dataset", "what", "why"], rows)
            found.append(("Of MedMNIST-C, but not available here", own))
        return found


def _answers(
    work: Work, name: str, tsm: TrainedTSM, vanilla: Tuned, vitask: Tuned
) -> dict[str, Prediction]:
    """Method -> its answers to a clean or a corrupted set."""
    base, _, corruption = name.partition(MARK)
    images = work.evaluated[base].splits["test"].images
    if corruption:
        place = ("corrupted", name, len(images))
        if place not in work.cache:
            spec = work.datasets[base].spec
            work.cache[place] = medmnist_c.corrupted(images, spec, corruption)
        images = work.cache[place]
    images = unmistakable(images)
    image = vitask.model.vlm.image_features(images)
    features = tsm.model.features(images, vitask.model.feature_kind)
    without, with_ep = vitask.model.score_both(base, image, features)
    scores = {
        "vanilla": vanilla.model.score(base, vanilla.model.image_inputs(image)),
        "vitask_without_ep": without,
        "vitask_with_ep": with_ep,
    }
    found = {method: Prediction(name, "candidates", log_p) for method, log_p in scores.items()}
    return found | {"tsm": classified(tsm.model, name, images, work.evaluated[name])}


def _judged(
    work: Work, predictions: list[Prediction]
) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
    """lost, be and rbe of each corrupted set, and its balanced accuracy by severity."""
    accuracy, steps = {}, {}
    for prediction in predictions:
        name = prediction.dataset
        count = len(prediction.log_probability)
        balanced = partial(_balanced, prediction, work.evaluated[name])
        accuracy[name] = balanced(np.arange(count))
        if MARK in name:
            rows = np.split(np.arange(count), medmnist_c.SEVERITIES)
            steps[name] = [round(balanced(severity), 6) for severity in rows]
    values: dict[str, dict[str, float]] = {}
    for base, dataset in work.datasets.items():
        mine = {n.partition(MARK)[2]: a for n, a in accuracy.items() if n.startswith(base + MARK)}
        for corruption, one in mine.items():
            values[f"{base}{MARK}{corruption}"] = {"lost": accuracy[base] - one}
        if dataset.size == medmnist_c.SIDE:
            errors = {name: 1 - one for name, one in mine.items()}
            own = medmnist_c.relative_errors(dataset.spec, 1 - accuracy[base], errors)
            for corruption, (be, rbe) in own.items():
                values[f"{base}{MARK}{corruption}"] |= {"be": be, "rbe": rbe}
    return values, steps


def _balanced(prediction: Prediction, dataset: Dataset, rows: np.ndarray) -> float:
    """Balanced accuracy on some of the test images."""
    labels = dataset.splits["test"].labels[rows]
    answers = candidates(dataset.spec, dataset.splits["train"].labels)
    some = replace(prediction, log_probability=prediction.log_probability[rows])
    return float(measure(scored(dataset.spec, labels, some, answers))["balanced_accuracy"][0])


def missing(record: "Record") -> list[tuple[str, str, str]]:
    """(dataset, what, why): corruptions that could not be made, and missing errors."""
    made = {base_of(name): record.metrics[name] for name in record.extras["severities"]}
    found = []
    for base, lacking in record.extras["unavailable"].items():
        found += [(base, name, why) for name, why in lacking.items()]
        if base not in made and not lacking:
            found.append((base, "–", "MedMNIST-C lists none for this dataset or modality"))
        if base in made and "be" not in made[base]:
            found.append((base, "`be`, `rbe`", _no_errors(record.trained_on[base]["size"])))
    return found


def _no_errors(size: int) -> str:
    """Why a set has none of MedMNIST-C's own errors."""
    if size == medmnist_c.SIDE:
        return "MedMNIST-C has no AlexNet's errors for this dataset"
    return f"relative to an AlexNet's errors at {medmnist_c.SIDE} pixels; these images have {size}"


def _by_severity(
    records: "Sequence[Record]", answers: "Answers", base: str, weights: np.ndarray
) -> list[str]:
    """One method's balanced accuracy on the clean images and at each severity.

    weights: (resamples, n) of the clean images; with an image all its versions are drawn.
    """
    points, drawn = [], []
    for record in records:
        clean = record.metrics[base]["balanced_accuracy"]
        whole = measure(answers.scored(record, base), weights, ranks=False)["balanced_accuracy"]
        for name, steps in record.extras["severities"].items():
            if base_of(name) != base:
                continue
            scored = answers.scored(record, name)
            found = [whole]
            for rows in np.split(np.arange(len(scored.labels)), medmnist_c.SEVERITIES):
                part = replace(
                    scored,
                    labels=scored.labels[rows],
                    probability=scored.probability[rows],
                    predicted=scored.predicted[rows],
                )
                found.append(measure(part, weights, ranks=False)["balanced_accuracy"])
            points.append([clean, *steps])
            drawn.append(found)
    ends = [interval(values) for values in np.mean(drawn, axis=0)]
    return [
        f"{point:.3f} [{low:.3f}, {high:.3f}]"
        for point, (low, high) in zip(np.mean(points, axis=0), ends, strict=True)
    ]


SUITE = Corruptions()
