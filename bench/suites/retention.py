"""What general ability tuning costs: the VLM's own task before and after each tuning.

For the embedded VLM that is its held-out picture questions, by kind, answered in free text.
`vanilla` against `untuned` is what tuning costs, `vitask` against `vanilla` what VITask's losses
cost more.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from bench.suites import Context, Outcome

if TYPE_CHECKING:
    from bench.plan import Plan
    from vitask.recipes import Recipe

STUDY = True
METHODS = {
    "untuned": "the VLM as it is",
    "vanilla": "after tuning with Van alone",
    "vitask": "after tuning with all losses of VITask",
}
REFERENCE = {"vanilla": "untuned", "vitask": "vanilla"}
PUBLISHED = None
PUBLISHED_NOTE = ""
TABLES = {"accuracy": "Accuracy on held-out picture questions, by kind"}
PICTURES, SEED = 400, 777  # held out from all pictures that the VLM was trained on


def unavailable(plan: "Plan") -> str | None:
    if plan.recipe.vlm == "pocket":
        return None
    return (
        f"no general task is known for the VLM {plan.recipe.vlm!r}; expected 'pocket', whose "
        "held-out picture questions are in this repository"
    )


def images_of(name: str) -> str:
    """All kinds are asked about the same pictures."""
    return "pictures"


def measured(values: Mapping[str, np.ndarray], weights: np.ndarray) -> dict[str, np.ndarray]:
    """The share of right answers among the pictures that the kind is asked about."""
    return {"accuracy": weights @ values["right"] / (weights @ values["asked"])}


def units(recipe: "Recipe") -> float:
    from bench.work import SCORING, specialist_units, tuning_units
    from vitask.recipes import vanilla

    tuning = tuning_units(recipe) + tuning_units(vanilla(recipe))
    return tuning + specialist_units(recipe) + SCORING * len(METHODS)


def run(context: Context, seed: int, wanted: Collection[str]) -> Iterator[Outcome]:
    from bench.items import Items
    from bench.work import SCORING, Work
    from vitask.pocket.evaluate import right
    from vitask.recipes import vanilla

    work = Work(context, seed)
    for method in METHODS:
        if method not in wanted:
            continue
        recipe = vanilla(context.recipe) if method == "vanilla" else context.recipe
        model = work.untuned if method == "untuned" else work.tuned(recipe, name=method).model
        found = right(model.vlm, PICTURES, SEED)
        items = {
            f"pictures: {kind}": Items({"right": np.nan_to_num(one), "asked": 1.0 - np.isnan(one)})
            for kind, one in found.items()
        }
        work.advance(SCORING, f"{method}, seed {seed}")
        yield Outcome(method, [], {"changed": work.changed(recipe)}, items=items)
