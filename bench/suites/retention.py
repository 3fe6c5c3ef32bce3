"""How much of the VLM's general ability does tuning cost?

The VLM answers its own task before and after each tuning.
For the embedded VLM this task is its held-out picture questions, by kind, answered in free text.
`vanilla` against `untuned` shows the cost of tuning, `vitask` against `vanilla` the further cost
of VITask's losses.
"""

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import numpy as np

from bench.runs.work import Work
from bench.stats.items import Items, Values
from bench.suite import Method, Metric, Outcome, Suite
from vitask.pocket.evaluate import right

if TYPE_CHECKING:
    from bench.runs.plan import Plan

PICTURES, SEED = 400, 777  # held out from all pictures that the VLM was trained on


class Retention(Suite):
    name = "retention"
    scorings = 1.5  # free answers to questions
    methods = (
        Method("untuned", "the VLM before tuning"),
        Method("vanilla", "after tuning with Van alone", "untuned"),
        Method("vitask", "after tuning with all losses of VITask", "vanilla"),
    )
    metrics = (Metric("accuracy", "Accuracy on held-out picture questions, by kind"),)

    def lacking(self, plan: "Plan") -> str | None:
        if plan.recipe.vlm == "pocket":
            return None
        return (
            f"the VLM {plan.recipe.vlm!r} has no known general task; expected 'pocket', whose "
            "held-out picture questions are in this repository"
        )

    def images_of(self, dataset: str) -> str:
        """All kinds are asked about the same pictures."""
        return "pictures"

    def measured(self, values: Values, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The share of right answers among the pictures that the kind is asked about."""
        return {"accuracy": weights @ values["right"] / (weights @ values["asked"])}

    def run(self, work: Work, wanted: Collection[str]) -> Iterator[Outcome]:
        models = self.models(work.recipe)
        for method in (m.name for m in self.methods):
            if method not in wanted:
                continue
            changed = {}
            if method == "untuned":
                model = work.untuned
            else:
                tsm = work.tsm(models["tsm"]) if method == "vitask" else None
                tuned = work.tuned(models[method], tsm)
                model, changed = tuned.model, tuned.note["changed"]
            items = {
                f"pictures: {kind}": Items(
                    {"right": np.nan_to_num(one), "asked": 1.0 - np.isnan(one)}
                )
                for kind, one in right(model.vlm, PICTURES, SEED).items()
            }
            work.scored(method)
            yield Outcome(method, [], {"changed": changed}, items=items)


SUITE = Retention()
