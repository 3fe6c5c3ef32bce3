"""No record and no page holds a name that could be a person's; the mapping stays with the user."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bench.__main__ import app
from bench.api import run_plan
from bench.runs import sets
from bench.runs.environment import command_line
from bench.runs.records import read_samples
from bench.suite import suite
from tests.bench.cheap_runs import problems, records_of
from vitask.data import external, load, medmnist

PEOPLE = [f"Mustermann_Erika_{number}" for number in range(20)]
RETINA = medmnist.spec("retinamnist")


@pytest.fixture
def photographs(tmp_path):
    """A data root with APTOS 2019, whose files carry names; every fourth is turned by its EXIF."""
    folder = tmp_path / "root" / "aptos2019"
    (folder / "train_images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = ["id_code,diagnosis"]
    for number, name in enumerate(PEOPLE):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        exif = Image.Exif()
        exif[274] = 3 if number % 4 == 0 else 1
        Image.fromarray(pixels).save(folder / "train_images" / f"{name}.png", exif=exif)
        lines.append(f"{name},{number % 5}")
    (folder / "train.csv").write_text("\n".join(lines))
    return tmp_path / "root"


@pytest.fixture
def patients(tmp_path):
    """A data root with a dataset of two classes, whose groups carry names."""
    root, rng, counts = (
        tmp_path / "root",
        np.random.default_rng(1),
        {"train": 8, "val": 4, "test": 8},
    )
    root.mkdir(exist_ok=True)
    arrays = {}
    for number, (split, count) in enumerate(counts.items()):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count)[:, None] % 2
        some = PEOPLE[6 * number : 6 * number + 6]
        arrays[f"{split}_groups"] = np.array([some[i % 6] for i in range(count)])
    np.savez(root / "own.npz", **arrays)
    card = {
        "name": "own", "modality": "toy", "task": "binary-class", "label": {"0": "a", "1": "b"},
        "n_channels": 1, "n_samples": counts, "license": "none", "source": "a test",
    }  # fmt: skip
    (root / "own.json").write_text(json.dumps(card))
    return root


def ids(*words):
    return CliRunner().invoke(app, ["data", "ids", *map(str, words)])


def rows(text):
    header, *found = csv.reader(io.StringIO(text))
    return header, dict(found)


def written(folder: Path) -> str:
    """Everything in a run's folder as text."""
    whole = [path.name for path in folder.rglob("*")]
    for path in folder.rglob("*"):
        if path.suffix == ".parquet":
            for sample in read_samples(path).values():
                whole += [*sample.ids, *(() if sample.groups is None else sample.groups)]
        elif path.is_file():
            whole.append(path.read_text("utf-8"))
    return "\n".join(map(str, whole))


def test_a_run_on_files_keeps_their_names_out(plan, photographs, monkeypatch):
    def evaluated(self, plan, datasets):
        found = external.load("aptos2019", RETINA, source="files", roots=[photographs], size=28)
        return {"aptos2019": found}

    plan = replace(plan, names=("retinamnist",))
    monkeypatch.setattr(type(suite("cheap")), "evaluated", evaluated)
    said = []
    done = run_plan(plan, ["cheap"], command="python -m bench run cheap", note=said.append)
    assert done.failed == {}
    assert said[:1] == ["aptos2019: 5 image(s): turned as their EXIF says"]
    text = written(plan.folder)
    assert not any(name in text for name in PEOPLE)
    assert "Mustermann" not in text
    sample = read_samples(next((plan.folder / "samples").glob("*.parquet")))["aptos2019"]
    header, found = rows(ids("aptos2019", "--data-root", photographs).stdout)
    assert header == ["file", "id"]
    assert set(sample.ids) < set(found.values())


def test_a_run_on_groups_keeps_their_names_out(plan, patients):
    plan = replace(plan, source="medmnist", names=("own",), roots=(patients,))
    done = run_plan(plan, ["cheap"], command="python -m bench run cheap", note=lambda text: None)
    assert done.failed == {}
    assert problems(plan) == []
    assert len(records_of(plan)) == len(sets.read_manifest(plan.folder)["cheap"].records)
    text = written(plan.folder)
    assert "Mustermann" not in text
    sample = read_samples(next((plan.folder / "samples").glob("*.parquet")))["own"]
    header, found = rows(ids("own", "--data-root", patients).stdout)
    assert header == ["group", "digest"]
    with np.load(patients / "own.npz") as archive:
        expected = [found[name] for name in archive["test_groups"].tolist()]
    assert sample.groups.tolist() == expected


def test_the_mapping_is_written_where_the_user_says(photographs, tmp_path):
    printed = ids("aptos2019", "--data-root", photographs)
    assert printed.exit_code == 0, printed.output
    _, found = rows(printed.stdout)
    assert set(found) == {f"train_images/{name}.png" for name in PEOPLE}
    done = ids("aptos2019", "--data-root", photographs, "--csv", tmp_path / "new" / "ids.csv")
    assert (done.exit_code, done.output) == (0, "")
    assert (tmp_path / "new" / "ids.csv").read_text() == printed.stdout
    for place in (tmp_path, photographs / "aptos2019" / "train.csv" / "x.csv"):
        done = ids("aptos2019", "--data-root", photographs, "--csv", place)
        assert done.exit_code == 1
        assert f"--csv {place} cannot be written" in done.output
        assert "Traceback" not in done.output


def test_what_has_no_mapping_is_said(patients):
    done = ids("idrid", "--data-root", patients)
    assert done.exit_code == 2
    assert "no dataset 'idrid'" in done.output
    with np.load(patients / "own.npz") as archive:
        plain = {key: archive[key] for key in archive.files if "groups" not in key}
    np.savez(patients / "own.npz", **plain)
    done = ids("own", "--data-root", patients)
    assert done.exit_code == 2
    assert "own has no groups, and its ids are places in the archive" in done.output
    assert load("own", source="medmnist", roots=[patients]).splits["test"].groups is None


@pytest.mark.parametrize(
    ("root", "given"),
    [("jane_doe", "./jane_doe"), ("/d/jane_doe", "/d//jane_doe/"), ("a/jane", "a/./jane"),
     ("./jane", "jane"), ("jane", "jane")],
)  # fmt: skip
def test_no_spelling_of_a_path_is_in_the_command_of_a_record(root, given):
    words = ["run", "main", "", "--data-root", given, f"--data-root={given}", "--out", "./x"]
    found = command_line([Path(root)], Path("x"), words)
    assert found == (
        "python -m bench run main  --data-root DATA_ROOT --data-root=DATA_ROOT --out OUT"
    )
