"""The files of a base VLM: found, and checked from their headers before anything large is built.

Only JSON and safetensors are read: nothing is unpickled, and no code of a checkpoint runs.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.utils import logging

from vitask.errors import InputError, boundary
from vitask.files import file_sha256
from vitask.memory import available
from vitask.pocket import POCKET
from vitask.sealed import listed
from vitask.weights import difference

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
READ = (  # what is fetched from the hub, and what a checkpoint's digests cover
    "*config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.*", "*.safetensors", INDEX,
)  # fmt: skip
FLOATS = {"F16", "BF16", "F32", "F64"}  # safetensors' names
REMEDY = "copy or download the checkpoint again"
GIB = 2**30


def find(name: str, *, download: bool = True) -> Path:
    """The folder of "pocket", of a folder's name, or of a hub name.

    download: False to take from the hub only what is small; weights that were downloaded before
        are there as well

    InputError if there is no such checkpoint.
    """
    if name == "pocket":
        return POCKET
    patterns = [one for one in READ if download or not one.endswith("safetensors")]
    try:
        if Path(name).exists():
            return Path(name)
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns="*/*"))
    except Exception as error:
        raise InputError(
            f"no vision language model at {name!r}; expected 'pocket', a folder with "
            "config.json and model.safetensors, or the hub name of a native InternVL "
            f"checkpoint that is downloaded or can be ({error})"
        ) from error


def files(folder: Path) -> list[Path]:
    """The files that decide what the VLM answers."""
    found = (path for path in folder.iterdir() if path.is_file())
    return sorted(path for path in found if any(fnmatch(path.name, one) for one in READ))


def digests(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of these files; a file that has not changed is read once."""
    found = {}
    for path in files(folder):
        with boundary(path, REMEDY):
            state = path.stat()
            found[path.name] = _digest(path, state.st_size, state.st_mtime_ns)
    return found


@cache
def _digest(path: Path, size: int, written: int) -> str:
    return file_sha256(path)


def check(
    folder: Path, dtype: torch.dtype, device: str | torch.device, *, partial: bool = False
) -> None:
    """InputError names the file, and what does not fit, unless this is a whole native InternVL.

    partial: whether the weights may be missing, because they were not downloaded

    Reads JSON files and the headers of the weights, and holds no weights.
    """
    config = _config(folder)
    if partial and not any(folder.glob("*.safetensors")):
        return
    shapes = _shapes(folder)
    with boundary(folder / CONFIG, REMEDY):
        for depth in _depths(config):
            if depth > len(shapes):
                raise InputError(
                    f"{folder / CONFIG} describes {depth} layers, but the weights hold "
                    f"{len(shapes)} tensors; {REMEDY}"
                )
        state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        with _silent():
            model, info = InternVLForConditionalGeneration.from_pretrained(
                None,
                config=InternVLConfig.from_pretrained(folder),
                state_dict=state,
                dtype=dtype,
                device_map="meta",
                ignore_mismatched_sizes=True,  # so that they are listed
                output_loading_info=True,
            )
    described = sum(parameter.numel() for parameter in model.parameters())
    held = sum(tensor.numel() for tensor in state.values())
    check_loaded(folder, info, f"{described:,} parameters described, {held:,} held")
    _check_memory(folder, described * dtype.itemsize, device)


def check_loaded(folder: Path, info: Mapping[str, Any], numbers: str = "") -> None:
    """InputError for what transformers reports: tensors missing, unexpected or of another shape."""
    other = [
        f"{name} is {list(found)}, expected {list(expected)}"
        for name, found, expected in sorted(info["mismatched_keys"])
    ]
    problems = difference(sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), other)
    problems = ", ".join(filter(None, [problems, *map(str, info["error_msgs"])]))
    if problems:
        names = " and ".join(path.name for path in _weight_files(folder)[:2])
        more = f" ({numbers})" if numbers else ""
        raise InputError(
            f"{folder}: {names} and {CONFIG} do not fit: {problems}{more}; a model with other "
            f"weights would give other answers: {REMEDY}"
        )


