"""The backgrounds of the phantom's pictures, with everything but the class.

Each look draws n pictures, float32 (n, 28, 28, channels) of about 0 to 1, and a mask (n, 28, 28)
of the places for class marks. Colour, place, size, shape and texture are random and independent of
the class.
"""

from collections.abc import Callable

import numpy as np

SIZE = 28
_Y, _X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / (SIZE - 1) * 2 - 1  # -1 to 1

Look = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def column(
    rng: np.random.Generator, n: int, low: float | int, high: float | int, channels: int = 0
) -> np.ndarray:
    """Uniform numbers to broadcast over pictures: (n, 1, 1), or (n, 1, 1, channels)."""
    shape = (n, 1, 1, channels) if channels else (n, 1, 1)
    return rng.uniform(low, high, shape).astype(np.float32)


def clouds(rng: np.random.Generator, n: int, cells: int) -> np.ndarray:
    """Smooth noise of about -1 to 1, (n, 28, 28), from a random grid of cells x cells."""
    grid = rng.uniform(-1, 1, (n, cells + 1, cells + 1)).astype(np.float32)
    place = np.linspace(0, cells, SIZE, endpoint=False)
    at, part = place.astype(int), (place % 1).astype(np.float32)
    part = part * part * (3 - 2 * part)
    rows = grid[:, at] * (1 - part)[:, None] + grid[:, at + 1] * part[:, None]
    return rows[:, :, at] * (1 - part) + rows[:, :, at + 1] * part


def blob(
    rng: np.random.Generator,
    n: int,
    *,
    radius: tuple[float, float],
    shift: float = 0.0,
    at: tuple[float, float] = (0.0, 0.0),
    wobble: float = 0.1,
    edge: float = 0.1,
) -> np.ndarray:
    """Soft ellipses of random place, axes, angle and outline, (n, 28, 28), 0 to 1."""
    y = _Y - at[0] - column(rng, n, -shift, shift)
    x = _X - at[1] - column(rng, n, -shift, shift)
    angle = column(rng, n, 0, np.pi)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    a, b = column(rng, n, *radius), column(rng, n, *radius)
    distance = np.sqrt((u / a) ** 2 + (v / b) ** 2) + wobble * clouds(rng, n, 4)
    return np.clip((1 - distance) / edge + 0.5, 0, 1)


