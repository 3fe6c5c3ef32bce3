"""How much do α, β, the stages' lengths and the LoRA rank matter?

Every setting answers without and with the exemplar, and is compared with the default's answers.
"""

from dataclasses import replace

from bench.suite import Method, Suite, Training
from vitask.recipes import Recipe

WEIGHTS = (0.3, 1.0, 3.0)  # factors of the recipe's alpha and beta, about 3 apart
WITH = "_with_ep"
GRID = {f"alpha_{a:g}_beta_{b:g}": (a, b) for a in WEIGHTS for b in WEIGHTS if (a, b) != (1, 1)}
SETTINGS = {
    "default": "the recipe",
    **{name: f"RDA weighted {a:g} times, CRT {b:g} times" for name, (a, b) in GRID.items()},
    "stage_1_only": "all epochs in stage 1: no CRT",
    "stage_2_only": "all epochs in stage 2: CRT from the start, the connector is not trained",
    "rank_quarter": "a quarter of the LoRA rank (and alpha)",
    "rank_fourfold": "four times the LoRA rank (and alpha)",
}


class Sensitivity(Suite):
    name = "sensitivity"
    scorings = 0.4  # no generated answers
    writes = False
    methods = tuple(
        Method(
            f"{name}{end}",
            f"{text}{how}",
            against=None if name == "default" else f"default{end}",
            model=name,
            exemplar=bool(end),
        )
        for end, how in (("", ""), (WITH, ", with the exemplar"))
        for name, text in SETTINGS.items()
    )

    def models(self, recipe: Recipe) -> dict[str, Training]:
        recipes = {"default": recipe}
        for name, (a, b) in GRID.items():
            recipes[name] = replace(
                recipe, rda_weight=a * recipe.rda_weight, crt_weight=b * recipe.crt_weight
            )
        epochs = recipe.epochs
        recipes["stage_1_only"] = replace(recipe, stage1_epochs=epochs, stage2_epochs=0)
        recipes["stage_2_only"] = replace(recipe, stage1_epochs=0, stage2_epochs=epochs)
        for name, factor in (("rank_quarter", 0.25), ("rank_fourfold", 4)):
            rank, alpha = int(recipe.lora_rank * factor), int(recipe.lora_alpha * factor)
            recipes[name] = replace(recipe, lora_rank=rank, lora_alpha=alpha)
        models = {"tsm": Training("tsm", recipe, kind="tsm")}
        for name, changed in recipes.items():
            models[name] = Training("vitask" if name == "default" else f"vitask-{name}", changed)
        return models


SUITE = Sensitivity()
