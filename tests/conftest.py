"""What all tests share. Imported before any test, and so before triton."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test fetches anything, not even by mistake
os.environ.setdefault("OMP_NUM_THREADS", "1")  # many small operations: threads would only wait

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jaxtyping
import pytest
import torch

ROOT = Path(__file__).parents[1]

# The same examples in every run, and no stopwatch: a busy machine fails no test.
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)
hypothesis.settings.load_profile("steady")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
torch.set_num_threads(1)

# Shapes are checked, not narrated. Triton reads the source of its kernels: their files stay bare.
_LOSSES = [
    f"kernels.{path.stem}"
    for path in (ROOT / "kernels").glob("*.py")
    if path.stem != "__init__" and "triton.jit" not in path.read_text()
]
jaxtyping.install_import_hook(["vitask", *_LOSSES], "beartype.beartype")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Code under test takes its seeds; this one is for what torch initialises by itself."""
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the runtime check of shapes, as users run it: for tests of our own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout, with real images; a user's machine has none."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no folder 'shared' with real data beside the checkout")
    return folder
