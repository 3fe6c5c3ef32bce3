"""The paper's figure 2, on one dataset: ways to give the VLM what the task-specific model knows.

`vlm_vision` trains the VLM's vision encoder as well. RDA and RDA* answer alone; RDA* lets the loss
move its teacher too. The task-specific model sees images of 128 pixels at least, so that it has
several patch tokens: of 32 pixels a CNN of stride 32 leaves one, which is its pooled feature.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.suites import Context, Outcome

if TYPE_CHECKING:
    import pandas as pd

    from vitask.recipes import Recipe

Names = tuple[str, ...]
STUDY = True
METHODS = {
    "tsm": "the task-specific model alone",
    "vlm": "the VLM tuned by instructions alone (Van)",
    "vlm_vision": "the same, its vision encoder and connector trained too (VLM*)",
    "ep_cls": "EP with one token, answering with it",
    "ep_all": "EP with every patch token, answering with them",
    "ep_rep": "patch tokens in place of the VLM's image tokens, answering with them",
    "rda": "EP with one token and RDA, answering alone",
    "rda_star": "the same without detaching the teacher (RDA*)",
}
REFERENCE = "vlm"
TSM_SIDE = 128  # pixels
PUBLISHED = "vitask_fig2_exemplars.csv"
PUBLISHED_NOTE = """\
Bai et al. 2024, section 3 and figure 2: InternVL2-2B on HAM10000 at 224 pixels."""


def trained_on(study: Names, whole: Names) -> Names:
    """HAM10000 as in the paper where it is there, else DermaMNIST, else the first."""
    for name in ("ham10000", "dermamnist"):
        if name in study:
            return (name,)
    return study[:1]


def seen(recipe: "Recipe") -> "Recipe":
    """The recipe with images for the task-specific model that leave several patch tokens."""
    return replace(recipe, tsm_image_size=max(recipe.tsm_image_size, TSM_SIDE))


def models(recipe: "Recipe") -> "dict[str, tuple[str, Recipe, bool]]":
    """Method -> name of its model, recipe, whether it answers with the exemplar."""
    from vitask.recipes import vanilla

    plain = vanilla(recipe)
    ep = replace(recipe, rda_weight=0.0, crt_weight=0.0)
    rda = replace(recipe, crt_weight=0.0)
    return {
        "vlm": ("vanilla", plain, False),
        "vlm_vision": ("vanilla_vision", replace(plain, trained="vision", step="three"), False),
        "ep_cls": ("ep", replace(ep, variant="cls"), True),
        "ep_all": ("ep_all", replace(ep, variant="all"), True),
        "ep_rep": ("ep_rep", replace(ep, variant="rep"), True),
        "rda": ("rda", rda, False),
        "rda_star": ("rda_star", replace(rda, detach_exemplar=False), False),
    }


def units(recipe: "Recipe") -> float:
    from bench.work import SCORING, specialist_units, tuning_units

    tuning = sum(tuning_units(own) for _, own, _ in models(recipe).values())
    return tuning + specialist_units(recipe) + SCORING * len(METHODS)


def run(context: Context, seed: int, wanted: Collection[str]) -> Iterator[Outcome]:
    from bench.work import Work

    work, own = Work(context, seed), seen(context.recipe)
    specialist = work.specialist(own)
    if "tsm" in wanted:
        yield work.answers("tsm", work.classify(specialist.model), specialist.note)
    for method, (name, recipe, with_exemplar) in models(own).items():
        if method in wanted:
            tuned = work.tuned(recipe, specialist, name=name)
            exemplar = tuned.exemplar if with_exemplar else None
            yield work.answers(method, work.predict(tuned.model, exemplar), tuned.note)


def figures(frame: "pd.DataFrame") -> dict[str, str]:
    from bench.figures import bars

    return {"exemplars.svg": bars(frame, "macro_f1", list(METHODS), "Macro-F1")}
