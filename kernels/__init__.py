"""Losses of VITask over the language model's head. Imports torch only; usable without the rest."""

from kernels.reference import IGNORE_INDEX, crt_loss, rda_loss, response_loss

__all__ = ["IGNORE_INDEX", "crt_loss", "rda_loss", "response_loss"]
