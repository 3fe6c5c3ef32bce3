"""Official files and cards: right ones load, wrong ones are refused with their name."""

import hashlib
import json
import re
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vitask import data
from vitask.data import SPLITS, card, medmnist
from vitask.data.archive import file_md5, load_file
from vitask.data.spec import Dataset
from vitask.errors import InputError

COUNTS = {"train": 9, "val": 4, "test": 5}


def small(name: str):
    """The official description with small counts."""
    return replace(medmnist.spec(name), n_samples=COUNTS)


def arrays(spec, size: int = 28, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    done = {}
    for split in SPLITS:
        n, channels = spec.n_samples[split], (3,) if spec.n_channels == 3 else ()
        done[f"{split}_images"] = rng.integers(0, 256, (n, size, size, *channels), dtype=np.uint8)
        shape, top = (
            ((n, len(spec.classes)), 2) if spec.multi_label else ((n, 1), len(spec.classes))
        )
        done[f"{split}_labels"] = rng.integers(0, top, shape, dtype=np.uint8)
    return done


def write(folder: Path, spec, size: int = 28, **changes: np.ndarray | None) -> Path:
    """A file with the official name and keys; a change to None leaves the key out."""
    path = folder / medmnist.file_name(spec.name, size)
    content = {k: v for k, v in (arrays(spec, size) | changes).items() if v is not None}
    np.savez_compressed(path, **content)
    return path


def read(path: Path, spec, **kwargs):
    settings = {"size": 28, "source": "medmnist", "expected_md5": file_md5(path)}
    return load_file(path, spec, **(settings | kwargs))


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write a small set and let INFO describe it, with its MD5."""

    def make(name: str, size: int = 28, folder: Path = tmp_path) -> Path:
        folder.mkdir(exist_ok=True)
        path = write(folder, small(name), size)
        suffix = "" if size == 28 else f"_{size}"
        changed = {"n_samples": COUNTS, f"MD5{suffix}": file_md5(path)}
        entry = medmnist.info()[name] | changed
        table = medmnist.info() | {name: entry}
        monkeypatch.setattr(medmnist, "info", lambda: table)
        monkeypatch.setattr(medmnist, "spec", medmnist.spec.__wrapped__)
        return path

    return make


@pytest.mark.parametrize("name", medmnist.NAMES)
@pytest.mark.parametrize("size", [28, 64])
def test_an_official_file_comes_back_as_it_was_written(name, size, official):
    path = official(name, size)
    dataset = data.load(name, source="medmnist", roots=[path.parent], size=size)
    assert (dataset.source, dataset.size, dataset.md5_ok) == ("medmnist", size, True)
    assert dataset.md5 == hashlib.md5(path.read_bytes()).hexdigest()
    written = arrays(dataset.spec, size)
    for split, found in dataset.splits.items():
        np.testing.assert_array_equal(found.images, written[f"{split}_images"])
        labels = written[f"{split}_labels"]
        assert found.labels.dtype == np.int64
        np.testing.assert_array_equal(
            found.labels, labels if dataset.spec.multi_label else labels[:, 0]
        )
        assert found.ids[-1] == f"{name}/{split}/{COUNTS[split] - 1:06d}"
        assert found.groups is None


def test_roots_are_searched_in_order(tmp_path, official):
    second = official("breastmnist", folder=tmp_path / "second")
    roots = [tmp_path / "none", tmp_path / "first", second.parent]
    (tmp_path / "first").mkdir()
    assert medmnist.find("breastmnist", 28, roots) == second
    first = tmp_path / "first" / second.name
    first.write_bytes(second.read_bytes())
    assert medmnist.find("breastmnist", 28, roots) == first


def test_a_missing_file_names_all_roots(tmp_path):
    with pytest.raises(ValueError, match=r"breastmnist_64\.npz is missing.*nowhere \(no such"):
        data.load("breastmnist", source="medmnist", roots=[tmp_path, tmp_path / "nowhere"], size=64)
    with pytest.raises(ValueError, match="no data root at all"):
        data.load("breastmnist", source="medmnist")
    with pytest.raises(ValueError, match="does not exist"):
        load_file(tmp_path / "x.npz", small("breastmnist"), size=28, source="medmnist")


def test_a_wrong_md5_is_refused_unless_allowed(tmp_path, official):
    path = official("pneumoniamnist")
    write(tmp_path, small("pneumoniamnist"), val_images=np.zeros((4, 28, 28), np.uint8))
    with pytest.raises(ValueError, match=f"MD5 is {file_md5(path)}, expected .*--allow-unverified"):
        data.load("pneumoniamnist", source="medmnist", roots=[tmp_path])
    admitted = data.load(
        "pneumoniamnist", source="medmnist", roots=[tmp_path], allow_unverified=["pneumoniamnist"]
    )
    assert not admitted.md5_ok
    assert admitted.md5 == file_md5(path)
    with pytest.raises(ValueError, match="did you mean pneumoniamnist"):
        data.load(
            "pneumoniamnist", source="medmnist", roots=[tmp_path], allow_unverified=["pneumonia"]
        )


WRONG = {
    "key missing": ({"val_labels": None}, r"missing \['val_labels'\]"),
    "key unknown": ({"more": np.zeros(1)}, r"unknown \['more'\]"),
    "groups are for cards": ({"train_groups": np.arange(9)}, r"unknown \['train_groups'\]"),
    "images float": ({"train_images": np.zeros((9, 28, 28, 3))}, "float64.*expected uint8"),
    "count": ({"test_images": np.zeros((6, 28, 28, 3), np.uint8)}, r"\(5, 28, 28, 3\)"),
    "channels": ({"val_images": np.zeros((4, 28, 28), np.uint8)}, r"3 channel\(s\)"),
    "size": ({"val_images": np.zeros((4, 64, 64, 3), np.uint8)}, r"\(4, 64, 64, 3\), expected"),
    "labels float": ({"val_labels": np.zeros((4, 1))}, "float64.*expected integers"),
    "labels flat": ({"val_labels": np.zeros(4, np.uint8)}, r"\(4,\), expected integers \(4, 1\)"),
    "label high": ({"val_labels": np.full((4, 1), 8, np.uint8)}, r"4 row\(s\).*\[8\].*0 to 7"),
    "label low": ({"val_labels": np.full((4, 1), -1)}, "out of range"),
    "pickle": ({"val_labels": np.full((4, 1), None)}, "val_labels.*pickled objects"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_content_is_refused_and_named(case, tmp_path):
    changes, message = WRONG[case]
    spec = small("bloodmnist")
    path = write(tmp_path, spec, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        read(path, spec)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=message):  # allow_unverified allows another MD5 only
        read(path, spec, expected_md5="0" * 32, allow_unverified=True)


def test_multi_label_rows_hold_only_0_and_1(tmp_path):
    spec = small("chestmnist")
    labels = np.zeros((4, 14), np.uint8)
    labels[2, 5] = 2
    with pytest.raises(ValueError, match=r"1 row\(s\), first row 2.*expected 0 to 1"):
        read(write(tmp_path, spec, val_labels=labels), spec)
    with pytest.raises(ValueError, match=r"\(4, 1\), expected integers \(4, 14\)"):
        read(write(tmp_path, spec, val_labels=labels[:, :1]), spec)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_a_truncated_archive_is_refused(share, tmp_path):
    spec = small("breastmnist")
    path = write(tmp_path, spec)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="truncated") as caught:
        read(path, spec)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"\x93NUMPY\x01\x00"], ids=str)
def test_a_file_that_is_not_a_zip_is_refused(content, tmp_path):
    path = tmp_path / "breastmnist.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not a \.npz"):
        read(path, small("breastmnist"))


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"], ids=str)
def test_a_member_that_is_not_an_array_is_refused(content, tmp_path):
    spec = small("breastmnist")
    path = write(tmp_path, spec)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, whole in members.items():
            archive.writestr(name, content if name == "val_images.npy" else whole)
    with pytest.raises(ValueError, match="val_images") as caught:
        read(path, spec)
    assert str(path) in str(caught.value)


def test_a_damaged_member_is_refused(tmp_path):
    spec = small("breastmnist")
    path = write(tmp_path, spec)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("val_images.npy")
    whole = bytearray(path.read_bytes())
    middle = member.header_offset + member.compress_size // 2
    whole[middle : middle + 8] = b"\0" * 8
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"damaged|cannot be read"):
        read(path, spec)


def test_an_archive_with_any_changed_byte_is_read_or_refused(tmp_path):
    spec, path = small("breastmnist"), tmp_path / "own.npz"
    groups = {f"{split}_groups": np.arange(COUNTS[split]).astype(str) for split in SPLITS}
    tiny = {k: v[:, :2, :2] if "images" in k else v for k, v in arrays(spec).items()}
    np.savez(path, **tiny, **groups)
    whole, rng = np.frombuffer(path.read_bytes(), dtype=np.uint8), np.random.default_rng(0)
    for at in rng.integers(0, len(whole), 100):
        changed = whole.copy()
        changed[at] ^= rng.integers(1, 256, dtype=np.uint8)
        path.write_bytes(changed.tobytes())
        with suppress(InputError):
            assert isinstance(load_file(path, spec, size=2, source="card"), Dataset)


# Cards


def own_card(spec, name: str = "own", **changes: object) -> dict:
    fields = {
        "name": name,
        "modality": spec.modality,
        "task": spec.task,
        "label": {str(i): text for i, text in enumerate(spec.classes)},
        "n_channels": spec.n_channels,
        "n_samples": COUNTS,
        "license": "CC0",
        "source": "a test",
    }
    return {k: v for k, v in (fields | changes).items() if v is not None}


def write_own(folder: Path, spec, *, size: int = 28, more: dict | None = None, **changes) -> Path:
    suffix = "" if size == 28 else f"_{size}"
    np.savez(folder / f"own{suffix}.npz", **(arrays(spec, size) | (more or {})))
    path = folder / "own.json"
    path.write_text(json.dumps(own_card(spec, **changes)))
    return path


@pytest.mark.parametrize("name", medmnist.NAMES)
def test_a_card_of_every_form_is_loaded(name, tmp_path):
    spec = small(name)
    write_own(tmp_path, spec, note="other fields are notes")
    dataset = data.load("own", source="medmnist", roots=[tmp_path])
    assert dataset.spec == replace(spec, name="own", head="own", license="CC0", source="a test")
    assert (dataset.source, dataset.md5_ok) == ("card", True)
    assert dataset.md5 == file_md5(tmp_path / "own.npz")
    assert dataset.splits["test"].ids[0] == "own/test/000000"
    assert data.names("medmnist", [tmp_path]) == (*medmnist.NAMES, "own")
    assert data.specs("medmnist", [tmp_path])["own"] == dataset.spec
    assert data.names("phantom", [tmp_path]) == medmnist.NAMES


def test_groups_of_a_card_are_loaded(tmp_path):
    spec = small("breastmnist")
    groups = {
        f"{split}_groups": np.array([f"p{i}" for i in range(COUNTS[split])]) for split in SPLITS
    }
    write_own(tmp_path, spec, more=groups)
    found = data.load("own", source="medmnist", roots=[tmp_path])
    digests = card.groups("own", [tmp_path])
    for split, images in found.splits.items():
        names = groups[f"{split}_groups"].tolist()
        assert images.groups.tolist() == [digests[name] for name in names]
    train = found.splits["train"]
    assert train.take([3, 1]).groups.tolist() == [digests["p3"], digests["p1"]]
    assert len(set(digests.values())) == len(digests)
    assert all(re.fullmatch("[0-9a-f]{12}", digest) for digest in digests.values())
    write_own(tmp_path, spec, more=groups | {"train_images": arrays(spec)["train_images"] ^ 1})
    again = card.groups("own", [tmp_path])
    assert again.keys() == digests.keys()
    assert not set(again.values()) & set(digests.values())  # nobody tries names without the images
    write_own(tmp_path, spec, more={"train_groups": np.arange(9)})
    with pytest.raises(ValueError, match=r"missing \['test_groups', 'val_groups'\]"):
        data.load("own", source="medmnist", roots=[tmp_path])
    write_own(tmp_path, spec, more=groups | {"val_groups": np.arange(5)})
    with pytest.raises(ValueError, match=r"val_groups is int64 \(5,\).*\(4,\)"):
        data.load("own", source="medmnist", roots=[tmp_path])


BAD_CARDS = {
    "field missing": ({"license": None}, r"lacks \['license'\]"),
    "task": ({"task": "segmentation"}, "task is 'segmentation'; expected one of"),
    "name": ({"name": "other"}, "name is 'other'; expected the file's name, 'own'"),
    "channels": ({"n_channels": 4}, "n_channels is 4"),
    "channels text": ({"n_channels": "1"}, "n_channels is '1'; expected a JSON integer"),
    "channels bool": ({"n_channels": True}, "expected a JSON integer"),
    "label keys": ({"label": {"1": "a", "2": "b"}}, "keys '0', '1'"),
    "label list": ({"label": ["a", "b"]}, "expected a JSON object"),
    "label twice": ({"label": {"0": "a", "1": "a"}}, "two or more different"),
    "label semicolon": ({"label": {"0": "a; b", "1": "c"}}, "without a semicolon"),
    "binary": ({"label": {"0": "a", "1": "b", "2": "c"}}, "3 classes in a binary"),
    "counts": ({"n_samples": {"train": 3, "test": 1}}, "n_samples is"),
    "count 0": ({"n_samples": COUNTS | {"val": 0}}, "count above 0"),
    "count": ({"n_samples": COUNTS | {"val": 5}}, r"val_images is .*expected uint8 \(5, 28, 28\)"),
}


@pytest.mark.parametrize("case", BAD_CARDS)
def test_a_bad_card_is_refused_and_named(case, tmp_path):
    changes, message = BAD_CARDS[case]
    write_own(tmp_path, small("breastmnist"), **changes)
    with pytest.raises(ValueError, match=message) as caught:
        data.load("own", source="medmnist", roots=[tmp_path])
    assert str(tmp_path / "own") in str(caught.value)


DEEP = '{"note": ' + "[" * 10**5


@pytest.mark.parametrize(
    "text", ["{", "", "[1]", "\xff", DEEP], ids=["cut", "empty", "list", "latin", "deep"]
)
def test_a_card_that_is_not_a_json_object_is_refused(text, tmp_path):
    write_own(tmp_path, small("breastmnist")).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"own\.json: (not a JSON card|holds a list)"):
        data.load("own", source="medmnist", roots=[tmp_path])


def test_a_card_with_a_key_twice_is_refused(tmp_path):
    path = write_own(tmp_path, small("breastmnist"))
    path.write_text(path.read_text().replace('"label": {', '"label": {"1": "other", '))
    with pytest.raises(InputError, match=r"own\.json: the key '1' is there twice"):
        data.load("own", source="medmnist", roots=[tmp_path])


def test_half_of_a_custom_dataset_says_which_half_is_missing(tmp_path):
    path = write_own(tmp_path, small("breastmnist"))
    with pytest.raises(ValueError, match=r"own_64\.npz is missing.*own\.npz"):
        data.load("own", source="medmnist", roots=[tmp_path], size=64)
    text = path.read_text()
    path.unlink()
    with pytest.raises(ValueError, match="has no card"):
        data.load("own", source="medmnist", roots=[tmp_path])
    path.write_text(text)
    (tmp_path / "own.npz").unlink()
    with pytest.raises(ValueError, match=r"own\.npz is missing beside its card"):
        data.load("own", source="medmnist", roots=[tmp_path])


@pytest.mark.parametrize("source", data.SOURCES)
def test_an_unknown_name_names_the_nearest(source, tmp_path):
    with pytest.raises(ValueError, match=r"no dataset 'brestmnist'.*breastmnist"):
        data.load("brestmnist", source=source, roots=[tmp_path])
    write_own(tmp_path, small("breastmnist"))
    expected = "did you mean own" if source == "medmnist" else "no dataset 'owm'"
    with pytest.raises(ValueError, match=expected):
        data.load("owm", source=source, roots=[tmp_path])
    with pytest.raises(ValueError, match="no dataset"):
        data.load("../own", source=source, roots=[tmp_path])


def test_an_unknown_source_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean phantom"):
        data.load("breastmnist", source="fantom")


def test_errors_name_the_folders_of_cards(tmp_path):
    write_own(tmp_path, small("breastmnist"))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        data.load("owm", source="medmnist", roots=[tmp_path])
    assert card.names([tmp_path, tmp_path]) == ("own",)


# Real files

REAL = {
    "breastmnist": ("medmnist", True),
    "retinamnist": ("medmnist", True),
    "pneumoniamnist": ("medmnist", False),
    "ham10000": ("card", True),
    "pbc_blood": ("card", True),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_pass_every_check(name, shared):
    roots = [shared / "medmnist", shared / "medmnist_form"]
    dataset = data.load(name, source="medmnist", roots=roots, allow_unverified=["pneumoniamnist"])
    assert (dataset.source, dataset.md5_ok) == REAL[name]
    assert {split: len(s) for split, s in dataset.splits.items()} == dataset.spec.n_samples
