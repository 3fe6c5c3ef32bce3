"""Are EP, RDA and CRT better than simpler ideas?

These are the baselines that reviewers asked for.
Each comparison is between equals. A baseline that would replace one part of VITask is compared
with that part: contrastive decoding with `crt`, the prefix with `vanilla_with_ep`; both are models
of `ablation`. VITask is compared with the first thing to try at its price: without the exemplar
with `vanilla_longer`, which computes as many forwards in training; with it with `ensemble`, which
needs the task-specific model at test time too. All others are compared with Van alone.

The ensemble's weight and the strength of contrastive decoding are chosen on validation data, per
dataset, from fixed grids.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial

from bench.runs.work import Tuned, Work
from bench.suite import Method, Outcome, Suite, Training
from bench.suites.ablation import ablated
from vitask.baselines import Scores, contrastive, ensemble
from vitask.checkpoint import VITask
from vitask.data.spec import Dataset
from vitask.features import Features
from vitask.recipes import Recipe
from vitask.score import Prediction
from vitask.validation import decide, macro_f1

Combine = Callable[[VITask, str, Dataset, Features, str], Scores]


class Baselines(Suite):
    name = "baselines"
    methods = (
        Method("vanilla", "Van alone", model="vanilla"),
        Method("vanilla_longer", "Van alone, for VITask's number of forwards", "vanilla", "longer"),
        Method("connector", "Van, the VLM's own connector trained too", "vanilla", "connector"),
        Method("vanilla_with_ep", "Van + EP, with the exemplar", "vanilla", "ep", exemplar=True),
        Method(
            "prefix", "Van and a learned token, the same for every image, in the exemplar's place",
            "vanilla_with_ep", "prefix", exemplar=True,
        ),
        Method("crt", "Van + CRT, no exemplar in training", "vanilla", "crt"),
        Method("contrastive_decoding", "vanilla minus its scores for the mean image", "crt"),
        Method("tsm", "the task-specific model", "vanilla", "tsm"),
        Method("ensemble", "log-probabilities of vanilla and the TSM averaged", "vanilla"),
        Method("vitask_without_ep", "VITask without the exemplar", "vanilla_longer", "vitask"),
        Method("vitask_with_ep", "VITask with the exemplar", "ensemble", "vitask", exemplar=True),
    )  # fmt: skip

    def models(self, recipe: Recipe) -> dict[str, Training]:
        models = ablated(recipe)
        plain, ep = models["vanilla"].recipe, models["ep"]
        longer = replace(  # two forwards a step in stage 1, three in stage 2
            plain,
            stage1_epochs=2 * recipe.stage1_epochs,
            stage2_epochs=3 * recipe.stage2_epochs,
        )
        return {
            "tsm": Training("tsm", recipe, kind="tsm"),
            "vanilla": models["vanilla"],
            "longer": Training("vanilla_longer", longer),
            "connector": Training("connector", replace(plain, trained="connector", step="three")),
            "crt": models["crt"],
            "ep": ep,
            "prefix": replace(ep, name="prefix", exemplar="constant"),
            "vitask": models["vitask"],
        }

    def run(self, work: Work, wanted: Collection[str]) -> Iterator[Outcome]:
        yield from work.by_model(self, wanted)
        if not {"contrastive_decoding", "ensemble"} & set(wanted):
            return
        models = self.models(work.recipe)
        vanilla, tsm = work.tuned(models["vanilla"]), work.tsm(models["tsm"])
        if "contrastive_decoding" in wanted:
            yield _chosen(work, "contrastive_decoding", vanilla, contrastive, "strength")
        if "ensemble" in wanted:
            own = partial(ensemble, tsm.model)
            yield _chosen(work, "ensemble", vanilla, own, "weight")


def _chosen(work: Work, method: str, vanilla: Tuned, combine: Combine, what: str) -> Outcome:
    """The strength that is best on the validation split, dataset by dataset."""
    predictions: list[Prediction] = []
    curves: dict[str, dict[str, float]] = {}
    for name, dataset in work.evaluated.items():
        scores = partial(combine, vanilla.model, name, dataset, work.image)
        candidates = work.tasks[name].candidates
        labels = dataset.splits["val"].labels
        curve = {
            strength: macro_f1(dataset.spec, labels, decide(dataset.spec, log_p, candidates))
            for strength, log_p in scores("val").items()
        }
        best = max(curve, key=lambda strength: curve[strength])
        predictions.append(Prediction(name, "candidates", scores("test")[best]))
        curves[name] = {str(strength): score for strength, score in curve.items()}
    outcome = work.outcome(method, predictions, vanilla.note)
    return replace(outcome, extras=outcome.extras | {f"validation by {what}": curves})


SUITE = Baselines()
