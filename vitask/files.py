"""Files that are whole or absent, and what may be deleted: only what we made."""

import ctypes
import hashlib
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from tempfile import mkdtemp

from vitask.errors import InputError, reason

PART = ".vitask-part"  # ends the names of what is being written, and of nothing else
MADE = ("run.json", "vitask.json")  # a folder with one of them is a run or a checkpoint
HERE, EXCHANGE = -100, 2  # of renameat2: paths as they are; exchange the two


def write_text(path: Path, text: str) -> None:
    """Atomic, UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Atomic: written beside the file, then moved onto it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path)
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def part_of(path: Path) -> Path:
    """Where a file or folder is written before it is whole."""
    return path.with_name(f".{path.name}{PART}")


def part_folder(parent: Path | None, name: str) -> Path:
    """A new, empty folder for parts, in the system's temporary folder by default."""
    return Path(mkdtemp(dir=parent, prefix=f".{name}.", suffix=PART))


def shown_name(path: Path) -> str:
    """A file's name as text, the same in every locale; bytes that are not UTF-8 as escapes."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def check_destination(path: Path, option: str) -> Path:
    """Where a file will be written (a link stays a link); InputError if that cannot be done.

    A file that is in a run or a checkpoint already is not replaced. To be sure, the part is
    created and deleted; one that an earlier command left is not touched.

    option: how the user named it, such as "--output"
    """
    try:
        place = path.resolve()
        if place.is_symlink():
            raise OSError(0, "the link leads back to itself")
        if place.exists() and not (place.is_file() and os.access(place, os.W_OK)):
            raise OSError(0, "what is there is not a file that you may replace")
        if place.exists() and (owner := _owner(place)):
            raise OSError(0, f"it is a file of the run or checkpoint {owner}")
        folder = place.parent
        while not folder.exists():
            folder = folder.parent
        if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise OSError(0, f"{folder} is not a folder that you may write to")
        _try_out(folder / part_of(place).name)
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself; a NUL in the name
        why = (isinstance(error, OSError) and error.strerror) or reason(error)
        raise InputError(f"{option} {path} cannot be written: {why}; name another file") from error
    return place


def _owner(place: Path) -> Path | None:
    """The run or checkpoint that a file is in."""
    made = ((folder, folder / name) for folder in place.parents for name in MADE)
    return next((folder for folder, file in made if file.is_file()), None)


def _try_out(part: Path) -> None:
    """Create an empty file and delete it; OSError if that cannot be done."""
    try:
        part.open("xb").close()
    except FileExistsError:
        if not (part.is_file() and os.access(part, os.W_OK)):
            raise
    else:
        part.unlink()


def sweep(folder: Path) -> None:
    """Delete the parts that a killed process left in a folder, not below it."""
    if folder.is_dir() and not folder.is_symlink():
        for path in folder.glob(f".*{PART}"):
            remove(path)


def remove(path: Path) -> None:
    """Delete a file or a folder; of a link, the link alone."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def linked(path: Path, top: Path) -> bool:
    """Whether `path`, or a folder between it and `top`, is a link: what it shows is elsewhere."""
    below = [path, *path.parents]
    return any(one.is_symlink() for one in below[: below.index(top)])


def put_folder(new: Path, place: Path) -> None:
    """Move a whole folder to `place`; the folder that is there is deleted afterwards.

    On Linux the two are exchanged in one step, so a kill at any moment leaves a whole folder at
    `place`. A file system that cannot do this has the older one beside it for a moment, as a part.
    """
    older = new
    if not place.exists():
        os.replace(new, place)
    elif not _exchanged(new, place):
        older = part_folder(place.parent, place.name)
        os.replace(place, older)
        try:
            os.replace(new, place)
        except OSError:
            os.replace(older, place)
            raise
    remove(older)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two paths change their names, where the system can."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return rename(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0


def told_apart(folder: Path, names: Collection[str]) -> tuple[list[Path], list[Path]]:
    """What a folder holds: (files of these names, everything else); links are not followed.

    names: relative, as "adapter/README.md". A folder that holds such files only is given whole.
    """
    ours, others = [], []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            start = f"{path.name}/"
            below = {name.removeprefix(start) for name in names if name.startswith(start)}
            inner = told_apart(path, below) if below else ([], [path])
            ours += inner[0] if inner[1] else [path]
            others += inner[1]
        else:
            (ours if path.name in names else others).append(path)
    return ours, others


def digests(folder: Path) -> dict[str, str]:
    """Relative name -> SHA-256 of every file in a folder and below it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
