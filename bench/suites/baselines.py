"""Are EP, RDA and CRT better than the obvious? What reviewers would try instead.

Like is compared with like. What would replace one part of VITask is compared with that part alone:
contrastive decoding with `crt`, the prefix with `vanilla_with_ep`, both of them models of
`ablation`. VITask is compared with what one would try first at its price: without the exemplar
with `vanilla_longer`, which computes as many forwards in training; with it with `ensemble`, which
needs the task-specific model for its answers too. All others are compared with Van alone.

The ensemble's weight and the strength of contrastive decoding are chosen on validation data, per
dataset, from fixed grids.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.suites import Context, Outcome
from bench.suites.ablation import models

if TYPE_CHECKING:
    from bench.work import Tuned, Work
    from vitask.recipes import Recipe

STUDY = True
BORROWED = ("ablation",)
METHODS = {
    "vanilla": "Van alone",
    "vanilla_longer": "Van alone, for as many epochs as VITask computes forwards",
    "connector": "Van, the VLM's own connector trained too",
    "vanilla_with_ep": "Van + EP, answering with the exemplar",
    "prefix": "Van and a learned token that is the same for every image, in the exemplar's place",
    "crt": "Van + CRT, no exemplar in training",
    "contrastive_decoding": "vanilla, less what it says to the mean image, instead of CRT",
    "tsm": "the task-specific model alone",
    "ensemble": "vanilla and the task-specific model, log-probabilities averaged",
    "vitask_without_ep": "VITask, answering alone",
    "vitask_with_ep": "VITask, answering with the exemplar",
}
REFERENCE = {
    "vanilla_longer": "vanilla", "connector": "vanilla", "vanilla_with_ep": "vanilla",
    "prefix": "vanilla_with_ep", "crt": "vanilla", "contrastive_decoding": "crt",
    "tsm": "vanilla", "ensemble": "vanilla",
    "vitask_without_ep": "vanilla_longer", "vitask_with_ep": "ensemble",
}  # fmt: skip
PUBLISHED = None
PUBLISHED_NOTE = ""
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of contrastive decoding; weights of the ensemble


def tuned_alone(recipe: "Recipe") -> "dict[str, Recipe]":
    """Models that answer without an exemplar, by name."""
    plain = models(recipe)["vanilla"][0]
    return {
        "vanilla": plain,
        # two forwards a step in stage 1, three in stage 2
        "vanilla_longer": replace(
            plain,
            stage1_epochs=2 * recipe.stage1_epochs,
            stage2_epochs=3 * recipe.stage2_epochs,
        ),
        "connector": replace(plain, trained="connector", step="three"),
        "crt": models(recipe)["crt"][0],
    }


def units(recipe: "Recipe") -> float:
    from bench.work import SCORING, specialist_units, tuning_units

    ep = models(recipe)["ep"][0]  # once with the exemplar, once with the prefix
    recipes = [*tuned_alone(recipe).values(), ep, ep, recipe]
    return sum(map(tuning_units, recipes)) + specialist_units(recipe) + SCORING * len(METHODS)


def run(context: Context, seed: int, wanted: Collection[str]) -> Iterator[Outcome]:
    from bench.work import Work

    work, recipe = Work(context, seed), context.recipe
    specialist = work.specialist()
    vanilla = None
    for name, own in tuned_alone(recipe).items():
        if name in wanted or (
            name == "vanilla" and {"contrastive_decoding", "ensemble"} & {*wanted}
        ):
            tuned = work.tuned(own, name=name)
            vanilla = vanilla or tuned
            if name in wanted:
                yield work.answers(name, work.predict(tuned.model), tuned.note)
    ep = models(recipe)["ep"][0]
    if "vanilla_with_ep" in wanted:
        tuned = work.tuned(ep, specialist, name="ep")
        yield from work.both_ways(tuned, ("", "vanilla_with_ep"), wanted)
    if "prefix" in wanted:
        exemplar = work.kept(lambda images: _same(work, specialist.model, len(images)))
        tuned = work.tuned(ep, specialist, name="prefix", exemplar=exemplar)
        yield work.answers("prefix", work.predict(tuned.model, exemplar), tuned.note)
    if "tsm" in wanted:
        yield work.answers("tsm", work.classify(specialist.model), specialist.note)
    if vanilla is not None and "contrastive_decoding" in wanted:
        yield _chosen(work, "contrastive_decoding", vanilla, *_contrastive(work, vanilla))
    if vanilla is not None and "ensemble" in wanted:
        yield _chosen(work, "ensemble", vanilla, *_ensemble(work, vanilla, specialist.model))
    if {"vitask_without_ep", "vitask_with_ep"} & set(wanted):
        tuned = work.tuned(recipe, specialist, name="vitask")
        yield from work.both_ways(tuned, ("vitask_without_ep", "vitask_with_ep"), wanted)


def _same(work: "Work", tsm: Any, count: int) -> Any:
    """A feature that says nothing about its image: the connector makes one token of it."""
    import torch

    return torch.zeros(count, tsm.feature_size())


Scores = Mapping[str, np.ndarray]  # strength -> log-probabilities (images, candidates), one dataset


def _contrastive(work: "Work", vanilla: "Tuned") -> tuple[Any, str]:
    """log p(y | v) - strength log p(y | the mean training image)."""

    def scores(name: str, part: str) -> dict[float, np.ndarray]:
        tokens = work.image(name, part)
        mean = work.image(name, "train").mean(0, keepdim=True)
        own = vanilla.model.score(name, tokens)
        blank = vanilla.model.score(name, mean)
        return {strength: own - strength * blank for strength in STRENGTHS}

    return scores, "strength"


def _ensemble(work: "Work", vanilla: "Tuned", tsm: Any) -> tuple[Any, str]:
    """(1 - weight) of vanilla's class log-probabilities and weight of the TSM's."""

    def scores(name: str, part: str) -> dict[float, np.ndarray]:
        dataset = work.everything[name]
        own = vanilla.model.score(name, work.image(name, part))
        own = own - np.logaddexp.reduce(own, axis=1, keepdims=True)
        other = tsm.log_probabilities(dataset.splits[part].images, dataset.spec)
        if dataset.spec.multi_label:  # of each candidate set of labels, labels independent
            members = vanilla.model.tasks[name].candidates.members
            absent = np.log1p(-np.minimum(np.exp(other), 1 - 1e-12))
            other = other @ members.T + absent @ (~members).T
        return {weight: (1 - weight) * own + weight * other for weight in STRENGTHS}

    return scores, "weight"


def _chosen(work: "Work", method: str, vanilla: "Tuned", scores: Any, what: str) -> Outcome:
    """The strength that is best on the validation part, dataset by dataset."""
    from vitask.score import Prediction
    from vitask.validation import decide, macro_f1

    predictions: list[Prediction] = []
    curves: dict[str, dict[str, float]] = {}
    for name, dataset in work.context.evaluated.items():
        candidates = work.untuned.tasks[name].candidates
        labels = dataset.splits["val"].labels
        curves[name] = {
            str(strength): macro_f1(dataset.spec, labels, decide(dataset.spec, log_p, candidates))
            for strength, log_p in scores(name, "val").items()
        }
        best = max(curves[name], key=lambda strength: curves[name][strength])
        log_p = scores(name, "test")[float(best)]
        predictions.append(Prediction(name, "candidates", log_p))
    outcome = work.answers(method, predictions, vanilla.note)
    return replace(outcome, extras=outcome.extras | {f"validation by {what}": curves})
