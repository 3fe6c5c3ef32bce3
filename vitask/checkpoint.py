"""A tuned model as a whole: VLM with adapters, exemplar connector, TSM, and its tasks.

model = VITask.from_pretrained("leaderboards/pocket-phantom/checkpoints/vitask-seed0")
model.predict("breastmnist", images)                      # with the TSM's exemplar
model.predict("breastmnist", images, exemplar=False)      # the VLM alone
model.plug(other_tsm)                                     # another TSM, without tuning
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from vitask.card import (
    ADAPTER,
    CONNECTOR,
    PROCESSOR,
    REMEDY,
    TSM_FILES,
    VISION,
    Card,
    Task,
    check_replaceable,
    read_card,
    write_card,
)
from vitask.data.images import check_images, resize_images, unmistakable
from vitask.errors import Damaged, InputError, boundary
from vitask.exemplar import ExemplarConnector, feature_kind, image_and_exemplar
from vitask.files import part_folder, put_folder, remove
from vitask.prompts import instruction, response
from vitask.recipes import Recipe
from vitask.score import generate, response_log_probabilities
from vitask.texts import check_texts
from vitask.tsm import TSM
from vitask.vlm import VLM
from vitask.weights import read_tensors


class VITask:
    """A VLM with or without tuning; without `tsm` and `connector` it has no exemplar.

    ValueError for a task with a text that the VLM's tokenizer cannot carry (`vitask/texts.py`).
    """

    def __init__(
        self,
        vlm: VLM,
        recipe: Recipe,
        tasks: Mapping[str, Task],
        *,
        tsm: TSM | None = None,
        connector: ExemplarConnector | None = None,
    ) -> None:
        for task in tasks.values():
            check_texts(vlm, task.spec, task.candidates, recipe.instruction)
        self.vlm, self.recipe, self.tasks = vlm, recipe, dict(tasks)
        self.tsm, self.connector = tsm, connector

    @property
    def feature_kind(self) -> Literal["cls", "all"]:
        """Which TSM features the connector takes."""
        return feature_kind(self.recipe.variant)

    def plug(self, tsm: TSM) -> "VITask":
        """The same model with another TSM before the same connector, without tuning.

        ValueError if the model has no connector, or if the TSM's features have another width.
        """
        if self.connector is None:
            raise InputError(
                "this model was tuned without exemplars, so it has no connector for a TSM; plug "
                "into a model that was tuned with exemplar=True"
            )
        width = tsm.feature_size(self.feature_kind)
        if width != self.connector.features:
            raise InputError(
                f"{tsm.name} gives features of width {width}, the connector was trained for "
                f"{self.connector.features}; plug in a TSM of the same width"
            )
        return VITask(self.vlm, self.recipe, self.tasks, tsm=tsm, connector=self.connector)

    # From images

    def predict(
        self, dataset: str, images: np.ndarray, *, exemplar: bool | None = None
    ) -> Float[np.ndarray, "images candidates"]:
        """Probability of each candidate, in the order of `tasks[dataset].candidates`.

        images:   uint8 (n, side, side) or (n, side, side, 3), of the recipe's source_size; colour
            becomes grey where the dataset is, so that answers equal those to files
        exemplar: whether the TSM's exemplar is in the prompt; None: if the model has a TSM

        At the temperature that was fitted on the val split, if the model has one. InputError for
        an unknown dataset, other images, and for an exemplar without a TSM.
        """
        channels, side = self._task(dataset).spec.n_channels, self.recipe.source_size
        if check_images(images, side=side, channels=channels).ndim == 4 and channels == 1:
            images = unmistakable(resize_images(images, side, channels=1))
        scores = self.score(dataset, self.image_tokens(images, exemplar=exemplar))
        return self.probability(dataset, scores, exemplar=exemplar)

    def probability(
        self, dataset: str, scores: np.ndarray, *, exemplar: bool | None = None
    ) -> Float[np.ndarray, "images candidates"]:
        """The softmax of `score`'s log-probabilities at the fitted temperature, or at 1."""
        scaled = scores / self.temperature(dataset, exemplar=exemplar)
        shifted = np.exp(scaled - scaled.max(-1, keepdims=True))
        return shifted / shifted.sum(-1, keepdims=True)

    def temperature(self, dataset: str, *, exemplar: bool | None = None) -> float:
        """Fitted on the val split with or without exemplar; 1 for an untuned model."""
        wanted = self.tsm is not None if exemplar is None else exemplar
        found = self._task(dataset).calibration.get("with" if wanted else "without")
        return 1.0 if found is None else found.temperature

    def image_tokens(
        self, images: np.ndarray, *, exemplar: bool | None = None
    ) -> Float[Tensor, "images tokens hidden"]:
        """The tokens at the image's place in the prompt, with or without exemplar tokens.

        images: uint8 (n, side, side) or (n, side, side, 3), of the recipe's source_size; unlike
            `predict`, it takes three grey images for what they are
        """
        if isinstance(images, np.ndarray):
            images = unmistakable(images)
        check_images(images, side=self.recipe.source_size)
        wanted = self.tsm is not None if exemplar is None else exemplar
        image = self.vlm.image_features(images)
        if not wanted:
            return image
        if self.tsm is None:
            raise InputError(
                "this checkpoint has no task-specific model (TSM); ask without the exemplar "
                "(exemplar=False, or --no-exemplar on the command line)"
            )
        return self.tokens(image, self.tsm.features(images, self.feature_kind))

    # From features

    @torch.no_grad()
    def image_inputs(self, image: Tensor) -> Float[Tensor, "images image_tokens hidden"]:
        """The `image` features that `tune` was given -> image tokens, on the CPU.

        They are image tokens already, except where vision was trained: then they are pixel values,
        (images, 3, height, width).
        """
        if self.recipe.trained == "adapters":
            return image
        return torch.cat([self.vlm.image_tokens(part).cpu() for part in image.split(256)])

    @torch.no_grad()
    def tokens(
        self, image: Float[Tensor, "images image_tokens hidden"], features: Tensor | None
    ) -> Float[Tensor, "images tokens hidden"]:
        """Image features and TSM features (None: no exemplar) -> tokens at the image's place."""
        if features is None:
            return image
        return image_and_exemplar(image, self.exemplar_tokens(features), self.recipe.variant)

    @torch.no_grad()
    def exemplar_tokens(self, features: Tensor) -> Float[Tensor, "images exemplar_tokens hidden"]:
        """TSM features through the connector."""
        if self.connector is None:
            raise InputError(
                "this model was tuned without exemplars, so it has no connector; ask without the "
                "exemplar"
            )
        device = self.connector.linear_1.weight.device
        parts = [self.connector(part.to(device)).cpu() for part in features.split(1024)]
        return torch.cat(parts)

    def score(
        self, dataset: str, tokens: Float[Tensor, "images tokens hidden"]
    ) -> Float[np.ndarray, "images candidates"]:
        """Log-probability of every candidate, summed over its response tokens, in nats."""
        return self._scores(dataset, tokens, None)[0]

    def score_both(
        self,
        dataset: str,
        image: Float[Tensor, "images image_tokens hidden"],
        features: Tensor,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores without and with exemplar, from one pass where both share the image tokens.

        features: of the TSM, (images, features) or (images, tokens, features)
        """
        if self.recipe.variant == "rep":  # the exemplar replaces the image
            tokens = self.tokens(image, features)
            return self.score(dataset, image), self.score(dataset, tokens)
        without, with_exemplar = self._scores(dataset, image, self.exemplar_tokens(features))
        return without, with_exemplar

    def _scores(self, dataset: str, tokens: Tensor, exemplar: Tensor | None) -> np.ndarray:
        task = self._task(dataset)
        return response_log_probabilities(
            self.vlm,
            self.vlm.prompt(instruction(task.spec, self.recipe.instruction)),
            tokens,
            [self.vlm.response_ids(response(text)) for text in task.candidates.texts],
            exemplar_tokens=exemplar,
            batch_size=self.recipe.score_batch_size,
        )

    def write(self, dataset: str, tokens: Float[Tensor, "images tokens hidden"]) -> list[str]:
        """Greedily generated answers, at most as long as the longest candidate."""
        task = self._task(dataset)
        longest = max(len(self.vlm.response_ids(response(t))) for t in task.candidates.texts)
        return generate(
            self.vlm,
            [self.vlm.prompt(instruction(task.spec, self.recipe.instruction))] * len(tokens),
            tokens,
            max_new_tokens=longest,
            batch_size=self.recipe.score_batch_size,
        )

    def _task(self, dataset: str) -> Task:
        if dataset not in self.tasks:
            known = ", ".join(self.tasks)
            raise InputError(f"this model has no dataset {dataset!r}; it was tuned on {known}")
        return self.tasks[dataset]

    # On disk

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter, connector, TSM, recipe, tasks and processor; the base VLM by name.

        Safetensors and JSON only. The card, vitask.json, holds a SHA-256 of every other file and
        of the base VLM's. The folder appears whole or not at all. An earlier checkpoint in it is
        replaced.

        InputError for a model without adapters, for a folder that holds anything else, and for one
        that cannot be written.
        """
        folder = Path(folder)
        if not self.vlm.adapted:
            raise InputError("this model was not tuned, so there is nothing to save; tune it first")
        check_replaceable(folder)
        with boundary(folder, "free space there, or name a folder that can be written"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            unfinished = part_folder(folder.parent, folder.name)
            try:
                unfinished.chmod(0o755)
                self._write(unfinished)
                put_folder(unfinished, folder)
            finally:
                remove(unfinished)

    def _write(self, folder: Path) -> None:
        # The vocabulary never changes, so peft need not look up the base model to check.
        self.vlm.adapter.save_pretrained(folder / ADAPTER, save_embedding_layers=False)
        self.vlm.processor.save_pretrained(folder / PROCESSOR)
        if self.connector is not None:
            save_file(self.connector.state_dict(), folder / CONNECTOR)
        if self.recipe.trained != "adapters":
            vision = self.vlm.vision_modules(self.recipe.trained)
            save_file(vision.state_dict(), folder / VISION)
        if self.tsm is not None:
            self.tsm.save(folder)
        write_card(folder, self.recipe, self.tasks, self.vlm.digests)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str = "cpu") -> "VITask":
        """Read a checkpoint of this or an earlier format. Scores are bit-equal to those saved.

        InputError if the folder has no checkpoint, or one of a newer format, and if the base VLM is
        missing or has changed. Damaged, which is one, if a file of the checkpoint is missing, cut,
        changed or exchanged, or does not fit the others; in formats 1 and 2, which have no digests,
        a change of mere values is not seen.
        """
        folder = Path(folder)
        card = read_card(folder)
        card.check(folder)
        recipe = card.recipe
        vlm = VLM.load(
            recipe.vlm,
            dtype=getattr(torch, recipe.precision),
            device=device,
            attention=recipe.attention,
        )
        vlm.check_base(card.base, folder)
        vlm.load_adapter(folder / ADAPTER)
        if recipe.trained != "adapters":
            vision = vlm.vision_modules(recipe.trained)
            vision.load_state_dict(read_tensors(folder / VISION, REMEDY, vision.state_dict()))
        tsm, connector = _exemplar_parts(folder, card, vlm)
        if tsm is not None:
            tsm.to(device)
        if connector is not None:
            connector.to(device)
        return cls(vlm, recipe, card.tasks, tsm=tsm, connector=connector)


def _exemplar_parts(
    folder: Path, card: Card, vlm: VLM
) -> tuple[TSM | None, ExemplarConnector | None]:
    """A checkpoint's TSM and connector, where it has them, frozen, on the CPU."""
    kind, hidden = feature_kind(card.recipe.variant), vlm.hidden_size
    names = (*TSM_FILES, CONNECTOR)
    if card.files is None and card.recipe.exemplar:  # else the card says which files there are
        for name in names:
            if not (folder / name).is_file():
                raise Damaged(f"{folder / name} is missing; {REMEDY}")
    tsm = connector = None
    if card.has(folder, TSM_FILES[0]):
        tsm = TSM.load(folder)
    if card.has(folder, CONNECTOR):
        path = folder / CONNECTOR
        found = read_tensors(path, REMEDY)
        width = found["norm.weight"].numel() if "norm.weight" in found else 1
        connector = ExemplarConnector(width, hidden)
        connector.load_state_dict(read_tensors(path, REMEDY, connector.state_dict()))
        connector.eval().requires_grad_(False)
        if tsm is not None and tsm.feature_size(kind) != width:
            raise Damaged(
                f"{path} takes features of width {width}, but {folder / TSM_FILES[1]} gives "
                f"{tsm.feature_size(kind)}: one of them was exchanged; {REMEDY}"
            )
    return tsm, connector