def check_values(folder: Path, model: torch.nn.Module) -> None:
    """InputError names weights that hold a value that is not a number, or infinite."""
    bad = [name for name, one in model.named_parameters() if not one.isfinite().all()]
    if bad:
        raise InputError(f"{folder}: not finite: {listed(bad)}; {REMEDY}")


def _config(folder: Path) -> dict[str, Any]:
    """config.json, of a native InternVL; every other text file is readable."""
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; expected the folder with {CONFIG} and {WEIGHTS}")
    for name, text in (
        ("vitask.json", "a tuned checkpoint: VITask.from_pretrained loads it"),
        ("adapter_config.json", "adapters: merge them into their base (merge_and_unload) first"),
    ):
        if (folder / name).is_file():
            raise InputError(f"{folder} holds {text}; expected a base VLM")
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} has no {CONFIG}; expected the folder of a native InternVL")
    found = {path.name: _object(path) for path in files(folder) if path.suffix == ".json"}
    for path in files(folder):
        if path.suffix in (".jinja", ".txt"):
            with boundary(path, REMEDY):
                path.read_text("utf-8")
    if not {"tokenizer.json", "vocab.json"} & set(found):
        raise InputError(f"{folder} has no tokenizer.json; {REMEDY}")
    config = found[CONFIG]
    kind = config.get("model_type")
    if kind == "internvl_chat":
        raise InputError(
            f"{folder / CONFIG} describes 'internvl_chat', InternVL's original layout, which runs "
            "code of its own; expected the native layout 'internvl': take the checkpoint whose "
            "name ends in -hf, such as OpenGVLab/InternVL3-1B-hf"
        )
    if kind != "internvl":
        raise InputError(
            f"{folder / CONFIG} has model_type {kind!r}; expected 'internvl', a native InternVL, "
            "such as OpenGVLab/InternVL3-1B-hf"
        )
    if config.get("quantization_config") is not None:
        raise InputError(
            f"{folder / CONFIG} has a quantization_config; expected weights that are not "
            "quantised: take the checkpoint in bfloat16"
        )
    return config


def _object(path: Path) -> dict[str, Any]:
    with boundary(path, REMEDY):
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise InputError(f"{path} holds {found!r:.40}; expected an object with fields")
    return found


def _depths(value: object) -> Iterator[int]:
    """Every number of layers in a configuration."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name.endswith("num_hidden_layers") and isinstance(inner, int):
                yield inner
            yield from _depths(inner)


def _weight_files(folder: Path) -> list[Path]:
    """One file, or those that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise InputError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}; expected safetensors, because other "
            f"files can run code: convert them, or {REMEDY}"
        )
    with boundary(folder / INDEX, REMEDY):
        names = sorted(set(_object(folder / INDEX)["weight_map"].values()))
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise InputError(f"{folder / INDEX} names {name}, which is missing; {REMEDY}")
    return [folder / name for name in names]


def _shapes(folder: Path) -> dict[str, list[int]]:
    """Tensor name -> shape, of all weights, from the headers."""
    shapes: dict[str, list[int]] = {}
    for path in _weight_files(folder):
        with boundary(path, REMEDY), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is not a mapping)
                part = file.get_slice(name)
                if name in shapes or part.get_dtype() not in FLOATS:
                    raise InputError(
                        f"{path}: {name} is there twice, or {part.get_dtype()}; expected one "
                        f"tensor of {', '.join(sorted(FLOATS))}; {REMEDY}"
                    )
                shapes[name] = part.get_shape()
    return shapes


def _check_memory(folder: Path, needed: int, device: str | torch.device) -> None:
    """InputError if the weights do not fit; on the way to a GPU they pass through the memory."""
    for place in dict.fromkeys(("cpu", torch.device(device).type)):
        free = available(place if place == "cpu" else device)
        if free is not None and needed > free:
            raise InputError(
                f"{folder} needs {needed / GIB:.1f} GiB of memory ({place}), {free / GIB:.1f} GiB "
                "are available; set precision=bfloat16, take a smaller VLM, or free memory"
            )


@contextmanager
def _silent() -> Iterator[None]:
    """Without transformers' report and bar: what is wrong becomes an error."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    if bar:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
