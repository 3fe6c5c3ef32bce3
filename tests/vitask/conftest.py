"""Tiny random checkpoints of the same class as large ones, and small datasets."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2TokenizerFast,
)

from vitask.data.spec import Dataset, DatasetSpec, Split

SPECIAL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_checkpoint(folder: Path, text: str = "qwen2", seed: int = 0) -> Path:
    """A random InternVL with byte tokens: 32 px, 4 image tokens, 2 layers of width 32."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *SPECIAL.values()]
    bytes_only = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(added)
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=bytes_only,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL,
    )
    size = {"height": 32, "width": 32}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=False),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=CHAT,
    )
    width = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text_config = {
        "model_type": text,
        "vocab_size": len(tokenizer),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    config = InternVLConfig(
        vision_config={
            **width,
            "num_attention_heads": 2,
            "image_size": [32, 32],
            "patch_size": [8, 8],
        },
        text_config={**width, **text_config},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():  # wider than transformers' initialisation, so that images matter
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint with Qwen2 as its language model, like OpenGVLab/InternVL3-1B-hf."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "qwen2")


@pytest.fixture(scope="session")
def tiny_datasets() -> dict[str, Dataset]:
    """Three small datasets: prompts of all lengths, shared labels, grey, colour, multi-label."""
    return {
        "two": small_dataset("two", ("cat", "a dog, seen (from) afar"), seed=1),
        "five": small_dataset("five", ("a", "bb", "ccc", "a b", "bb ccc"), channels=1, seed=2),
        "many": small_dataset("many", ("x", "y", "z"), task="multi-label, binary-class", seed=3),
    }


def small_dataset(
    name: str,
    classes: tuple[str, ...],
    *,
    task: str = "multi-class",
    channels: int = 3,
    seed: int = 0,
    counts: tuple[int, int, int] = (30, 8, 10),
) -> Dataset:
    """Random images whose brightness depends on the class."""
    spec = DatasetSpec(
        name=name,
        task=task,
        classes=classes,
        modality=f"{name} imaging",
        n_channels=channels,
        n_samples=dict(zip(("train", "val", "test"), counts, strict=True)),
        license="none",
        source="test",
        head=name,
    )
    rng = np.random.default_rng(seed)
    splits = {}
    for split, count in spec.n_samples.items():
        shape = (count, 28, 28, 3) if channels == 3 else (count, 28, 28)
        images = rng.integers(0, 90, shape, dtype=np.uint8)
        if spec.multi_label:
            labels = rng.integers(0, 2, (count, len(classes)))
            brightness = labels.sum(1)
        else:
            labels = brightness = rng.integers(0, len(classes), count)
        images += (brightness * 30).astype(np.uint8).reshape(-1, *[1] * (images.ndim - 1))
        ids = np.array([f"{name}/{split}/{i:06d}" for i in range(count)])
        splits[split] = Split(images, labels.astype(np.int64), ids)
    return Dataset(spec, splits, size=28, source="card", md5="0" * 32, md5_ok=True)
