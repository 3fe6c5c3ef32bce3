"""A folder of images and a saved model -> a CSV with one row for each image.

The command line is checked before torch is imported and the model is loaded. Images go through
the model in batches and rows are written as they come, so memory does not grow with the folder.
"""

import csv
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import typer

from bench.commands.cli import UnknownName
from vitask.card import read_card
from vitask.data.images import image_files, notes, read_image, unmistakable
from vitask.errors import boundary
from vitask.files import check_destination, part_of

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
    dataset has them. Standard error says which files are skipped and what the reader did.

    exemplar: None means with exemplar if the model was tuned with one
    batch_size: None means the recipe's score_batch_size
    """
    card = read_card(checkpoint)
    recipe, name = card.recipe, _chosen(dataset, list(card.tasks))
    exemplar = recipe.exemplar if exemplar is None else exemplar
    if exemplar and not (checkpoint / "tsm.json").is_file():
        raise UnknownName(f"{checkpoint} has no task-specific model: give --no-exemplar")
    files, skipped = image_files(folder)
    for text in skipped:
        typer.echo(f"skipped: {text}", err=True)
    with _destination(output) as file:
        import torch
        from transformers.utils import logging

        from vitask.checkpoint import VITask

        logging.disable_progress_bar()  # stderr is for what the user must know
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = VITask.from_pretrained(checkpoint, device=device)
        model.recipe = replace(recipe, score_batch_size=batch_size or recipe.score_batch_size)
        if (temperature := model.temperature(name, exemplar=exemplar)) != 1:
            text = f"probabilities are at temperature {temperature:.3g}, fitted on validation data"
            typer.echo(text, err=True)
        return _write(file, model, name, folder, files, exemplar)


def columns(texts: Sequence[str], own: Sequence[str]) -> list[str]:
    """A column's name for each candidate: its text, marked where the table has the name already."""
    names: list[str] = []
    for text in texts:
        name = text
        while name in own or (name != text and name in texts):
            name = f"candidate {name}"
        names.append(name)
    return names


def _chosen(dataset: str | None, known: list[str]) -> str:
    """The dataset whose question is asked; where there is only one, it need not be named."""
    if dataset is None and len(known) == 1:
        return known[0]
    if dataset in known:
        return dataset
    listed = " and ".join(filter(None, (", ".join(known[:-1]), *known[-1:])))
    unknown = "" if dataset is None else f", not for {dataset!r}"
    raise UnknownName(f"this checkpoint answers for {listed}{unknown}: name one with --dataset")


@contextmanager
def _destination(output: Path | None) -> Iterator[TextIO]:
    """Standard output, or a part file beside `output` that replaces it once it is complete."""
    if output is None:
        yield sys.stdout
        return
    place = check_destination(output, "--output")
    with boundary(f"--output {output}", "name another file"):
        place.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(place)
        file = part.open("w", encoding="utf-8", newline="")
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
    side, done = model.recipe.source_size, Counter[str]()
    # on the face of everything that phantom data made
    mark = {"trained_on": "PHANTOM data"} if "vitask/data/phantom.py" in spec.source else {}
    table = csv.writer(file, lineterminator="\n")
    size, unreadable = model.recipe.score_batch_size, 0
    own = ["file", *mark, "answer", "generated", "error"]
    table.writerow([*own, *columns(texts, own)])
    for start in range(0, len(files), size):
        batch, images, rows = files[start : start + size], {}, {}
        for path in batch:
            try:
                images[path] = read_image(folder / path, side, spec.n_channels, done=done)
            except ValueError as error:
                rows[path] = [*("" for _ in mark), "", "", str(error), *("" for _ in texts)]
        unreadable += len(rows)
        if images:
            pixels = unmistakable(np.stack([*images.values()]))
            tokens = model.image_tokens(pixels, exemplar=exemplar)
            scores = model.score(name, tokens)
            probability = model.probability(name, scores, exemplar=exemplar)
            for path, text, p in zip(images, model.write(name, tokens), probability, strict=True):
                digits = [f"{value:.6f}" for value in p]
                rows[path] = [*mark.values(), texts[p.argmax()], text, "", *digits]
        for path in batch:  # a name that is not UTF-8 is written with escapes
            cells = [path.as_posix(), *rows[path]]
            table.writerow([cell.encode(errors="backslashreplace").decode() for cell in cells])
        file.flush()  # whoever reads along sees whole batches
    for text in notes(done):
        typer.echo(text, err=True)
    return unreadable
