"""The suites. A new one is one file: a module with the names below, and a line in SUITES.

METHODS     name -> what it is; the rows of its table
REFERENCE   the method that differences and p-values are taken against, or None
PUBLISHED   file in leaderboards/published shown beside it, or None
PUBLISHED_NOTE
            what the published numbers are and why they differ, shown above them
units(recipe) -> float
            one seed's work in arbitrary units, for the time left; `run` advances as many
run(context, seed, wanted) -> Iterator[Outcome]
            yields every wanted method as soon as it is scored

Modules are imported when they are needed: the command line lists them without torch.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from bench.progress import Progress
    from vitask.data.spec import Dataset
    from vitask.recipes import Recipe
    from vitask.score import Prediction

SUITES = {"main": "bench.suites.main"}


@dataclass(frozen=True)
class Outcome:
    """One method scored on the test parts of all datasets.

    extras: what is worth keeping of the way there (validation curves, losses), JSON-able
    """

    method: str
    predictions: "list[Prediction]"
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """What a suite works with. `cache` keeps what all seeds share, for the suite's own use."""

    recipe: "Recipe"
    datasets: "dict[str, Dataset]"
    folder: Path
    key: str  # content key of the recipe, the data and the code: equal keys, equal results
    device: str
    progress: "Progress"
    cache: dict[str, Any] = field(default_factory=dict)


class Suite(Protocol):
    """A module of this package, as the docstring above describes it."""

    METHODS: dict[str, str]
    REFERENCE: str | None
    PUBLISHED: str | None
    PUBLISHED_NOTE: str

    @staticmethod
    def units(recipe: "Recipe") -> float: ...

    @staticmethod
    def run(context: Context, seed: int, wanted: Collection[str]) -> Iterator[Outcome]: ...


def suite(name: str) -> Suite:
    """The suite's module; ValueError names the nearest."""
    if name not in SUITES:
        near = get_close_matches(name, SUITES) or list(SUITES)
        raise ValueError(f"no suite {name!r}; did you mean {' or '.join(near)}?")
    return cast(Suite, import_module(SUITES[name]))
