"""Errors with a message for the user, and boundaries where a library's error becomes one."""

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST = 300  # characters of a library's message that are shown


class InputError(ValueError):
    """Says what was given, what was expected and what to do; shown as one line, without a trace."""


class Damaged(InputError):
    """A file that we wrote is cut, changed, exchanged or missing; the message names it."""


class Diverged(InputError, FloatingPointError):
    """A loss is not a finite number."""


@contextmanager
def boundary(what: object, remedy: str) -> Iterator[None]:
    """Any error inside becomes an InputError: `what` cannot be used (why); `remedy`.

    For calls into libraries that read a user's files, weights or options: on a damaged file they
    raise almost anything.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} cannot be used ({reason(error)}); {remedy}") from error


@contextmanager
def intact(what: object, remedy: str) -> Iterator[None]:
    """Any error inside, ours too, becomes `Damaged`: `what` is damaged (why); `remedy`.

    For reading what this package wrote.
    """
    try:
        yield
    except Damaged:
        raise
    except Exception as error:
        raise Damaged(f"{what} is damaged ({reason(error)}); {remedy}") from error


def reason(error: BaseException) -> str:
    """An error's message in one line, not too long; its class if it has none."""
    text = " ".join(str(error).split())
    text = f"{text[:LONGEST]}..." if len(text) > LONGEST else text
    return text if text and not isinstance(error, KeyError) else f"{type(error).__name__} {text}"
