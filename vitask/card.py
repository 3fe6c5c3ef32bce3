"""A checkpoint's card, read without loading the model."""

import json
from pathlib import Path

from vitask.data.spec import DatasetSpec
from vitask.errors import InputError
from vitask.recipes import Recipe


def read_card(checkpoint: Path) -> tuple[Recipe, dict[str, DatasetSpec]]:
    """A checkpoint's recipe and the specs of its datasets."""
    card = checkpoint / "vitask.json"
    if not card.is_file():
        raise InputError(f"no checkpoint at {checkpoint}; expected a folder with vitask.json")
    try:
        fields = json.loads(card.read_text(encoding="utf-8"))
        specs = {name: DatasetSpec.of_json(task["spec"]) for name, task in fields["tasks"].items()}
        return Recipe.of_json(fields["recipe"]), specs
    except InputError as error:  # it says what to do
        raise InputError(f"{card}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"{card} is damaged or of another version ({error!r}): copy or train it again"
        raise InputError(text) from error
