"""What the commands of the command line share: options, names, errors."""

import sys
import traceback
from collections.abc import Callable, Collection
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

ROOT = Path(__file__).resolve().parents[1]
FAILED, MISUSED = 1, 2  # exit codes

Roots = Annotated[
    list[Path] | None,
    typer.Option("--data-root", help="Folder with .npz files; may be given several times."),
]
Out = Annotated[Path, typer.Option("--out", help="Folder of all runs.")]
Unverified = Annotated[
    str, typer.Option(help="Official sets whose MD5 may differ, a,b,...; every row then says so.")
]


class UnknownName(ValueError):
    """A name on the command line that stands for nothing."""


def clean(command: Callable[..., None]) -> Callable[..., None]:
    """Errors that our own boundary raises come as one message, all others with their trace."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except UnknownName as error:
            stop(str(error), MISUSED)
        except (ValueError, FileNotFoundError) as error:
            if not is_our_error(error):
                raise
            stop(str(error), FAILED)
        except KeyboardInterrupt:
            stop("interrupted; the same command continues", FAILED)

    return wrapped


def data_folders(data_root: list[Path] | None) -> tuple[Path, ...]:
    """The data roots, all of which are there."""
    for root in data_root or ():
        if not root.is_dir():
            raise ValueError(f"--data-root {root} is no folder; expected one that holds .npz files")
    return tuple(data_root or ())


def split_names(text: str) -> tuple[str, ...]:
    """a, b and c of "a,b,c", each once."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def check_known(kind: str, name: str, known: Collection[str]) -> None:
    """UnknownName names the nearest of what there is."""
    if name not in known:
        near = get_close_matches(name, known) or list(known)
        raise UnknownName(f"no {kind} {name!r}; did you mean {' or '.join(near)}?")


def must_resolve(names: Callable[[], object]) -> None:
    """A dataset that does not exist is a misuse of the command line."""
    try:
        names()
    except ValueError as error:
        raise UnknownName(str(error)) from error


def is_our_error(error: BaseException) -> bool:
    """Raised by this project's own code as a boundary error, and so with a message that helps."""
    if not isinstance(error, ValueError | FileNotFoundError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    packages = [str(ROOT / name) for name in ("bench", "kernels", "vitask")]
    return bool(frames) and frames[-1].filename.startswith(tuple(packages))


def stop(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)
