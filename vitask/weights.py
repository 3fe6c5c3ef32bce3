"""Tensors from safetensors files: exactly those that are expected, or an error that names them."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from vitask.errors import Damaged, intact
from vitask.sealed import listed


def read_tensors(
    path: Path, remedy: str, expected: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The tensors of a file, on the CPU.

    expected: tensors of the same names, dtypes and shapes; None: any

    Damaged names the file and the tensors that are missing, unexpected or of another form.
    """
    with intact(path, remedy):
        found = load_file(path)
    if expected is not None:
        other = [
            f"{name} is {_form(found[name])}, expected {_form(expected[name])}"
            for name in expected
            if name in found and _form(found[name]) != _form(expected[name])
        ]
        missing = [name for name in expected if name not in found]
        problems = difference(missing, [name for name in found if name not in expected], other)
        if problems:
            raise Damaged(f"{path} does not fit the model: {problems}; {remedy}")
    return found


def difference(missing: list[str], unexpected: list[str], other: list[str]) -> str:
    """How tensors differ from those of a model; empty if they do not.

    other: texts, each of a tensor of another dtype or shape
    """
    parts = (
        (missing, "missing tensor(s)"),
        (unexpected, "unexpected tensor(s)"),
        (other, "tensor(s) of another form"),
    )
    return ", ".join(f"{len(names)} {what}: {listed(names)}" for names, what in parts if names)


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
