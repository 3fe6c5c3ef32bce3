"""A folder of images and a saved model -> a CSV with one row for each image.

The command line is checked before torch is imported and the model is loaded. Images go through
the model in batches and rows are written as they come, so memory does not grow with the folder.
"""

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import typer

from bench.commands.cli import UnknownName
from vitask.data.images import ENDINGS, read_image
from vitask.data.spec import DatasetSpec
from vitask.recipes import Recipe

if TYPE_CHECKING:
    from vitask.checkpoint import VITask


def predict_folder(
    checkpoint: Path,
    folder: Path,
    *,
    dataset: str | None = None,
    exemplar: bool | None = None,
    output: Path | None = None,
    batch_size: int | None = None,
) -> int:
    """Write the CSV to `output` (None: standard output); return the number of unreadable images.

    Images are resized to the recipe's source size without cropping, in colour or grey as the
    dataset has them.

    exemplar: None means with exemplar if the model was tuned with one
    batch_size: None means the recipe's score_batch_size
    """
    recipe, specs = _read_card(checkpoint)
    name = _chosen(dataset, list(specs))
    exemplar = recipe.exemplar if exemplar is None else exemplar
    if exemplar and not (checkpoint / "tsm.json").is_file():
        raise UnknownName(f"{checkpoint} has no task-specific model: give --no-exemplar")
    files = _image_files(folder)
    with _destination(output) as file:
        import torch
        from transformers.utils import logging

        from vitask.checkpoint import VITask

        logging.disable_progress_bar()  # stderr is for what the user must know
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = VITask.from_pretrained(checkpoint, device=device)
        model.recipe = replace(recipe, score_batch_size=batch_size or recipe.score_batch_size)
        return _write(file, model, name, folder, files, exemplar)


def _read_card(checkpoint: Path) -> tuple[Recipe, dict[str, DatasetSpec]]:
    """What a checkpoint says about itself: its recipe, and the datasets that it answers for."""
    card = checkpoint / "vitask.json"
    if not card.is_file():
        raise ValueError(f"no checkpoint at {checkpoint}; expected a folder with vitask.json")
    try:
        fields = json.loads(card.read_text(encoding="utf-8"))
        specs = {name: DatasetSpec.of_json(task["spec"]) for name, task in fields["tasks"].items()}
        return Recipe.of_json(fields["recipe"]), specs
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"{card} is damaged or of another version ({error!r}): copy or train it again"
        raise ValueError(text) from error


def _chosen(dataset: str | None, known: list[str]) -> str:
    """The dataset whose question is asked; where there is only one, it need not be named."""
    if dataset is None and len(known) == 1:
        return known[0]
    if dataset in known:
        return dataset
    listed = " and ".join(filter(None, (", ".join(known[:-1]), *known[-1:])))
    unknown = "" if dataset is None else f", not for {dataset!r}"
    raise UnknownName(f"this checkpoint answers for {listed}{unknown}: name one with --dataset")


def _image_files(folder: Path) -> list[Path]:
    """Sorted paths of all images, relative to the folder. What is skipped is said on stderr."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; expected a folder of images")
    walk = os.walk(folder, onerror=lambda error: typer.echo(f"skipped: {error}", err=True))
    paths = (Path(place, name).relative_to(folder) for place, _, names in walk for name in names)
    found = [path for path in paths if path.name.lower().endswith(ENDINGS)]
    files = sorted(path for path in found if not any(p.startswith(".") for p in path.parts))
    if hidden := len(found) - len(files):
        typer.echo(f"skipped: {hidden} hidden image file(s)", err=True)
    if not files:
        raise ValueError(f"no image in {folder}; expected files ending in {', '.join(ENDINGS)}")
    return files


@contextmanager
def _destination(output: Path | None) -> Iterator[TextIO]:
    """Standard output, or a part file beside `output` that replaces it once it is complete."""
    if output is None:
        yield sys.stdout
        return
    try:
        place = output.resolve()  # a link stays a link
        if place.exists() and not (place.is_file() and os.access(place, os.W_OK)):
            raise OSError(0, "what is there is not a file that you may replace")
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f".{place.name}.part")
        file = part.open("w", encoding="utf-8", newline="")
    except OSError as error:
        text = f"--output {output} cannot be written: {error.strerror}; name another file"
        raise ValueError(text) from error
    try:
        with file:
            yield file
            os.fsync(file.fileno())
        os.replace(part, place)
    finally:
        part.unlink(missing_ok=True)


def _write(
    file: TextIO, model: "VITask", name: str, folder: Path, files: Sequence[Path], exemplar: bool
) -> int:
    """The header, and batch by batch a row for each image; returns how many were unreadable."""
    spec, texts = model.tasks[name].spec, model.tasks[name].candidates.texts
    # on the face of everything that phantom data made
    mark = {"trained_on": "PHANTOM data"} if "phantom" in spec.source else {}
    table, size, unreadable = (
        csv.writer(file, lineterminator="\n"),
        model.recipe.score_batch_size,
        0,
    )
    table.writerow(["file", *mark, "answer", "generated", "error", *texts])
    for start in range(0, len(files), size):
        batch, images, rows = files[start : start + size], {}, {}
        for path in batch:
            try:
                images[path] = read_image(folder / path, model.recipe.source_size, spec.n_channels)
            except ValueError as error:
                rows[path] = [*("" for _ in mark), "", "", str(error), *("" for _ in texts)]
        unreadable += len(rows)
        if images:
            tokens = model.image_tokens(np.stack([*images.values()]), exemplar=exemplar)
            scores = model.score(name, tokens)
            probability = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
            for path, text, p in zip(images, model.write(name, tokens), probability, strict=True):
                digits = [f"{value:.6f}" for value in p]
                rows[path] = [*mark.values(), texts[p.argmax()], text, "", *digits]
        for path in batch:  # a name that is not UTF-8 is written with escapes
            cells = [path.as_posix(), *rows[path]]
            table.writerow([cell.encode(errors="backslashreplace").decode() for cell in cells])
        file.flush()  # whoever reads along sees whole batches
    return unreadable
