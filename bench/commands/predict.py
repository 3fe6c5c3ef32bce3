"""A folder of images -> a CSV of class probabilities and answers, with a saved model."""

from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, UnidentifiedImageError

from vitask.checkpoint import VITask

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def predict_folder(
    checkpoint: Path, folder: Path, dataset: str | None, *, exemplar: bool | None = None
) -> pd.DataFrame:
    """One row an image: file, answer, generated text, probability of every candidate answer.

    Images are resized to the recipe's source size without cropping, in colour or grey as the
    dataset has them. exemplar: by default wherever the checkpoint has a task-specific model.
    """
    model = VITask.from_pretrained(checkpoint)
    name = dataset or (next(iter(model.tasks)) if len(model.tasks) == 1 else None)
    if name is None or name not in model.tasks:
        raise ValueError(
            f"--dataset is {dataset!r}; this checkpoint answers for {', '.join(model.tasks)}"
        )
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; expected a folder of images")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS)
    if not files:
        raise ValueError(f"no image in {folder}; expected files ending in {', '.join(ENDINGS)}")
    task = model.tasks[name]
    images = np.stack(
        [read_image(p, model.recipe.source_size, task.spec.n_channels) for p in files]
    )
    tokens = model.image_tokens(images, exemplar=exemplar)
    probability = model.predict(name, images, exemplar=exemplar)
    frame = pd.DataFrame(probability, columns=list(task.candidates.texts))
    frame.insert(0, "generated", model.write(name, tokens))
    frame.insert(0, "answer", [task.candidates.texts[i] for i in probability.argmax(1)])
    if "phantom" in task.spec.source:  # on the face of everything made from it
        frame.insert(0, "trained_on", "PHANTOM data")
    frame.insert(0, "file", [p.relative_to(folder).as_posix() for p in files])
    return frame


def read_image(path: Path, size: int, channels: int) -> np.ndarray:
    """uint8 (size, size[, 3]), resized by bicubic interpolation."""
    try:
        with Image.open(path) as image:
            mode = "RGB" if channels == 3 else "L"
            seen = _eight_bit(path, image).convert(mode)
            resized = seen.resize((size, size), Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is no readable image ({error})") from error
    return np.asarray(resized, dtype=np.uint8)


def _eight_bit(path: Path, image: Image.Image) -> Image.Image:
    """An image of 16 bits a pixel reduced to 8; Pillow itself would cut its values off at 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"{path} has mode {image.mode} with values from {values.min()} to {values.max()}; "
            "expected 8 or 16 bits a pixel: convert it first"
        )
    return Image.fromarray((values / 257).round().astype(np.uint8))
