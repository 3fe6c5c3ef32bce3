"""Users' image files are read as they are shown, and what has no defined look is refused."""

import os
import struct
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from vitask.data import images as reader
from vitask.data.images import ENDINGS, image_files, notes, read_image, resize_images
from vitask.errors import InputError

SIDE = 28
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
HOLE = np.zeros((SIDE, SIDE), dtype=bool)
HOLE[5:20, 3:9] = True
ON_WHITE = np.where(HOLE[..., None], 255, COLOUR).astype(np.uint8)
TURNS = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


def saved(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


def read(path, channels=3):
    """The picture in its own size, and what was said about it."""
    done = Counter()
    return read_image(path, SIDE, channels, done=done), notes(done)


def png(path, depth, kind, rows, **chunks):
    """A PNG of any bit depth; rows are the bytes of each line."""
    height, width = len(rows), len(rows[0]) * 8 // depth // {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    parts = {"IHDR": struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0), **chunks}
    parts["IDAT"] = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in {**parts, "IEND": b""}.items():
        named = name.encode() + body
        content += struct.pack(">I", len(body)) + named + struct.pack(">I", zlib.crc32(named))
    path.write_bytes(content)
    return path


def tiff(path, *pages):
    """A grey TIFF; a page is its width, height, bits a pixel, bytes and other tags."""
    content = struct.pack("<2sHI", b"II", 42, 8)
    for number, (width, height, bits, body, tags) in enumerate(pages, start=1):
        tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 277: 1, 278: height, **tags}
        body = body + bytes(len(body) % 2)
        start = len(content) + 2 + 12 * (len(tags) + 2) + 4
        tags |= {273: start, 279: len(body)}
        content += struct.pack("<H", len(tags))
        for tag, value in sorted(tags.items()):
            content += struct.pack("<HHII", tag, 4, 1, value)
        content += struct.pack("<I", start + len(body) if number < len(pages) else 0) + body
    path.write_bytes(content)
    return path


# Orientation


@pytest.mark.parametrize("orientation", [1, *TURNS, 0, 9])
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "lzw.tif"])
def test_images_are_upright(tmp_path, ending, orientation):
    options = {"compression": "tiff_lzw"} if "lzw" in ending else {}
    if options and orientation in (0, 9):
        pytest.skip("libtiff writes no such orientation")
    plain, said = read(saved(tmp_path / f"plain.{ending}", COLOUR, **options))
    assert said == ()
    exif = Image.Exif()
    exif[reader.ORIENTATION] = orientation
    path = saved(tmp_path / f"turned.{ending}", COLOUR, exif=exif, **options)
    found, said = read(path)
    np.testing.assert_array_equal(found, TURNS.get(orientation, np.asarray)(plain))
    expected = ("1 image(s): turned as their EXIF says",) if orientation in TURNS else ()
    assert said == expected


def test_a_damaged_exif_is_said(tmp_path):
    path = saved(tmp_path / "a.png", COLOUR, exif=b"Exif\0\0nonsense")
    found, said = read(path)
    np.testing.assert_array_equal(found, COLOUR)
    assert said == (f"1 image(s): {reader.NO_EXIF}",)


def test_a_turned_image_is_not_stretched(tmp_path):
    wide = np.zeros((20, 40), dtype=np.uint8)
    wide[:, 10:30] = 200  # upright, the centre square
    exif = Image.Exif()
    exif[reader.ORIENTATION] = 6
    path = saved(tmp_path / "a.png", wide, exif=exif)
    assert (read_image(path, SIDE, 1, square=True) == 200).all()


# Transparency


def transparent(path, kind):
    """The same picture with a hole, stored in another way; under the hole are other values."""
    rgba = np.dstack([np.where(HOLE[..., None], 90, COLOUR), np.where(HOLE, 0, 255)])
    image = Image.fromarray(rgba.astype(np.uint8))
    if kind == "RGBA png":
        image.save(path / "a.png")
    elif kind == "RGBA webp":
        image.save(path / "a.webp", lossless=True, exact=True)
    elif kind == "RGBA tif":
        image.save(path / "a.tif", compression="tiff_lzw")
    elif kind == "RGBA jp2":
        image.save(path / "a.jp2")
    elif kind == "RGB tRNS":
        key = (1, 2, 3)
        keyed = np.where(HOLE[..., None], np.array(key), COLOUR).astype(np.uint8)
        saved(path / "a.png", keyed, transparency=key)
    elif kind == "no hole":
        saved(path / "a.png", ON_WHITE)
    return next(path.iterdir())


