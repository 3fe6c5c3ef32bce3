"""MedMNIST-C: what is left when images are corrupted as images of their modality are.

NAME is the clean test part; NAME+CORRUPTION holds each of its images at severities 1 to 5, made by
the package medmnistc. `lost` is what the corruption takes from the balanced accuracy. `be` and
`rbe` are MedMNIST-C's own errors, relative to its AlexNet, and there at 224 pixels only; a set
that has none is named below. An image is resampled with all that was made of it; the average is
over the corrupted sets alone.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from bench.suites import Context, Outcome

if TYPE_CHECKING:
    from bench.plan import Plan
    from bench.record import Record
    from bench.table import Answers
    from vitask.data.spec import Dataset
    from vitask.recipes import Recipe
    from vitask.score import Prediction

STUDY = True
METHODS = {
    "tsm": "the task-specific model",
    "vanilla": "Van alone",
    "vitask_without_ep": "VITask, answering alone",
    "vitask_with_ep": "VITask, answering with the exemplar",
}
REFERENCE = "vanilla"
PUBLISHED = None
PUBLISHED_NOTE = ""
TABLES = {
    "macro_f1": "Macro-F1, by constrained scoring",
    "balanced_accuracy": "Balanced accuracy",
    "lost": "Balanced accuracy lost against the clean images (lower is better)",
    "be": "MedMNIST-C's balanced error relative to AlexNet's (lower is better)",
    "rbe": "MedMNIST-C's relative balanced error (lower is better)",
}
LIBRARIES = ("medmnistc", "opencv-python-headless", "scikit-image", "wand")
MARK = "+"  # between a set's name and its corruption's
SCORED = 12.0  # scoring all corruptions of a set, in scorings of its test part


def averaged(name: str) -> bool:
    return MARK in name


def images_of(name: str) -> str:
    return name.partition(MARK)[0]


def lost_against(name: str) -> dict[str, tuple[str, str]]:
    """`lost` is the clean set's balanced accuracy minus this one's."""
    return {"lost": (images_of(name), "balanced_accuracy")} if MARK in name else {}


def unavailable(plan: "Plan") -> str | None:
    from bench import corruption

    return corruption.missing()


def evaluated(plan: "Plan", datasets: "dict[str, Dataset]") -> "dict[str, Dataset]":
    """Clean and corrupted test parts; the corrupted images are made by `run`, set by set."""
    from bench.corruption import split_listed
    from vitask.data import subset

    found = {}
    for name, dataset in datasets.items():
        clean = subset(dataset, test=plan.recipe.corrupted_limit)
        found[name] = clean
        for corruption in split_listed(dataset.spec)[0]:
            own = _described(clean, corruption)
            found[own.spec.name] = own
    return found


def _described(clean: "Dataset", corruption: str) -> "Dataset":
    """Labels, ids and groups of a corrupted set, over a black image that takes no memory."""
    from bench.corruption import SEVERITIES
    from vitask.data.spec import Split

    test = clean.splits["test"]
    count = SEVERITIES * len(test)
    split = Split(
        np.broadcast_to(np.uint8(0), (count, *test.images.shape[1:])),
        np.concatenate([test.labels] * SEVERITIES),
        np.array([f"{i}@{severity + 1}" for severity in range(SEVERITIES) for i in test.ids]),
        np.concatenate([test.ids if test.groups is None else test.groups] * SEVERITIES),
    )
    spec = replace(clean.spec, name=f"{clean.spec.name}{MARK}{corruption}")
    return replace(clean, spec=spec, splits=clean.splits | {"test": split})


def units(recipe: "Recipe") -> float:
    from bench.work import SCORING, specialist_units, tuning_units
    from vitask.recipes import vanilla

    tuning = tuning_units(recipe) + tuning_units(vanilla(recipe))
    return tuning + specialist_units(recipe) + SCORED * SCORING * len(METHODS)


def run(context: Context, seed: int, wanted: Collection[str]) -> Iterator[Outcome]:
    from bench.corruption import corrupted, split_listed
    from bench.work import SCORING, Work
    from vitask.recipes import vanilla
    from vitask.score import Prediction

    work = Work(context, seed)
    specialist = work.specialist()
    plain = work.tuned(vanilla(context.recipe), name="vanilla")
    tuned = work.tuned(context.recipe, specialist, name="vitask")
    found: dict[str, list[Prediction]] = {method: [] for method in METHODS}
    cost = SCORED * SCORING * len(METHODS) / len(context.evaluated)
    for name, dataset in context.evaluated.items():
        base, _, corruption = name.partition(MARK)
        images = context.evaluated[base].splits["test"].images
        if corruption:
            key = ("corrupted", name, len(images))
            if key not in context.cache:
                context.cache[key] = corrupted(images, context.datasets[base].spec, corruption)
            images = context.cache[key]
        image = tuned.model.vlm.image_features(images)
        scores = {"vanilla": plain.model.score(base, plain.model.seen(image))}
        features = specialist.model.features(images, tuned.model.feature_kind)
        ways = ("vitask_without_ep", "vitask_with_ep")
        scores |= dict(zip(ways, tuned.model.score_both(base, image, features), strict=True))
        for method, log_p in scores.items():
            found[method].append(Prediction(name, "candidates", log_p))
        log_p = specialist.model.log_probabilities(images, dataset.spec)
        kind = "labels" if dataset.spec.multi_label else "candidates"
        found["tsm"].append(Prediction(name, kind, log_p))
        work.advance(cost, f"{name}, seed {seed}")
    lacking = {name: split_listed(d.spec)[1] for name, d in context.datasets.items()}
    for method in METHODS:
        if method in wanted:
            values, steps = _judged(context, found[method])
            note = {"tsm": specialist.note, "vanilla": plain.note}.get(method, tuned.note)
            extras = {"changed": note["changed"], "unavailable": lacking, "severities": steps}
            yield Outcome(method, found[method], extras, values=values)


def _judged(
    context: Context, predictions: "list[Prediction]"
) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
    """lost, be and rbe of each corrupted set, and its balanced accuracy by severity."""
    from bench.corruption import SEVERITIES, SIDE, relative_errors

    accuracy, steps = {}, {}
    for prediction in predictions:
        name = prediction.dataset
        count = len(prediction.log_probability)
        balanced = partial(_balanced, prediction, context.evaluated[name])
        accuracy[name] = balanced(np.arange(count))
        if MARK in name:
            rows = np.split(np.arange(count), SEVERITIES)
            steps[name] = [round(balanced(part), 6) for part in rows]
    values: dict[str, dict[str, float]] = {}
    for base, dataset in context.datasets.items():
        mine = {n.partition(MARK)[2]: a for n, a in accuracy.items() if n.startswith(base + MARK)}
        for corruption, one in mine.items():
            values[f"{base}{MARK}{corruption}"] = {"lost": accuracy[base] - one}
        if dataset.size == SIDE:
            errors = {name: 1 - one for name, one in mine.items()}
            own = relative_errors(dataset.spec, 1 - accuracy[base], errors)
            for corruption, (be, rbe) in own.items():
                values[f"{base}{MARK}{corruption}"] |= {"be": be, "rbe": rbe}
    return values, steps


def _balanced(prediction: "Prediction", dataset: "Dataset", rows: np.ndarray) -> float:
    """Balanced accuracy on some of the test images."""
    from bench.metrics import measure, scored
    from vitask.prompts import candidates

    labels = dataset.splits["test"].labels[rows]
    answers = candidates(dataset.spec, dataset.splits["train"].labels)
    part = replace(prediction, log_probability=prediction.log_probability[rows])
    return float(measure(scored(dataset.spec, labels, part, answers))["balanced_accuracy"][0])


def sections(records: "Sequence[Record]", answers: "Answers") -> list[tuple[str, str]]:
    """By severity, and what is not there."""
    first = records[0]
    bases = list(first.trained_on)
    lines = ["| dataset | method | clean | 1 | 2 | 3 | 4 | 5 |", "|---" * 8 + "|"]
    corrupted = {images_of(name) for name in first.extras["severities"]}
    for base in bases:
        if base not in corrupted:
            continue
        weights = answers.weights(base).astype(float)
        for method in METHODS:
            mine = [r for r in records if r.method == method]
            cells = _by_severity(mine, answers, base, weights)
            lines.append(f"| {base} | {method} | " + " | ".join(cells) + " |")
    found = []
    if len(lines) > 2:
        title = (
            "Balanced accuracy by severity, mean over corruptions and seeds, and its 95 % interval"
        )
        found.append((title, "\n".join(lines)))
    if lacking := missing(first):
        lines = ["| dataset | what | why |", "|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in lacking]
        found.append(("Of MedMNIST-C, but not available here", "\n".join(lines)))
    return found


def missing(record: "Record") -> list[tuple[str, str, str]]:
    """(dataset, what, why): corruptions that could not be made, and its own errors."""
    made = {images_of(name): record.metrics[name] for name in record.extras["severities"]}
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
    from bench.corruption import SIDE

    if size == SIDE:
        return "MedMNIST-C has no AlexNet's errors for this dataset"
    return f"relative to an AlexNet's errors at {SIDE} pixels; these images have {size}"


def _by_severity(
    records: "Sequence[Record]", answers: "Answers", base: str, weights: np.ndarray
) -> list[str]:
    """One method's balanced accuracy on the clean images and at each severity.

    weights: (resamples, n) of the clean images; with an image all its versions are drawn.
    """
    from bench.corruption import SEVERITIES
    from bench.metrics import measure
    from bench.stats import interval

    points, drawn = [], []
    for record in records:
        clean = record.metrics[base]["balanced_accuracy"]
        whole = measure(answers.scored(record, base), weights, ranks=False)["balanced_accuracy"]
        for name, steps in record.extras["severities"].items():
            if images_of(name) != base:
                continue
            scored = answers.scored(record, name)
            found = [whole]
            for rows in np.split(np.arange(len(scored.labels)), SEVERITIES):
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
