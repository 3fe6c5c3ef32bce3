"""External sets in their published form: grades, splits, and errors in a folder."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import unicodedata
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitask.data import external, medmnist, phantom
from vitask.data.pseudonyms import pseudonyms
from vitask.data.spec import DatasetSpec
from vitask.data.subset import subset
from vitask.errors import InputError
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
    xls(table, [("Image name", "Retinopathy grade"), ("p9.tif", 1.0), ("", ""), ("p8.tif", 3)])
    found = external.READERS["messidor"](table.parent)[8:]
    assert [(path.name, grade) for path, grade, _ in found] == [("p9.tif", 1), ("p8.tif", 3)]
    for value in ("", 0.5, 4, "x"):
        xls(table, [("Image name", "Retinopathy grade"), ("p9.tif", 1), ("p8.tif", value)])
        with pytest.raises(
            InputError, match=rf"Annotation_Base12\.xls, row 3, image 'p8.tif'.*{value}"
        ):
            read("messidor", tmp_path / "xls")
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
    files = external.image_ids("idrid", [shared / "external"])
    names = {Path(file).stem for file in files}
    assert len(files) == 412 + 103
    assert "IDRiD_118" not in names
    every = [i for split in found.splits.values() for i in split.ids]
    assert sorted(every) == sorted(files.values())
    assert not any(name in i for name in names for i in every)


# Tables


def changed(folder, *edits):
    """The set's table with some texts replaced."""
    (path,) = folder.glob("*.csv")
    text = path.read_text("utf-8")
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize(
    "value", ["5", "-1", "2.5", "x", "", "inf", "nan", "1e0", "True", "٣", "0x1"]
)
@pytest.mark.parametrize(
    ("make", "old"), [(aptos, "a3,3\n"), (messidor2, "m3.jpg,3,0,1\n"), (messidor, "p3.tif,3\n")]
)
def test_only_grades_of_the_set_are_taken(make, old, value, tmp_path):
    folder = make(tmp_path)
    path = changed(folder, (old, old.replace(",3", f",{value}", 1)))
    message = rf"{path.name}, row 5, image '{old.split(',')[0]}': .* is '{value}'; expected a whole"
    with pytest.raises(InputError, match=message):
        read(folder.name, tmp_path)


def test_messidors_last_grade_is_3(tmp_path):
    changed(messidor(tmp_path), ("p3.tif,3\n", "p3.tif,4\n"))
    with pytest.raises(InputError, match="is '4'; expected a whole number from 0 to 3"):
        read("messidor", tmp_path)


def test_whole_numbers_may_have_a_point_and_blanks(tmp_path):
    before = read(aptos(tmp_path).name, tmp_path)
    changed(tmp_path / "aptos2019", ("a3,3\n", " a3 , 3.0\n\n,\n"), ("a4,4\n", "a4.PNG,4.\n"))
    after = read("aptos2019", tmp_path)
    assert before.md5 == after.md5
    assert before.splits["test"].ids.tolist() == after.splits["test"].ids.tolist()


@pytest.mark.parametrize("value", ["2", "-1", "", "yes", "0.5"])
def test_gradable_is_0_or_1(value, tmp_path):
    changed(messidor2(tmp_path), ("m3.jpg,3,0,1\n", f"m3.jpg,3,0,{value}\n"))
    with pytest.raises(InputError, match=f"adjudicated_gradable is '{value}'; expected a whole"):
        read("messidor2", tmp_path)


