"""The paper's figure 4: how well do the models answer incomplete instructions?

@FORM: tuned with the complete instruction, asked by the form. @no_list_trained: the list of
possible diagnoses is left out in training too, as in the paper. All answers are without the
exemplar, by constrained scoring among the same candidates.

Every form is compared with the same model's complete instruction. VITask with the complete
instruction is compared with Van alone. This command compares them for another form:

    python -m bench compare vitask_without_ep@no_list vanilla@no_list --suite instructions
"""

from collections.abc import Collection, Iterator
from dataclasses import replace

from bench.runs.work import Work
from bench.suite import (
    Chart,
    Method,
    Names,
    Outcome,
    Published,
    Suite,
    Training,
    tsm_vanilla_vitask,
)
from vitask.checkpoint import VITask
from vitask.recipes import Recipe

TRAINED = "no_list_trained"
KINDS = {"vanilla": ("vanilla", "Van alone"), "vitask_without_ep": ("vitask", "VITask")}
FORMS = {
    "complete": "complete instruction",
    "no_list": "class list removed",
    "list_75": "class list cut to its first 75 %",
    "list_50": "class list cut to its first 50 %",
    "list_25": "class list cut to its first 25 %",
    "shuffled_1": "class list shuffled",
    "shuffled_2": "class list shuffled in a second order",
    "shuffled_3": "class list shuffled in a third order",
    "no_modality": "modality removed",
    "paraphrase_1": "a paraphrase",
    "paraphrase_2": "a second paraphrase",
    "paraphrase_3": "a third paraphrase",
    "empty": "no instruction at all",
    TRAINED: "class list removed, in training too",
}


def _against(kind: str, form: str) -> str | None:
    if form != "complete":
        return f"{kind}@complete"
    return None if kind == "vanilla" else "vanilla@complete"


class Instructions(Suite):
    name = "instructions"
    scorings = 0.4  # no generated answers
    methods = tuple(
        Method(f"{kind}@{form}", f"{text}: {what}", against=_against(kind, form))
        for form, what in FORMS.items()
        for kind, (_, text) in KINDS.items()
    )
    published = Published(
        "vitask_fig4_incomplete_instructions.csv",
        "Bai et al. 2024, figure 4: InternVL2-2B on DermaMNIST at 224 pixels; incomplete = class "
        "list removed in training and testing.",
    )
    charts = (Chart("instructions.svg", "bars", title="Macro-F1"),)

    def trained_on(self, study: Names, whole: Names) -> Names:
        """All datasets of the recipe, not the study's few."""
        return whole

    def models(self, recipe: Recipe) -> dict[str, Training]:
        models = tsm_vanilla_vitask(recipe)
        for name in ("vanilla", "vitask"):
            no_list = replace(models[name].recipe, instruction="no_list")
            models[f"{name}-no_list"] = Training(f"{name}-no_list", no_list)
        return models

    def run(self, work: Work, wanted: Collection[str]) -> Iterator[Outcome]:
        models = self.models(work.recipe)
        for kind, (name, _) in KINDS.items():
            asked = [form for form in FORMS if f"{kind}@{form}" in wanted]
            tsm = work.tsm(models["tsm"]) if name == "vitask" and asked else None
            if set(asked) - {TRAINED}:
                tuned = work.tuned(models[name], tsm)
            for form in asked:
                method = f"{kind}@{form}"
                if form == TRAINED:
                    model = work.tuned(models[f"{name}-no_list"], tsm)
                    predictions = work.predict(model.model, write=False)
                    yield work.outcome(method, predictions, model.note)
                    continue
                recipe = replace(models[name].recipe, instruction=form)
                asking = VITask(tuned.model.vlm, recipe, tuned.model.tasks)
                note = tuned.note | {"changed": work.changed(recipe)}
                yield work.outcome(method, work.predict(asking, write=False), note)


SUITE = Instructions()
