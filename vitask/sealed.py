"""JSON files that hold their own SHA-256, and the SHA-256 of the files beside them.

So a file that is cut, changed, exchanged or missing is found and named.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitask.errors import Damaged, intact
from vitask.files import file_sha256, write_text

SEAL = "sha256"  # the field with the digest of all other fields
KINDS = {str: "a text", int: "an integer", float: "a number", dict: "an object", list: "a list"}
SHOWN = 3  # names in a message


def write_sealed(path: Path, fields: Mapping[str, Any]) -> None:
    """Write the fields as JSON, and their digest."""
    known = json.loads(json.dumps(fields))
    write_text(path, json.dumps(known | {SEAL: _digest(known)}, indent=1) + "\n")


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


class Fields:
    """A JSON file's fields; each is checked as it is read. Damaged names the file and the field.

    remedy: what the user can do if the file is damaged
    """

    def __init__(self, path: Path, remedy: str) -> None:
        self.path, self.remedy = path, remedy
        with intact(path, remedy):
            found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise self.damaged(f"it holds {found!r:.40}; expected an object with fields")
        self.values: dict[str, Any] = found

    def damaged(self, why: str) -> Damaged:
        return Damaged(f"{self.path} is damaged ({why}); {self.remedy}")

    def of(self, name: str, kind: type) -> Any:
        """The field's value; one of KINDS."""
        if name not in self.values:
            raise self.damaged(f"it lacks the field {name!r}")
        value = self.values[name]
        allowed = (int, float) if kind is float else (kind,)
        if type(value) not in allowed:  # True is an int for isinstance
            raise self.damaged(f"{name} is {value!r:.40}; expected {KINDS[kind]}")
        return value

    def digests(self, name: str) -> dict[str, str]:
        """The field's value: file name -> SHA-256."""
        found = self.of(name, dict)
        for file, digest in found.items():
            if not isinstance(digest, str):
                raise self.damaged(f"{name}: {file} has {digest!r:.40}; expected a SHA-256")
        return found

    def check_seal(self) -> None:
        """Damaged if a field was changed, added or removed."""
        content = {name: value for name, value in self.values.items() if name != SEAL}
        if self.of(SEAL, str) != _digest(content):
            raise self.damaged("its content does not match its SHA-256")


def check_files(folder: Path, files: Mapping[str, str], remedy: str) -> None:
    """Damaged names the files that are missing or do not have their SHA-256."""
    found = []
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
            continue
        with intact(path, remedy):
            same = file_sha256(path) == digest
        if not same:
            found.append(f"{path} is not the file that was saved: cut, changed or exchanged")
    if found:
        raise Damaged(f"{listed(found)}; {remedy}")


def listed(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
