"""Exemplar prompting: TSM features -> exemplar tokens in the language model's embedding space."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitask.errors import InputError

VARIANTS = {
    "cls": "one token: the TSM's CLS or pooled feature, after the image tokens",
    "all": "every patch token of the TSM, after the image tokens",
    "rep": "every patch token of the TSM in place of the image tokens",
}


def feature_kind(variant: str) -> Literal["cls", "all"]:
    """Which TSM features a variant takes: the pooled one, or all patch tokens."""
    return "cls" if variant == "cls" else "all"


class ExemplarConnector(nn.Module):
    """LayerNorm, Linear, GELU, Linear: the same layers as the VLM's connector.

    The only new parameters of the method: the "learnable vision-language connector" of arXiv
    2410.06456, section 3.1. Float32 features of width `features` become tokens of width `hidden`.
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.linear_1 = nn.Linear(features, hidden)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden, hidden)

    @property
    def features(self) -> int:
        """Width of the TSM features."""
        return self.linear_1.in_features

    def forward(
        self, features: Float[Tensor, "batch *any features"]
    ) -> Float[Tensor, "batch tokens hidden"]:
        """(batch, features) gives one exemplar token, (batch, tokens, features) one a token."""
        if features.shape[-1] != self.features:
            raise InputError(
                f"the task-specific model (TSM) gives features of width {features.shape[-1]}, the "
                f"connector was trained for {self.features}; plug in a TSM of the same width"
            )
        if features.ndim == 2:
            features = features[:, None]
        return self.linear_2(self.act(self.linear_1(self.norm(features))))


def image_and_exemplar(
    image: Float[Tensor, "batch image_tokens hidden"],
    exemplar: Float[Tensor, "batch exemplar_tokens hidden"] | None,
    variant: str,
) -> Float[Tensor, "batch tokens hidden"]:
    """The tokens at the image's place in the prompt, with or without an exemplar."""
    if exemplar is None:
        return image
    exemplar = exemplar.to(image.dtype)
    return exemplar if variant == "rep" else torch.cat([image, exemplar], dim=1)