@pytest.mark.parametrize(
    "name", ["000123", "5e1234", "1e5", "nan", "NA", "None", "1.50", "a.b", "ä ö", "-7"]
)
def test_ids_are_texts(name, tmp_path):
    folder = aptos(tmp_path)
    before = read("aptos2019", tmp_path)
    (folder / "train_images" / "a3.png").rename(folder / "train_images" / f"{name}.PNG")
    path = changed(folder, ("a3,3", f"{name},3"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_text("utf-8").encode())  # as Excel saves it
    assert read("aptos2019", tmp_path).md5 == before.md5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a3,3\na3,3", r"row 6, image 'a3' is listed before, in .*row 5, image 'a3'; keep one"),
        ("a3,3\na3.png,1", "row 6, image 'a3.png' is listed before"),
        ("../a3,3", "image '../a3': an id is the name of a file, not a path"),
        ("..,3", r"image '\.\.': an id is the name of a file, not a path"),
        ("/etc/passwd,3", "not a path"),
        ("b\\\\a3,3", "not a path"),
        ("._a3,3", "not hidden"),
        (",3", "row 5: id_code is empty"),
        ("a3,3,4", "row 5 has 3 cells, the header 2; a cell with a comma needs quotes"),
        ('"a3,3', "cannot be used .*save it as CSV UTF-8"),
        ("a3", "diagnosis is ''"),
    ],
)
def test_a_row_that_could_mean_something_else_is_refused(row, message, tmp_path):
    changed(aptos(tmp_path), ("a3,3", row))
    with pytest.raises(InputError, match=message) as caught:
        read("aptos2019", tmp_path)
    assert "train.csv" in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_a_table_in_another_encoding_is_refused(encoding, tmp_path):
    path = changed(aptos(tmp_path), ("a3,3", "ä3,3"))
    path.write_bytes(path.read_text("utf-8").encode(encoding))
    with pytest.raises(InputError, match=r"train\.csv is not UTF-8 text .*save it as CSV UTF-8"):
        read("aptos2019", tmp_path)


def test_a_column_may_not_be_there_twice(tmp_path):
    changed(aptos(tmp_path), ("id_code,diagnosis", "id_code,diagnosis,diagnosis"))
    with pytest.raises(InputError, match=r"\['diagnosis'\] more than once"):
        read("aptos2019", tmp_path)


def test_a_damaged_xls_is_refused(tmp_path, capsys):
    pytest.importorskip("xlrd")
    table = messidor_published(tmp_path) / "Annotation_Base11.xls"
    whole, rng = table.read_bytes(), np.random.default_rng(0)
    for _ in range(40):
        damaged = np.frombuffer(whole, dtype=np.uint8).copy()
        damaged[rng.integers(0, 60, 4)] = rng.integers(0, 256, 4)
        table.write_bytes(damaged.tobytes()[: rng.integers(0, len(whole) + 1)])
        with suppress(InputError):
            external.READERS["messidor"](table.parent)
    assert capsys.readouterr().out == ""


# Files


def test_two_files_of_one_name_are_refused_and_copies_passed_over(tmp_path):
    folder = aptos(tmp_path) / "train_images"
    before = read("aptos2019", tmp_path).md5
    for copy in (".a3.png", "._a3.png", "a3.txt", "__MACOSX/a3.png"):
        (folder / copy).parent.mkdir(exist_ok=True)
        (folder / copy).write_bytes(b"copy")
    assert read("aptos2019", tmp_path).md5 == before
    shutil.copy(folder / "a3.png", folder / "a3.JPEG")
    with pytest.raises(InputError, match=r"image 'a3': .* has a3\.JPEG and a3\.png; expected one"):
        read("aptos2019", tmp_path)


@pytest.mark.parametrize("ending", [".PNG", ".Jpeg", ".TIF", ".gif", ".webp"])
def test_any_ending_of_an_image_is_found(ending, tmp_path):
    folder = aptos(tmp_path) / "train_images"
    (folder / "a3.png").rename(folder / f"a3{ending}")  # the content decides what it is
    read("aptos2019", tmp_path)


def test_accents_may_be_stored_apart_from_their_letters(tmp_path):
    folder = aptos(tmp_path) / "train_images"
    composed, apart = (unicodedata.normalize(form, "é3") for form in ("NFC", "NFD"))
    (folder / "a3.png").rename(folder / f"{apart}.png")
    changed(folder.parent, ("a3,3", f"{composed},3"))
    found = set(read("aptos2019", tmp_path).splits["train"].ids)
    (folder / f"{apart}.png").rename(folder / f"{composed}.png")
    assert set(read("aptos2019", tmp_path).splits["train"].ids) == found


