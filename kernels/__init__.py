"""Losses of VITask over the language model's head, fused. Imports torch, triton, jaxtyping only."""

from kernels.linear import (
    VITaskLosses,
    linear_cross_entropy,
    linear_crt,
    linear_rda,
    linear_vitask,
)
from kernels.reference import IGNORE_INDEX, crt_loss, rda_loss, response_loss

__all__ = [
    "linear_vitask",
    "VITaskLosses",
    "linear_cross_entropy",
    "linear_rda",
    "linear_crt",
    "IGNORE_INDEX",
    "response_loss",
    "rda_loss",
    "crt_loss",
]