@pytest.mark.parametrize(
    "kind", ["RGBA png", "RGBA webp", "RGBA tif", "RGBA jp2", "RGB tRNS", "no hole"]
)
def test_files_that_look_equal_give_equal_arrays(tmp_path, kind):
    found, said = read(transparent(tmp_path, kind))
    np.testing.assert_array_equal(found, ON_WHITE)
    assert said == (() if kind == "no hole" else (f"1 image(s): {reader.ON_WHITE}",))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["LA", "LA tif", "PA tif", "P bytes", "P index", "L tRNS", "gif"])
def test_grey_files_that_look_equal_give_equal_arrays(tmp_path, kind, channels):
    levels = (GREY // 32 * 32) | 1  # few levels, none of them 0
    shown = np.where(HOLE, 255, levels).astype(np.uint8)
    path = tmp_path / ("a.tif" if "tif" in kind else "a.gif" if kind == "gif" else "a.png")
    opacity = Image.fromarray(np.where(HOLE, 0, 255).astype(np.uint8))
    grey = Image.fromarray(levels.astype(np.uint8))
    index = Image.fromarray(np.where(HOLE, 0, levels).astype(np.uint8))
    if kind.startswith("LA"):
        Image.merge("LA", (grey, opacity)).save(path)
    elif kind == "PA tif":
        paletted = grey.convert("P")
        paletted.putalpha(opacity)
        assert paletted.mode == "PA"
        paletted.save(path)
    elif kind == "L tRNS":
        index.save(path, transparency=0)
    else:
        index.putpalette([level for level in range(256) for _ in range(3)])
        index.save(path, transparency=bytes([0, *[255] * 255]) if kind == "P bytes" else 0)
    expected = shown if channels == 1 else np.repeat(shown[..., None], 3, axis=-1)
    found, said = read(path, channels)
    np.testing.assert_array_equal(found, expected)
    assert said == (f"1 image(s): {reader.ON_WHITE}",)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_is_compared_in_the_bits_of_the_file(tmp_path, depth):
    top = 2**depth - 1
    line = {1: b"\x0f", 2: b"\x00\x05", 4: b"\x00\x11", 8: b"\0\1", 16: b"\0\0\0\1"}[depth]
    key = {1: 1, 2: 1, 4: 1, 8: 1, 16: 1}[depth]
    path = png(tmp_path / "a.png", depth, 0, [line], tRNS=struct.pack(">H", key))
    with Image.open(path) as image:
        width = image.width
    found = read_image(path, width, 1)[0]
    half = width // 2
    assert (found[:half] < 30).all(), f"the value 0 of {top} is black"
    assert (found[-1] == 255).all(), "the key is shown on white"


def test_half_transparent_parts_are_mixed_with_white(tmp_path):
    half = np.dstack([np.full((4, 4, 3), 100, np.uint8), np.full((4, 4), 51, np.uint8)])
    assert (read(saved(tmp_path / "a.png", half))[0] == 224).all()  # 0.2 * 100 + 0.8 * 255


def test_an_opaque_alpha_changes_nothing(tmp_path):
    palette = Image.fromarray(COLOUR).quantize(16)
    palette.save(tmp_path / "plain.png")
    palette.save(tmp_path / "alpha.png", transparency=bytes([255] * 16))
    for channels in (1, 3):
        plain, _ = read(tmp_path / "plain.png", channels)
        found, said = read(tmp_path / "alpha.png", channels)
        np.testing.assert_array_equal(found, plain)
        assert said == ()


# Modes and depths


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("value", [0, 255])
@pytest.mark.parametrize(
    "form",
    [
        *("1 png", "1 tif", "1 bmp", "1 pbm", "L png", "L jpg", "L bmp", "L pgm", "L tga", "L pcx"),
        *("L jp2", "L gif", "LA png", "P png", "P gif", "P bmp", "P tga", "P pcx", "P tif"),
        *("RGB png", "RGB jpg", "RGB bmp", "RGB dib", "RGB webp", "RGB ppm", "RGB tga", "RGB pcx"),
        *("RGB sgi", "RGB jp2", "RGB gif", "RGBA png", "RGBA bmp", "RGBX tif", "CMYK tif"),
        *("CMYK jpg", "YCbCr jpg", "YCbCr tif", "LAB tif"),
    ],
)
def test_every_mode_becomes_grey_or_colour(tmp_path, form, value, channels):
    mode, ending = form.split()
    path = tmp_path / f"image.{ending}"
    if mode == "LAB":
        grey = Image.new("LAB", (40, 20), (value, 128, 128))
    else:
        grey = Image.new("RGB", (40, 20), (value,) * 3).convert(mode)
    grey.save(path)
    try:
        with Image.open(path) as image:
            image.load()
    except OSError:
        pytest.skip("this Pillow cannot read what it wrote")
    found, _ = read(path, channels)
    assert found.shape == ((SIDE, SIDE, 3) if channels == 3 else (SIDE, SIDE))
    np.testing.assert_allclose(found.astype(int), value, atol=1)


def test_grey_stays_equal_through_colour_and_back(tmp_path):
    for pixels in (GREY, np.repeat(GREY[..., None], 3, axis=-1)):
        path = saved(tmp_path / "a.png", pixels)
        np.testing.assert_array_equal(read(path, 1)[0], GREY)
        np.testing.assert_array_equal(read(path, 3)[0], np.repeat(GREY[..., None], 3, axis=-1))


RAMP = np.linspace(0, 65535, SIDE * SIDE).round().astype(np.uint16).reshape(SIDE, SIDE)


def sixteen(path, form):
    """RAMP in a file of 16 bits a pixel."""
    if form == "I png":
        saved(path / "a.png", RAMP)
    elif form == "I;16 tif":
        saved(path / "a.tif", RAMP)
    elif form == "I;16B tif":
        Image.frombytes("I;16B", RAMP.shape, RAMP.astype(">u2").tobytes()).save(path / "a.tif")
    elif form == "lzw tif":
        saved(path / "a.tif", RAMP, compression="tiff_lzw")
    elif form == "I tif":
        saved(path / "a.tif", RAMP.astype(np.int32))
    elif form == "inverted tif":
        saved(path / "a.tif", 65535 - RAMP, tiffinfo={reader.INVERTED: 0})
    elif form == "pgm":
        lines = RAMP.astype(">u2").tobytes()
        (path / "a.pgm").write_bytes(b"P5 %d %d 65535\n" % RAMP.shape + lines)
    elif form == "RGB png":
        rows = np.repeat(RAMP[..., None], 3, axis=-1).astype(">u2").reshape(SIDE, -1)
        png(path / "a.png", 16, 2, [row.tobytes() for row in rows])
    elif form == "RGBA png":
        whole = np.dstack([RAMP, RAMP, RAMP, np.full_like(RAMP, 65535)])
        png(path / "a.png", 16, 6, [row.tobytes() for row in whole.astype(">u2")])
    elif form == "LA png":
        whole = np.dstack([RAMP, np.full_like(RAMP, 65535)])
        png(path / "a.png", 16, 4, [row.tobytes() for row in whole.astype(">u2")])
    return next(path.iterdir())


@pytest.mark.parametrize(
    "form",
    [
        *("I png", "I;16 tif", "I;16B tif", "lzw tif", "I tif", "inverted tif", "pgm"),
        *("RGB png", "RGBA png", "LA png"),
    ],
)
def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path, form):
    expected = (RAMP / 257).round().astype(int)
    for channels in (1, 3):
        found, said = read(sixteen(tmp_path, form), channels)
        shown = found if channels == 1 else found[..., 1]
        # Pillow takes the upper 8 of 16 bits in colour
        np.testing.assert_allclose(shown.astype(int), expected, atol="RGB" in form or "LA" in form)
        assert said == (f"1 image(s): {reader.REDUCED}",)


