"""Which errors carry a message for the user."""

import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = tuple(str(ROOT / name) for name in ("bench", "kernels", "vitask"))


def is_our_error(error: BaseException) -> bool:
    """Raised by this project's code at a boundary, and so with a message that helps."""
    if not isinstance(error, ValueError | FileNotFoundError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(PACKAGES)
