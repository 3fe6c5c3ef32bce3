"""The vision language model (VLM): a thin layer over native transformers classes.

Image features, embeddings, hidden states, head. It takes any `InternVLForConditionalGeneration`
checkpoint: the embedded `pocket`, a folder, `OpenGVLab/InternVL3-1B-hf`.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AutoProcessor, InternVLForConditionalGeneration, InternVLProcessor

from vitask.data.images import check_images
from vitask.errors import InputError
from vitask.pocket import POCKET

# The linear layers of the language model only: "all-linear" would also adapt the vision tower and
# the VLM's connector.
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj"


@dataclass(frozen=True)
class Prompt:
    """A rendered chat turn, cut at the image: token ids before and after the image tokens.

    Exemplar tokens go between the image tokens and `after`, before the token that closes the image.
    So all branches share the prefix `before` + image.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]


class VLM:
    """A native InternVL with its processor."""

    def __init__(
        self, model: InternVLForConditionalGeneration, processor: InternVLProcessor, name: str
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.name = name

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        attention: str = "sdpa",
    ) -> "VLM":
        """Load "pocket", a folder or a hub name, frozen and in evaluation mode.

        attention: of the language model on CUDA, "sdpa" or "flex_attention", with equal results;
            elsewhere always SDPA, because FlexAttention trains on CUDA only

        ValueError if there is no such checkpoint.
        """
        source = str(POCKET) if name == "pocket" else name
        text = attention if torch.device(device).type == "cuda" else "sdpa"
        try:
            processor = AutoProcessor.from_pretrained(source)
            model = InternVLForConditionalGeneration.from_pretrained(
                source, dtype=dtype, attn_implementation={"": "sdpa", "text_config": text}
            )
        except OSError as error:
            raise InputError(
                f"no vision language model at {name!r}; expected 'pocket', a folder with "
                "config.json and model.safetensors, or the hub name of a native InternVL "
                f"checkpoint that is downloaded or can be ({error})"
            ) from error
        return cls(model.to(device), processor, name)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def hidden_size(self) -> int:
        return self.model.config.text_config.hidden_size

    @property
    def head(self) -> Float[Tensor, "vocab hidden"]:
        """Weight of the language model's head, which has no bias and is never trained."""
        return self.model.lm_head.weight

    # Images

    @torch.no_grad()
    def image_features(
        self, images: np.ndarray, batch_size: int = 256
    ) -> Float[Tensor, "images image_tokens hidden"]:
        """Vision tower and VLM connector, without gradient: uint8 images (n, h, w[, 3]) -> tokens.

        One tile for each image. Returned on the CPU, in the model's dtype.
        """
        return torch.cat(
            [self.image_tokens(part).cpu() for part in self._batches(images, batch_size)]
        )

    def image_tokens(
        self, pixel_values: Float[Tensor, "images 3 height width"]
    ) -> Float[Tensor, "images image_tokens hidden"]:
        """Vision tower and VLM connector, with gradients where they are trained."""
        pixels = pixel_values.to(self.device, self.dtype)
        return self.model.model.get_image_features(pixel_values=pixels).pooler_output

    @torch.no_grad()
    def vision_features(
        self, images: np.ndarray, batch_size: int = 256
    ) -> Float[Tensor, "images features"]:
        """Mean of the vision tower's last hidden states, for linear probes; float32 on the CPU."""
        features = [
            self.model.model.vision_tower(pixel_values=pixels).last_hidden_state.mean(1).float()
            for pixels in self._batches(images, batch_size)
        ]
        return torch.cat(features).cpu()

    def pixel_values(self, images: np.ndarray) -> Float[Tensor, "images 3 height width"]:
        """The checkpoint's image processor: resize to one tile, normalise. Grey becomes RGB.

        images: uint8 (n, side, side) or (n, side, side, 3); InputError for others, see
            `check_images`
        """
        return self._normalised(check_images(images))

    def _normalised(self, images: np.ndarray) -> Float[Tensor, "images 3 height width"]:
        rgb = images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=-1)
        tensor = torch.from_numpy(np.ascontiguousarray(rgb.transpose(0, 3, 1, 2)))
        done = self.processor.image_processor(
            images=list(tensor), crop_to_patches=False, return_tensors="pt"
        )
        return done["pixel_values"]

    def _batches(self, images: np.ndarray, batch_size: int) -> "Sequence[Tensor]":
        check_images(images)
        return [
            self._normalised(images[i : i + batch_size]).to(self.device, self.dtype)
            for i in range(0, len(images), batch_size)
        ]

    # Text

    def prompt(self, instruction: str) -> Prompt:
        """[user, image, instruction, assistant] in the checkpoint's chat template."""
        text = self._render(instruction)
        image = self.processor.image_token
        opened = f"{self.processor.start_image_token}{image}{self.processor.end_image_token}"
        ids = self.processor.tokenizer(text.replace(image, opened), add_special_tokens=False)[
            "input_ids"
        ]
        at = ids.index(self.processor.image_token_id)
        return Prompt(before=tuple(ids[:at]), after=tuple(ids[at + 1 :]))

    def response_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a response and its end-of-turn token."""
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return (*ids, self.end_of_turn_id)

    @property
    def end_of_turn_id(self) -> int:
        """The token that closes the assistant's turn in the chat template."""
        if not hasattr(self, "_end_of_turn_id"):
            prompt = self._render("?")
            whole = self._render("?", "!")
            tail = whole.removeprefix(prompt).removeprefix("!")
            self._end_of_turn_id = self.processor.tokenizer(tail, add_special_tokens=False)[
                "input_ids"
            ][0]
        return self._end_of_turn_id

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True)

    def _render(self, instruction: str, answer: str | None = None) -> str:
        content = [{"type": "image"}, {"type": "text", "text": instruction}]
        messages = [{"role": "user", "content": content}]
        if answer is not None:
            reply = [{"type": "text", "text": answer}]
            messages.append({"role": "assistant", "content": reply})
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer is None
        )

    # Language model

    def embed(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape hidden"]:
        return self.model.get_input_embeddings()(ids)

    def hidden(
        self,
        embeddings: Float[Tensor, "batch tokens hidden"],
        *,
        mask: Tensor | None = None,
        positions: Int[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens hidden"]:
        """Last hidden states, after the final norm.

        mask:      bool (batch or 1, 1, tokens, tokens), True where a token may attend; None: causal
        positions: int64; None: counted from 0

        Rows are padded on the right, so with a causal mask no token attends to padding.
        """
        return self.model.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=None if mask is None else self._mask(mask, embeddings),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state

    def _mask(self, mask: Tensor, embeddings: Tensor) -> Tensor | BlockMask:
        """The mask in the form of the language model's attention."""
        attention = self.model.config.text_config._attn_implementation
        if attention == "sdpa":
            return mask
        if attention == "eager":  # it adds the mask to the scores
            zeros = torch.zeros_like(mask, dtype=embeddings.dtype)
            return zeros.masked_fill(~mask, torch.finfo(embeddings.dtype).min)
        if attention == "flex_attention":  # it skips blocks without any pair
            rows, _, queries, keys = mask.shape
            of_all = mask.expand(len(embeddings), -1, -1, -1)
            return create_block_mask(
                lambda row, head, query, key: of_all[row, 0, query, key],
                rows, None, queries, keys, device=mask.device,
            )  # fmt: skip
        raise InputError(
            f"attention is {attention!r}; expected 'sdpa', 'eager' or 'flex_attention', which take "
            "a mask over pairs of tokens: load the model through VLM.load"
        )

    def logits(self, hidden: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
        """Head in at least float32: bfloat16 would lose the small differences between branches."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.to(dtype) @ self.head.to(dtype).T

    def add_lora(self, *, rank: int, alpha: int, dropout: float) -> None:
        """Add trainable LoRA adapters to the language model's linear layers, in place (peft)."""
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=LORA_TARGETS,
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            # peft reads a property of transformers by its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            self.adapter = peft.get_peft_model(self.model, config)
        # The name, not the path where it was found: other machines read the file that peft saves.
        self.adapter.peft_config["default"].base_model_name_or_path = self.name

    def vision_modules(self, trained: str) -> nn.ModuleDict:
        """The modules on the way to image tokens that are trained whole, for `recipe.trained`.

        None for "adapters", the VLM's connector for "connector", and for "vision" the vision tower
        too.
        """
        inner = self.model.model
        modules = {"connector": inner.multi_modal_projector, "vision": inner.vision_tower}
        wanted = {"adapters": (), "connector": ("connector",), "vision": tuple(modules)}[trained]
        return nn.ModuleDict({name: modules[name] for name in wanted})

    def load_adapter(self, folder: Path) -> None:
        """Add saved LoRA adapters, frozen, in place."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            self.adapter = peft.PeftModel.from_pretrained(self.model, folder)
        self.adapter.requires_grad_(False)
