"""Can the probabilities be trusted, and does abstaining help?

Temperature and thresholds are set on validation data.
`_scaled`: one temperature per dataset divides the log-probabilities. It maximises the likelihood
of the validation split, and leaves the answers unchanged. Abstention: a share of the validation
split with the largest confidence sets a threshold, and the test images above it are answered.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.runs.work import Work
from bench.stats.resampling import interval
from bench.suite import FOUR, Method, Outcome, Suite, pick, table
from vitask.calibration import (
    COVERAGES,
    abstention,
    at_temperature,
    confidence,
    fit_temperature,
)
from vitask.decision import rounded
from vitask.score import Prediction

if TYPE_CHECKING:
    from bench.report.answers import Answers
    from bench.runs.records import Record

SCALED = "_scaled"
TITLE = (
    "Accuracy on the answered test images, its 95 % interval at these thresholds, and the share "
    "that is answered; averaged over datasets and seeds"
)
Scores = dict[str, "Prediction"]  # dataset -> prediction of one split


class Calibration(Suite):
    name = "calibration"
    scorings = 0.4  # no generated answers
    methods = (
        *(replace(one, against=None) for one in FOUR),
        *(
            Method(f"{one.name}{SCALED}", f"{one.text}, temperature scaled", against=one.name)
            for one in FOUR
        ),
    )
    metrics = pick("ece", "macro_f1", "accuracy")

    def run(self, work: Work, wanted: Collection[str]) -> Iterator[Outcome]:
        models = self.models(work.recipe)
        for kind in (one.name for one in FOUR):
            if not {kind, f"{kind}{SCALED}"} & set(wanted):
                continue
            name = kind.partition("_")[0]
            tsm = None if name == "vanilla" else work.tsm(models["tsm"])
            if name == "tsm":
                assert tsm is not None
                note = tsm.note
                val, test = (_of(work.classify(tsm.model, split)) for split in ("val", "test"))
            else:
                tuned = work.tuned(models[name], tsm)
                note, exemplar = tuned.note, tuned.exemplar if kind == "vitask_with_ep" else None
                val, test = (
                    _scores(work, tuned.model, exemplar, split) for split in ("val", "test")
                )
            yield from _outcomes(work, kind, val, test, wanted, note)

    def sections(self, records: "Sequence[Record]", answers: "Answers") -> list[tuple[str, str]]:
        """Accuracy on the answered images, by the share of the validation split answered."""
        head = [f"{coverage:.0%} of validation" for coverage in COVERAGES]
        lines = []
        plain = {(r.method, r.seed): r for r in records}
        for kind in (one.name for one in FOUR):
            curves, drawn = [], []
            for record in (r for r in records if r.method == f"{kind}{SCALED}"):
                for name, curve in record.extras["abstention"].items():
                    curves.append(curve)
                    drawn.append(_drawn_accuracies(answers, plain[kind, record.seed], name, curve))
            if not curves:
                continue
            ends = [interval(values) for values in np.mean(drawn, axis=0)]
            means = zip(np.mean(curves, axis=0), ends, strict=True)
            cells = [
                f"{accuracy:.3f} [{low:.3f}, {high:.3f}] ({share:.0%})"
                for (_, share, accuracy), (low, high) in means
            ]
            lines.append([kind, *cells])
        return [(TITLE, table(["method", *head], lines))]


def _of(predictions: list[Prediction]) -> Scores:
    return {prediction.dataset: prediction for prediction in predictions}


def _scores(work: Work, model: Any, exemplar: Any, split: str) -> Scores:
    done = {}
    for name in work.evaluated:
        features = None if exemplar is None else exemplar(name, split)
        log_p = model.score(name, model.tokens(work.image(name, split), features))
        done[name] = Prediction(name, "candidates", log_p)
    return done


def _outcomes(
    work: Work,
    kind: str,
    vals: Mapping[str, "Prediction"],
    tests: Mapping[str, "Prediction"],
    wanted: Collection[str],
    note: dict[str, Any],
) -> Iterator[Outcome]:
    scaled, temperatures, curves = [], {}, {}
    for name, dataset in work.evaluated.items():
        members = work.tasks[name].candidates.members
        val, test = vals[name], tests[name]
        temperatures[name] = fit_temperature(val, dataset, members)
        scaled.append(replace(test, log_probability=at_temperature(test, temperatures[name])))
        curves[name] = abstention(rounded(val), rounded(test), dataset, members)
    if kind in wanted:
        yield work.outcome(kind, list(tests.values()), note)
    if f"{kind}{SCALED}" in wanted:
        outcome = work.outcome(f"{kind}{SCALED}", scaled, note)
        own = {"temperature": temperatures, "abstention": curves}
        yield replace(outcome, extras=outcome.extras | own)


def _drawn_accuracies(
    answers: "Answers", record: "Record", name: str, curve: list[list[float]]
) -> np.ndarray:
    """(coverages, resamples): accuracy on the drawn test images that are answered.

    The curve names the share that is answered: that many with the largest confidence.
    """
    scored, sample = answers.scored(record, name), answers.samples[record.name][name]
    right = (scored.labels == scored.predicted).reshape(len(scored.labels), -1).all(1)
    sure = confidence(sample.prediction)
    weights, ordered = answers.weights(name).astype(float), np.sort(sure)[::-1]
    found = []
    for _, share, _ in curve:
        count = round(share * len(ordered))
        answered = sure >= (ordered[count - 1] if count else np.inf)
        total = weights @ answered
        hit = weights @ (right & answered)
        found.append(np.divide(hit, total, out=np.full(len(total), np.nan), where=total > 0))
    return np.array(found)


SUITE = Calibration()
