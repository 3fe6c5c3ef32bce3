"""External sets in their published form: grades, splits, and errors in a folder."""

import json
import struct
import sys
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from vitask.data import external, medmnist, phantom
from vitask.data.spec import DatasetSpec
from vitask.prompts import candidates, instruction

RETINA = medmnist.spec("retinamnist")
GRADES = [0, 1, 2, 3, 4] * 4


def photograph(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((40, 60, 3), 10, dtype=np.uint8)
    pixels[:, 10:50] = value  # the centre square has one value
    Image.fromarray(pixels).save(path)


def published(folder, table, header, image, row):
    """A set's folder: a table with a line for each image, and images whose value is their grade."""
    for number, grade in enumerate(GRADES):
        photograph(folder / image.format(number), 50 + grade)
    lines = [header, *(row(number, grade) for number, grade in enumerate(GRADES))]
    (folder / table).write_text("\n".join(lines))
    return folder


def aptos(root):
    return published(
        root / "aptos2019", "train.csv", "id_code,diagnosis", "train_images/a{}.png",
        lambda number, grade: f"a{number},{grade}",
    )  # fmt: skip


def messidor2(root):
    return published(
        root / "messidor2", "messidor_data.csv",
        "image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable", "images/m{}.jpg",
        lambda number, grade: f"m{number}.jpg," + (",0,0" if number == 7 else f"{grade},0,1"),
    )  # fmt: skip


def messidor(root):
    return published(
        root / "messidor", "annotations.csv", "Image name,Retinopathy grade", "images/p{}.tif",
        lambda number, grade: f"p{number}.tif,{min(grade, 3)}",
    )  # fmt: skip


def xls(path, rows):
    """The oldest form of Excel's files that is still read (BIFF2): type, length, content."""

    def record(kind, content):
        return struct.pack("<HH", kind, len(content)) + content

    found = record(0x09, struct.pack("<HH", 7, 0x10))  # start of a worksheet
    for line, row in enumerate(rows):
        for column, value in enumerate(row):
            place = struct.pack("<HH3x", line, column)
            if isinstance(value, str):
                found += record(0x04, place + bytes([len(value)]) + value.encode())
            else:
                found += record(0x03, place + struct.pack("<d", value))
    path.write_bytes(found + record(0x0A, b""))


def messidor_published(root):
    """Two bases with an XLS file each, and no annotations.csv."""
    folder = messidor(root)
    (folder / "annotations.csv").unlink()
    header = (
        "Image name", "Ophthalmologic department", "Retinopathy grade", "Risk of macular edema ",
    )  # fmt: skip
    rows = [(f"p{number}.tif", "A", min(grade, 3), 0) for number, grade in enumerate(GRADES)]
    xls(folder / "Annotation_Base11.xls", [header, *rows[:8]])
    xls(folder / "Annotation_Base12.xls", [header, *rows[8:]])
    return folder


def read(name, root):
    return external.load(name, RETINA, source="medmnist", roots=[root], size=28)


@pytest.mark.parametrize("make", [aptos, messidor2], ids=["aptos2019", "messidor2"])
def test_splits_are_stratified_and_have_every_gradable_image_once(make, tmp_path):
    name = make(tmp_path).name
    found = read(name, tmp_path)
    labels = np.concatenate([split.labels for split in found.splits.values()])
    assert len(labels) == len(GRADES) - (name == "messidor2")
    names = [i for split in found.splits.values() for i in split.ids]
    assert len(set(names)) == len(names)
    assert set(found.splits["train"].labels) == set(found.splits["test"].labels) == set(range(5))
    again = read(name, tmp_path)
    assert found.md5 == again.md5
    assert found.spec.classes == RETINA.classes
    assert found.spec.head == RETINA.head


def test_messidor_asks_five_grades_and_counts_the_last_two_as_one(tmp_path):
    found = read(messidor(tmp_path).name, tmp_path)
    assert instruction(found.spec) == instruction(RETINA)
    assert found.spec.classes[:3] == RETINA.classes[:3]
    assert len(found.spec.classes) == 4
    labels = np.concatenate([split.labels for split in found.splits.values()])
    assert sorted(set(labels)) == [0, 1, 2, 3]
    answers = candidates(found.spec, labels)
    assert answers.texts == RETINA.classes
    assert answers.members.argmax(1).tolist() == [0, 1, 2, 3, 3]
    assert DatasetSpec.of_json(json.loads(json.dumps(asdict(found.spec)))) == found.spec


def test_messidor_as_published_equals_its_tables_as_one_csv(tmp_path):
    pytest.importorskip("xlrd")
    messidor(tmp_path / "csv")
    messidor_published(tmp_path / "xls")
    assert read("messidor", tmp_path / "xls").md5 == read("messidor", tmp_path / "csv").md5
    table = tmp_path / "xls" / "messidor" / "Annotation_Base12.xls"
    xls(table, [("Image name", "Retinopathy grade"), ("p1.tif", 1), ("p2.tif", "")])
    assert [path.name for path, *_ in external.READERS["messidor"](table.parent)][8:] == ["p1.tif"]
    table.write_text("Image name,Retinopathy grade")
    with pytest.raises(ValueError, match=r"Annotation_Base12\.xls is not an XLS file"):
        read("messidor", tmp_path / "xls")


def test_messidor_as_published_names_the_package_that_reads_it(tmp_path, monkeypatch):
    folder = messidor_published(tmp_path)
    monkeypatch.setitem(sys.modules, "xlrd", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"Annotation_Base11\.xls .*pip install xlrd"):
        read("messidor", tmp_path)
    for path in folder.glob("*.xls"):
        path.unlink()
    with pytest.raises(ValueError, match="neither the published XLS files nor an annotations"):
        read("messidor", tmp_path)


def test_images_are_their_centre_square(tmp_path):
    aptos(tmp_path)
    test = read("aptos2019", tmp_path).splits["test"]
    assert test.images.shape[1:] == (28, 28, 3)
    assert (test.images == (50 + test.labels)[:, None, None, None]).all()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no folder 'idrid'"):
        read("idrid", tmp_path)
    folder = aptos(tmp_path)
    (folder / "train_images" / "a3.png").unlink()
    with pytest.raises(ValueError, match="no image 'a3'"):
        read("aptos2019", tmp_path)
    (folder / "train.csv").write_text("id_code,grade\na1,2\n")
    with pytest.raises(ValueError, match=r"lacks the column\(s\) \['diagnosis'\]"):
        read("aptos2019", tmp_path)
    (folder / "train.csv").unlink()
    with pytest.raises(ValueError, match=r"train\.csv is missing"):
        read("aptos2019", tmp_path)


def test_idrid_as_published(shared):
    found = read("idrid", shared / "external")
    counts = {split: np.bincount(s.labels).tolist() for split, s in found.splits.items()}
    assert counts["test"] == [34, 5, 32, 19, 13]
    train = np.add(counts["train"], counts["val"])
    assert train.sum() == 412  # IDRiD_118 is a picture of the test split
    assert not any("IDRiD_118" in i for split in ("train", "val") for i in found.splits[split].ids)


@pytest.mark.parametrize("name", external.SHIFTS)
def test_phantoms_are_other_pictures_in_other_colours(name):
    found = external.load(name, RETINA, source="phantom", roots=(), size=28)
    base = phantom.make("retinamnist")
    assert found.source == "phantom"
    assert found.splits["test"].images.mean((0, 1, 2)) != pytest.approx(
        base.splits["test"].images.mean((0, 1, 2)), abs=3
    )
    known = {image.tobytes() for image in base.splits["train"].images}
    assert not known & {image.tobytes() for image in found.splits["test"].images}
