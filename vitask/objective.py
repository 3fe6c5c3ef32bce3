"""What is minimised: which losses, with which weights, in which stage.

Stage 1:  L = Van + EP + alpha RDA
Stage 2:  L = Van + EP + alpha RDA + beta CRT        (arXiv 2410.06456, section 3.4)
"""

from typing import NamedTuple

from torch import Tensor

from kernels import crt_loss, rda_loss, response_loss
from vitask.branches import BranchRows
from vitask.recipes import Recipe
from vitask.vlm import VLM


class Weights(NamedTuple):
    """alpha and beta of a stage."""

    rda: float
    crt: float


class Losses(NamedTuple):
    """The sum that is minimised, and its parts for the log (detached), in nats per token."""

    total: Tensor
    response: Tensor
    exemplar: Tensor
    rda: Tensor
    crt: Tensor


def stage_weights(recipe: Recipe, stage: int) -> Weights:
    """CRT enters in stage 2; everything else is the same in both."""
    return Weights(rda=recipe.rda_weight, crt=recipe.crt_weight if stage == 2 else 0.0)


def joint_loss(vlm: VLM, rows: BranchRows, weights: Weights, *, detach_exemplar: bool) -> Losses:
    """Each loss is the mean over its own counted rows; an absent branch costs nothing."""
    logits = vlm.logits(rows.hidden)
    zero = logits.new_zeros(())
    response = response_loss(logits, rows.labels)
    exemplar = rda = crt = zero
    if rows.exemplar_hidden is not None:
        exemplar_logits = vlm.logits(rows.exemplar_hidden)
        exemplar = response_loss(exemplar_logits, rows.labels)
        if weights.rda:
            rda = rda_loss(logits, exemplar_logits, rows.labels, detach_exemplar=detach_exemplar)
    if rows.negative_hidden is not None and weights.crt:
        assert rows.negative_rows is not None
        negative_logits = vlm.logits(rows.negative_hidden)
        positive_logits = logits[rows.negative_rows]
        crt = crt_loss(positive_logits, negative_logits, rows.labels[rows.negative_rows])
    total = response + exemplar + weights.rda * rda + weights.crt * crt
    parts = (part.detach() for part in (response, exemplar, rda, crt))
    return Losses(total, *parts)
