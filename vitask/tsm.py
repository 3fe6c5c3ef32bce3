"""The task-specific model (TSM): one small classifier for all chosen datasets.

A timm model with a shared head. A sample's loss is over the classes of its dataset only. The
features become exemplar tokens (vitask/exemplar.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import accelerate
import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup

from vitask.backbone import build, check, check_alone, check_kind, colours
from vitask.card import TSM_FILES
from vitask.data.images import check_images, unmistakable
from vitask.data.spec import Dataset, DatasetSpec
from vitask.errors import Diverged, InputError, boundary, intact
from vitask.files import file_sha256, write_bytes
from vitask.names import canonical
from vitask.recipes import Recipe
from vitask.sealed import Fields, check_files, write_sealed
from vitask.validation import OnEpoch, decide, ignore, macro_f1
from vitask.weights import read_tensors

REMEDY = "copy the saved model again, or train it again"


@dataclass(frozen=True)
class Head:
    """A span of the shared head's outputs: the classes of one dataset, or of several (organ).

    start, stop: numbers of outputs, as in a slice
    """

    start: int
    stop: int


def heads(specs: Sequence[DatasetSpec]) -> dict[str, Head]:
    """Spans by head name, in order of first appearance; the 12 MedMNIST sets give 70 outputs.

    ValueError for datasets of one head whose classes differ.
    """
    spans: dict[str, Head] = {}
    first: dict[str, DatasetSpec] = {}
    for spec in specs:
        other = first.setdefault(spec.head, spec)
        if [*map(canonical, other.classes)] != [*map(canonical, spec.classes)]:
            raise InputError(
                f"datasets {other.name!r} and {spec.name!r} share the TSM's head {spec.head!r}, "
                f"and have {len(other.classes)} and {len(spec.classes)} classes that are not the "
                "same; give one of them another head"
            )
        if spec.head not in spans:
            start = max((span.stop for span in spans.values()), default=0)
            spans[spec.head] = Head(start, start + len(spec.classes))
    return spans


class TSM(nn.Module):
    """A timm backbone with a shared head.

    name:  timm's name of the model, with or without a tag
    spans: outputs of each head, from `heads`
    size:  side in pixels to which images are resized

    InputError for an unknown name, a size that the model cannot take, and pretrained weights that
    do not exist or cannot be loaded.
    """

    def __init__(
        self, name: str, spans: dict[str, Head], size: int, *, pretrained: bool = False
    ) -> None:
        super().__init__()
        classes = max(span.stop for span in spans.values())
        self.found = check(name, size, pretrained=pretrained)
        self.backbone = build(self.found, classes, pretrained=pretrained)
        self.name, self.spans, self.size = name, spans, size
        for which, values in zip(("mean", "std"), colours(self.backbone), strict=True):
            self.register_buffer(which, torch.tensor(values).view(3, 1, 1), persistent=False)

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
        """Width of the features; InputError where the model has none of this kind."""
        check_kind(kind)
        return self.found.layout().width if kind == "all" else self.found.width

    @torch.no_grad()
    def features(
        self, images: np.ndarray, kind: Literal["cls", "all"] = "cls", batch_size: int = 256
    ) -> Float[Tensor, "images *tokens features"]:
        """Features of uint8 images (n, h, w[, 3]), float32 on the CPU.

        cls: (images, features), the classifier's input: the class token if the model classifies
             from one, else the pooled feature
        all: (images, tokens, features), the last feature map without prefix tokens; InputError
             where the model gives no single map
        """
        self.feature_size(kind)
        check_images(images)
        self.eval()
        done = []
        for i in range(0, len(images), batch_size):
            maps = self.backbone.forward_features(self._normalised(images[i : i + batch_size]))
            if kind == "cls":
                maps = self.backbone.forward_head(maps, pre_logits=True)
            else:
                maps = self.found.layout().tokens(maps)
            done.append(maps.float().cpu())
        return torch.cat(done)

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
        """Write `tsm.safetensors`, and `tsm.json` with its SHA-256, into an existing folder."""
        # Copies: CoaT has tensors under several names, which safetensors would refuse.
        whole = torch.contiguous_format
        state = {n: value.clone(memory_format=whole) for n, value in self.state_dict().items()}
        spans = {name: [span.start, span.stop] for name, span in self.spans.items()}
        card = {"name": self.name, "size": self.size, "heads": spans}
        with boundary(folder, "free space there, or name a folder that can be written"):
            write_bytes(folder / TSM_FILES[1], save(state))
            write_sealed(
                folder / TSM_FILES[0],
                card | {"files": {TSM_FILES[1]: file_sha256(folder / TSM_FILES[1])}},
            )

    @classmethod
    def load(cls, folder: Path) -> "TSM":
        """The model that `save` wrote, frozen, on the CPU.

        Damaged names a file that is missing, cut, changed or exchanged, and the fields or tensors
        that do not fit. Files of earlier versions have no SHA-256.
        """
        card = Fields(folder / TSM_FILES[0], REMEDY)
        if "files" in card.values:
            card.check_seal()
            check_files(folder, card.digests("files"), REMEDY)
        name, size, spans = card.of("name", str), card.of("size", int), {}
        with intact(f"{card.path}: heads", REMEDY):
            for head, (start, stop) in card.of("heads", dict).items():
                if not (type(start) is type(stop) is int and 0 <= start < stop):
                    raise InputError(f"{head} is {[start, stop]}; expected a span of outputs")
                spans[head] = Head(start, stop)
        with intact(card.path, REMEDY):
            model = cls(name, spans, size)
        model.load_state_dict(read_tensors(folder / TSM_FILES[1], REMEDY, model.state_dict()))
        return model.eval().requires_grad_(False)


def check_tsm(
    name: str,
    size: int,
    kind: str = "cls",
    *,
    pretrained: bool = False,
    batch_size: int = 2,
    images: int = 2,
) -> None:
    """InputError unless a TSM of this model can be trained and gives these features.

    Before anything is trained: it takes a second or so, little memory and no network. A refusal
    takes longer, because sizes that work are looked for.

    name, size: timm's name, and the side of its input in pixels
    kind:       its features: cls | all; vitask.exemplar.feature_kind says which a variant needs
    pretrained: whether weights are wanted; whether the hub can be reached is not tried
    batch_size: images per training step
    images:     all training images
    """
    check(name, size, kind, pretrained=pretrained)
    if min(batch_size, images) == 1:
        check_alone(name, size)


def train_tsm(
    datasets: Mapping[str, Dataset], recipe: Recipe, seed: int, *, on_epoch: OnEpoch = ignore
) -> tuple[TSM, list[dict[str, float]]]:
    """Train one model on all train splits; keep the epoch that is best on the val splits.

    Returns the frozen model and the validation curve: for each epoch the macro-F1 of each
    dataset's val split, their "mean", and "loss", the mean training loss in nats. The same seed
    on the same machine gives the same model. InputError, before training, for a model that
    `check_tsm` refuses.
    """
    check_tsm(
        recipe.tsm,
        recipe.tsm_image_size,
        pretrained=recipe.tsm_pretrained,
        batch_size=recipe.tsm_batch_size,
        images=sum(len(dataset.splits["train"]) for dataset in datasets.values()),
    )
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
            if not np.isfinite(total):
                raise Diverged(
                    f"the loss is {total} in epoch {epoch + 1} of the TSM {recipe.tsm!r}; lower "
                    "the recipe's tsm_learning_rate"
                )
        curve.append(_validate(model, datasets) | {"loss": total / len(sample)})
        if curve[-1]["mean"] > max((c["mean"] for c in curve[:-1]), default=-1.0):
            best = {name: value.detach().clone() for name, value in model.state_dict().items()}
        on_epoch("tsm", epoch + 1, recipe.tsm_epochs)
    model.train()  # older timm: LeViT and others drop what they cached
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
