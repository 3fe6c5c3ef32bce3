"""Does exemplar prompting depend on the task-specific model? Other architectures and features.

A CNN, a ViT that classifies from its class token, a ViT that pools, a hybrid; one of them is the
recipe's own. With the exemplar against without it, answered by the same model: what this
task-specific model's exemplar gives. Without it, and the task-specific models themselves, against
the CNN's: whether another teacher is a better one.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.suites import Context, Outcome

if TYPE_CHECKING:
    from vitask.recipes import Recipe

STUDY = True
LARGE = 224  # pixels that the task-specific model sees, from which on models of usual size serve
SPECIALISTS = {  # what it is, timm's name of a small one, timm's name of a large one
    "cnn": ("CNN, pooled feature", "test_resnet", "resnet50.a1_in1k"),
    "vit_cls": ("ViT, class token", "test_vit", "vit_base_patch16_224.augreg_in21k"),
    "vit_pooled": (
        "ViT, pooled feature", "test_vit2", "vit_base_patch16_siglip_gap_224.v2_webli",
    ),
    "hybrid": (
        "convolutions and attention, pooled feature", "test_coatnet", "coatnet_0_rw_224.sw_in1k",
    ),
}  # fmt: skip
KINDS = {
    "tsm": "alone",
    "without_ep": "as VITask's teacher, the VLM answering alone",
    "with_ep": "as VITask's exemplar",
}
METHODS = {
    f"{name}_{kind}": f"{what} ({small}; at {LARGE} pixels {large}), {how}"
    for name, (what, small, large) in SPECIALISTS.items()
    for kind, how in KINDS.items()
}
REFERENCE = {f"{name}_with_ep": f"{name}_without_ep" for name in SPECIALISTS} | {
    f"{name}_{kind}": f"cnn_{kind}"
    for name in SPECIALISTS
    if name != "cnn"
    for kind in ("tsm", "without_ep")
}
PUBLISHED = None
PUBLISHED_NOTE = ""


def recipes(recipe: "Recipe") -> "dict[str, Recipe]":
    """Specialist -> the recipe with it: small ones for small images, else of the usual size."""
    large = recipe.tsm_image_size >= LARGE
    return {name: replace(recipe, tsm=own[1 + large]) for name, own in SPECIALISTS.items()}


def units(recipe: "Recipe") -> float:
    from bench.work import SCORING, specialist_units, tuning_units

    one = specialist_units(recipe) + tuning_units(recipe) + SCORING * len(KINDS)
    return one * len(SPECIALISTS)


def run(context: Context, seed: int, wanted: Collection[str]) -> Iterator[Outcome]:
    from bench.work import Work

    work = Work(context, seed)
    for name, recipe in recipes(context.recipe).items():
        asked = {kind for kind in KINDS if f"{name}_{kind}" in wanted}
        if not asked:
            continue
        own = recipe == context.recipe
        specialist = work.specialist(recipe, name="tsm" if own else f"tsm-{name}")
        if "tsm" in asked:
            predictions = work.classify(specialist.model)
            yield work.answers(f"{name}_tsm", predictions, specialist.note)
        if asked & {"without_ep", "with_ep"}:
            tuned = work.tuned(recipe, specialist, name="vitask" if own else f"vitask-{name}")
            pair = (f"{name}_without_ep", f"{name}_with_ep")
            yield from work.both_ways(tuned, pair, wanted)
