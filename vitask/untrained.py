"""VLMs of any size with random weights, for timing and tests."""

from dataclasses import dataclass

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from vitask.vlm import VLM


@dataclass(frozen=True)
class Shape:
    """The size of a language model, and the number of tokens per image."""

    text: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    image_tokens: int = 256


def random_vlm(shape: Shape, dtype: torch.dtype, device: str) -> VLM:
    """A native InternVL of this size with random weights; its vision tower never runs."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = InternVLConfig(
        vision_config={
            **small,
            "num_attention_heads": 1,
            "image_size": [32, 32],
            "patch_size": [8, 8],
        },
        text_config={
            "model_type": shape.text,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "vocab_size": shape.vocab,
            "tie_word_embeddings": False,
        },
        attn_implementation="sdpa",
    )
    with torch.device(device):
        model = InternVLForConditionalGeneration._from_config(config, dtype=dtype)
    processor = VLM.load("pocket").processor  # never used, as prompts are token ids
    return VLM(model, processor, "random")
