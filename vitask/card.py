"""A checkpoint's card, `vitask.json`: recipe, tasks, and a SHA-256 of every other file.

It is read and written here alone, without loading the model.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from vitask.calibration import Calibration
from vitask.data.spec import Dataset, DatasetSpec
from vitask.errors import InputError, intact
from vitask.files import PART, digests, told_apart
from vitask.prompts import Candidates, candidates
from vitask.recipes import Recipe
from vitask.sealed import Fields, check_files, listed, write_sealed

# In format 1 the recipe has fields for each source of data; formats 1 and 2 have no digests.
FORMAT = 3
CARD, NOTE = "vitask.json", "training.json"  # a run adds the note
ADAPTER, PROCESSOR = "adapter", "processor"  # folders
CONNECTOR, VISION = "connector.safetensors", "vision.safetensors"
TSM_FILES = ("tsm.json", "tsm.safetensors")
EARLIER = {  # the files of checkpoints that do not name them
    CARD, NOTE, CONNECTOR, VISION, *TSM_FILES,
    *(f"{ADAPTER}/{name}" for name in (
        "README.md", "adapter_config.json", "adapter_model.safetensors")),
    *(f"{PROCESSOR}/{name}" for name in (
        "added_tokens.json", "chat_template.jinja", "merges.txt", "preprocessor_config.json",
        "processor_config.json", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json")),
}  # fmt: skip
REMEDY = "copy the checkpoint again, or tune the model again"


@dataclass(frozen=True)
class Task:
    """A dataset that the model was tuned on: its description and its candidates.

    calibration: fitted on the val split, "without" and "with" exemplar; empty for an untuned model
    """

    spec: DatasetSpec
    candidates: Candidates
    calibration: Mapping[str, Calibration] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: Dataset) -> "Task":
        spec = dataset.spec
        return cls(spec, candidates(spec, dataset.splits["train"].labels))

    def card(self) -> dict[str, Any]:
        """For `vitask.json`."""
        calibration = {mode: asdict(found) for mode, found in self.calibration.items()}
        return {"spec": asdict(self.spec), **self.candidates.card(), "calibration": calibration}

    @classmethod
    def of_card(cls, card: Mapping[str, Any]) -> "Task":
        """The task that `card` was made of; ValueError for fields that do not fit."""
        spec = DatasetSpec.of_json(card["spec"])
        answers, members = card["answers"], card["members"]
        if not all(isinstance(text, str) for text in answers) or len(answers) != len(members):
            raise InputError(f"{len(members)} members for the answers {answers!r:.80}")
        for stated in members:
            if not all(type(i) is int and 0 <= i < len(spec.classes) for i in stated):
                raise InputError(f"members has {stated!r:.40}; expected numbers of classes")
        found = card.get("calibration", {})  # older checkpoints have none
        calibration = {mode: Calibration.of_json(values) for mode, values in found.items()}
        return cls(spec, Candidates.of_card(card, len(spec.classes)), calibration)


@dataclass(frozen=True)
class Card:
    """What a checkpoint's card holds.

    base:  file name -> SHA-256 of the base VLM's files, empty where they are not known
    files: relative name -> SHA-256 of the checkpoint's files; None in formats 1 and 2
    """

    recipe: Recipe
    tasks: dict[str, Task]
    base: dict[str, str]
    files: dict[str, str] | None

    def check(self, folder: Path) -> None:
        """Damaged names the files that are missing, cut, changed or exchanged."""
        if self.files is not None:
            check_files(folder, self.files, REMEDY)

    def has(self, folder: Path, name: str) -> bool:
        """Whether a file is part of the checkpoint."""
        return name in self.files if self.files is not None else (folder / name).is_file()


def write_card(
    folder: Path, recipe: Recipe, tasks: Mapping[str, Task], base: Mapping[str, str]
) -> None:
    """Write the card of a checkpoint whose other files are in the folder, and no others."""
    card = {
        "format": FORMAT,
        "recipe": asdict(recipe),
        "tasks": {name: task.card() for name, task in tasks.items()},
        "base": dict(base),
        "files": digests(folder),
    }
    write_sealed(folder / CARD, card)


def read_card(folder: Path) -> Card:
    """A checkpoint's card, of this format or an earlier one.

    InputError if there is no card, or one of a newer format; Damaged, which names the file and the
    field, for a card that was cut or changed.
    """
    path = folder / CARD
    if not path.is_file():
        raise InputError(_absent(folder))
    found = Fields(path, REMEDY)
    if found.of("format", int) not in range(1, FORMAT + 1):
        raise InputError(
            f"{path} has format {found.values['format']!r}; this version reads formats 1 to "
            f"{FORMAT}: update VITask to read a newer checkpoint, or tune the model again"
        )
    sealed = found.values["format"] >= 3
    if sealed:
        found.check_seal()
    with intact(f"{path}: recipe", REMEDY):
        recipe = Recipe.of_json(found.of("recipe", dict))
        _check_types(recipe)
    tasks = {}
    for name, task in found.of("tasks", dict).items():
        with intact(f"{path}: tasks.{name}", REMEDY):
            tasks[name] = Task.of_card(task)
    base = found.digests("base") if sealed else {}
    return Card(recipe, tasks, base, found.digests("files") if sealed else None)


def check_replaceable(folder: Path) -> None:
    """InputError for a place that a checkpoint may not take.

    It may take a new or empty folder, and one that holds nothing but an earlier checkpoint.
    """
    expected = "expected a new or empty folder, or a checkpoint, which is replaced"
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder} is a link or a file; {expected}")
    if not folder.is_dir():
        return
    names: set[str] = set()
    if (folder / CARD).is_file():
        files = read_card(folder).files
        names = EARLIER if files is None else {*files, CARD, NOTE}
    others = [path.relative_to(folder).as_posix() for path in told_apart(folder, names)[1]]
    if others:
        raise InputError(
            f"{folder} holds files that are not a checkpoint ({listed(others)}); {expected}"
        )


def _absent(folder: Path) -> str:
    """Says that the card is missing, and names one that a killed process left beside it."""
    text = (
        f"no checkpoint at {folder}; expected a folder with {CARD}, written by save_pretrained or "
        "`python -m bench run`"
    )
    parts = sorted(folder.parent.glob(f".{folder.name}.*{PART}/{CARD}"))
    if parts and not folder.exists():
        text += f"; {parts[0].parent} holds one that was about to be replaced: rename it"
    return text


def _check_types(recipe: Recipe) -> None:
    """InputError names a field whose value has another type."""
    for one in fields(recipe):
        value, kinds = getattr(recipe, one.name), get_args(one.type) or (one.type,)
        if one.name == "sources":
            continue
        kinds = (*kinds, int) if float in kinds else kinds
        if type(value) not in kinds or (type(value) is float and not math.isfinite(value)):
            raise InputError(f"{one.name} is {value!r:.40}; expected {one.type}")
