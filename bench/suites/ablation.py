"""The paper's table 2: what do RDA and CRT contribute?

Each loss alone is compared with none. Both losses together are compared with RDA alone, which
differs in CRT and nothing else: the test is about what the second loss adds.
"""

from dataclasses import replace

from bench.suite import Method, Published, Suite, Training
from vitask.recipes import Recipe, vanilla


def ablated(recipe: Recipe) -> dict[str, Training]:
    """VITask with and without each of its losses."""
    plain = vanilla(recipe)
    rda = replace(recipe, crt_weight=0.0)
    recipes = {
        "vanilla": plain,
        "crt": replace(plain, crt_weight=recipe.crt_weight),
        "ep": replace(rda, rda_weight=0.0),
        "rda": rda,
        "ep_crt": replace(recipe, rda_weight=0.0),
        "vitask": recipe,
    }
    return {name: Training(name, own) for name, own in recipes.items()}


class Ablation(Suite):
    name = "ablation"
    methods = (
        Method("vanilla", "Van alone, no exemplar in training", model="vanilla"),
        Method("rda", "Van + EP + RDA, without the exemplar", "vanilla", "rda"),
        Method("crt", "Van + CRT, no exemplar in training", "vanilla", "crt"),
        Method("rda_crt", "all losses, without the exemplar: VITask", "rda", "vitask"),
        Method("vanilla_with_ep", "Van + EP, with the exemplar", "vanilla", "ep", exemplar=True),
        *(
            Method(f"{name}_with_ep", f"{text}, with the exemplar", against, model, exemplar=True)
            for name, text, against, model in (
                ("rda", "Van + EP + RDA", "vanilla_with_ep", "rda"),
                ("crt", "Van + EP + CRT", "vanilla_with_ep", "ep_crt"),
                ("rda_crt", "all losses: VITask", "rda_with_ep", "vitask"),
            )
        ),
    )
    published = Published(
        "vitask_table2_ablation.csv",
        "Bai et al. 2024, table 2: InternVL2-2B at 224 pixels on five datasets. The model and the "
        "images differ from those above: do not compare number by number.",
    )

    def models(self, recipe: Recipe) -> dict[str, Training]:
        return {"tsm": Training("tsm", recipe, kind="tsm"), **ablated(recipe)}


SUITE = Ablation()
