"""Does exemplar prompting depend on the task-specific model's architecture?

The task-specific models are a CNN, a ViT that classifies from its class token, a ViT that pools,
and a hybrid. One of them is the recipe's. Answers with the exemplar are compared with answers
without it by the same model: this shows what the exemplar of this task-specific model adds.
Answers without it, and the task-specific models alone, are compared with the CNN's: this shows
whether another teacher is a better one.
"""

from dataclasses import replace

from bench.suite import Method, Suite, Training
from vitask.recipes import Recipe

LARGE = 224  # pixels of the task-specific model's input from which models of usual size are used
TSMS = {  # what it is, timm's name of a small one, timm's name of a large one
    "cnn": ("CNN, pooled feature", "test_resnet", "resnet50.a1_in1k"),
    "vit_cls": ("ViT, class token", "test_vit", "vit_base_patch16_224.augreg_in21k"),
    "vit_pooled": (
        "ViT, pooled feature", "test_vit2", "vit_base_patch16_siglip_gap_224.v2_webli",
    ),
    "hybrid": (
        "convolutions and attention, pooled feature", "test_coatnet", "coatnet_0_rw_224.sw_in1k",
    ),
}  # fmt: skip
USES = {
    "tsm": "alone",
    "without_ep": "as VITask's teacher, without the exemplar",
    "with_ep": "as VITask's exemplar",
}


def _against(tsm: str, use: str) -> str | None:
    if use == "with_ep":
        return f"{tsm}_without_ep"
    return None if tsm == "cnn" else f"cnn_{use}"


class Architectures(Suite):
    name = "architectures"
    methods = tuple(
        Method(
            f"{tsm}_{use}",
            f"{what} ({small}; at {LARGE} pixels {large}), {how}",
            against=_against(tsm, use),
            model=f"{tsm}_tsm" if use == "tsm" else tsm,
            exemplar=use == "with_ep",
        )
        for tsm, (what, small, large) in TSMS.items()
        for use, how in USES.items()
    )

    def models(self, recipe: Recipe) -> dict[str, Training]:
        found = {}
        for name, names in TSMS.items():
            timm_name = names[2] if recipe.tsm_image_size >= LARGE else names[1]
            changed = replace(recipe, tsm=timm_name)
            end = "" if changed == recipe else f"-{name}"
            found[f"{name}_tsm"] = Training(f"tsm{end}", changed, kind="tsm")
            found[name] = Training(f"vitask{end}", changed, tsm=f"{name}_tsm")
        return found


SUITE = Architectures()