def paint(base: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Lay a colour over pictures (n, 28, 28, channels) by a mask (n, 28, 28) of 0 to 1."""
    return base + mask[..., None] * (colour - base)


def _tint(rng: np.random.Generator, n: int, colour: tuple[float, ...], spread: float) -> np.ndarray:
    return np.asarray(colour, dtype=np.float32) + column(rng, n, -spread, spread, len(colour))


def _field(
    rng: np.random.Generator, n: int, colour: tuple[float, ...], spread: float
) -> np.ndarray:
    """A background of one colour with smooth variation, (n, 28, 28, channels)."""
    uneven = 0.06 * clouds(rng, n, 2)[..., None]
    return _tint(rng, n, colour, spread) + uneven


def pathology(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Pink tissue with purple patches."""
    base = _field(rng, n, (0.82, 0.62, 0.76), 0.1)
    patches = np.clip(clouds(rng, n, 5) + column(rng, n, -0.3, 0.3), 0, 1)
    return paint(base, patches, _tint(rng, n, (0.48, 0.32, 0.62), 0.1)), np.ones_like(patches)


def xray(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Two dark lungs in a bright chest, with ribs."""
    base = _field(rng, n, (0.68,), 0.1)
    left = blob(rng, n, radius=(0.38, 0.62), at=(0.0, -0.45), shift=0.08, wobble=0.12)
    right = blob(rng, n, radius=(0.38, 0.62), at=(0.0, 0.45), shift=0.08, wobble=0.12)
    lungs = np.maximum(left, right)
    base = paint(base, lungs, _tint(rng, n, (0.36,), 0.08))
    bend = _Y * column(rng, n, 7, 10) + np.abs(_X) * column(rng, n, 1, 4) + column(rng, n, 0, 6)
    return base + 0.04 * np.sin(bend)[..., None], np.ones_like(lungs)


def dermatoscope(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A dark lesion on skin."""
    base = _field(rng, n, (0.80, 0.62, 0.55), 0.1)
    lesion = blob(rng, n, radius=(0.55, 0.95), shift=0.2, wobble=0.25, edge=0.3)
    return paint(base, lesion, _tint(rng, n, (0.55, 0.38, 0.32), 0.12)), lesion


def oct_scan(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Bright layers across a dark background."""
    base = _field(rng, n, (0.25,), 0.06)
    y = _Y + column(rng, n, -0.2, 0.2) + column(rng, n, -0.25, 0.25) * _X**2
    y = y + 0.08 * clouds(rng, n, 3)
    tissue = np.clip((column(rng, n, 0.55, 0.75) - np.abs(y)) * 8, 0, 1)
    layers = 0.08 * np.sin(y * column(rng, n, 8, 12) + column(rng, n, 0, 6))
    return paint(base, tissue, _tint(rng, n, (0.52,), 0.08)) + (tissue * layers)[..., None], tissue


def fundus(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """An orange disc with a bright optic disc and vessels."""
    base = _field(rng, n, (0.06, 0.05, 0.05), 0.03)
    disc = blob(rng, n, radius=(0.92, 1.0), wobble=0.02, shift=0.05)
    base = paint(base, disc, _tint(rng, n, (0.68, 0.40, 0.22), 0.12))
    side = rng.choice(np.array([-1, 1], dtype=np.float32), (n, 1, 1)) * column(rng, n, 0.35, 0.6)
    nerve = np.exp(-((_X - side) ** 2 + (_Y - column(rng, n, -0.2, 0.2)) ** 2) / 0.03)
    base = paint(base, 0.8 * nerve, _tint(rng, n, (0.9, 0.75, 0.5), 0.06))
    arc = np.abs(np.abs(_Y) - column(rng, n, 0.3, 0.5) - 0.3 * (_X - side) * np.sign(-side))
    vessel = 0.35 * disc * np.clip(1 - arc / 0.07, 0, 1)
    return paint(base, vessel, np.array([0.4, 0.12, 0.1], dtype=np.float32)), disc


def ultrasound(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Speckle in layers, with a dark lump."""
    depth = 0.10 * np.sin(_Y * column(rng, n, 3, 6) + column(rng, n, 0, 6) + clouds(rng, n, 2))
    base = _field(rng, n, (0.48,), 0.08) + depth[..., None]
    lump = blob(rng, n, radius=(0.35, 0.7), shift=0.25, wobble=0.2, edge=0.3)
    base = paint(base, lump, _tint(rng, n, (0.30,), 0.06))
    speckle = rng.rayleigh(0.8, (n, SIZE, SIZE, 1)).astype(np.float32)
    return base * (0.85 + 0.15 * speckle), np.ones_like(lump)


def blood(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A cell with a purple nucleus among pale red cells."""
    base = _field(rng, n, (0.86, 0.76, 0.72), 0.07)
    for _ in range(3):
        other = blob(rng, n, radius=(0.25, 0.4), shift=1.0, wobble=0.05)
        base = paint(base, 0.7 * other, _tint(rng, n, (0.78, 0.55, 0.55), 0.06))
    cell = blob(rng, n, radius=(0.6, 0.9), shift=0.1, wobble=0.1)
    base = paint(base, cell, _tint(rng, n, (0.72, 0.64, 0.76), 0.08))
    nucleus = blob(rng, n, radius=(0.3, 0.55), shift=0.2, wobble=0.35)
    return paint(base, nucleus, _tint(rng, n, (0.48, 0.32, 0.60), 0.08)), cell


def tissue(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Fluorescent patches of a cell and its neighbours."""
    base = _field(rng, n, (0.28,), 0.08) + 0.12 * clouds(rng, n, 6)[..., None]
    cell = blob(rng, n, radius=(0.45, 0.8), shift=0.15, wobble=0.3, edge=0.4)
    return paint(base, cell, _tint(rng, n, (0.55,), 0.1)), np.ones_like(cell)


def _ct(radius: tuple[float, float], spine: tuple[float, float]) -> Look:
    """A slice of the body: a bright outline, the spine where this view has it, soft organs."""

    def look(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        base = _field(rng, n, (0.10,), 0.03)
        body = blob(rng, n, radius=radius, shift=0.08, wobble=0.06)
        base = paint(base, body, _tint(rng, n, (0.45,), 0.08))
        for _ in range(2):
            organ = blob(rng, n, radius=(0.2, 0.45), shift=0.45, wobble=0.2, edge=0.2)
            base = paint(base, 0.6 * organ * body, _tint(rng, n, (0.50,), 0.15))
        bone = blob(rng, n, radius=(0.1, 0.2), at=spine, shift=0.06)
        return paint(base, bone, _tint(rng, n, (0.80,), 0.06)), body

    return look


LOOKS: dict[str, Look] = {
    "pathmnist": pathology,
    "chestmnist": xray,
    "dermamnist": dermatoscope,
    "octmnist": oct_scan,
    "pneumoniamnist": xray,
    "retinamnist": fundus,
    "breastmnist": ultrasound,
    "bloodmnist": blood,
    "tissuemnist": tissue,
    "organamnist": _ct((0.75, 0.95), (0.6, 0.0)),
    "organcmnist": _ct((0.85, 1.1), (0.0, 0.0)),
    "organsmnist": _ct((0.7, 0.9), (0.0, 0.6)),
}