def test_twelve_bits_reach_white(tmp_path):
    path = tiff(tmp_path / "a.tif", (2, 1, 12, b"\x00\x0f\xff", {}))  # 0 and 4095
    assert read_image(path, 2, 1)[0].tolist() == [0, 255]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.float32(0.5), "real numbers"),
        (np.float32(200), "real numbers"),
        (np.int32(-5), "values from -5"),
        (np.int32(70_000), "values from 70000"),
        (np.int32(200), "values from 200"),  # 8 or 16 bits?
    ],
)
def test_values_without_a_defined_look_are_refused(tmp_path, values, message):
    path = saved(tmp_path / "real.tiff", np.full((4, 4), values))
    with pytest.raises(InputError, match=rf"real\.tiff.*{message}.*expected 8 or 16 bits"):
        read_image(path, SIDE, 1)


def test_signed_values_of_eight_bits_are_refused(tmp_path):
    path = saved(tmp_path / "a.tif", GREY, tiffinfo={reader.SIGN: 2})
    with pytest.raises(InputError, match="signed"):
        read_image(path, SIDE, 1)


def test_sixteen_bits_with_one_transparent_colour_are_refused(tmp_path):
    path = png(tmp_path / "a.png", 16, 2, [bytes(6)], tRNS=bytes(6))
    with pytest.raises(InputError, match="alpha channel"):
        read_image(path, SIDE, 3)


