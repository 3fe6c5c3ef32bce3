"""A folder of images and a saved model -> a CSV with one row for each image.

The command line is checked before torch is imported and the model is loaded. Images go through
the model in batches and rows are written as they come, so memory does not grow with the folder.
"""

import csv
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import typer

from bench.commands.cli import UnknownName
from vitask.card import read_card
from vitask.data.images import ENDINGS, image_files, notes, read_image, unmistakable
from vitask.errors import InputError, boundary
from vitask.files import check_destination, part_of, shown_name

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
    place = None if output is None else _place(output, checkpoint, folder)
    with _destination(place) as table:
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
        return _write(table, model, name, folder, files, exemplar)


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


def _place(output: Path, checkpoint: Path, folder: Path) -> Path:
    """Where the CSV goes; InputError if that is in the checkpoint, or one of the images."""
    place = check_destination(output, "--output")
    if place.is_relative_to(checkpoint.resolve()):
        raise InputError(
            f"--output {output} is in the checkpoint {checkpoint}; name a file elsewhere"
        )
    for one in (place, output.parent.resolve() / output.name):  # what a link leads to, and the link
        image = one.suffix.lower() in ENDINGS and one.is_relative_to(folder.resolve())
        if image and place.exists():
            raise InputError(f"--output {output} is one of the images; name another file")
    return place


@dataclass
class _Table:
    """Where rows go.

    place: None for standard output
    sizes: bytes of the file after the header and after each batch
    """

    file: TextIO
    place: Path | None = None
    sizes: list[int] = field(default_factory=list)

    def write(self, rows: Sequence[Sequence[str]]) -> None:
        """The header or a batch; whoever reads along sees whole batches."""
        if self.place is None:
            csv.writer(self.file, lineterminator="\n").writerows(rows)
            self.file.flush()
            return
        with boundary(f"--output {self.place}", "make room, or name another file"):
            csv.writer(self.file, lineterminator="\n").writerows(rows)
            self.file.flush()
            self.sizes.append(os.fstat(self.file.fileno()).st_size)


@contextmanager
def _destination(place: Path | None) -> Iterator[_Table]:
    """Standard output, or a part file beside `place` that replaces it once it is complete.

    Of a command that stops early, the part stays, with whole batches only; without any, it is
    deleted.
    """
    if place is None:
        with _utf8():
            yield _Table(sys.stdout)
        return
    what, part = f"--output {place}", part_of(place)
    with boundary(what, "name another file"):
        place.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("w", encoding="utf-8", newline="")
    table = _Table(file, place)
    try:
        yield table
        with boundary(what, "make room, or name another file"):
            os.fsync(file.fileno())
            file.close()
            os.replace(part, place)
    except BaseException:
        with suppress(OSError):
            file.close()
        with suppress(OSError):
            if len(table.sizes) > 1:
                os.truncate(part, table.sizes[-1])
                typer.echo(f"the rows so far are in {shown_name(part)}", err=True)
            else:
                part.unlink(missing_ok=True)
        raise


@contextmanager
def _utf8() -> Iterator[None]:
    """Standard output in UTF-8, as the file would be, unless a terminal shows it."""
    stream = sys.stdout
    if not isinstance(stream, TextIOWrapper) or stream.isatty():
        yield
        return
    before, errors = stream.encoding, stream.errors
    stream.reconfigure(encoding="utf-8", errors=errors)
    try:
        yield
    finally:
        with suppress(OSError):  # a reader who has gone
            stream.reconfigure(encoding=before, errors=errors)


def _write(
    table: _Table, model: "VITask", name: str, folder: Path, files: Sequence[Path], exemplar: bool
) -> int:
    """The header, and batch by batch a row for each image; returns how many were unreadable."""
    spec, texts = model.tasks[name].spec, model.tasks[name].candidates.texts
    side, done = model.recipe.source_size, Counter[str]()
    # on the face of everything that phantom data made
    mark = {"trained_on": "PHANTOM data"} if "vitask/data/phantom.py" in spec.source else {}
    size, unreadable = model.recipe.score_batch_size, 0
    own = ["file", *mark, "answer", "generated", "error"]
    table.write([[*own, *columns(texts, own)]])
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
        lines = ([shown_name(path), *rows[path]] for path in batch)
        table.write([[_encodable(cell) for cell in line] for line in lines])
    for text in notes(done):
        typer.echo(text, err=True)
    return unreadable


def _encodable(text: str) -> str:
    """What UTF-8 cannot hold, such as half of a surrogate pair, becomes an escape."""
    return text.encode(errors="backslashreplace").decode()
