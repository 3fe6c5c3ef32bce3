"""LoRA adapters on a VLM's language model, through peft: new ones, and saved ones."""

import warnings
from pathlib import Path
from typing import TypeAlias

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from vitask.errors import InputError, boundary
from vitask.sealed import Fields
from vitask.weights import read_tensors

# The linear layers of the language model only: "all-linear" would also adapt the vision tower and
# the VLM's connector.
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields of peft's file that say nothing about the numbers.
ASIDE = {"base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
MARK = "_adapted_by_vitask"  # an attribute of the transformers model


Model: TypeAlias = PreTrainedModel | peft.PeftModel  # the second is refused


def add(model: Model, name: str, *, rank: int, alpha: int, dropout: float) -> peft.PeftModel:
    """Add trainable adapters to the model, in place.

    name: of the base model, as the file with the adapters has it

    InputError for a model that was adapted before, by us or by peft: its first user's answers
    would change.
    """
    if adapted(model):
        raise InputError(
            f"this VLM ({name}) already has adapters or was tuned; expected one as VLM.load gives "
            "it, because tuning changes it in place: load a fresh VLM for each model"
        )
    config = _config(rank, alpha, dropout)
    with warnings.catch_warnings():
        # peft reads a property of transformers by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        with boundary("these LoRA settings", "change lora_rank, lora_alpha or lora_dropout"):
            adapter = peft.get_peft_model(model, config)
    # The name, not the path where it was found: other machines read the file that peft saves.
    adapter.peft_config["default"].base_model_name_or_path = name
    setattr(model, MARK, True)
    return adapter


def adapted(model: nn.Module) -> bool:
    """Whether a model has adapters, of any kind that peft knows, or had ours."""
    return (
        isinstance(model, peft.PeftModel)
        or getattr(model, MARK, False)
        or any(isinstance(module, BaseTunerLayer) for module in model.modules())
    )


def load(model: Model, name: str, folder: Path, remedy: str) -> peft.PeftModel:
    """Add the adapters that were saved in a folder, in place, frozen and in evaluation mode.

    Damaged names the file, and the field or the tensors that do not fit; InputError as in `add`.
    """
    rank, alpha, dropout = _settings(Fields(folder / CONFIG, remedy))
    adapter = add(model, name, rank=rank, alpha=alpha, dropout=dropout)
    own = peft.get_peft_model_state_dict(adapter, save_embedding_layers=False)
    found = read_tensors(folder / WEIGHTS, remedy, own)
    with torch.no_grad():
        for tensor_name, tensor in own.items():
            tensor.copy_(found[tensor_name])
    return adapter.requires_grad_(False).eval()


def _config(rank: int, alpha: int, dropout: float) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=LORA_TARGETS,
        task_type="CAUSAL_LM",
    )


def _settings(fields: Fields) -> tuple[int, int, float]:
    """Rank, alpha and dropout; every other field must be as in adapters that we make."""
    rank, alpha = fields.of("r", int), fields.of("lora_alpha", int)
    dropout = float(fields.of("lora_dropout", float))
    if rank < 1 or not 0 <= dropout < 1:
        raise fields.damaged(f"r is {rank}, lora_dropout {dropout}; expected r >= 1 and 0 to 1")
    ours = _config(rank, alpha, dropout).to_dict()
    for needed in ("peft_type", "target_modules"):
        fields.of(needed, str)
    for name, value in fields.values.items():
        if name not in ASIDE and value != ours.get(name) and (name in ours or value):
            raise fields.damaged(f"{name} is {value!r:.80}; expected {ours.get(name)!r:.80}")
    return rank, alpha, dropout