def test_ids_are_equal_in_every_locale(tmp_path):
    folder = aptos(tmp_path) / "train_images"
    (folder / "a3.png").rename(folder / "é3.png")
    changed(folder.parent, ("a3,3", "é3,3"))
    code = (
        "import sys; from pathlib import Path; from vitask.data.external import image_ids\n"
        "print(sorted(image_ids('aptos2019', [Path(sys.argv[1])]).values()))"
    )
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == f"{sorted(external.image_ids('aptos2019', [tmp_path]).values())}\n", (
        done.stderr
    )


def test_a_file_that_is_not_regular_is_not_waited_for(tmp_path):
    folder = aptos(tmp_path) / "train_images"
    (folder / "a3.png").unlink()
    os.mkfifo(folder / "a3.png")
    with pytest.raises(InputError, match=r"a3\.png .*is not a regular file"):
        read("aptos2019", tmp_path)


def test_what_the_reader_did_is_noted(tmp_path):
    folder = aptos(tmp_path) / "train_images"
    assert read("aptos2019", tmp_path).notes == ()
    for number in (3, 4):
        with Image.open(folder / f"a{number}.png") as image:
            image.putalpha(100)
            image.save(folder / f"a{number}.png")
    found = read("aptos2019", tmp_path)
    assert [note[:11] for note in found.notes] == ["2 image(s):"]
    assert subset(found, train=5).notes == found.notes


def test_a_set_that_is_too_small_for_its_splits_is_refused(tmp_path):
    (aptos(tmp_path) / "train.csv").write_text("id_code,diagnosis\na1,1\n")
    with pytest.raises(InputError, match=r"1 labelled image.*none for the split"):
        read("aptos2019", tmp_path)


# Ids


def test_ids_hold_no_name_and_are_equal_in_every_size_and_subset(tmp_path):
    read_again = external.load(
        aptos(tmp_path).name, RETINA, source="medmnist", roots=[tmp_path], size=64
    )
    found = read("aptos2019", tmp_path)
    for split, images in found.splits.items():
        assert all(re.fullmatch(f"aptos2019/{split}/[0-9a-f]{{12}}", i) for i in images.ids)
        assert images.ids.tolist() == read_again.splits[split].ids.tolist()
        assert set(subset(found, **{split: 2}).splits[split].ids) <= set(images.ids)
    assert sorted(external.image_ids("aptos2019", [tmp_path]).values()) == sorted(
        i for split in found.splits.values() for i in split.ids
    )


def test_ids_are_keyed_by_the_images(tmp_path):
    folder = aptos(tmp_path)
    before = external.image_ids("aptos2019", [tmp_path])
    shutil.copytree(folder, tmp_path / "elsewhere" / "aptos2019")
    assert external.image_ids("aptos2019", [tmp_path / "elsewhere"]) == before
    photograph(folder / "train_images" / "a3.png", 9)  # one other image, and every digest differs
    after = external.image_ids("aptos2019", [tmp_path])
    assert after.keys() == before.keys()
    assert not set(after.values()) & set(before.values())


def test_different_names_have_different_pseudonyms():
    names = {"", "a", "A", "ä", "a\u0308", "a/b", "\udcff", "x" * 999, *map(str, range(99))}
    found = pseudonyms(names, b"key")
    assert found.keys() == names
    assert len(set(found.values())) == len(names)
    assert found == pseudonyms(sorted(names), b"key")
    assert not set(found.values()) & set(pseudonyms(names, b"other").values())


def test_pseudonyms_grow_where_they_would_be_equal(monkeypatch):
    module = sys.modules[pseudonyms.__module__]
    monkeypatch.setattr(module, "DIGITS", 1)
    found = pseudonyms({str(number) for number in range(100)}, b"key")
    assert len(set(found.values())) == 100


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
