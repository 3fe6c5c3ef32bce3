"""Can the probabilities be trusted, and is it better to abstain? Both settled on validation data.

`_scaled`: log-probabilities divided by one temperature per dataset, which makes the validation
part likeliest; answers stay the same. Abstention: the share of the validation part with the
largest confidence fixes a threshold, and the test images above it are answered.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.suites import Context, Outcome

if TYPE_CHECKING:
    from bench.record import Record
    from bench.table import Answers
    from bench.work import Work
    from vitask.data.spec import Dataset
    from vitask.recipes import Recipe
    from vitask.score import Prediction

STUDY = True
KINDS = {
    "tsm": "the task-specific model alone",
    "vanilla": "Van alone",
    "vitask_without_ep": "VITask, answering alone",
    "vitask_with_ep": "VITask, answering with the exemplar",
}
SCALED = "_scaled"
METHODS = KINDS | {f"{kind}{SCALED}": f"{text}, temperature scaled" for kind, text in KINDS.items()}
REFERENCE = {f"{kind}{SCALED}": kind for kind in KINDS}
PUBLISHED = None
PUBLISHED_NOTE = ""
TABLES = {
    "ece": "Expected calibration error (15 bins; lower is better)",
    "macro_f1": "Macro-F1, by constrained scoring",
    "accuracy": "Accuracy, by constrained scoring",
}
COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # shares of the validation part that are answered
LOG_TEMPERATURES = (-3.0, 3.0)


def units(recipe: "Recipe") -> float:
    from bench.work import SCORING, specialist_units, tuning_units
    from vitask.recipes import vanilla

    tuning = tuning_units(recipe) + tuning_units(vanilla(recipe))
    return tuning + specialist_units(recipe) + SCORING * len(METHODS)


def run(context: Context, seed: int, wanted: Collection[str]) -> Iterator[Outcome]:
    from bench.work import Work
    from vitask.recipes import vanilla

    work, recipe = Work(context, seed), context.recipe
    asked = [kind for kind in KINDS if {kind, f"{kind}{SCALED}"} & set(wanted)]
    if not asked:
        return
    specialist = work.specialist()
    plain = work.tuned(vanilla(recipe), name="vanilla") if "vanilla" in asked else None
    vitask = None
    if {"vitask_without_ep", "vitask_with_ep"} & set(asked):
        vitask = work.tuned(recipe, specialist, name="vitask")
    for kind in asked:
        model = plain if kind == "vanilla" else vitask
        exemplar = vitask.exemplar if vitask is not None and kind == "vitask_with_ep" else None
        tuned = None if model is None or kind == "tsm" else model.model
        parts = {part: _scores(work, specialist.model, tuned, exemplar, part) for part in PARTS}
        note = specialist.note if kind == "tsm" or model is None else model.note
        yield from _outcomes(work, kind, parts, wanted, note)


PARTS = ("val", "test")
Scores = dict[str, "Prediction"]  # dataset -> prediction of one part


def _scores(work: "Work", tsm: Any, model: Any, exemplar: Any, part: str) -> Scores:
    from vitask.score import Prediction

    done = {}
    for name, dataset in work.context.evaluated.items():
        if model is None:
            log_p = tsm.log_probabilities(dataset.splits[part].images, dataset.spec)
            kind = "labels" if dataset.spec.multi_label else "candidates"
        else:
            features = None if exemplar is None else exemplar(name, part)
            log_p = model.score(name, model.tokens(work.image(name, part), features))
            kind = "candidates"
        done[name] = Prediction(name, kind, log_p)
    return done


def _outcomes(
    work: "Work",
    kind: str,
    parts: Mapping[str, Scores],
    wanted: Collection[str],
    note: dict[str, Any],
) -> Iterator[Outcome]:
    from dataclasses import replace

    scaled, temperatures, curves = [], {}, {}
    for name, dataset in work.context.evaluated.items():
        members = work.untuned.tasks[name].candidates.members
        val, test = parts["val"][name], parts["test"][name]
        temperature = fit(val, dataset, members)
        temperatures[name] = temperature
        scaled.append(replace(test, log_probability=at(test, temperature)))
        curves[name] = abstention(val, test, dataset, members)
    if kind in wanted:
        yield work.answers(kind, list(parts["test"].values()), note)
    if f"{kind}{SCALED}" in wanted:
        answered = work.answers(f"{kind}{SCALED}", scaled, note)
        own = {"temperature": temperatures, "abstention": curves}
        yield replace(answered, extras=answered.extras | own)


def at(prediction: "Prediction", temperature: float) -> np.ndarray:
    """Log-probabilities at a temperature; of single labels by their logits."""
    log_p = prediction.log_probability
    if prediction.kind == "candidates":
        return log_p / temperature
    logits = log_p - np.log1p(-np.exp(np.minimum(log_p, -1e-12)))
    return -np.logaddexp(0, -logits / temperature)


def fit(val: "Prediction", dataset: "Dataset", members: np.ndarray) -> float:
    """The temperature at which the validation part's answers are likeliest."""
    from scipy.optimize import minimize_scalar

    truth = dataset.splits["val"].labels

    def loss(log_temperature: float) -> float:
        log_p = at(val, float(np.exp(log_temperature)))
        if val.kind == "labels":
            absent = np.log1p(-np.exp(np.minimum(log_p, -1e-12)))
            return -float(np.where(truth == 1, log_p, absent).mean())
        log_p = log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True)
        answer = _answer(truth, members)
        there = answer >= 0  # a set of labels that is no candidate has no likelihood
        return -float(log_p[there, answer[there]].mean()) if there.any() else 0.0

    found = minimize_scalar(loss, bounds=LOG_TEMPERATURES, method="bounded")
    return round(float(np.exp(found.x)), 6)


