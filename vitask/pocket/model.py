"""The pocket VLM: every component of a large InternVL, with about 2 M parameters."""

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor

from vitask.pocket.pictures import SIDE
from vitask.pocket.tokenizer import IMAGE_TOKENS, VOCABULARY

PATCH = 4  # pixels: 8 x 8 patches, 4 x 4 image tokens after the pixel shuffle
WIDTH = 128
LAYERS = 4


def make_model(processor: InternVLProcessor, seed: int) -> InternVLForConditionalGeneration:
    """A model with random weights, determined by `seed`."""
    tokenizer = processor.tokenizer
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "image_size": [SIDE, SIDE],
        "patch_size": [PATCH, PATCH],
        "layer_scale_init_value": 1.0,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.image_token_id,
        image_seq_length=IMAGE_TOKENS,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():
        # By fan-in: transformers' 0.02 suits wide models; at this width the model learns late.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.flatten(1).shape[1] ** -0.5)
    return model
