"""The vision language model (VLM): a thin layer over native transformers classes.

Image features, embeddings, hidden states, head. It takes any `InternVLForConditionalGeneration`
checkpoint: the embedded `pocket`, a folder, `OpenGVLab/InternVL3-1B-hf`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AutoProcessor, InternVLForConditionalGeneration, InternVLProcessor

from vitask import adapter, base
from vitask.card import REMEDY
from vitask.data.images import check_images
from vitask.errors import InputError, boundary
from vitask.names import canonical
from vitask.sealed import listed

MARKS = ("<image>", "<video>")  # what chats of this family write in the place of pictures


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
        self,
        model: InternVLForConditionalGeneration | PeftModel,
        processor: InternVLProcessor,
        name: str,
    ) -> None:
        """model: as transformers loads it; one that peft wrapped answers, but cannot be tuned."""
        self.model = cast(InternVLForConditionalGeneration, model.eval().requires_grad_(False))
        self.processor = processor
        self.name = name
        # Of its files, if it was loaded from files; SHA-256 by name.
        self.folder: Path | None = None
        self.digests: dict[str, str] = {}

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

        InputError if there is no such checkpoint; if it is not a native InternVL; if a file is cut
        or missing; if the weights differ from what config.json describes, or do not fit into
        memory; if the processor does not fit the weights. It names the file and the tensors.
        """
        folder = base.find(name)
        base.check(folder, dtype, device)
        digests = base.digests(folder)
        text = attention if torch.device(device).type == "cuda" else "sdpa"
        with boundary(f"the tokenizer or processor of {folder}", base.REMEDY):
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            if not isinstance(processor, InternVLProcessor):
                raise TypeError(f"it is a {type(processor).__name__}")
        with boundary(folder, base.REMEDY):
            model, info = InternVLForConditionalGeneration.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation={"": "sdpa", "text_config": text},
                use_safetensors=True,
                output_loading_info=True,
            )
            base.check_loaded(folder, info)
            base.check_values(folder, model)
        with boundary(f"device {device}", "free its memory, or take another device"):
            model.to(device)
        vlm = cls(model, processor, name)
        vlm.folder, vlm.digests = folder, digests
        vlm._check_processor()
        return vlm

    @staticmethod
    def check(
        name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        """Check a base VLM before work begins: InputError as in `load`, but for the processor.

        Reads JSON files and the weights' headers, in a fraction of a second, and holds no weights.
        From the hub it fetches small files only; weights that were not downloaded are not checked.
        """
        folder = base.find(name, download=False)
        base.check(folder, dtype, device, partial=name != "pocket" and not Path(name).exists())

    def _check_processor(self) -> None:
        """InputError if the processor does not fit the weights, as one of another checkpoint."""
        where, question = f"the tokenizer or processor of {self.folder}", "What is it?"
        with boundary(
            f"chat_template.jinja, or another chat template of {self.folder},", base.REMEDY
        ):
            self._render(question)
        with boundary(where, base.REMEDY):
            prompt = self.prompt(question)
            ids = (*prompt.before, *prompt.after, *self.response_ids(question))
            shown = question in self.decode(prompt.after)
            size = self.processor.image_processor.size
            pixels = [size["height"], size["width"]]
        config = self.model.config
        side = config.vision_config.image_size
        for what, found, expected in (
            ("a prompt that holds its instruction", shown, True),
            ("the image token", self.processor.image_token_id, config.image_token_id),
            ("tokens of an image", self.processor.image_seq_length, config.image_seq_length),
            ("pixels", pixels, [side, side] if isinstance(side, int) else [*side]),
            ("a token beyond the vocabulary", max(ids) >= len(self.head), False),
        ):
            if found != expected:
                raise InputError(
                    f"{where} does not fit {base.CONFIG}: {what}: {found}, expected {expected}; "
                    f"{base.REMEDY}"
                )
        self._check_pixels(where, pixels)

    def _check_pixels(self, where: str, side: list[int]) -> None:
        """InputError unless the image processor makes usable pixel values of a random image."""
        shape = (1, side[0] // 2 + 3, side[1] // 2 + 3, 3)
        image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        with boundary(where, base.REMEDY):
            made = self._normalised(image).to(self.dtype)
            found = tuple(made.shape)
        wrong = ""
        if found != (expected := (1, 3, *side)):
            wrong = f"in the shape {found}, expected {expected}"
        elif not made.isfinite().all():
            wrong = "that are not finite"
        elif (made.amax((2, 3)) == made.amin((2, 3))).any():
            wrong = "that are all the same"
        if wrong:
            raise InputError(
                f"{where} cannot be used: of a random image it makes values {wrong}; {base.REMEDY}"
            )

    def check_base(self, expected: Mapping[str, str], checkpoint: Path) -> None:
        """InputError names the files of the base VLM that are not those of `expected`."""
        names = sorted({*self.digests, *expected})
        other = [name for name in names if self.digests.get(name) != expected.get(name)]
        if other and expected:
            raise InputError(
                f"the base VLM {self.name!r} has changed since {checkpoint} was tuned on it: "
                f"{listed(other)} in {self.folder}; its answers would change: restore these files, "
                "or tune the model again"
            )

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
        """[user, image, instruction, assistant] in the checkpoint's chat template.

        ValueError for an instruction with a special token of the tokenizer.
        """
        if mark := self.special_token(instruction):
            raise InputError(
                f"instruction {instruction!r} has {mark!r}, a special token of the VLM "
                f"{self.name!r}, not a text; leave it out"
            )
        text = self._render(instruction)
        image = self.processor.image_token
        opened = f"{self.processor.start_image_token}{image}{self.processor.end_image_token}"
        ids = self._ids(text.replace(image, opened))
        at = ids.index(self.processor.image_token_id)
        return Prompt(before=ids[:at], after=ids[at + 1 :])

    def response_ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a response and its end-of-turn token.

        ValueError for a text with a special token, and for one that the tokens do not give back
        (compared as written answers are, `vitask.names.canonical`).
        """
        ids = self.token_ids(text)
        if mark := self.special_token(text):
            raise InputError(
                f"response {text!r} has {mark!r}, a special token of the VLM {self.name!r}, not a "
                "text; leave it out"
            )
        if canonical(written := self.decode(ids)) != canonical(text):
            raise InputError(
                f"response {text!r} comes back from the tokens of the VLM {self.name!r} as "
                f"{written!r}; write it with characters that the tokenizer knows"
            )
        return ids

    def token_ids(self, text: str) -> tuple[int, ...]:
        """The same ids for any text, unchecked."""
        return (*self._ids(text), self.end_of_turn_id)

    def special_token(self, text: str) -> str | None:
        """A special token in a text, which the model would not see as letters; None if none is."""
        if found := next((t for t in (*self.special.values(), *MARKS) if t in text), None):
            return found
        found_ids = (i for i in self._ids(text) if i in self.special)  # a normaliser may make one
        return next((self.special[i] for i in found_ids), None)

    @cached_property
    def special(self) -> dict[int, str]:
        """The tokenizer's special tokens by id, but for the one of unknown characters."""
        tokenizer = self.processor.tokenizer
        return {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content and number != tokenizer.unk_token_id
        }

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    @property
    def end_of_turn_id(self) -> int:
        """The token that closes the assistant's turn in the chat template."""
        if not hasattr(self, "_end_of_turn_id"):
            prompt = self._render("?")
            whole = self._render("?", "!")
            tail = whole.removeprefix(prompt).removeprefix("!")
            self._end_of_turn_id = self._ids(tail)[0]
        return self._end_of_turn_id

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids -> text, without special tokens; blanks before commas stay."""
        return self.processor.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

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

    @property
    def adapted(self) -> bool:
        """Whether the model has adapters, or was tuned: then it is not the base VLM any more."""
        return adapter.adapted(self.model)

    def add_lora(self, *, rank: int, alpha: int, dropout: float) -> None:
        """Add trainable LoRA adapters to the language model's linear layers, in place (peft).

        InputError for a VLM that has adapters already, or was tuned.
        """
        self.adapter = adapter.add(self.model, self.name, rank=rank, alpha=alpha, dropout=dropout)

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
        """Add saved LoRA adapters, frozen, in place.

        InputError for a VLM that has adapters already, or was tuned. Damaged names the file, and
        the field or the tensors that do not fit.
        """
        self.adapter = adapter.load(self.model, self.name, folder, REMEDY)
