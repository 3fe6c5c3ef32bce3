"""The objective: which losses, with which weights, in which stage.

Stage 1:  L = Van + EP + alpha RDA
Stage 2:  L = Van + EP + alpha RDA + beta CRT        (arXiv 2410.06456, section 3.4)
"""

from typing import NamedTuple

from kernels import VITaskLosses, linear_vitask
from vitask.branches import BranchRows
from vitask.recipes import Recipe
from vitask.vlm import VLM


class Weights(NamedTuple):
    """alpha (RDA) and beta (CRT) of a stage."""

    rda: float
    crt: float


def stage_weights(recipe: Recipe, stage: int) -> Weights:
    """CRT enters in stage 2; the other losses are the same in both stages."""
    return Weights(rda=recipe.rda_weight, crt=recipe.crt_weight if stage == 2 else 0.0)


def joint_loss(
    vlm: VLM, rows: BranchRows, weights: Weights, *, detach_exemplar: bool
) -> VITaskLosses:
    """Losses in nats per response token, each the mean over its rows; 0 for an absent branch."""
    contrastive = weights.crt != 0
    return linear_vitask(
        rows.hidden,
        vlm.head,
        rows.labels,
        exemplar_hidden=rows.exemplar_hidden,
        negative_hidden=rows.negative_hidden if contrastive else None,
        negative_rows=rows.negative_rows if contrastive else None,
        rda_weight=weights.rda,
        crt_weight=weights.crt,
        detach_exemplar=detach_exemplar,
    )
