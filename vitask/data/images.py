"""Image files of users -> uint8 arrays of one size. The only place that opens such files."""

import os
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vitask.errors import InputError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def read_image(
    path: Path, size: int, channels: int, *, square: bool = False
) -> UInt8[np.ndarray, "height width *colours"]:
    """uint8 (size, size), or (size, size, 3) for 3 channels, resized by bicubic interpolation.

    square: keep only the centre square; otherwise the whole image is stretched.
    Raises ValueError for every file that cannot be read, and for one of more pixels than
    `Image.MAX_IMAGE_PIXELS`, so a small file cannot fill the memory.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise InputError("there is no such file, or it is not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                pixels = _eight_bit(image).convert("RGB" if channels == 3 else "L")
        if square:
            side = min(pixels.size)
            left, top = (pixels.width - side) // 2, (pixels.height - side) // 2
            pixels = pixels.crop((left, top, left + side, top + side))
        return np.asarray(pixels.resize((size, size), Image.Resampling.BICUBIC), dtype=np.uint8)
    except Exception as error:  # on a damaged file Pillow's readers raise almost anything
        raise InputError(f"{path} is not a readable image ({error})") from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """Reduce 16 bits a pixel to 8; Pillow itself would cut the values off at 255."""
    if not image.mode.startswith(("I", "F")):
        # Pillow warns if a palette with transparency becomes RGB in one step
        return image.convert("RGBA") if "transparency" in image.info else image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise InputError(
            f"mode {image.mode} with values from {values.min()} to {values.max()}; "
            "expected 8 or 16 bits a pixel: convert it first"
        )
    return Image.fromarray((values / 257).round().astype(np.uint8))


def image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Sorted paths of all images, relative to the folder, and notes on skipped ones."""
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; expected a folder of images")
    skipped: list[str] = []
    walk = os.walk(folder, onerror=lambda error: skipped.append(str(error)))
    paths = (Path(place, name).relative_to(folder) for place, _, names in walk for name in names)
    found = [path for path in paths if path.name.lower().endswith(ENDINGS)]
    files = sorted(path for path in found if not any(p.startswith(".") for p in path.parts))
    if hidden := len(found) - len(files):
        skipped.append(f"{hidden} hidden image file(s)")
    if not files:
        raise InputError(f"no image in {folder}; expected files ending in {', '.join(ENDINGS)}")
    return files, skipped
