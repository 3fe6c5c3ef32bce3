"""The descriptions from INFO, read without an import, and the download."""

import hashlib
import os
import subprocess
import sys

import pytest

from vitask import data
from vitask.data import medmnist


@pytest.mark.parametrize("name", medmnist.NAMES)
def test_every_entry_is_medmnists_own(name):
    spec, entry = medmnist.spec(name), medmnist.info()[name]
    assert (spec.task, spec.n_channels) == (entry["task"], entry["n_channels"])
    assert spec.n_samples == entry["n_samples"]
    if name != "retinamnist":
        assert spec.classes == tuple(entry["label"].values())
    assert len(spec.classes) == len(entry["label"])
    for size in medmnist.SIZES:
        assert len(medmnist.expected_md5(name, size)) == 32
        assert medmnist.file_name(name, size) in entry["url" if size == 28 else f"url_{size}"]


def test_the_twelve_sets_as_the_paper_counts_them():
    specs = data.specs("medmnist")
    assert tuple(specs) == medmnist.NAMES == data.names("phantom")
    assert len({s.modality for s in specs.values()}) == 9
    assert sum({s.head: len(s.classes) for s in specs.values()}.values()) == 70
    assert [n for n, s in specs.items() if s.multi_label] == ["chestmnist"]
    assert len({s.classes for s in specs.values() if s.head == "organ"}) == 1
    totals = [sum(s.n_samples[split] for s in specs.values()) for split in data.SPLITS]
    assert totals == [518_175, 70_467, 119_320]


def test_reading_info_imports_neither_medmnist_nor_torch_and_makes_no_folder(
    tmp_path, pytestconfig
):
    code = (
        "import sys; from vitask import data; from vitask.data import medmnist; "
        "assert medmnist.spec('breastmnist').classes[0] == 'malignant'; "
        "data.load('breastmnist', source='phantom', phantom_sizes=(4, 2, 2)); "
        "print([m for m in ('medmnist', 'torch', 'pandas') if m in sys.modules])"
    )
    env = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(pytestconfig.rootpath)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_size_is_an_error():
    with pytest.raises(ValueError, match="no size 32"):
        medmnist.file_name("breastmnist", 32)


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A file at the official address, with the MD5 that INFO has."""
    content = tmp_path / "remote.npz"
    content.write_bytes(b"the official bytes")
    entry = medmnist.info()["breastmnist"] | {
        "url_64": content.as_uri(),
        "MD5_64": hashlib.md5(content.read_bytes()).hexdigest(),
    }
    table = medmnist.info() | {"breastmnist": entry}
    monkeypatch.setattr(medmnist, "info", lambda: table)
    return content


def test_download_keeps_what_has_the_right_md5(served, tmp_path):
    root = tmp_path / "new" / "root"
    path = medmnist.download("breastmnist", 64, root)
    assert path == root / "breastmnist_64.npz"
    assert path.read_bytes() == served.read_bytes()
    served.unlink()  # the file exists already: nothing is fetched
    assert medmnist.download("breastmnist", 64, root) == path
    assert [p.name for p in root.iterdir()] == [path.name]


def test_download_leaves_nothing_that_has_a_wrong_md5(served, tmp_path):
    served.write_bytes(b"other bytes")
    root = tmp_path / "root"
    with pytest.raises(ValueError, match=r"gave MD5 .*nothing was kept"):
        medmnist.download("breastmnist", 64, root)
    assert list(root.iterdir()) == []
    (root / "breastmnist_64.npz").write_bytes(b"mine")
    with pytest.raises(ValueError, match="move it away"):
        medmnist.download("breastmnist", 64, root)
    assert (root / "breastmnist_64.npz").read_bytes() == b"mine"


def test_download_without_a_network_says_what_to_put_where(served, tmp_path):
    served.unlink()
    with pytest.raises(ValueError, match=r"cannot be fetched.*put it at .*breastmnist_64\.npz"):
        medmnist.download("breastmnist", 64, tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []
    with pytest.raises(ValueError, match="no MedMNIST set 'x'"):
        medmnist.download("x", 28, tmp_path)
