"""A timm model at a size: how it is built, what it gives, and why it is refused.

All of this is found by trying, before anything is trained: a copy of the model is built on
PyTorch's meta device, where tensors have a shape but no numbers, and zero images go through it.
This takes no memory, draws no random number, and leaves the model that is used untouched.
"""

import warnings
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from math import isqrt
from typing import Any, Literal, TypeVar

import timm
import torch
from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from vitask.errors import InputError, boundary, reason

FEATURES = ("cls", "all")
CLASSES = 7  # of a trial: no default of timm's, so a model that ignores the number is found out
# A model may need a size that is a multiple of one of these: its patch, window or stride.
STEPS = (1, 2, 4, 7, 8, 14, 16, 32, 64, 128, 256)
T = TypeVar("T")


@dataclass(frozen=True)
class Grid:
    """How a model lays out its last feature map.

    order:  tokens (n, prefix + tokens, features), channels_first (n, features, h, w), or
            channels_last (n, h, w, features)
    prefix: number of tokens before those of the grid, such as class tokens and registers
    width:  number of features
    """

    order: Literal["tokens", "channels_first", "channels_last"]
    prefix: int
    width: int

    def tokens(self, maps: Tensor) -> Float[Tensor, "images tokens features"]:
        """The map's tokens, row by row, without prefix tokens."""
        if self.order == "tokens":
            return maps[:, self.prefix :]
        return (
            maps.flatten(2).transpose(1, 2)
            if self.order == "channels_first"
            else maps.flatten(1, 2)
        )


@dataclass(frozen=True)
class Found:
    """What a trial of a model at a size found out.

    arguments: what timm.create_model needs, beside the name and the number of classes
    width:     of the classifier's input, the feature `cls`
    grid:      how the last feature map is laid out, or, as text, why there are no features `all`
    """

    name: str
    size: int
    arguments: dict[str, Any]
    width: int
    grid: Grid | str

    def layout(self) -> Grid:
        """How the last feature map is laid out; InputError where it is not one grid of tokens."""
        if isinstance(self.grid, str):
            raise InputError(
                f"timm's model {self.name!r} has no features 'all' at {self.size} pixels: "
                f"{self.grid}; use features 'cls' (variant 'cls'), or another model (tsm)"
            )
        return self.grid


def check(name: str, size: int, kind: str = "cls", *, pretrained: bool = False) -> Found:
    """What a model gives at a size, or an InputError that says why it cannot be used.

    name:       timm's, with or without a tag
    size:       side of the images in pixels
    kind:       the features that are wanted: cls | all
    pretrained: whether weights are wanted; this asks timm's list and not the network
    """
    check_kind(kind)
    check_name(name, pretrained=pretrained)
    found = tried(name, size)
    if kind == "all":
        found.layout()
    return found


def check_kind(kind: str) -> None:
    """InputError unless it is a kind of features."""
    if kind not in FEATURES:
        raise InputError(f"features {kind!r}; expected one of {', '.join(FEATURES)}")


def check_name(name: str, *, pretrained: bool = False) -> None:
    """InputError unless timm has the model and its tag, and, if wanted, weights for it."""
    if ":" in name or "/" in name:
        raise InputError(
            f"{name!r} is an address; expected a name of timm.list_models(), such as "
            "'resnet18' or 'resnet18.a1_in1k': timm finds the weights on the hub by itself"
        )
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=4)
        asked = f"; did you mean {' or '.join(near)}?" if near else "; see timm.list_models()"
        raise InputError(f"timm has no model {name!r}{asked}")
    base, _, tag = name.partition(".")
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise InputError(f"timm's {base!r} has no tag {tag!r}; {_tags(base)}") from error
    if pretrained and not (config is not None and config.has_weights):
        raise InputError(
            f"timm has no pretrained weights for {name!r}; {_tags(base)}; or train from random "
            "weights (tsm_pretrained=false)"
        )


def _tags(base: str) -> str:
    known = timm.list_pretrained(f"{base}.*")
    return f"expected {' or '.join(known)}" if known else f"timm knows no weights of {base!r}"


