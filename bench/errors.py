"""Which errors are told in one line, and which show where they were raised."""

from pathlib import Path

from vitask.errors import InputError, reason

ROOT = Path(__file__).resolve().parents[1]


def of_the_machine(error: BaseException) -> bool:
    """Whether the system refused: no space, no permission, a name too long, a broken device.

    A file that is missing or in the way, without its name, is a fault of this project. A closed
    pipe (`| head`) is not an error: typer ends the command quietly.
    """
    if not isinstance(error, OSError) or isinstance(error, BrokenPipeError):
        return False
    named = bool(error.filename) or not isinstance(error, FileNotFoundError | FileExistsError)
    return bool(error.errno and error.strerror and named)


def told(error: BaseException) -> str | None:
    """The line that tells the user what happened; None for a fault of this project."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and of_the_machine(error):
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return f"out of memory ({reason(error)}); lower the recipe's batch sizes or use --limit"
    return None