def _answer(labels: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The candidate that states the labels, -1 for none."""
    if labels.ndim == 1:
        return labels
    known = {row.tobytes(): number for number, row in enumerate(members)}
    return np.array([known.get(row.astype(bool).tobytes(), -1) for row in labels])


def abstention(
    val: "Prediction", test: "Prediction", dataset: "Dataset", members: np.ndarray
) -> list[list[float]]:
    """[share of val answered, share of test answered, accuracy on these] for each coverage."""
    confidence = {part: _confidence(p) for part, p in (("val", val), ("test", test))}
    right = _right(test, dataset.splits["test"].labels, members)
    found = []
    for coverage in COVERAGES:
        threshold = np.quantile(confidence["val"], 1 - coverage) if coverage < 1 else -np.inf
        kept = confidence["test"] >= threshold
        accuracy = float(right[kept].mean()) if kept.any() else 0.0
        found.append([coverage, round(float(kept.mean()), 6), round(accuracy, 6)])
    return found


def _confidence(prediction: "Prediction") -> np.ndarray:
    """Log-probability of the answer that is given."""
    log_p = prediction.log_probability
    if prediction.kind == "labels":
        absent = np.log1p(-np.exp(np.minimum(log_p, -1e-12)))
        return np.maximum(log_p, absent).sum(1)
    return log_p.max(1) - np.logaddexp.reduce(log_p, axis=1)


def _right(prediction: "Prediction", labels: np.ndarray, members: np.ndarray) -> np.ndarray:
    log_p = prediction.log_probability
    if prediction.kind == "labels":
        return ((log_p > np.log(0.5)) == (labels == 1)).all(1)
    return log_p.argmax(1) == _answer(labels, members)


def sections(records: "Sequence[Record]", answers: "Answers") -> list[tuple[str, str]]:
    """Accuracy on what is answered, by the share of the validation part that is answered."""
    from bench.stats import interval

    title = (
        "Accuracy on the answered test images, its 95 % interval for these thresholds, and the "
        "share that is answered; averaged over datasets and seeds"
    )
    head = [f"{coverage:.0%} of validation" for coverage in COVERAGES]
    lines = ["| method | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    plain = {(r.method, r.seed): r for r in records}
    for kind in KINDS:
        mine = [r for r in records if r.method == f"{kind}{SCALED}"]
        curves, drawn = [], []
        for r in mine:
            for name, curve in r.extras["abstention"].items():
                curves.append(curve)
                drawn.append(_drawn_accuracies(answers, plain[kind, r.seed], name, curve))
        if not curves:
            continue
        ends = [interval(values) for values in np.mean(drawn, axis=0)]
        cells = [
            f"{accuracy:.3f} [{low:.3f}, {high:.3f}] ({share:.0%})"
            for (_, share, accuracy), (low, high) in zip(np.mean(curves, axis=0), ends, strict=True)
        ]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return [(title, "\n".join(lines))]


def _drawn_accuracies(
    answers: "Answers", record: "Record", name: str, curve: list[list[float]]
) -> np.ndarray:
    """(coverages, resamples): accuracy on the drawn test images that are answered.

    The curve names the share that is answered: that many with the largest confidence.
    """
    scored, sample = answers.scored(record, name), answers.samples[record.name][name]
    right = (scored.labels == scored.predicted).reshape(len(scored.labels), -1).all(1)
    confidence = _confidence(sample.prediction)
    weights, ordered = answers.weights(name).astype(float), np.sort(confidence)[::-1]
    found = []
    for _, share, _ in curve:
        count = round(share * len(ordered))
        kept = confidence >= (ordered[count - 1] if count else np.inf)
        total = weights @ kept
        hit = weights @ (right & kept)
        found.append(np.divide(hit, total, out=np.full(len(total), np.nan), where=total > 0))
    return np.array(found)
