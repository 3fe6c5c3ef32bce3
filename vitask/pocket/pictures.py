"""Procedural pictures: shapes on textured backgrounds, with all facts that questions ask for.

They are not medical, and not from files: a seed gives the pictures.
"""

from dataclasses import dataclass

import numpy as np

SIDE = 32  # pixels
SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan", "white", "black")
TEXTURES = (
    "plain",
    "horizontal stripes",
    "vertical stripes",
    "diagonal stripes",
    "checks",
    "dots",
    "noise",
    "waves",
)
POSITIONS = (
    "top left", "top", "top right", "left", "centre", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
SIZES = ("tiny", "small", "medium", "large")
COUNTS = ("one", "two", "three", "four")
BRIGHTNESS = ("dark", "dim", "light", "bright")

_RGB = np.array(
    [[220, 40, 40], [40, 190, 60], [50, 70, 230], [230, 210, 40],
     [180, 50, 200], [50, 210, 220], [245, 245, 245], [12, 12, 12]],
    dtype=np.float32,
) / 255  # fmt: skip
_RADIUS = np.array([2.6, 4.2, 6.2, 9.0], dtype=np.float32)  # pixels, by SIZES
_LEVEL = np.array(
    [0.12, 0.36, 0.6, 0.84], dtype=np.float32
)  # mean of the background, by BRIGHTNESS
_CELL = np.array([[r, c] for r in (6.5, 15.5, 24.5) for c in (6.5, 15.5, 24.5)], dtype=np.float32)


@dataclass(frozen=True)
class Pictures:
    """Pictures and their facts.

    images: uint8 (n, 32, 32, 3)
    facts:  kind -> int (n,), index of the answer, -1 if the picture does not settle it: the
            position of several shapes, the colour in a grey picture
    """

    images: np.ndarray
    facts: dict[str, np.ndarray]


def draw(count: int, rng: np.random.Generator) -> Pictures:
    """`count` pictures: one to four equal shapes on a textured background, some grey, noisy."""
    shape = rng.integers(len(SHAPES), size=count)
    colour = rng.integers(len(COLOURS), size=count)
    texture = rng.integers(len(TEXTURES), size=count)
    brightness = rng.integers(len(BRIGHTNESS), size=count)
    copies = np.where(rng.random(count) < 0.55, 0, rng.integers(1, len(COUNTS), size=count))
    size = np.where(copies == 0, rng.integers(len(SIZES), size=count), rng.integers(2, size=count))
    grey = rng.random(count) < 0.3
    cells = rng.permuted(np.tile(np.arange(9), (count, 1)), axis=1)[:, : len(COUNTS)]

    ground = _ground(texture, _LEVEL[brightness], grey, rng)
    # A shape must differ from its background: in grey pictures by its level.
    contrast = np.where(brightness < 2, 0.45, -0.45)[:, None]
    level = (_LEVEL[brightness][:, None] + contrast) * np.ones(3, dtype=np.float32)
    ink = np.where(grey[:, None], level, _RGB[colour]) + rng.normal(0, 0.03, (count, 3))
    mask = _shapes(shape, _RADIUS[size], cells, copies, rng)[..., None]
    images = ground * (1 - mask) + ink[:, None, None].astype(np.float32) * mask
    noise = rng.uniform(0.0, 0.05, (count, 1, 1, 1)) * rng.standard_normal((count, SIDE, SIDE, 1))
    pixels = np.rint(255 * np.clip(images + noise, 0, 1)).astype(np.uint8)
    facts = {
        "shape": shape,
        "colour": np.where(grey, -1, colour),
        "texture": texture,
        "position": np.where(copies == 0, cells[:, 0], -1),
        "size": size,
        "count": copies,
        "brightness": brightness,
    }
    return Pictures(pixels, facts)


def _ground(
    texture: np.ndarray, level: np.ndarray, grey: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Textured backgrounds, float32 (n, 32, 32, 3): mean `level`, a tint, a smooth gradient."""
    count = len(texture)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)[:, None]
    period = rng.uniform(3.0, 7.0, (count, 1, 1)).astype(np.float32)
    phase = rng.uniform(0, 2 * np.pi, (2, count, 1, 1)).astype(np.float32)
    rows = np.sin(2 * np.pi * y / period + phase[0])
    columns = np.sin(2 * np.pi * x / period + phase[1])
    slope = rng.choice([-1.0, 1.0], (count, 1, 1)).astype(np.float32)
    waves = np.sin(2 * np.pi * (y + 2.5 * np.sin(x / 3 + phase[1])) / (period + 2) + phase[0])
    patterns = np.stack(
        [
            np.zeros_like(rows),
            np.sign(rows) * np.ones_like(x),
            np.sign(columns) * np.ones_like(y),
            np.sign(np.sin(2 * np.pi * (y + slope * x) / (1.4 * period) + phase[0])),
            np.sign(rows * columns),
            2.0 * (rows + columns > 1.1) - 0.3,
            rng.standard_normal((count, SIDE, SIDE)).astype(np.float32),
            np.sign(waves),
        ]
    )
    pattern = patterns[texture, np.arange(count)]
    depth = rng.uniform(0.06, 0.13, (count, 1, 1)).astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi, (count, 1, 1)).astype(np.float32)
    steep = rng.uniform(0, 0.004, (count, 1, 1)).astype(np.float32)
    gradient = steep * ((x - 15.5) * np.cos(angle) + (y - 15.5) * np.sin(angle))
    tint = np.where(grey[:, None], 0, rng.uniform(-0.08, 0.08, (count, 3))).astype(np.float32)
    ground = level[:, None, None] + depth * pattern + gradient
    return ground[..., None] + tint[:, None, None]


def _shapes(
    shape: np.ndarray,
    radius: np.ndarray,
    cells: np.ndarray,
    copies: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Coverage of the pictures' shapes in [0, 1], float32 (n, 32, 32)."""
    count = len(shape)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)[:, None]
    covered = np.zeros((count, SIDE, SIDE), dtype=np.float32)
    for copy in range(cells.shape[1]):
        centre = _CELL[cells[:, copy]] + rng.uniform(-1.5, 1.5, (count, 2)).astype(np.float32)
        angle = rng.uniform(-0.3, 0.3, (count, 1, 1)).astype(np.float32)
        dy, dx = y - centre[:, 0, None, None], x - centre[:, 1, None, None]
        u = np.cos(angle) * dx - np.sin(angle) * dy
        v = np.sin(angle) * dx + np.cos(angle) * dy
        r = radius[:, None, None]
        far = np.hypot(u, v)
        au, av = np.abs(u), np.abs(v)
        distance = np.stack(  # about the signed distance in pixels, negative inside
            [
                far - r,
                np.maximum(au, av) - 0.88 * r,
                np.maximum(0.87 * au + 0.5 * v, -v - 0.1 * r) - 0.5 * r,
                np.minimum(np.maximum(au - 0.3 * r, av - r), np.maximum(av - 0.3 * r, au - r)),
                np.abs(far - 0.78 * r) - 0.24 * r,
                (au + av - 1.15 * r) * 0.7,
            ]
        )[shape, np.arange(count)]
        drawn = np.clip(0.5 - distance, 0, 1) * (copy <= copies)[:, None, None]
        covered = np.maximum(covered, drawn)
    return covered
