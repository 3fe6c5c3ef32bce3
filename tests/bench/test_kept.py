"""A kept model that is damaged is named, set aside and trained again; nothing is deleted."""

import json
import shutil

import pytest
import torch

from bench.runs.models import kept, models_of
from vitask.errors import InputError
from vitask.files import digests
from vitask.tsm import TSM, Head

NOTE = "training.json"
FILES = ("training.json", "tsm.json", "tsm.safetensors")


class Trainer:
    """`kept` for tiny TSMs: the model of a key is always the same; counts trainings."""

    def __init__(self, place):
        self.place, self.trained, self.said = place, [], []

    def __call__(self, name, key, load=TSM.load, suite="cheap"):
        def train():
            self.trained.append(key)
            torch.manual_seed(int(key))
            return TSM("test_resnet", {"a": Head(0, 2)}, 32).eval(), [{"loss": 1.0}]

        def save(model, folder):
            folder.mkdir()
            model.save(folder)

        done = kept(self.place, name, key, suite, lambda: train, save, load, say=self.said.append)
        self.note = done[1]
        return done[0].state_dict()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models, of the keys 1 and 2, and what `kept` gave."""
    made = Trainer(tmp_path_factory.mktemp("models"))
    return made.place, made("one", "1"), made("other", "2")


@pytest.fixture
def trainer(models, tmp_path):
    """These models, in a folder for the test."""
    return Trainer(shutil.copytree(models[0], tmp_path / "checkpoints"))


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "gone", "exchanged"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_model_is_set_aside_and_trained_again(models, trainer, name, how):
    _, first, neighbour = models
    whole = digests(trainer.place)
    path = trainer.place / "one" / name
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "gone":
        path.unlink()
    elif how == "exchanged":
        shutil.copy(trainer.place / "other" / name, path)
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"cut": content[:middle], "flipped": flipped, "empty": b""}[how])
    before = digests(trainer.place / "one")
    assert same(trainer("one", "1"), first)
    if (name, how) == (NOTE, "exchanged"):  # the note of 2 on the files of 1
        assert same(trainer("other", "2"), neighbour)
    aside = trainer.place / "damaged"
    assert [digests(folder) for folder in aside.iterdir()] == [before]
    (text,) = trainer.said
    assert f"{trainer.place / 'one'}" in text
    assert how == "exchanged" or name in text
    assert str(aside / "one") in text
    assert same(trainer("one", "1"), first)
    assert trainer.trained == ["1"]  # once: it is found from now on
    for file, digest in whole.items():
        if not file.endswith(NOTE):  # its seconds differ
            found = digests(trainer.place)
            assert digest in {found.get(file), found.get(file.replace("one/", "one-2/"))}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"key": 5}'])
def test_a_damaged_neighbour_never_stops_another_model(trainer, content):
    (trainer.place / "one" / NOTE).write_bytes(content)
    trainer("other", "2")
    trainer("other", "2")
    assert trainer.trained == []
    assert len(trainer.said) == 1
    assert f"{trainer.place / 'one' / NOTE}" in trainer.said[0]
    assert (trainer.place / "damaged" / "one" / NOTE).read_bytes() == content


def test_every_damaged_model_keeps_its_own_place(trainer):
    for _ in range(2):
        (trainer.place / "one" / "tsm.safetensors").write_bytes(b"")
        trainer("one", "1")
    names = sorted(path.name for path in (trainer.place / "damaged").iterdir())
    assert names == ["one", "one-2"]


def test_a_model_that_is_not_to_blame_stays(trainer):
    """A base VLM that is missing, or a full memory, is not the checkpoint's fault."""

    def load(folder):
        raise InputError("no base VLM")

    with pytest.raises(InputError, match="no base VLM"):
        trainer("one", "1", load)
    assert (trainer.place / "one" / NOTE).is_file()
    assert trainer.said == []


def test_notes_of_earlier_versions_are_found(models, trainer):
    path = trainer.place / "one" / NOTE
    note = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in note.items() if k not in ("files", "sha256")}))
    assert same(trainer("one", "1"), models[1])
    assert trainer.trained == []
    found = trainer.note
    assert found.pop("found")
    assert found == {k: v for k, v in note.items() if k not in ("files", "sha256")}
    assert trainer.place / "one" in models_of(trainer.place, "cheap")


def test_the_note_is_the_same_whether_the_model_was_found(trainer):
    trainer("third", "3")
    made = trainer.note
    trainer("third", "3")
    assert trainer.note == made | {"found": True}


def test_only_our_files_are_deleted_for_fresh(trainer):
    trainer("third", "3", suite="another")
    trainer("fourth", "4")
    (trainer.place / "other" / "notes.txt").write_text("years of work")
    (trainer.place / "fourth" / NOTE).write_bytes(b"{")
    found = models_of(trainer.place, "cheap")
    ours = [trainer.place / "other" / name for name in sorted((*FILES,))]
    assert found == [trainer.place / "one", *sorted(ours)]


def test_what_is_not_a_model_makes_room(trainer):
    (trainer.place / "third").mkdir()
    (trainer.place / "third" / "notes.txt").write_text("years of work")
    trainer("third", "3")
    assert (trainer.place / "damaged" / "third" / "notes.txt").read_text() == "years of work"
    assert trainer.trained == ["3"]


@pytest.mark.parametrize("content", ["{}", "{", '{"log": [1], "seconds": 3}'])
def test_a_folder_of_the_user_stays_whatever_its_note_says(trainer, content):
    folder = trainer.place / "mine"
    folder.mkdir()
    (folder / NOTE).write_text(content)
    (folder / "model.bin").write_text("years of work")
    trainer("one", "1")
    assert sorted(path.name for path in folder.iterdir()) == ["model.bin", NOTE]
    assert trainer.said == []


def test_a_note_of_the_user_beside_a_model_makes_it_no_model_of_a_run(trainer):
    (trainer.place / "other" / NOTE).write_text('{"epochs": 3}')
    trainer("third", "3")
    assert (trainer.place / "other" / "tsm.json").is_file()
    assert trainer.said == []


def test_our_note_without_its_model_is_set_aside(trainer):
    path = trainer.place / "other" / NOTE
    path.write_text(path.read_text().replace("1.0", "2.0"))
    (path.parent / "tsm.json").unlink()
    trainer("third", "3")
    assert len(trainer.said) == 1
    assert (trainer.place / "damaged" / "other" / NOTE).is_file()
