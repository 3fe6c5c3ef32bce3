"""Fused VITask losses over the language model's head. Imports torch, triton and jaxtyping only."""

from kernels.linear import (
    VITaskLosses,
    linear_cross_entropy,
    linear_crt,
    linear_rda,
    linear_vitask,
)
from kernels.problem import IGNORE_INDEX
from kernels.reference import crt_loss, rda_loss, response_loss

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