# Colour profiles


def profile(*, swapped):
    """sRGB's profile, or one with red and green swapped under another name."""
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if swapped:
        content = content.replace("sRGB".encode("utf-16-be"), "tRGB".encode("utf-16-be"))
        count = struct.unpack(">I", content[128:132])[0]
        table = content[132 : 132 + 12 * count]
        turned = table.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ")
        content = content.replace(table, turned.replace(b"?XYZ", b"gXYZ"))
    return content


@pytest.mark.parametrize("ending", ["png", "webp", "tif"])
def test_colours_are_those_of_the_embedded_profile(tmp_path, ending):
    options = {"lossless": True} if ending == "webp" else {}
    plain = saved(tmp_path / f"a.{ending}", COLOUR, icc_profile=profile(swapped=False), **options)
    np.testing.assert_array_equal(read(plain)[0], COLOUR)
    assert read(plain)[1] == ()
    other = saved(tmp_path / f"b.{ending}", COLOUR, icc_profile=profile(swapped=True), **options)
    found, said = read(other)
    np.testing.assert_allclose(found.astype(int), COLOUR[..., [1, 0, 2]], atol=3)
    assert said == (f"1 image(s): {reader.IN_SRGB}",)


@pytest.mark.parametrize("content", [b"nonsense", profile(swapped=True)], ids=["broken", "of RGB"])
def test_a_profile_that_does_not_fit_is_said(tmp_path, content):
    found, said = read(saved(tmp_path / "a.png", GREY, icc_profile=content), 1)
    np.testing.assert_array_equal(found, GREY)
    assert said == (f"1 image(s): {reader.NO_PROFILE}",)


# Pages, previews, frames


@pytest.mark.parametrize("ending", ["tif", "gif", "webp", "png", "mpo", "jpg"])
def test_the_first_of_several_pages_is_read_and_said(tmp_path, ending):
    first, second = (Image.new("RGB", (20, 20), (value,) * 3) for value in (250, 10))
    options = {"format": "MPO"} if ending in ("mpo", "jpg") else {}
    first.save(tmp_path / f"a.{ending}", save_all=True, append_images=[second], **options)
    found, said = read(tmp_path / f"a.{ending}")
    np.testing.assert_allclose(found.astype(int), 250, atol=1)
    assert said == (f"1 image(s): {reader.FIRST}",)


@pytest.mark.parametrize("tag", [{reader.PREVIEW: 1}, {reader.PREVIEW: 4}, {reader.OLD_PREVIEW: 2}])
def test_previews_and_masks_are_passed_over(tmp_path, tag):
    small, whole = (5, 5, 8, bytes([10] * 25), tag), (20, 20, 8, bytes([200] * 400), {})
    found, said = read(tiff(tmp_path / "a.tif", small, whole), 1)
    assert (found == 200).all()
    assert said == (f"1 image(s): {reader.FIRST}",)
    with pytest.raises(InputError, match="every page is marked as a preview or a mask"):
        read(tiff(tmp_path / "b.tif", small), 1)


# Size and damage


def test_square_keeps_the_centre_and_the_default_everything(tmp_path):
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:, 10:50] = 200
    path = saved(tmp_path / "wide.png", pixels)
    assert (read_image(path, SIDE, 3, square=True) == 200).all()
    assert (read_image(path, SIDE, 3)[:, 0] == 0).all()


@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(40, 60), (40, 60, 3), (17, 9, 3)], ids=str)
def test_arrays_are_resized_exactly_as_files(tmp_path, shape, channels, square):
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    from_file = read_image(saved(tmp_path / "a.png", pixels), SIDE, channels, square=square)
    from_array = resize_images(pixels[None], SIDE, channels=channels, square=square)
    np.testing.assert_array_equal(from_array[0], from_file)


