"""Which errors are told in one line, and which show where they were raised."""

import errno
from pathlib import Path

from vitask.errors import InputError, reason

ROOT = Path(__file__).resolve().parents[1]
# Of the machine, not of the code: no space, no permission, too many files, a broken device.
OF_THE_MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE,
    errno.EIO, errno.ENOMEM, errno.ESTALE,
}  # fmt: skip


def told(error: BaseException) -> str | None:
    """The line that tells the user what happened; None for a fault of this project."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}; what is complete was kept, the same command goes on"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return f"out of memory ({reason(error)}); lower the recipe's batch sizes or use --limit"
    return None
