"""The paper's figure 2: which form should the exemplar take?

One dataset; ways to give the VLM the task-specific model's knowledge.
`vlm_vision` trains the VLM's vision encoder as well. RDA and RDA* answer without the exemplar;
RDA* lets the loss move its teacher too. The task-specific model takes images of at least 128
pixels, so that it has several patch tokens: at 32 pixels a CNN of stride 32 has one, which equals
its pooled feature.
"""

from dataclasses import replace

from bench.suite import Chart, Method, Names, Published, Suite, Training
from vitask.recipes import Recipe, vanilla

TSM_SIDE = 128  # pixels


class Exemplars(Suite):
    name = "exemplars"
    methods = (
        Method("tsm", "the task-specific model", "vlm", "tsm"),
        Method("vlm", "the VLM tuned by instructions alone (Van)", model="vlm"),
        Method(
            "vlm_vision", "the same, vision encoder and connector too (VLM*)", "vlm", "vlm_vision"
        ),
        *(
            Method(name, text, "vlm", name, exemplar=True)
            for name, text in (
                ("ep_cls", "EP with one token, with the exemplar"),
                ("ep_all", "EP with every patch token, with the exemplar"),
                ("ep_rep", "patch tokens in place of the VLM's image tokens"),
            )
        ),
        Method("rda", "EP with one token and RDA, without the exemplar", "vlm", "rda"),
        Method("rda_star", "the same without detaching the teacher (RDA*)", "vlm", "rda_star"),
    )
    published = Published(
        "vitask_fig2_exemplars.csv",
        "Bai et al. 2024, section 3 and figure 2: InternVL2-2B on HAM10000 at 224 pixels.",
    )
    charts = (Chart("exemplars.svg", "bars", title="Macro-F1"),)

    def trained_on(self, study: Names, whole: Names) -> Names:
        """HAM10000 as in the paper where the study has it, else DermaMNIST, else the first."""
        for name in ("ham10000", "dermamnist"):
            if name in study:
                return (name,)
        return study[:1]

    def models(self, recipe: Recipe) -> dict[str, Training]:
        recipe = replace(recipe, tsm_image_size=max(recipe.tsm_image_size, TSM_SIDE))
        plain, rda = vanilla(recipe), replace(recipe, crt_weight=0.0)
        ep = replace(rda, rda_weight=0.0)
        vision = replace(plain, trained="vision", step="three")
        return {
            "tsm": Training("tsm", recipe, kind="tsm"),
            "vlm": Training("vanilla", plain),
            "vlm_vision": Training("vanilla_vision", vision),
            "ep_cls": Training("ep", replace(ep, variant="cls")),
            "ep_all": Training("ep_all", replace(ep, variant="all")),
            "ep_rep": Training("ep_rep", replace(ep, variant="rep")),
            "rda": Training("rda", rda),
            "rda_star": Training("rda_star", replace(rda, detach_exemplar=False)),
        }


SUITE = Exemplars()