def test_too_many_pixels_are_an_error_and_no_warning(tmp_path, monkeypatch):
    path = saved(tmp_path / "large.png", np.zeros((30, 30), dtype=np.uint8))
    for most in (800, 400):  # Pillow warns above its limit and raises above twice of it
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(InputError, match=r"large\.png is not a readable image .*900 pixels"):
            read_image(path, SIDE, 1)


def test_a_png_with_megabytes_of_text_is_refused(tmp_path):
    text = b"Comment\0\0" + zlib.compress(bytes(2 * 1024 * 1024))
    path = png(tmp_path / "text.png", 8, 0, [b"\0"], zTXt=text)
    with pytest.raises(InputError, match=r"text\.png is not a readable image"):
        read_image(path, SIDE, 1)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png", "missing.png"):
        with pytest.raises(InputError, match=rf"{name} .*not a regular file"):
            read_image(tmp_path / name, SIDE, 1)


def test_no_other_program_is_started_for_a_file(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript, whatever a file's ending is."""
    monkeypatch.setattr(os, "system", None)
    monkeypatch.setattr("subprocess.Popen", None)
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(InputError, match="cannot identify"):
        read_image(path, SIDE, 1)


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "tiff", "webp", "gif", "tga", "jp2"])
def test_no_damage_raises_anything_but_an_input_error(tmp_path, ending):
    rng = np.random.default_rng(0)
    whole = saved(
        tmp_path / f"whole.{ending}", rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
    ).read_bytes()
    path = tmp_path / f"damaged.{ending}"
    for _ in range(40):
        damaged = np.frombuffer(whole, dtype=np.uint8).copy()
        damaged[rng.integers(0, min(100, len(whole)), 4)] = rng.integers(0, 256, 4)
        path.write_bytes(damaged.tobytes()[: rng.integers(0, len(whole) + 1)])
        with suppress(InputError):
            assert read_image(path, SIDE, 3).shape == (SIDE, SIDE, 3)


# Folders


def touched(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_endings_count_in_any_case(tmp_path):
    names = [f"a{ending}" for ending in ENDINGS] + [f"B{ending.upper()}" for ending in ENDINGS]
    touched(tmp_path, *names)
    assert image_files(tmp_path) == (sorted(map(Path, names)), [])


@pytest.mark.parametrize(
    ("copy", "said"),
    [
        ("._a.png", "1 hidden image file(s)"),
        (".ipynb_checkpoints/a-checkpoint.png", "1 hidden image file(s)"),
        ("deep/.thumbnails/a.PNG", "1 hidden image file(s)"),
        ("__MACOSX/a.png", "1 image file(s) in __MACOSX, a folder of copies"),
        ("__MACOSX/._a.png", "1 hidden image file(s)"),
        ("deep/@eaDir/a.jpg", "1 image file(s) in @eaDir, a folder of copies"),
        ("Thumbs/a.jpg", "1 image file(s) in Thumbs, a folder of copies"),
        ("a.dcm", "1 file(s) ending in .dcm, which are not read as images"),
        ("a.EPS", "1 file(s) ending in .eps, which are not read as images"),
        ("scan", "1 file(s) without an ending, which are not read as images"),
    ],
)
def test_copies_and_other_files_are_left_out_and_said(tmp_path, copy, said):
    touched(tmp_path, "a.png", copy)
    assert image_files(tmp_path) == ([Path("a.png")], [said])


def test_a_hidden_folder_may_be_asked_for(tmp_path):
    touched(tmp_path, ".cache/thumbs/a.png")
    assert image_files(tmp_path / ".cache" / "thumbs") == ([Path("a.png")], [])


def test_links_to_folders_are_not_followed_and_said(tmp_path):
    touched(tmp_path, "in/a.png", "out/b.png")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    assert image_files(tmp_path / "in") == ([Path("a.png")], ["1 link(s) to folders"])


def test_a_folder_without_an_image_says_what_it_holds(tmp_path):
    touched(tmp_path, "a.dcm", "._a.png")
    with pytest.raises(InputError, match=r"expected files ending in \.png.*1 hidden.*1 .* \.dcm"):
        image_files(tmp_path)
