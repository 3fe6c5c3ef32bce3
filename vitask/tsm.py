"""The task-specific model (TSM): one small classifier for all chosen datasets.

A timm model with a shared head. A sample's loss is over the classes of its dataset only. The
features become exemplar tokens (vitask/exemplar.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import accelerate
import numpy as np
import timm
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from vitask.data.images import check_images, unmistakable
from vitask.data.spec import Dataset, DatasetSpec
from vitask.errors import InputError
from vitask.recipes import Recipe
from vitask.validation import OnEpoch, decide, ignore, macro_f1

FEATURES = ("cls", "all")


@dataclass(frozen=True)
class Head:
    """A span of the shared head's outputs: the classes of one dataset, or of several (organ).

    start, stop: numbers of outputs, as in a slice
    """

    start: int
    stop: int


def heads(specs: Sequence[DatasetSpec]) -> dict[str, Head]:
    """Spans by head name, in order of first appearance; the 12 MedMNIST sets give 70 outputs."""
    spans: dict[str, Head] = {}
    for spec in specs:
        if spec.head not in spans:
            start = max((span.stop for span in spans.values()), default=0)
            spans[spec.head] = Head(start, start + len(spec.classes))
    return spans


class TSM(nn.Module):
    """A timm backbone with a shared head.

    name:  timm's name of the model; ValueError for an unknown one
    spans: outputs of each head, from `heads`
    size:  side in pixels to which images are resized
    """

    def __init__(
        self, name: str, spans: dict[str, Head], size: int, *, pretrained: bool = False
    ) -> None:
        super().__init__()
        if not timm.is_model(name):
            near = get_close_matches(name, timm.list_models(), n=4)
            asked = f"; did you mean {' or '.join(near)}?" if near else "; see timm.list_models()"
            raise InputError(f"timm has no model {name!r}{asked}")
        classes = max(span.stop for span in spans.values())
        # Models with a fixed grid (ViT, hybrids) need the size; the others take any.
        config = timm.get_pretrained_cfg(name)
        extra = {"img_size": size} if config is not None and config.fixed_input_size else {}
        self.backbone = timm.create_model(name, pretrained=pretrained, num_classes=classes, **extra)
        self.name, self.spans, self.size = name, spans, size
        colours = self.backbone.pretrained_cfg
        self.register_buffer("mean", torch.tensor(colours["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(colours["std"]).view(3, 1, 1), persistent=False)

    def pixels(self, images: np.ndarray) -> Float[Tensor, "images 3 size size"]:
        """Normalised float32 of this size; grey becomes RGB.

        images: uint8 (n, side, side) or (n, side, side, 3); InputError for others, see
            `check_images`
        """
        return self._normalised(check_images(images))

    def _normalised(self, images: np.ndarray) -> Float[Tensor, "images 3 size size"]:
        rgb = images if images.ndim == 4 else np.repeat(images[..., None], 3, axis=-1)
        tensor = torch.from_numpy(np.ascontiguousarray(rgb.transpose(0, 3, 1, 2)))
        tensor = tensor.to(self.mean.device).float() / 255
        if tensor.shape[-1] != self.size:
            tensor = functional.interpolate(
                tensor, size=(self.size, self.size), mode="bicubic", antialias=True
            ).clamp(0, 1)
        return (tensor - self.mean) / self.std

    def forward(self, pixels: Float[Tensor, "images 3 size size"]) -> Float[Tensor, "images all"]:
        """Logits over the whole shared head."""
        return self.backbone(pixels)

    def logits(
        self, pixels: Float[Tensor, "images 3 size size"], head: str
    ) -> Float[Tensor, "images classes"]:
        span = self.spans[head]
        return self(pixels)[:, span.start : span.stop]

    def feature_size(self, kind: str = "cls") -> int:
        """Width of the features; some models have another layer before `cls`."""
        width = self.backbone.num_features
        return width if kind == "all" else getattr(self.backbone, "head_hidden_size", width)

    @torch.no_grad()
    def features(
        self, images: np.ndarray, kind: Literal["cls", "all"] = "cls", batch_size: int = 256
    ) -> Float[Tensor, "images *tokens features"]:
        """Features of uint8 images (n, h, w[, 3]), float32 on the CPU.

        cls: (images, features), the classifier's input: the class token if the model classifies
             from one, else the pooled feature
        all: (images, tokens, features), the last feature map without prefix tokens
        """
        if kind not in FEATURES:
            raise InputError(f"features {kind!r}; expected one of {', '.join(FEATURES)}")
        check_images(images)
        self.eval()
        done = []
        for i in range(0, len(images), batch_size):
            maps = self.backbone.forward_features(self._normalised(images[i : i + batch_size]))
            if kind == "cls":
                maps = self.backbone.forward_head(maps, pre_logits=True)
            done.append((maps if kind == "cls" else self._patches(maps)).float().cpu())
        return torch.cat(done)

    def _patches(self, maps: Tensor) -> Float[Tensor, "images tokens features"]:
        if maps.ndim == 3:  # (images, prefix + tokens, features)
            return maps[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
        if maps.shape[1] == self.feature_size("all"):  # NCHW
            return maps.flatten(2).transpose(1, 2)
        return maps.flatten(1, 2)  # NHWC

    @torch.no_grad()
    def log_probabilities(
        self, images: np.ndarray, spec: DatasetSpec, batch_size: int = 256
    ) -> np.ndarray:
        """float64 (images, classes), in nats: log-softmax, or log-sigmoid for multi-label.

        images: of the dataset that `spec` describes, uint8 (n, side, side) or (n, side, side, 3)
        """
        check_images(unmistakable(images) if spec.n_channels == 1 else images)
        self.eval()
        logits = torch.cat(
            [
                self.logits(self._normalised(images[i : i + batch_size]), spec.head).double().cpu()
                for i in range(0, len(images), batch_size)
            ]
        )
        done = functional.logsigmoid(logits) if spec.multi_label else logits.log_softmax(-1)
        return done.numpy()

    def save(self, folder: Path) -> None:
        """Write `tsm.safetensors` and `tsm.json` into an existing folder."""
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, folder / "tsm.safetensors")
        spans = {name: [span.start, span.stop] for name, span in self.spans.items()}
        card = {"name": self.name, "size": self.size, "heads": spans}
        (folder / "tsm.json").write_text(json.dumps(card, indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, folder: Path) -> "TSM":
        """The model that `save` wrote, frozen, on the CPU."""
        card = json.loads((folder / "tsm.json").read_text("utf-8"))
        spans = {name: Head(*span) for name, span in card["heads"].items()}
        model = cls(card["name"], spans, card["size"])
        model.load_state_dict(load_file(folder / "tsm.safetensors"))
        return model.eval().requires_grad_(False)


def train_tsm(
    datasets: Mapping[str, Dataset], recipe: Recipe, seed: int, *, on_epoch: OnEpoch = ignore
) -> tuple[TSM, list[dict[str, float]]]:
    """Train one model on all train splits; keep the epoch that is best on the val splits.

    Returns the frozen model and the validation curve: for each epoch the macro-F1 of each
    dataset's val split, their "mean", and "loss", the mean training loss in nats. The same seed
    on the same machine gives the same model.
    """
    accelerate.utils.set_seed(seed)
    accelerator = accelerate.Accelerator()
    specs = {name: dataset.spec for name, dataset in datasets.items()}
    model = TSM(
        recipe.tsm,
        heads(list(specs.values())),
        recipe.tsm_image_size,
        pretrained=recipe.tsm_pretrained,
    ).to(accelerator.device)
    pixels = {
        name: model.pixels(unmistakable(dataset.splits["train"].images))
        for name, dataset in datasets.items()
    }
    labels = {name: torch.from_numpy(d.splits["train"].labels) for name, d in datasets.items()}
    sample = [(name, i) for name, d in datasets.items() for i in range(len(d.splits["train"]))]
    rng = np.random.default_rng(seed)
    starts = [*range(recipe.tsm_batch_size, len(sample), recipe.tsm_batch_size)]
    if starts and len(sample) - starts[-1] == 1:
        starts.pop()  # batch norm cannot take one image alone: it joins the batch before
    steps = recipe.tsm_epochs * (len(starts) + 1)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.tsm_learning_rate, weight_decay=recipe.tsm_weight_decay
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.05 * steps), steps)
    trained, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    best, curve = {}, []
    for epoch in range(recipe.tsm_epochs):
        trained.train()
        total = 0.0
        order = rng.permutation(len(sample))
        for numbers in np.split(order, starts):
            rows = [sample[i] for i in numbers]
            batch = augment(torch.stack([pixels[name][i] for name, i in rows]), rng)
            logits = trained(batch)
            loss = logits.new_zeros(())
            for name in dict.fromkeys(name for name, _ in rows):
                at = [k for k, row in enumerate(rows) if row[0] == name]
                span = model.spans[specs[name].head]
                truth = labels[name][[rows[k][1] for k in at]].to(logits.device)
                loss = loss + task_loss(logits[at, span.start : span.stop], truth, specs[name])
            accelerator.backward(loss / len(rows))
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total += float(loss.detach())
        curve.append(_validate(model, datasets) | {"loss": total / len(sample)})
        if curve[-1]["mean"] > max((c["mean"] for c in curve[:-1]), default=-1.0):
            best = {name: value.detach().clone() for name, value in model.state_dict().items()}
        on_epoch("tsm", epoch + 1, recipe.tsm_epochs)
    model.load_state_dict(best)
    return model.eval().requires_grad_(False), curve


def augment(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Mirror half of the images left to right, and shift all of them by up to 1/8 of their side."""
    mirrored = torch.from_numpy(rng.random(len(pixels)) < 0.5).to(pixels.device)
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    reach = pixels.shape[-1] // 8
    down, right = rng.integers(-reach, reach + 1, size=2).tolist()
    padded = functional.pad(pixels, (reach,) * 4, mode="reflect")
    top, left, side = reach + down, reach + right, pixels.shape[-1]
    return padded[..., top : top + side, left : left + side]


def task_loss(
    logits: Float[Tensor, "samples classes"], labels: Tensor, spec: DatasetSpec
) -> Float[Tensor, ""]:
    """Sum over samples, in nats: cross-entropy, or for multi-label the mean of binary losses."""
    if spec.multi_label:
        losses = functional.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), reduction="none"
        )
        return losses.mean(-1).sum()
    return functional.cross_entropy(logits, labels, reduction="sum")


def _validate(model: TSM, datasets: Mapping[str, Dataset]) -> dict[str, float]:
    scores = {}
    for name, dataset in datasets.items():
        val = dataset.splits["val"]
        log_p = model.log_probabilities(val.images, dataset.spec)
        scores[name] = macro_f1(dataset.spec, val.labels, decide(dataset.spec, log_p))
    return scores | {"mean": float(np.mean(list(scores.values())))}
