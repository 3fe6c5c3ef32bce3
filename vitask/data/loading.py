"""The datasets of every source in one form: their names, descriptions and images.

medmnist   the 12 2D sets of MedMNIST, and custom sets in its key layout with a JSON card
phantom    a procedural stand-in for the same 12, which tests the pipeline, not science
"""

from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from vitask.data import card, medmnist, phantom
from vitask.data.spec import Dataset, DatasetSpec
from vitask.errors import InputError
from vitask.names import canonical

SOURCES = ("medmnist", "phantom")

Sizes = tuple[int, int, int]  # images in train, val, test


def names(source: str = "medmnist", roots: Sequence[Path] = ()) -> tuple[str, ...]:
    """The 12 official names; for "medmnist" also the sets in the roots that have a card.

    ValueError for a card whose name cannot be used; it says why.
    """
    _check_source(source)
    if source == "medmnist" and (wrong := card.faults(roots)):
        raise InputError("; ".join(wrong))
    return _known(source, roots)


def _known(source: str, roots: Sequence[Path]) -> tuple[str, ...]:
    custom = card.names(roots) if source == "medmnist" else ()
    return (*medmnist.NAMES, *(name for name in custom if name not in medmnist.NAMES))


def specs(source: str = "medmnist", roots: Sequence[Path] = ()) -> dict[str, DatasetSpec]:
    """Descriptions by name, without reading an image."""
    return {name: spec(name, source=source, roots=roots) for name in names(source, roots)}


def spec(name: str, *, source: str = "medmnist", roots: Sequence[Path] = ()) -> DatasetSpec:
    """The description of one dataset.

    For an unknown name, a ValueError names the nearest, or the rule that the name breaks.
    """
    _check_source(source)
    if name in medmnist.NAMES:
        return phantom.spec(name) if source == "phantom" else medmnist.spec(name)
    if source == "medmnist" and card.begun(name, roots):
        return card.read_card(card.find(name, roots))
    raise _unknown(name, _known(source, roots), roots)


def load(
    name: str,
    *,
    source: str,
    roots: Sequence[Path] = (),
    size: int = 28,
    allow_unverified: Collection[str] = (),
    phantom_sizes: Sizes | Mapping[str, Sizes] | None = None,
) -> Dataset:
    """One dataset with all its images, after every check.

    source:           "medmnist" (official sets, and custom ones with a card) | "phantom"
    roots:            folders that hold the files, searched in order
    size:             side of the source images in pixels
    allow_unverified: names of official sets whose MD5 may differ (then `md5_ok` is False)
    phantom_sizes:    images in train, val and test, for all sets or by name

    A ValueError names the file, what was expected, what was found and what to do.
    """
    _check_source(source)
    for allowed in allow_unverified:
        if allowed not in medmnist.NAMES:
            raise _unknown(allowed, medmnist.NAMES, ())
    custom = source == "medmnist" and card.begun(name, roots)
    if name not in medmnist.NAMES and not custom:
        raise _unknown(name, _known(source, roots), roots)
    if source == "phantom":
        if size != phantom.SIZE:
            raise InputError(
                f"phantom images have {phantom.SIZE} pixels, not {size}; use a recipe with "
                f"source_size={phantom.SIZE}, or real data"
            )
        if isinstance(phantom_sizes, Mapping):
            phantom_sizes = phantom_sizes.get(name)
        return phantom.make(name, phantom_sizes or phantom.SIZES)
    if name in medmnist.NAMES:
        return medmnist.load(name, roots, size=size, allow_unverified=allow_unverified)
    return card.load(name, roots, size=size)


def _check_source(source: str) -> None:
    if source not in SOURCES:
        near = get_close_matches(source, SOURCES) or list(SOURCES)
        raise InputError(f"no data source {source!r}; did you mean {' or '.join(near)}?")


def _unknown(name: str, known: Sequence[str], roots: Sequence[Path]) -> InputError:
    if not card.NAME.fullmatch(name):
        return InputError(f"no dataset {name!r}: {card.RULE}")
    same = [one for one in known if canonical(one) == canonical(name)]
    near = same or get_close_matches(name, known) or list(known)
    searched = f" (cards looked for in {', '.join(map(str, roots))})" if roots else ""
    text = f"no dataset {name!r}{searched}; did you mean {' or '.join(near)}?"
    return InputError(" Not usable: ".join([text, *card.faults(roots)]))


def present(source: str, roots: Sequence[Path], size: int) -> tuple[str, ...]:
    """The datasets in the roots, or all phantoms; ValueError if there are none.

    Cards whose names cannot be used are left out: `card.faults` names them.
    """
    if source == "phantom":
        return names(source)
    official = [
        name
        for name in medmnist.NAMES
        if any((root / medmnist.file_name(name, size)).is_file() for root in roots)
    ]
    found = tuple(dict.fromkeys([*official, *card.names(roots)]))
    if not found:
        looked = ", ".join(map(str, roots)) or "no folder: give --data-root"
        raise InputError(f"no dataset of {size} pixels found; looked in {looked}")
    return found
