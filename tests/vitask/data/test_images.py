"""Users' image files: every mode becomes 8 bits, and what cannot be read is a ValueError."""

import os
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from vitask.data.images import read_image


def saved(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


def test_sixteen_bit_images_are_scaled_and_not_cut_off(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    plain = saved(tmp_path / "plain.png", (ramp / 257).round().astype(np.uint8))
    for options in ({}, {"transparency": 0}):
        deep = saved(tmp_path / "deep.png", ramp, **options)
        np.testing.assert_array_equal(read_image(deep, 28, 1), read_image(plain, 28, 1))
    real = saved(tmp_path / "real.tiff", np.full((4, 4), 0.5, dtype=np.float32))
    with pytest.raises(ValueError, match=r"real\.tiff.*expected 8 or 16 bits"):
        read_image(real, 28, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_grey_or_colour(tmp_path, mode, channels):
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    Image.new("RGB", (40, 20), (255, 255, 255)).convert(mode).save(path)
    image = read_image(path, 28, channels)
    assert image.shape == ((28, 28, 3) if channels == 3 else (28, 28))
    assert (image == 255).all()


def test_transparency_changes_no_colour(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    palette = Image.fromarray(pixels).quantize(16)
    palette.save(tmp_path / "opaque.png")
    palette.save(tmp_path / "clear.png", transparency=bytes(range(16)))
    for channels in (1, 3):
        opaque, clear = (
            read_image(tmp_path / f"{n}.png", 28, channels) for n in ("opaque", "clear")
        )
        np.testing.assert_array_equal(opaque, clear)


def test_square_keeps_the_centre_and_the_default_everything(tmp_path):
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:, 10:50] = 200
    path = saved(tmp_path / "wide.png", pixels)
    assert (read_image(path, 28, 3, square=True) == 200).all()
    assert (read_image(path, 28, 3)[:, 0] == 0).all()


def test_too_many_pixels_are_an_error_and_no_warning(tmp_path, monkeypatch):
    path = saved(tmp_path / "large.png", np.zeros((30, 30), dtype=np.uint8))
    for most in (800, 400):  # Pillow warns above its limit and raises above twice of it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(ValueError, match=r"large\.png is not a readable image .*900 pixels"):
            read_image(path, 28, 1)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="not a regular file"):
        read_image(tmp_path / "pipe.png", 28, 1)


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "tiff", "webp"])
def test_no_damage_raises_anything_but_a_value_error(tmp_path, ending):
    rng = np.random.default_rng(0)
    whole = saved(
        tmp_path / f"whole.{ending}", rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
    ).read_bytes()
    path = tmp_path / f"damaged.{ending}"
    for _ in range(60):
        damaged = np.frombuffer(whole, dtype=np.uint8).copy()
        damaged[rng.integers(0, min(100, len(whole)), 4)] = rng.integers(0, 256, 4)
        path.write_bytes(damaged.tobytes()[: rng.integers(0, len(whole) + 1)])
        with suppress(ValueError):
            assert read_image(path, 28, 3).shape == (28, 28, 3)
