"""The paper's figure 4 and more: what is left when the instruction is not complete?

@FORM: tuned with the complete instruction, asked by the form. @no_list_trained: the list of
possible diagnoses is left out in training too, as in the paper. Everything is answered without the
exemplar, by constrained scoring among the same answers.

Every form is compared with the same model's complete instruction, and VITask so asked with Van
alone. VITask against Van asked by another form, which is no row's mark:

    python -m bench compare vitask_without_ep@no_list vanilla@no_list --suite instructions
"""

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from bench.suites import Context, Outcome
from vitask.prompts import FORMS

if TYPE_CHECKING:
    import pandas as pd

    from vitask.recipes import Recipe

Names = tuple[str, ...]
STUDY = True
TRAINED = "no_list_trained"
KINDS = {"vanilla": "Van alone", "vitask_without_ep": "VITask"}
WHAT = {
    "complete": "complete instruction",
    "no_list": "class list removed",
    "list_75": "class list cut to its first 75 %",
    "list_50": "class list cut to its first 50 %",
    "list_25": "class list cut to its first 25 %",
    "shuffled_1": "class list shuffled",
    "shuffled_2": "class list shuffled otherwise",
    "shuffled_3": "class list shuffled a third way",
    "no_modality": "modality removed",
    "paraphrase_1": "paraphrased",
    "paraphrase_2": "paraphrased otherwise",
    "paraphrase_3": "paraphrased a third way",
    "empty": "no instruction at all",
    TRAINED: "class list removed, in training too",
}
METHODS = {
    f"{kind}@{form}": f"{text}: {what}"
    for form, what in WHAT.items()
    for kind, text in KINDS.items()
}
REFERENCE = {"vitask_without_ep@complete": "vanilla@complete"} | {
    f"{kind}@{form}": f"{kind}@complete" for form in WHAT if form != "complete" for kind in KINDS
}
PUBLISHED = "vitask_fig4_incomplete_instructions.csv"
PUBLISHED_NOTE = """\
Bai et al. 2024, figure 4: InternVL2-2B on DermaMNIST at 224 pixels; incomplete = class list removed
in training and testing."""


def trained_on(study: Names, whole: Names) -> Names:
    """All datasets of the recipe, not the study's few."""
    return whole


def units(recipe: "Recipe") -> float:
    from bench.work import SCORING, specialist_units, tuning_units
    from vitask.recipes import vanilla

    tuning = tuning_units(recipe) + tuning_units(vanilla(recipe))
    return 2 * tuning + specialist_units(recipe) + SCORING * len(METHODS)


def run(context: Context, seed: int, wanted: Collection[str]) -> Iterator[Outcome]:
    from bench.work import Work
    from vitask.checkpoint import VITask
    from vitask.recipes import vanilla

    assert set(WHAT) == {*FORMS, TRAINED}
    work = Work(context, seed)
    for kind in KINDS:
        full = context.recipe if kind.startswith("vitask") else vanilla(context.recipe)
        name = "vitask" if kind.startswith("vitask") else "vanilla"
        specialist = work.specialist() if full.exemplar else None
        asked = [form for form in FORMS if f"{kind}@{form}" in wanted]
        if asked:
            tuned = work.tuned(full, specialist, name=name)
            for form in asked:
                asking = replace(full, instruction=form)
                model = VITask(tuned.model.vlm, asking, tuned.model.tasks)
                note = tuned.note | {"changed": work.changed(asking)}
                yield work.answers(f"{kind}@{form}", work.predict(model, write=False), note)
        if f"{kind}@{TRAINED}" in wanted:
            tuned = work.tuned(
                replace(full, instruction="no_list"), specialist, name=f"{name}-no_list"
            )
            predictions = work.predict(tuned.model, write=False)
            yield work.answers(f"{kind}@{TRAINED}", predictions, tuned.note)


def figures(frame: "pd.DataFrame") -> dict[str, str]:
    from bench.figures import bars

    return {"instructions.svg": bars(frame, "macro_f1", list(METHODS), "Macro-F1")}
