"""Names of datasets: the rule is said, and no two names are taken for each other."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from bench.__main__ import app
from tests.vitask.data.test_archive import arrays, own_card, small
from vitask import data
from vitask.data import card, medmnist
from vitask.data.loading import present
from vitask.tsm import heads

SPEC = small("breastmnist")
BROKEN = [
    "my.set",
    "my set",
    "_own",
    "-own",
    "été",
    "e\u0301",
    "naïve",
    "a+b",
    "a,b",
    "数据",
    "x" * 101,
]


def write(folder, name):
    """A whole custom dataset of this name."""
    np.savez(folder / f"{name}.npz", **arrays(SPEC))
    text = json.dumps(own_card(SPEC, name), ensure_ascii=False)
    (folder / f"{name}.json").write_text(text, "utf-8")


def bench(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("name", [*BROKEN, "", "a/b", "../own", "a\x00", "x" * 300])
@pytest.mark.parametrize("source", data.SOURCES)
def test_a_name_that_breaks_the_rule_is_told_the_rule(name, source, tmp_path):
    if name in BROKEN:
        write(tmp_path, name)
    for ask in (data.load, data.spec):
        with pytest.raises(ValueError, match="letters from a to z, digits, - and _") as caught:
            ask(name, source=source, roots=[tmp_path])
        assert repr(name) in str(caught.value)
        assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", BROKEN)
def test_a_card_whose_name_breaks_the_rule_is_named_and_the_others_stay(name, tmp_path):
    write(tmp_path, "own")
    write(tmp_path, name)
    file = str(tmp_path / f"{name}.json")
    for ask in (data.names, data.specs):
        with pytest.raises(ValueError, match="letters from a to z") as caught:
            ask("medmnist", [tmp_path])
        assert file in str(caught.value)
    with pytest.raises(ValueError, match="did you mean own") as caught:
        data.spec("owm", roots=[tmp_path])
    assert file in str(caught.value)
    assert present("medmnist", [tmp_path], 28) == card.names([tmp_path]) == ("own",)
    assert data.spec("own", roots=[tmp_path]).name == "own"


def test_data_check_and_list_name_the_card(tmp_path):
    write(tmp_path, "own")
    write(tmp_path, "my.set")
    done = bench("data", "check", "--data-root", tmp_path)
    assert done.exit_code == 1
    assert f"{tmp_path / 'my.set.json'} cannot be used: a name has letters" in done.stderr
    assert "own: 9 / 4 / 5 images" in done.stdout
    done = bench("list", "--data-root", tmp_path)
    assert done.exit_code == 1
    assert str(tmp_path / "my.set.json") in done.stderr


def test_hidden_files_and_lone_json_files_are_no_cards(tmp_path):
    write(tmp_path, "own")
    write(tmp_path, "._own")
    (tmp_path / "my.notes.json").write_text("{}")
    assert data.names("medmnist", [tmp_path])[-1] == "own"


@pytest.mark.parametrize(("name", "other"), [("BreastMNIST", "breastmnist"), ("Own", "own")])
def test_names_that_differ_in_case_alone_are_refused(name, other, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    write(folders[0], name)
    if other not in medmnist.NAMES:
        write(folders[1], other)
    for ask in (lambda: data.load(name, source="medmnist", roots=folders),
                lambda: data.spec(name, roots=folders),
                lambda: data.names("medmnist", folders)):  # fmt: skip
        with pytest.raises(ValueError, match=f"differs from '{other}' only in case") as caught:
            ask()
        assert name in str(caught.value)
    assert data.spec("retinamnist", roots=folders).name == "retinamnist"


def test_one_name_in_two_roots_is_the_first_root_s(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder, "own")
    assert card.names([tmp_path / "b", tmp_path / "a"]) == ("own",)
    assert card.find("own", [tmp_path / "b", tmp_path / "a"]) == tmp_path / "b" / "own.json"


def test_another_case_of_a_known_name_is_the_nearest():
    with pytest.raises(ValueError, match="did you mean pathmnist\\?"):
        data.spec("PATHMNIST")


@pytest.mark.parametrize("name", ["organ", "Organ", "average", "mean", "Loss"])
def test_names_that_stand_for_something_else_are_refused(name, tmp_path):
    write(tmp_path, name)
    with pytest.raises(ValueError, match="is taken by the"):
        data.load(name, source="medmnist", roots=[tmp_path])
    with pytest.raises(ValueError, match="is taken by the"):
        data.names("medmnist", [tmp_path])


def test_a_head_is_shared_by_equal_classes_alone():
    organ = [medmnist.spec(f"organ{view}mnist") for view in "acs"]
    assert heads(organ)["organ"].stop == 11
    other = replace(medmnist.spec("breastmnist"), name="mine", head="organ")
    with pytest.raises(ValueError, match="'organamnist' and 'mine' share the TSM's head 'organ'"):
        heads([*organ, other])
