"""Arrays of images from Python: what a model would misread is refused, with the remedy."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vitask.checkpoint import Task, VITask
from vitask.data import load
from vitask.data.images import check_images, read_image, resize_images, unmistakable
from vitask.errors import InputError
from vitask.features import Features
from vitask.recipes import POCKET, vanilla
from vitask.tsm import TSM, heads
from vitask.vlm import VLM

GREY, COLOUR = "octmnist", "dermamnist"
SIDE = POCKET.source_size


@pytest.fixture(scope="module")
def tasks():
    return {name: Task.of(load(name, source="phantom")) for name in (GREY, COLOUR)}


@pytest.fixture(scope="module")
def model(tasks):
    return VITask(VLM.load("pocket"), vanilla(POCKET), tasks)


@pytest.fixture(scope="module")
def tsm(tasks):
    return TSM("test_resnet", heads([task.spec for task in tasks.values()]), 32).eval()


@pytest.fixture
def entries(model, tsm, tasks):
    """Every place where arrays of images enter."""
    return {
        "check_images": check_images,
        "VLM.pixel_values": model.vlm.pixel_values,
        "VLM.image_features": model.vlm.image_features,
        "VLM.vision_features": model.vlm.vision_features,
        "TSM.pixels": tsm.pixels,
        "TSM.features": tsm.features,
        "TSM.log_probabilities": lambda images: tsm.log_probabilities(images, tasks[COLOUR].spec),
        "VITask.image_tokens": model.image_tokens,
        "VITask.predict, grey": lambda images: model.predict(GREY, images),
        "VITask.predict, colour": lambda images: model.predict(COLOUR, images),
    }


def zeros(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


GOOD = [
    zeros(1, SIDE, SIDE),
    zeros(2, SIDE, SIDE),
    zeros(1, SIDE, SIDE, 3),
    zeros(3, SIDE, SIDE, 3),
]
WRONG = {
    "float": (zeros(2, SIDE, SIDE, dtype=np.float32), r"(images * 255).round().astype(np.uint8)"),
    "double": (zeros(1, SIDE, SIDE, 3, dtype=float), "float64"),
    "half": (zeros(1, SIDE, SIDE, 3, dtype=np.float16), "float16"),
    "int64": (zeros(2, SIDE, SIDE, dtype=np.int64), "int64"),
    "int8": (zeros(2, SIDE, SIDE, dtype=np.int8), "int8"),
    "uint16": (zeros(2, SIDE, SIDE, dtype=np.uint16), "images / 257"),
    "bool": (zeros(2, SIDE, SIDE, dtype=bool), "images.astype(np.uint8) * 255"),
    "objects": (np.array([zeros(2, 2), zeros(3, 3)], dtype=object), "several sizes"),
    "one grey": (zeros(SIDE, SIDE), "images[None]"),
    "one colour": (zeros(SIDE, SIDE, 3), "images[None]"),
    "one RGBA": (zeros(SIDE, SIDE, 4), "images[None]"),
    "one, channel last": (zeros(SIDE, SIDE, 1), "images[None]"),
    "one, channels first": (zeros(3, SIDE, SIDE), "three grey ones"),
    "RGBA": (zeros(2, SIDE, SIDE, 4), "on white"),
    "LA": (zeros(2, SIDE, SIDE, 2), "(2, 28, 28, 2)"),
    "channel last": (zeros(2, SIDE, SIDE, 1), "images[..., 0]"),
    "channels first": (zeros(2, 3, SIDE, SIDE), "images.transpose(0, 2, 3, 1)"),
    "channel first": (zeros(2, 1, SIDE, SIDE), "images.transpose(0, 2, 3, 1)"),
    "RGBA first": (zeros(2, 4, SIDE, SIDE), "images.transpose(0, 2, 3, 1)"),
    "volumes": (zeros(2, 5, SIDE, SIDE, 3), "(2, 5, 28, 28, 3)"),
    "wide": (zeros(2, SIDE, 2 * SIDE), "resize_images"),
    "high": (zeros(2, 2 * SIDE, SIDE, 3), "resize_images"),
    "none": (zeros(0, SIDE, SIDE), "no pixel"),
    "no pixels": (zeros(2, 0, 0, 3), "no pixel"),
    "nothing": (zeros(), "()"),
    "masked": (np.ma.masked_array(zeros(2, SIDE, SIDE), True), "np.stack"),
    "tensor": (torch.zeros(2, SIDE, SIDE, dtype=torch.uint8), "torch.Tensor"),
    "pictures": ([Image.new("L", (SIDE, SIDE))] * 2, "builtins.list"),
    "picture": (Image.new("L", (SIDE, SIDE)), "PIL.Image.Image"),
    "bytes": (bytes(SIDE * SIDE), "builtins.bytes"),
    "missing": (None, "NoneType"),
}


def test_good_arrays_pass_everywhere(entries):
    for entry in entries.values():
        for images in GOOD:
            assert len(entry(images)) == len(images)


@pytest.mark.parametrize("case", WRONG)
def test_other_arrays_are_refused_with_the_remedy_everywhere(entries, case, unchecked):
    images, remedy = WRONG[case]
    if case == "one, channels first":  # there they are three grey images
        del entries["VITask.image_tokens"]
    for entry in entries.values():
        with pytest.raises(InputError, match=re.escape(remedy)) as caught:
            entry(images)
        assert "expected uint8 of shape (n, height, width)" in str(caught.value)
        if isinstance(images, np.ndarray) and case != "masked":
            assert f"dtype {images.dtype} and shape {images.shape}" in str(caught.value)


@pytest.mark.parametrize("side", [1, 27, 32, 224])
def test_predict_refuses_another_side_than_the_recipes(model, side):
    images = zeros(2, side, side, 3)
    with pytest.raises(
        InputError, match=r"of 28 x 28 pixels: resize_images\(images, 28, channels=3\)"
    ):
        model.predict(COLOUR, images)
    assert model.predict(COLOUR, resize_images(images, SIDE)).shape[0] == 2


@pytest.mark.parametrize("name", [GREY, COLOUR])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("count", [1, 2])
def test_answers_to_files_equal_those_to_arrays_of_the_same_images(
    model, tasks, tmp_path, name, mode, count
):
    rng, channels = np.random.default_rng(0), tasks[name].spec.n_channels
    shape = (count, 40, 30, 3) if mode == "RGB" else (count, 40, 30)
    arrays = rng.integers(0, 256, shape, dtype=np.uint8)
    files = [tmp_path / f"{number}.png" for number in range(count)]
    for path, pixels in zip(files, arrays, strict=True):
        Image.fromarray(pixels).save(path)
    read = np.stack([read_image(path, SIDE, channels) for path in files])
    expected = model.predict(name, read)
    with pytest.raises(InputError, match="resize_images") as caught:
        model.predict(name, arrays)
    assert f"resize_images(images, {SIDE}, channels={channels})" in str(caught.value)
    same = resize_images(arrays, SIDE, channels=channels)
    np.testing.assert_array_equal(model.predict(name, same), expected)
    small = resize_images(arrays, SIDE, channels=3)
    again = [tmp_path / f"small{number}.png" for number in range(count)]
    for path, pixels in zip(again, small, strict=True):
        Image.fromarray(pixels).save(path)
    read = np.stack([read_image(path, SIDE, channels) for path in again])
    np.testing.assert_array_equal(model.predict(name, small), model.predict(name, read))


def test_three_grey_images_of_a_dataset_are_three_images(tiny_datasets, model, tsm, tasks):
    three = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8)
    colour = unmistakable(three)
    np.testing.assert_array_equal(colour, np.repeat(three[..., None], 3, axis=-1))
    assert unmistakable(colour) is colour
    spec = tasks[GREY].spec
    for images in (three, colour):  # the description says that they are grey
        np.testing.assert_array_equal(
            tsm.log_probabilities(images, spec), tsm.log_probabilities(colour, spec)
        )
    grey = tiny_datasets["five"]
    few = {
        "five": type(grey)(
            grey.spec, {"test": grey.splits["test"].take([0, 1, 2])}, 28, "", "", True
        )
    }
    assert Features(few, model.vlm.image_features)("five", "test").shape[0] == 3


@given(st.lists(st.integers(0, 5), max_size=5), st.sampled_from(["u1", "i4", "f4", "?"]))
def test_what_passes_is_a_batch_of_square_images(shape, dtype):
    images = np.zeros(shape, dtype)
    try:
        found = check_images(images)
    except InputError:
        return
    assert found is images
    assert images.dtype == np.uint8
    assert images.size > 0
    assert images.ndim == 3 or (images.ndim == 4 and images.shape[-1] == 3)
    assert images.shape[1] == images.shape[2]


def test_resizing_names_what_it_cannot_do():
    assert resize_images(zeros(2, 5, 9), 4, square=True).shape == (2, 4, 4)
    for size, channels in ((0, None), (4, 2), (-1, 3)):
        with pytest.raises(InputError, match=f"size {size}, channels {channels}; expected"):
            resize_images(zeros(2, 5, 9), size, channels=channels)
    with pytest.raises(InputError, match="single grey image"):
        resize_images(zeros(5, 5), 4)


def test_the_counts_of_the_reader_are_those_of_the_images(tmp_path):
    done = Counter()
    for number in range(3):
        path = tmp_path / f"{number}.png"
        Image.new("RGBA", (4, 4)).save(path)
        read_image(path, 4, 1, done=done)
    assert list(done.values()) == [3]
