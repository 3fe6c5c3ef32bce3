"""Names: when two are the same, and which are refused.

The name of a class is also an answer that a model writes. So two names are the same if `canonical`
gives the same text for both. Where a dataset is described, equal and misleading names are refused;
where a written answer is read, it is compared in this form. No other file compares names.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from vitask.errors import InputError

SEPARATOR = "; "  # between the names of an instruction, and of an answer with several labels
NO_FINDING = "no finding"  # the multi-label answer when no label is present
# Characters that are not drawn and are not in Unicode's category of format characters: fillers
# and variation selectors.
_NOT_DRAWN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    "\U000e0000-\U000e0fff]"
)
_PERIODS = ".\u3002\uff0e\uff61"  # also ideographic, full-width and half-width
_NOT_IN_A_LINE = {"Cc": "a control character", "Zl": "a line end", "Zp": "a line end"}


@lru_cache(maxsize=4096)
def canonical(text: str) -> str:
    """The form in which names are compared; canonical(canonical(text)) == canonical(text).

    Composed (NFC) and case-folded. Runs of white space are one blank. Invisible characters (zero
    width, soft hyphen, marks of direction), blanks at both ends and final periods, also those of
    East Asian texts, are left out.
    """
    while (simpler := _simpler(text)) != text:
        text = simpler
    return text


def _simpler(text: str) -> str:
    if not text.isascii():
        drawn = _NOT_DRAWN.sub("", text)
        drawn = "".join(c for c in drawn if unicodedata.category(c) != "Cf")
        text = unicodedata.normalize("NFD", drawn)
    folded = text.casefold()
    if not folded.isascii():
        folded = unicodedata.normalize("NFC", folded)
    return " ".join(folded.split()).rstrip(f"{_PERIODS} ")


@lru_cache(maxsize=256)
def numbers(names: tuple[str, ...]) -> dict[str, int]:
    """Canonical form -> number of the name in the list. Not to be changed: it is kept."""
    return {canonical(name): number for number, name in enumerate(names)}


# Where a dataset is described


def check_answers(
    where: str,
    classes: Sequence[str],
    answers: Sequence[tuple[str, int]],
    *,
    multi_label: bool,
) -> None:
    """InputError for names that a written answer could not tell apart, and for reserved names.

    where:   what the message starts with
    answers: finer answers, each with its label; empty if the classes are the answers

    Blanks at the ends of a name are kept as given. They do not count when names are compared.
    """
    texts = [text for text, _ in answers]
    for text in (*classes, *texts):
        _check_text(f"{where}: class name {text!r}", text)
    _check_different(where, classes)
    _check_different(where, texts)
    if multi_label:
        _check_reserved(where, classes)
    if not answers:
        return
    if multi_label:
        raise InputError(
            f"{where}: has finer answers and several labels an image; expected one of the two"
        )
    known = numbers(tuple(classes))
    for text, label in answers:
        if label not in range(len(classes)):
            raise InputError(
                f"{where}: answer {text!r} has the label {label!r}; expected a number from 0 to "
                f"{len(classes) - 1}, of the class that it belongs to"
            )
        if known.get(canonical(text), label) != label:
            other = classes[known[canonical(text)]]
            raise InputError(
                f"{where}: answer {text!r} has the label of class {classes[label]!r}, and is the "
                f"name of class {other!r}; rename one of them, or correct the label"
            )
    if missing := set(range(len(classes))) - {label for _, label in answers}:
        named = ", ".join(repr(classes[label]) for label in sorted(missing))
        raise InputError(f"{where}: no answer has the label of class {named}; add one")


def check_line(what: str, text: object) -> None:
    """InputError unless `text` is one line that can be written as UTF-8; `what` names it."""
    if not isinstance(text, str):
        raise InputError(f"{what} is {text!r}; expected a text")
    check_writable(what, text)
    for character in text:
        if kind := _NOT_IN_A_LINE.get(unicodedata.category(character)):
            raise InputError(
                f"{what} has {kind}, U+{ord(character):04X}; expected one line of text: write a "
                "blank in its place"
            )


def check_writable(what: str, text: str) -> None:
    """InputError for half of a surrogate pair, which no file can hold; `what` names the text."""
    if lost := re.search("[\ud800-\udfff]", text):
        raise InputError(
            f"{what} has U+{ord(lost[0]):04X}, half of a surrogate pair, which cannot be written "
            "as UTF-8; write the whole character"
        )


def _check_text(what: str, text: object) -> None:
    check_line(what, text)
    form = canonical(str(text))
    if not form:
        raise InputError(
            f"{what} is empty, as blanks, invisible characters and final periods do not count; "
            "expected a name that can be read"
        )
    if SEPARATOR.strip() in form:
        raise InputError(
            f"{what} has a semicolon; expected a text without a semicolon, which separates the "
            "names in an instruction: write a comma in its place"
        )


def _check_different(where: str, names: Sequence[str]) -> None:
    known: dict[str, str] = {}
    for name in names:
        if (form := canonical(name)) in known:
            raise InputError(
                f"{where}: class names {known[form]!r} and {name!r} are the same: case, Unicode "
                "form, blanks, invisible characters and final periods do not count, because they "
                "do not in a written answer; expected two or more different names: rename one"
            )
        known[form] = name


def _check_reserved(where: str, classes: Sequence[str]) -> None:
    for name in classes:
        if canonical(name) == canonical(NO_FINDING):
            raise InputError(
                f"{where}: class name {name!r} is the answer {NO_FINDING!r}, which says that an "
                "image has none of the labels; leave the class out, and give such images no label"
            )
