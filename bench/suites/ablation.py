"""The paper's table 2: what RDA and CRT contribute, answering without and with the exemplar.

Each loss alone is compared with none, both with RDA alone: those two differ in CRT and nothing
else, so that what the second loss adds is tested, not what both bring together.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.suites import Context, Outcome

if TYPE_CHECKING:
    from vitask.recipes import Recipe

STUDY = True
METHODS = {
    "vanilla": "Van alone, no exemplar in training",
    "rda": "Van + EP + RDA, answering alone",
    "crt": "Van + CRT, no exemplar in training",
    "rda_crt": "Van + EP + RDA + CRT, answering alone: VITask without exemplar; CRT added to `rda`",
    "vanilla_with_ep": "Van + EP, answering with the exemplar",
    "rda_with_ep": "Van + EP + RDA, answering with the exemplar",
    "crt_with_ep": "Van + EP + CRT, answering with the exemplar",
    "rda_crt_with_ep": "all losses, with the exemplar: VITask; CRT added to `rda_with_ep`",
}
REFERENCE = {
    "rda": "vanilla", "crt": "vanilla", "rda_crt": "rda", "vanilla_with_ep": "vanilla",
    "rda_with_ep": "vanilla_with_ep", "crt_with_ep": "vanilla_with_ep",
    "rda_crt_with_ep": "rda_with_ep",
}  # fmt: skip
PUBLISHED = "vitask_table2_ablation.csv"
PUBLISHED_NOTE = """\
Bai et al. 2024, table 2: InternVL2-2B at 224 pixels on five datasets. Another model and other
images: not comparable number by number."""


def models(recipe: "Recipe") -> "dict[str, tuple[Recipe, dict[bool, str]]]":
    """Name of a model -> its recipe, and the methods it answers as: without, with exemplar."""
    from vitask.recipes import vanilla

    plain = vanilla(recipe)
    without_crt = replace(recipe, crt_weight=0.0)
    return {
        "vanilla": (plain, {False: "vanilla"}),
        "crt": (replace(plain, crt_weight=recipe.crt_weight), {False: "crt"}),
        "ep": (replace(without_crt, rda_weight=0.0), {True: "vanilla_with_ep"}),
        "rda": (without_crt, {False: "rda", True: "rda_with_ep"}),
        "ep_crt": (replace(recipe, rda_weight=0.0), {True: "crt_with_ep"}),
        "vitask": (recipe, {False: "rda_crt", True: "rda_crt_with_ep"}),
    }


def units(recipe: "Recipe") -> float:
    from bench.work import SCORING, specialist_units, tuning_units

    tuning = sum(tuning_units(own) for own, _ in models(recipe).values())
    return tuning + specialist_units(recipe) + SCORING * len(METHODS)


def run(context: Context, seed: int, wanted: Collection[str]) -> Iterator[Outcome]:
    from bench.work import Work

    work = Work(context, seed)
    specialist = work.specialist()
    for name, (recipe, methods) in models(context.recipe).items():
        if not set(methods.values()) & set(wanted):
            continue
        tuned = work.tuned(recipe, specialist, name=name)
        pair = (methods.get(False, ""), methods.get(True, ""))
        yield from work.both_ways(tuned, pair, wanted)
