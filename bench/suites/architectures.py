"""Does exemplar prompting depend on the task-specific model? Other architectures and features.

A CNN (the recipe's own), a ViT that classifies from its class token, a ViT that pools, a hybrid.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.suites import Context, Outcome

if TYPE_CHECKING:
    from vitask.recipes import Recipe

STUDY = True
SPECIALISTS = {
    "cnn": "test_resnet, pooled feature",
    "vit_cls": "test_vit, class token",
    "vit_pooled": "test_vit2, pooled feature",
    "hybrid": "test_coatnet, convolutions and attention, pooled feature",
}
KINDS = {
    "tsm": "alone",
    "without_ep": "as VITask's teacher, the VLM answering alone",
    "with_ep": "as VITask's exemplar",
}
METHODS = {
    f"{name}_{kind}": f"{what}, {how}"
    for name, what in SPECIALISTS.items()
    for kind, how in KINDS.items()
}
REFERENCE = {
    f"{name}_{kind}": f"cnn_{kind}" for name in SPECIALISTS if name != "cnn" for kind in KINDS
}
PUBLISHED = None
PUBLISHED_NOTE = ""


def units(recipe: "Recipe") -> float:
    from bench.work import SCORING, specialist_units, tuning_units

    one = specialist_units(recipe) + tuning_units(recipe) + SCORING * len(KINDS)
    return one * len(SPECIALISTS)


def run(context: Context, seed: int, wanted: Collection[str]) -> Iterator[Outcome]:
    from bench.work import Work

    work = Work(context, seed)
    for name, what in SPECIALISTS.items():
        asked = {kind for kind in KINDS if f"{name}_{kind}" in wanted}
        if not asked:
            continue
        recipe = replace(context.recipe, tsm=what.split(",")[0])
        own = recipe == context.recipe
        specialist = work.specialist(recipe, name="tsm" if own else f"tsm-{name}")
        if "tsm" in asked:
            predictions = work.classify(specialist.model)
            yield work.answers(f"{name}_tsm", predictions, specialist.note)
        if asked & {"without_ep", "with_ep"}:
            tuned = work.tuned(recipe, specialist, name="vitask" if own else f"vitask-{name}")
            pair = (f"{name}_without_ep", f"{name}_with_ep")
            yield from work.both_ways(tuned, pair, wanted)