def build(found: Found, classes: int, *, pretrained: bool = False) -> nn.Module:
    """timm's model with `classes` outputs, on the CPU; InputError where weights do not load."""
    if not pretrained:
        return timm.create_model(found.name, num_classes=classes, **found.arguments)
    remedy = (
        "timm loads them from the Hugging Face hub or from its cache: connect to the network once, "
        "or train from random weights (tsm_pretrained=false)"
    )
    with boundary(f"the pretrained weights of timm's model {found.name!r}", remedy):
        return timm.create_model(
            found.name, pretrained=True, num_classes=classes, **found.arguments
        )


def colours(backbone: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, red, green and blue, that the model expects; timm's default."""
    config = backbone.pretrained_cfg
    mean, std = config.get("mean"), config.get("std")
    return mean or IMAGENET_DEFAULT_MEAN, std or IMAGENET_DEFAULT_STD


@lru_cache(maxsize=256)
def tried(name: str, size: int) -> Found:
    """A trial of a model at a size, with one image and a training step's forward of two.

    An InputError names what failed, and sizes that work.
    """
    try:
        return _trial(name, size)
    except Exception as error:
        why = reason(error).rstrip(". ")
        raise InputError(
            f"timm's model {name!r} cannot take images of {size} pixels ({why}); "
            f"{_advice(name, size)}"
        ) from error


@lru_cache(maxsize=256)
def check_alone(name: str, size: int) -> None:
    """InputError unless the model can be trained with one image at a time.

    Batch norm cannot where it sees one value per channel, as in most CNNs at 32 pixels.
    """
    arguments = tried(name, size).arguments
    try:
        _on_meta(lambda device: _logits_in_training(_model(name, arguments, device), size, 1))
    except Exception as error:
        raise InputError(
            f"timm's model {name!r} cannot be trained with one image at a time at {size} pixels "
            f"({reason(error)}); use batches of 2 images or more (tsm_batch_size)"
        ) from error


def _trial(name: str, size: int) -> Found:
    # Models with a fixed grid (ViT, hybrids) need the size; the others take any. For those that
    # timm describes otherwise, the second way is tried as well.
    ways: list[dict[str, Any]] = [{}, {"img_size": size}]
    first, second = reversed(ways) if _fixed(name) else ways
    try:
        return _on_meta(lambda device: _found(name, size, first, device))
    except Exception:
        try:
            return _on_meta(lambda device: _found(name, size, second, device))
        except Exception:  # the first error says more
            pass
        raise


def _on_meta(work: Callable[[str], T]) -> T:
    """What `work` returns on the meta device; on the CPU where PyTorch cannot do it there."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            return work("meta")
        except Exception as error:
            if "meta" not in str(error).lower():
                raise
        return work("cpu")


def _model(name: str, arguments: dict[str, Any], device: str) -> nn.Module:
    with torch.device(device):
        model = timm.create_model(name, num_classes=CLASSES, **arguments)
    if device == "meta" and any(isinstance(part, nn.RNNBase) for part in model.modules()):
        raise NotImplementedError("on meta, PyTorch takes minutes for recurrent layers")
    return model


def _found(name: str, size: int, arguments: dict[str, Any], device: str) -> Found:
    model = _model(name, arguments, device).eval()
    for values in colours(model):
        if len(values) != 3:
            raise InputError(f"it takes {len(values)} colours; expected 3")
    maps = model.forward_features(torch.zeros(1, 3, size, size, device=device))
    width = _row("feature", model.forward_head(maps, pre_logits=True), 1)
    found = Found(name, size, arguments, width, _grid(model, maps))
    for logits in (model.forward_head(maps), _logits_in_training(model, size, 2)):
        if (outputs := _row("output", logits, len(logits))) != CLASSES:
            raise InputError(f"it has {outputs} outputs, whatever the number of classes")
    return found


def _logits_in_training(model: nn.Module, size: int, images: int) -> Any:
    device = next(model.parameters()).device
    return model.train()(torch.zeros(images, 3, size, size, device=device))


def _row(what: str, value: Any, images: int) -> int:
    """The width of a tensor (images, width)."""
    if not isinstance(value, Tensor) or value.ndim != 2 or len(value) != images:
        raise InputError(f"its {what} is {_shape(value)}; expected ({images}, width)")
    return value.shape[1]


def _grid(model: nn.Module, maps: Any) -> Grid | str:
    """The layout of the maps of one image (1, ...), or why they are not one grid of tokens."""
    if not isinstance(maps, Tensor):
        return f"it gives {_shape(maps)}, expected one map"
    if maps.ndim == 4:
        first, middle, last = maps.shape[1:]
        # Images are square, so the grid is. If all three are equal, timm's models say which.
        said_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        if middle == last and not (first == middle and said_last):
            return Grid("channels_first", 0, first)
        if first == middle:
            return Grid("channels_last", 0, last)
    if maps.ndim == 3:
        _, tokens, width = maps.shape
        for prefix in _prefixes(model):
            if tokens == prefix:
                return f"it gives class tokens only, {_shape(maps)}"
            if isqrt(tokens - prefix) ** 2 == tokens - prefix:
                return Grid("tokens", prefix, width)
    return f"its features are {_shape(maps)}, not a square grid"


def _prefixes(model: nn.Module) -> tuple[int, ...]:
    """How many tokens may stand before the grid, the likeliest first."""
    said = getattr(model, "num_prefix_tokens", None)
    if said is not None:
        return (said,)
    token = getattr(model, "cls_token", None)
    return (token.shape[1], 0) if isinstance(token, Tensor) and token.ndim == 3 else (0,)


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, list | tuple):
        return f"a list of {len(value)} ({', '.join(_shape(one) for one in value)})"
    return f"a {type(value).__name__}"


def _advice(name: str, size: int) -> str:
    """Which sizes work instead, as an instruction."""
    step, sizes = _on_meta(lambda device: _sizes(name, size, device))
    if not sizes:
        return "no size that was tried works; use another model (tsm)"
    which = " or ".join(map(str, sizes))
    if step is None:
        what = f"images of {which} pixels"
    elif step == 1:
        what = f"images of {which} pixels or more"
    else:
        what = f"a multiple of {step} pixels, such as {which}"
    return f"use {what} (tsm_image_size), or another model (tsm)"


def _sizes(name: str, size: int, device: str) -> tuple[int | None, list[int]]:
    """The distance of sizes that work, where one was found, and the next smaller and larger one."""
    fixed, plain = _fixed(name), _model(name, {}, device)

    def works(size: int) -> bool:
        try:
            model = (_model(name, {"img_size": size}, device) if fixed else plain).eval()
            maps = model.forward_features(torch.zeros(1, 3, size, size, device=device))
            return model.forward_head(maps).shape == (1, CLASSES)
        except Exception:
            return False

    above = next((one for one in _candidates(name, size) if works(one)), None)
    if above is None:
        return None, []
    # Three steps as well: where sizes are rounded, 33 pixels can do as well as 32, and not 35.
    steps = (one for one in STEPS if above % one == 0 and works(above + one))
    step = next((one for one in steps if works(above + 3 * one)), None)
    if step is None or above < size:
        return None, [above]
    # Whatever fails by being too small works from some size on.
    between = range(size - size % step + step, above + 1, step)
    above = between[bisect_left(between, True, key=works)] if len(between) > 1 else above
    below = size - size % step
    return step, [below, above] if below > 0 and works(below) else [above]


def _candidates(name: str, size: int) -> list[int]:
    """Sizes to try: larger multiples of 32, and the sizes that the model was made for."""
    config = timm.get_pretrained_cfg(name)
    made_for = [config.input_size, config.min_input_size] if config is not None else []
    known = sorted({shape[-1] for shape in made_for if shape})
    end = min((one for one in known if one > size), default=size + 512)
    return [*range(size - size % 32 + 32, end, 32), *(one for one in known if one >= end), *known]


def _fixed(name: str) -> bool:
    config = timm.get_pretrained_cfg(name)
    return config is not None and config.fixed_input_size
