"""Which defaults to trust: α and β over a grid, the lengths of the stages, the LoRA rank.

Every setting is answered without and with the exemplar and compared with the default's.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.suites import Context, Outcome

if TYPE_CHECKING:
    from vitask.recipes import Recipe

STUDY = True
WEIGHTS = (0.3, 1.0, 3.0)  # of the recipe's own alpha and beta, a factor of about 3 apart
WITH = "_with_ep"
SETTINGS = {
    "default": "the recipe",
    **{
        f"alpha_{a:g}_beta_{b:g}": f"RDA weighted {a:g} times, CRT {b:g} times the recipe's"
        for a in WEIGHTS
        for b in WEIGHTS
        if (a, b) != (1.0, 1.0)
    },
    "stage_1_only": "all epochs in stage 1: CRT never enters",
    "stage_2_only": "all epochs in stage 2: CRT from the start, the connector never trains",
    "rank_quarter": "a quarter of the LoRA rank (and alpha)",
    "rank_fourfold": "four times the LoRA rank (and alpha)",
}
METHODS = SETTINGS | {
    f"{name}{WITH}": f"{text}, answering with the exemplar" for name, text in SETTINGS.items()
}
REFERENCE = {
    name: "default" + (WITH if name.endswith(WITH) else "")
    for name in METHODS
    if not name.startswith("default")
}
PUBLISHED = None
PUBLISHED_NOTE = ""


def recipes(recipe: "Recipe") -> "dict[str, Recipe]":
    """Setting -> its recipe."""
    found = {"default": recipe}
    for a in WEIGHTS:
        for b in WEIGHTS:
            found[f"alpha_{a:g}_beta_{b:g}"] = replace(
                recipe, rda_weight=a * recipe.rda_weight, crt_weight=b * recipe.crt_weight
            )
    found["stage_1_only"] = replace(recipe, stage1_epochs=recipe.epochs, stage2_epochs=0)
    found["stage_2_only"] = replace(recipe, stage1_epochs=0, stage2_epochs=recipe.epochs)
    for name, factor in (("rank_quarter", 0.25), ("rank_fourfold", 4)):
        rank, alpha = int(recipe.lora_rank * factor), int(recipe.lora_alpha * factor)
        found[name] = replace(recipe, lora_rank=rank, lora_alpha=alpha)
    return {name: found[name] for name in SETTINGS}


def units(recipe: "Recipe") -> float:
    from bench.work import SCORING, specialist_units, tuning_units

    tuning = sum(map(tuning_units, recipes(recipe).values()))
    return tuning + specialist_units(recipe) + SCORING * len(METHODS)


def run(context: Context, seed: int, wanted: Collection[str]) -> Iterator[Outcome]:
    from bench.work import Work

    work = Work(context, seed)
    specialist = work.specialist()
    for setting, recipe in recipes(context.recipe).items():
        if not {setting, f"{setting}{WITH}"} & set(wanted):
            continue
        name = "vitask" if setting == "default" else f"vitask-{setting}"
        tuned = work.tuned(recipe, specialist, name=name)
        yield from work.both_ways(tuned, (setting, f"{setting}{WITH}"), wanted, write=False)
