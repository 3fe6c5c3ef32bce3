"""Users' images -> uint8 arrays: one reader for files, one check for arrays from Python.

`read_image` gives a file's picture as a viewer shows it: upright, on white, in sRGB, 8 bits a
channel. Where a file does not say how its values look, it is refused. `check_images` refuses
arrays that a model would misread.
"""

import os
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageCms, ImageOps

from vitask.errors import InputError, reason
from vitask.files import shown_name

# Pillow's formats of still images that it decodes itself. The content decides, not the ending.
FORMATS = {
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "AVIF": (".avif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
# Nothing in these files says for sure what they are: read only under their own ending.
UNMARKED = {"DIB": (".dib",), "PCX": (".pcx",), "SGI": (".sgi",), "TGA": (".tga",)}
ENDINGS = tuple(ending for some in (FORMATS | UNMARKED).values() for ending in some)

COPIES = {  # folders that systems and viewers fill with copies, beside all hidden ones
    "__macosx", "@eadir", "@__thumb", "#recycle", "@recycle", "$recycle.bin", "lost+found",
    "system volume information", "thumbs", "thumbnails",
}  # fmt: skip

# What the reader did to an image, as it is said to the user.
TURNED = "turned as their EXIF says"
ON_WHITE = "transparent parts are shown on white, as in a viewer"
FIRST = "only the first of several pages or frames is read"
IN_SRGB = "colours are converted from the file's profile to sRGB"
NO_PROFILE = "the colour profile does not fit the pixels and is not used"
NO_EXIF = "the EXIF cannot be read, so the image is not turned"
REDUCED = "16 bits a channel are reduced to 8"

SIXTEEN = 65535
ORIENTATION, INVERTED, PREVIEW, OLD_PREVIEW, SIGN = 274, 262, 254, 255, 339  # tags of TIFF
PREVIEW_OR_MASK = 0b101  # bits of the tag PREVIEW


# Files


def read_image(
    path: Path, size: int, channels: int, *, square: bool = False, done: Counter[str] | None = None
) -> UInt8[np.ndarray, "height width *colours"]:
    """uint8 (size, size), or (size, size, 3) for 3 channels, resized by bicubic interpolation.

    square: keep only the centre square; otherwise the whole image is stretched
    done:   counts what was done to the image, for `notes`

    The picture is turned as its EXIF says and shown on white where it is transparent. 16 bits a
    channel are reduced to 8, colours converted to sRGB. Of several pages or frames the first is
    read; previews and masks in a TIFF are passed over.

    InputError for a file that cannot be read, for values without a defined look (real numbers,
    negative ones, more than 16 bits), and for more pixels than `Image.MAX_IMAGE_PIXELS`, so a
    small file cannot fill the memory.
    """
    seen: set[str] = set()
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise InputError("there is no such file, or it is not a regular file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_formats(path.suffix.lower())) as image:
                picture = _shown(image, seen).convert("RGB" if channels == 3 else "L")
        pixels = np.asarray(_resized(picture, size, square), dtype=np.uint8)
    except Exception as error:  # on a damaged file Pillow's readers raise almost anything
        what = f"{shown_name(path)} is not a readable image"
        raise InputError(f"{what} ({reason(error)})") from error
    if done is not None:
        done.update(seen)
    return pixels


def notes(done: Mapping[str, int]) -> tuple[str, ...]:
    """What `read_image` did, a line for each kind: "12 image(s): turned as their EXIF says"."""
    return tuple(f"{count} image(s): {what}" for what, count in sorted(done.items()))


def image_files(folder: Path) -> tuple[list[Path], list[str]]:
    """Sorted paths of all images, relative to the folder, and notes on skipped files.

    Endings count in upper and lower case. Hidden files and copies that systems and viewers make
    are skipped. InputError for a folder without an image.
    """
    if not folder.is_dir():
        raise InputError(f"no folder {folder}; expected a folder of images")
    files, skipped = list[Path](), list[str]()
    hidden, links, copies, others = 0, 0, Counter[str](), Counter[str]()
    for place, inner, found in os.walk(folder, onerror=lambda error: skipped.append(str(error))):
        links += sum(Path(place, name).is_symlink() for name in inner)
        for path in (Path(place, name).relative_to(folder) for name in found):
            copied = [part for part in path.parts[:-1] if part.casefold() in COPIES]
            concealed = any(part.startswith(".") for part in path.parts)
            if path.suffix.lower() not in ENDINGS:
                others[path.suffix.lower()] += not (copied or concealed)
            elif concealed:
                hidden += 1
            elif copied:
                copies[copied[0]] += 1
            else:
                files.append(path)
    if hidden:
        skipped.append(f"{hidden} hidden image file(s)")
    skipped += [f"{count} image file(s) in {name}, a folder of copies" for name, count in
                sorted(copies.items())]  # fmt: skip
    if links:
        skipped.append(f"{links} link(s) to folders")
    for ending, count in sorted((+others).items()):
        which = f"ending in {ending}" if ending else "without an ending"
        skipped.append(f"{count} file(s) {which}, which are not read as images")
    if not files:
        but = f"; there are {'; '.join(skipped)}" if skipped else ""
        raise InputError(
            f"no image in {folder}; expected files ending in {', '.join(ENDINGS)}{but}"
        )
    return sorted(files), skipped


@cache
def _formats(ending: str) -> tuple[str, ...]:
    """The formats to try; older releases of Pillow lack some."""
    Image.init()
    unmarked = [name for name, endings in UNMARKED.items() if ending in endings]
    return tuple(name for name in (*FORMATS, *unmarked) if name in Image.OPEN)


def _resized(picture: Image.Image, size: int, square: bool) -> Image.Image:
    if square:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    return picture.resize((size, size), Image.Resampling.BICUBIC)


# One file's picture as it is shown


def _shown(image: Image.Image, seen: set[str]) -> Image.Image:
    """The picture in mode L or RGB; what was done goes into `seen`."""
    tiff = image.format == "TIFF"
    if getattr(image, "is_animated", False):
        seen.add(FIRST)
    if tiff:
        _skip_previews(image)
        turn = image.tag_v2.get(ORIENTATION, 1)
    raw = _raw_mode(image)
    image.load()
    if not tiff:
        turn = _orientation(image, seen)
    if ";16" in raw or image.mode.startswith("I"):
        seen.add(REDUCED)
    picture, opacity = _eight_bit(image, raw)
    if image.info.get("icc_profile") and image.mode != "LAB":
        picture = _in_srgb(picture, image.info["icc_profile"], seen)
    if picture.mode == "CMYK":
        picture = picture.convert("RGB")
    if opacity is not None and opacity.getextrema()[0] < 255:
        seen.add(ON_WHITE)
        paper = Image.new(picture.mode, picture.size, "white")
        paper.paste(picture, mask=opacity)
        picture = paper
    if turn in range(2, 9):
        seen.add(TURNED)
        if not tiff:  # Pillow turns a TIFF while it loads it
            picture.info = {}  # no other EXIF that Pillow would have to write again
            picture.getexif()[ORIENTATION] = turn
            picture = ImageOps.exif_transpose(picture)
    return picture


def _skip_previews(image: Image.Image) -> None:
    """Go to the first page of a TIFF that is neither a reduced preview nor a mask."""
    page = 0
    while image.tag_v2.get(PREVIEW, 0) & PREVIEW_OR_MASK or image.tag_v2.get(OLD_PREVIEW, 1) == 2:
        page += 1
        try:
            image.seek(page)
        except EOFError as error:
            raise InputError(
                "every page is marked as a preview or a mask; export the full image"
            ) from error


def _raw_mode(image: Image.Image) -> str:
    """How the file stores a pixel, in Pillow's words, such as "L;4" or "RGB;16B"."""
    arguments = image.tile[0][3] if image.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _orientation(image: Image.Image, seen: set[str]) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # viewers show such images as they are stored
        seen.add(NO_EXIF)
        return 1


def _eight_bit(image: Image.Image, raw: str) -> tuple[Image.Image, Image.Image | None]:
    """The picture in mode L, RGB or CMYK, and its opacity in mode L (None: opaque)."""
    mode, key = image.mode, image.info.get("transparency")  # of one grey or colour, where it is one
    one = isinstance(key, int)
    if mode == "F" or (mode == "L" and image.format == "TIFF" and 2 in _sign(image)):
        what = "real numbers (mode F)" if mode == "F" else "signed values of 8 bits"
        raise InputError(f"{what}; expected 8 or 16 bits a pixel, unsigned: convert it first")
    if mode.startswith("I"):
        values = _sixteen_bit(image)
        top = 4095 if raw.startswith("I;12") else SIXTEEN
        levels = np.rint(np.arange(SIXTEEN + 1) * (255 / top)).clip(0, 255).astype(np.uint8)
        if image.format == "TIFF" and image.tag_v2.get(INVERTED) == 0:  # Pillow inverts 8 bits only
            levels[: top + 1] = levels[top::-1]
        opacity = _opacity(values != (key & SIXTEEN)) if one else None
        return Image.fromarray(levels[values]), opacity
    if mode in ("1", "L"):
        grey = image.convert("L")
        scale = {"1": 255, "L;2": 85, "L;4": 17}.get(raw, 1)  # the key is in the file's bits
        if not one:
            return grey, None
        return grey, _opacity(np.asarray(grey) != (key & (255 // scale)) * scale)
    if mode == "RGB" and isinstance(key, tuple):
        if ";16" in raw:  # Pillow has dropped the bits that the key is compared with
            raise InputError("one transparent colour of 16 bits; save it with an alpha channel")
        different = np.asarray(image) != np.array([part & 255 for part in key], dtype=np.uint8)
        return image, _opacity(different.any(-1))
    if mode == "P" or mode.endswith(("A", "a")):
        whole = (image.convert("LA") if mode == "La" else image).convert("RGBA")
        return whole.convert("RGB"), whole.getchannel("A")
    return (image if mode == "CMYK" else image.convert("RGB")), None


def _sixteen_bit(image: Image.Image) -> np.ndarray:
    """Values from 0 to 65535. Mode I holds 32 bits: there only what is surely 16 bits is taken."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    sure = image.format != "TIFF" or high > 255
    if image.mode == "I" and not (low >= 0 and high <= SIXTEEN and sure):
        raise InputError(
            f"32 bits a pixel (mode I) with values from {low} to {high}; expected 8 or 16 bits a "
            "pixel: convert it first"
        )
    return values


def _sign(image: Image.Image) -> tuple[int, ...]:
    """SampleFormat of a TIFF: 1 unsigned, 2 signed, 3 real."""
    found = image.tag_v2.get(SIGN, 1)
    return found if isinstance(found, tuple) else (found,)


def _opacity(opaque: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(opaque, np.uint8(255), np.uint8(0)))


def _in_srgb(picture: Image.Image, profile: bytes, seen: set[str]) -> Image.Image:
    """Colours by the embedded profile, as viewers show them."""
    space = {"L": "GRAY"}.get(picture.mode, picture.mode)
    try:
        known = ImageCms.ImageCmsProfile(BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(known) and picture.mode != "CMYK":
            return picture
        if known.profile.xcolor_space.strip() != space:
            raise ImageCms.PyCMSError("of another colour space")
        standard = ImageCms.createProfile("sRGB")
        found = ImageCms.profileToProfile(picture, known, standard, outputMode="RGB")
    except Exception:  # damaged, of other colours, or Pillow was built without littleCMS
        seen.add(NO_PROFILE)
        return picture
    seen.add(IN_SRGB)
    return found


# Arrays


def check_images(
    images: object, *, side: int | None = None, channels: int | None = None, square: bool = True
) -> UInt8[np.ndarray, "images height width *colours"]:
    """The images, if they are uint8 (n, h, w) or (n, h, w, 3), square, at least one.

    side:     the side in pixels that they must have; None for any
    channels: of the dataset, for the remedy of another side
    square:   False admits others than square ones

    InputError for everything else says what it looks like and what to do. (3, h, w) is refused,
    too: it is three grey images or one in colour.
    """
    expected = "expected uint8 of shape (n, height, width) or (n, height, width, 3)"
    if not isinstance(images, np.ndarray) or isinstance(images, np.ma.MaskedArray):
        kind = f"{type(images).__module__}.{type(images).__name__}"
        raise InputError(
            f"images are a {kind}; {expected} in one numpy array: np.stack([np.asarray(image) for "
            "image in images]), on the CPU"
        )
    found = f"images have dtype {images.dtype} and shape {images.shape}; {expected}"
    if remedy := _wrong_dtype(images) or _wrong_shape(images.shape):
        raise InputError(f"{found}: {remedy}")
    height, width = images.shape[1:3]
    if (square and height != width) or (side is not None and (height, width) != (side, side)):
        wanted = "square images" if side is None else f"{side} x {side} pixels"
        raise InputError(
            f"{found}, of {wanted}: resize_images(images, {side or 'SIDE'}"
            f"{f', channels={channels}' if channels else ''}) of vitask.data.images does it as for "
            "files"
        )
    return images


def resize_images(
    images: np.ndarray, size: int, *, channels: int | None = None, square: bool = False
) -> UInt8[np.ndarray, "images height width *colours"]:
    """Images resized, and turned to grey or colour, exactly as `read_image` does it with a file.

    images:   uint8 (n, h, w) or (n, h, w, 3), of any size
    channels: 1 for grey, 3 for colour, None to keep them
    square:   keep only the centre squares; otherwise the whole images are stretched

    uint8 (n, size, size) or (n, size, size, 3). InputError as by `check_images`.
    """
    if size < 1 or channels not in (None, 1, 3):
        raise InputError(
            f"size {size}, channels {channels}; expected 1 pixel or more; 1, 3 or None"
        )
    mode = {None: None, 1: "L", 3: "RGB"}[channels]
    pictures = (Image.fromarray(image) for image in check_images(images, square=False))
    return np.stack(
        [
            np.asarray(_resized(picture.convert(mode) if mode else picture, size, square))
            for picture in pictures
        ]
    )


def unmistakable(images: np.ndarray) -> np.ndarray:
    """A dataset's images in a shape that `check_images` admits: three grey ones become colour."""
    three = images.ndim == 3 and len(images) == 3
    return np.repeat(images[..., None], 3, axis=-1) if three else images


def _wrong_dtype(images: np.ndarray) -> str:
    """What to do about a dtype other than uint8; empty if there is nothing to do."""
    if images.dtype == np.uint8:
        return ""
    if images.dtype == object:
        return "images of several sizes? Resize each one, then np.stack them"
    if images.dtype.kind == "f":
        return (
            "undo the normalisation first; values from 0 to 1 become "
            "(images * 255).round().astype(np.uint8)"
        )
    if images.dtype == np.uint16:
        return "16 bits become (images / 257).round().astype(np.uint8)"
    if images.dtype == np.bool_:
        return "give 0 and 255: images.astype(np.uint8) * 255"
    return "values from 0 to 255 become images.astype(np.uint8)"


def _wrong_shape(shape: tuple[int, ...]) -> str:
    """What to do about another shape; empty if there is nothing to do."""
    if 0 in shape:
        return "there is no pixel in it; give one image or more"
    if len(shape) == 2:
        return "a single grey image? Give images[None]"
    if len(shape) == 3 and shape[-1] in (1, 3, 4):
        return "a single image with its channels? Give images[None], without alpha"
    if len(shape) == 3 and shape[0] == 3:
        return (
            "one colour image with its channels first, or three grey ones? Give "
            "images.transpose(1, 2, 0)[None], or np.repeat(images[..., None], 3, axis=-1)"
        )
    if len(shape) == 4 and shape[-1] != 3:
        if shape[-1] == 4:
            return "with alpha? Put them on white, as read_image does, and give three channels"
        if shape[-1] == 1:
            return "grey with a channel? Give images[..., 0]"
        if shape[1] in (1, 3, 4):
            return "channels first? Give images.transpose(0, 2, 3, 1), in grey or colour"
    return "" if len(shape) == 3 or (len(shape) == 4 and shape[-1] == 3) else "give that"
