"""The paper's table 2: what do RDA and CRT contribute?

Each loss alone is compared with none. Both losses together are compared with RDA alone, which
differs in CRT and nothing else: the test is about what the second loss adds.
"""

from collections.abc import Collection, Iterator
from dataclasses import replace

from bench.runs.work import Work
from bench.suite import Method, Outcome, Published, Suite, Training
from vitask.recipes import Recipe, vanilla

ANSWERS = {  # model -> the methods it answers as: without, with the exemplar
    "vanilla": ("vanilla", ""),
    "crt": ("crt", ""),
    "ep": ("", "vanilla_with_ep"),
    "rda": ("rda", "rda_with_ep"),
    "ep_crt": ("", "crt_with_ep"),
    "vitask": ("rda_crt", "rda_crt_with_ep"),
}


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
        Method("vanilla", "Van alone, no exemplar in training"),
        Method("rda", "Van + EP + RDA, without the exemplar", "vanilla"),
        Method("crt", "Van + CRT, no exemplar in training", "vanilla"),
        Method("rda_crt", "all losses, without the exemplar: VITask; CRT added to `rda`", "rda"),
        Method("vanilla_with_ep", "Van + EP, with the exemplar", "vanilla"),
        Method("rda_with_ep", "Van + EP + RDA, with the exemplar", "vanilla_with_ep"),
        Method("crt_with_ep", "Van + EP + CRT, with the exemplar", "vanilla_with_ep"),
        Method(
            "rda_crt_with_ep",
            "all losses, with the exemplar: VITask; CRT added to `rda_with_ep`",
            "rda_with_ep",
        ),
    )
    published = Published(
        "vitask_table2_ablation.csv",
        "Bai et al. 2024, table 2: InternVL2-2B at 224 pixels on five datasets. The model and the "
        "images differ from those above: do not compare number by number.",
    )

    def models(self, recipe: Recipe) -> dict[str, Training]:
        return {"tsm": Training("tsm", recipe, kind="tsm"), **ablated(recipe)}

    def run(self, work: Work, wanted: Collection[str]) -> Iterator[Outcome]:
        models = self.models(work.recipe)
        tsm = work.tsm(models["tsm"])
        for name, methods in ANSWERS.items():
            if {*methods} & set(wanted):
                yield from work.both_ways(work.tuned(models[name], tsm), methods, wanted)


SUITE = Ablation()
