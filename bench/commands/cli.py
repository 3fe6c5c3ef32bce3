"""Options, checks of names, and error handling for all commands."""

import os
import sys
from collections.abc import Callable, Collection
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from bench.errors import told
from vitask.errors import InputError

FAILED, MISUSED = 1, 2  # exit codes

Roots = Annotated[
    list[Path] | None,
    typer.Option("--data-root", help="Folder with .npz files; may be given several times."),
]
Datasets = Annotated[str, typer.Option(help="a,b,...; default: the recipe's.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of all runs.")]
Unverified = Annotated[
    str, typer.Option(help="Official sets whose MD5 may differ, a,b,...; every row is marked.")
]


class UnknownName(InputError):
    """An unknown name on the command line."""


def clean(command: Callable[..., None]) -> Callable[..., None]:
    """Print our errors as one line, all others with their traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except UnknownName as error:
            stop(str(error), MISUSED)
        except KeyboardInterrupt:
            stop("interrupted; the same command continues", FAILED)
        except Exception as error:
            if (text := told(error)) is None:
                raise
            stop(text, FAILED)

    return wrapped


def data_folders(data_root: list[Path] | None) -> tuple[Path, ...]:
    """The data roots; each must exist."""
    for root in data_root or ():
        if not os.path.isdir(root):  # False without access, too
            raise InputError(f"--data-root {root} is not a folder; expected one with .npz files")
    return tuple(data_root or ())


def split_names(text: str, known: Collection[str] = ()) -> tuple[str, ...]:
    """The names in "a,b,c", each once; a known name may have commas, the longest counts."""
    words, found = text.split(","), []
    names = {name.strip(): name for name in known}
    while words:
        joined = (",".join(words[:count]).strip() for count in range(len(words), 1, -1))
        name = next((one for one in joined if one in names), words[0].strip())
        words = words[name.count(",") + 1 :]
        found.append(names.get(name, name))
    return tuple(dict.fromkeys(filter(None, found)))


def check_known(kind: str, name: str, known: Collection[str]) -> None:
    """Raise UnknownName with the nearest known name."""
    if name not in known:
        near = get_close_matches(name, known) or list(known)
        raise UnknownName(f"no {kind} {name!r}; did you mean {' or '.join(near)}?")


def must_resolve(names: Callable[[], object]) -> None:
    """Turn an error about an unknown dataset into UnknownName."""
    try:
        names()
    except ValueError as error:
        raise UnknownName(str(error)) from error


def stop(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)
