"""Recipes from outside: `field=value` texts, and TOML files that start from a named recipe.

    base = "pocket"
    lora_rank = 4
    learning_rate = 1e-3
    train_limit = "none"

    [sources.phantom]
    seeds = [0, 1, 2]

TOML has no null, so "none" means None. The base gives the fields that a file leaves out. Every
error is a ValueError of one line that names the field, and the file if it is in one.
"""

import math
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from vitask.errors import InputError
from vitask.recipes import RECIPES, Recipe, Source, Study
from vitask.recipes import recipe as base_recipe

NONE = "none"  # None, in texts and in TOML
FIELDS: dict[str, Any] = {
    field.name: field.type for field in fields(Recipe) if field.name not in ("name", "sources")
}
EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


def parse(texts: Sequence[str]) -> dict[str, Any]:
    """`field=value` texts -> values of the fields' types, in the order given.

    int, float, str, bool ("true", "false"), and `int | None` ("none"). ValueError for a text
    without "=", a field that is unknown, refused or given twice, and a value of another type.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (piece.strip() for piece in text.partition("="))
        if not equals:
            raise InputError(f"{text!r} is not a setting; expected field=value")
        if name == "name":
            raise InputError("name cannot be set: a recipe file gives a recipe its name")
        if name == "sources":
            raise InputError(
                "sources cannot be set: choose with --datasets and --seeds, or in a recipe file"
            )
        if name not in FIELDS:
            raise _unknown(name, FIELDS)
        if name in settings:
            raise InputError(f"{name} is given twice; expected one value")
        settings[name] = _of_text(name, value, FIELDS[name])
    return settings


def apply(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with these fields changed.

    ValueError for an unknown field, a value of another type, and one that `Recipe` refuses.
    """
    return replace(recipe, **_values("", settings, FIELDS))


def read(path: str | Path) -> tuple[Recipe, dict[str, Any]]:
    """A TOML file -> its recipe, named after the file, and the fields that differ from the base.

    `sources` is in the recipe only: the fields can be applied again to the size of a study.
    ValueError for a file that is missing or malformed, for a base that is missing or unknown, for
    unknown keys, and for values that have the wrong type or that `Recipe` refuses.
    """
    path = Path(path)
    try:
        return _read(path)
    except RecursionError as error:
        raise InputError(f"{path}: malformed TOML (nested too deeply)") from error


def _read(path: Path) -> tuple[Recipe, dict[str, Any]]:
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected a file") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise InputError(f"{path}: malformed TOML ({error})") from error
    try:
        if not isinstance(given.get("base"), str):
            raise InputError(f"base is missing; expected one of {', '.join(RECIPES)}, as a text")
        base = base_recipe(given.pop("base"))
        settings = _values("", {k: v for k, v in given.items() if k != "sources"}, FIELDS)
        sources = _sources(given.get("sources", {}), base.sources)
        recipe = replace(base, name=path.stem, sources=sources, **settings)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    return recipe, {n: value for n, value in settings.items() if value != getattr(base, n)}


def to_toml(recipe: Recipe) -> str:
    """The recipe as a TOML file to start from: every field with its value.

    The base is the named recipe, or "pocket" for a recipe of another name. A field that is None
    is a comment, or "none" where the base has a value. `read` gives an equal recipe but for its
    name.
    """
    base = RECIPES.get(recipe.name, RECIPES["pocket"])
    lines = [f"base = {_toml(base.name)}", *_lines(recipe, base, FIELDS)]
    for name, source in recipe.sources.items():
        other = base.sources[name]
        lines += ["", f"[sources.{name}]"]
        lines += _lines(source, other, ("datasets", "seeds", "samples"))
        lines += ["", f"[sources.{name}.study]"]
        lines += _lines(source.study, other.study, [field.name for field in fields(Study)])
    return "\n".join(lines) + "\n"


# Reading


def _of_text(name: str, text: str, kind: Any) -> Any:
    """A text as a value of a field's type."""
    if NoneType in get_args(kind):
        if text.lower() == NONE:
            return None
        return _of_text(name, text, get_args(kind)[0])
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise _wrong(name, text, kind)
    try:
        return _checked(name, kind(text), kind)
    except ValueError:
        raise _wrong(name, text, FIELDS[name]) from None


def _checked(name: str, value: Any, field: Any) -> Any:
    """A value as one of a field's type: TOML's lists become tuples, "none" None."""
    optional = NoneType in get_args(field)
    if optional and value in (NONE, None):
        return None
    kind = get_args(field)[0] if optional else field
    if get_origin(kind) is tuple:
        arguments = get_args(kind)
        many = arguments[-1] is ...
        if not isinstance(value, list | tuple) or not (many or len(value) == len(arguments)):
            raise _wrong(name, value, field)
        if many and not value:
            raise InputError(f"{name} is empty; expected one or more")
        return tuple(_checked(f"{name}[{i}]", v, arguments[0]) for i, v in enumerate(value))
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind is not float and type(value) is kind:  # True is an int for isinstance
        return value
    raise _wrong(name, value, field)


def _values(where: str, table: Mapping[str, Any], types: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a TOML table at `where`, each of its type."""
    for name in table:
        if name not in types:
            if where + name == "name":
                raise InputError("name cannot be set: a recipe has the name of its file")
            raise _unknown(where + name, [where + known for known in types])
    return {name: _checked(where + name, v, types[name]) for name, v in table.items()}


def _sources(given: Any, base: Mapping[str, Source]) -> dict[str, Source]:
    """The tables [sources.NAME] and [sources.NAME.study] over those of the base."""
    types = {cls: {field.name: field.type for field in fields(cls)} for cls in (Source, Study)}
    found = dict(base)
    for name, content in _table("sources", given).items():
        where = f"sources.{name}"
        if name not in base:
            raise _unknown(where, [f"sources.{known}" for known in base])
        table = dict(_table(where, content))
        study = _table(f"{where}.study", table.pop("study", {}))
        values = _values(f"{where}.", table, types[Source])
        sizes = _values(f"{where}.study.", study, types[Study])
        found[name] = replace(base[name], **values, study=replace(base[name].study, **sizes))
    return found


def _table(where: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise InputError(f"{where} is {given!r}; expected a table [{where}]")
    return given


def _unknown(name: str, known: Collection[str]) -> InputError:
    near = get_close_matches(name, known) or list(known)
    return InputError(f"a recipe has no field {name!r}; did you mean {' or '.join(near)}?")


def _wrong(name: str, value: object, kind: Any) -> InputError:
    return InputError(f"{name} is {value!r}; expected {_described(kind)}")


def _described(kind: Any) -> str:
    arguments = get_args(kind)
    if NoneType in arguments:
        return f"{_described(arguments[0])} or {NONE}"
    if get_origin(kind) is tuple:
        each = EXPECTED[arguments[0]].split()[-1]
        return f"a list of {each}s" if arguments[-1] is ... else f"{len(arguments)} {each}s"
    return EXPECTED[kind]


# Writing


def _lines(values: Any, base: Any, names: Collection[str]) -> list[str]:
    """A line a field."""
    lines = []
    for name in names:
        value = getattr(values, name)
        left_out = value is None and getattr(base, name) is None
        lines.append(f"# {name} = {_toml(NONE)}" if left_out else f"{name} = {_toml(value)}")
    return lines


def _toml(value: object) -> str:
    """A value in TOML."""
    if value is None:
        return _toml(NONE)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        escaped = (f"\\u{ord(c):04x}" if c in '"\\\x7f' or c < " " else c for c in value)
        return f'"{"".join(escaped)}"'
    return repr(value)
