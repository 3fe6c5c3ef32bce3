"""Results of a folder: killed, continued, extended, superseded, collected, deleted."""

import json
import os
import signal
import time
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bench.api import run_plan
from bench.commands.verify import differences
from bench.report.render import write
from bench.runs import keys, sets
from bench.runs.plan import Job, Plan
from bench.runs.records import read_samples
from bench.suite import suite
from tests.bench.cheap_runs import complete, problems, records_of
from vitask.files import PART, part_of
from vitask.sealed import write_sealed


def contents(folder):
    """Every file's bytes, with the times and memory of records left out."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if path.parent.name == "records":
            record = json.loads(content)
            assert set(record.pop("measured")) == {"seconds", "peak_mib", "sha256"}
            content = json.dumps(record)
        found[path.relative_to(folder).as_posix()] = content
    return found


def changed_at(folder):
    return {p.name: p.stat().st_mtime_ns for p in (folder / "records").iterdir()}


@pytest.mark.parametrize("kills", [5, pytest.param(60, marks=pytest.mark.long)])
def test_killed_at_any_moment_and_continued_gives_the_same_files(plan, tmp_path, kills):
    plan = replace(plan, seeds=(0, 1))
    start = time.monotonic()
    complete(plan)
    seconds = time.monotonic() - start
    expected = contents(plan.folder)
    again = replace(plan, out=tmp_path / "again")
    rng = np.random.default_rng(0)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            try:
                with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
                    complete(again)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.1, 0.6) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    complete(again)
    assert contents(again.folder) == expected


def test_a_run_continues_where_it_was_killed(finished):
    """One lost record: only that one is computed again."""
    plan, records = finished
    before, files = changed_at(plan.folder), contents(plan.folder)
    lost = records[1].name
    (plan.folder / "records" / f"{lost}.json").unlink()
    assert complete(plan).computed == {"cheap": 1}
    after = changed_at(plan.folder)
    assert [name for name in after if after[name] != before[name]] == [f"{lost}.json"]
    assert contents(plan.folder) == files


def test_the_same_command_again_computes_nothing_and_says_so(finished, capsys):
    plan, _ = finished
    before, files = changed_at(plan.folder), contents(plan.folder)
    assert complete(plan).computed == {"cheap": 0}
    assert "cheap: nothing to compute, 3 records found" in capsys.readouterr().err
    assert changed_at(plan.folder) == before
    assert contents(plan.folder) == files


def test_more_seeds_are_added_to_a_run(finished, tmp_path):
    """In any order, the folder equals that of one command with all seeds."""
    plan, _ = finished
    before = changed_at(plan.folder)
    assert complete(replace(plan, seeds=(2,))).computed == {"cheap": 3}
    after = changed_at(plan.folder)
    assert {name: after[name] for name in before} == before
    assert set(pd.read_csv(plan.folder / "cheap.csv").seeds) == {"0;2"}
    assert problems(plan) == []
    other = replace(plan, out=tmp_path / "other", seeds=(0, 2))
    complete(other)
    assert contents(other.folder) == contents(plan.folder)
    assert complete(replace(plan, seeds=(0,))).computed == {"cheap": 0}
    assert set(pd.read_csv(plan.folder / "cheap.csv").seeds) == {"0;2"}


def test_changed_ingredients_supersede_a_set_and_restore_it(finished, monkeypatch, capsys):
    """Nothing is lost or mixed, and the message names the changed ingredient."""
    plan, records = finished
    complete(replace(plan, seeds=(1,)))
    files = contents(plan.folder)
    other = replace(plan, recipe=replace(plan.recipe, weight_decay=0.5))
    assert other.folder == plan.folder
    assert complete(other).computed == {"cheap": 3}
    said = capsys.readouterr().err.replace("\n", " ")
    assert "recipe.weight_decay 0.01 → 0.5" in said
    assert "superseded/" in said
    older = plan.folder / "superseded" / Job.of(suite("cheap"), plan).key
    assert sorted(p.stem for p in (older / "records").iterdir()) == sorted(
        name.replace("seed0", f"seed{seed}")
        for name in (r.name for r in records)
        for seed in (0, 1)
    )
    assert set(pd.read_csv(plan.folder / "cheap.csv").seeds) == {0}
    assert {r.recipe["weight_decay"] for r in records_of(plan)} == {0.5}
    assert problems(plan) == []
    assert differences(older, sets.read_records(older, "cheap"), plan.datasets()) == []
    assert complete(plan).computed == {"cheap": 0}  # the first set is found again
    shown = {name: content for name, content in contents(plan.folder).items()
             if not name.startswith("superseded/")}  # fmt: skip
    assert shown == files
    assert complete(other).computed == {"cheap": 0}


def dies_after(moves):
    """An `os.replace` that is killed after so many moves of records and samples."""
    real, left = os.replace, [moves]

    def dying(source, target):
        if "records" in str(target) or "samples" in str(target):
            if left[0] == 0 and PART not in str(source):
                raise KeyboardInterrupt
            left[0] -= PART not in str(source)
        real(source, target)

    return dying


@pytest.mark.parametrize("moves", range(0, 14, 3))
def test_a_killed_move_is_completed(finished, monkeypatch, moves):
    plan, _ = finished
    other = replace(plan, recipe=replace(plan.recipe, weight_decay=0.5), seeds=(0, 1))
    with monkeypatch.context() as patched:
        patched.setattr("bench.runs.sets.os.replace", dies_after(moves))
        with pytest.raises(KeyboardInterrupt):
            run_plan(other, ["cheap"])
    with sets.locked(plan.folder):
        pass
    assert {r.recipe["weight_decay"] for r in records_of(plan)} == {0.5}
    assert sets.strays(plan.folder) == []
    assert not (plan.folder / "unfinished").exists()
    older = plan.folder / "superseded" / Job.of(suite("cheap"), plan).key
    assert len(sets.read_records(older, "cheap")) == 3


@pytest.mark.parametrize("moves", range(0, 18, 3))
def test_a_killed_return_of_an_older_set_is_completed(finished, monkeypatch, moves):
    """Two seeds of another set are shown, and the first set comes back with a second seed."""
    plan, _ = finished
    other = replace(plan, recipe=replace(plan.recipe, weight_decay=0.5), seeds=(0, 1))
    complete(other)
    with monkeypatch.context() as patched:
        patched.setattr("bench.runs.sets.os.replace", dies_after(moves))
        with pytest.raises(KeyboardInterrupt):
            run_plan(replace(plan, seeds=(0, 1)), ["cheap"])
    assert complete(replace(plan, seeds=(0, 1))).computed == {"cheap": 0}
    assert [r.seed for r in records_of(plan)] == [0] * 3 + [1] * 3
    assert problems(plan) == []
    assert complete(other).computed == {"cheap": 0}
    assert problems(plan) == []
    assert sets.strays(plan.folder) == []


def test_an_unfinished_set_is_not_shown(finished, monkeypatch):
    """The older complete set stays, with its tables."""
    plan, _ = finished
    files = contents(plan.folder)
    of = suite("cheap")
    whole = of.run

    def broken(work, wanted):
        yield next(whole(work, wanted))
        raise RuntimeError("out of memory")

    other = replace(plan, recipe=replace(plan.recipe, weight_decay=0.5))
    with monkeypatch.context() as patched:
        patched.setattr(of, "run", broken)
        assert "out of memory" in run_plan(other, ["cheap"]).failed["cheap"]
    shown = {name: content for name, content in contents(plan.folder).items()
             if not name.startswith("unfinished/")}  # fmt: skip
    assert shown == files
    assert run_plan(other, ["cheap"]).computed == {"cheap": 2}


def test_fresh_deletes_only_the_named_suites_and_lists_the_files(finished, capsys):
    plan, records = finished
    manifest = sets.read_manifest(plan.folder)
    other = plan.folder / "records" / "other-x-seed0.json"
    other.write_text("{}")
    entry = replace(manifest["cheap"], records=["other-x-seed0"])
    sets.write_manifest(plan.folder, manifest | {"other": entry})
    before = changed_at(plan.folder)
    assert complete(plan, fresh=True).computed == {"cheap": 3}
    said = capsys.readouterr().err
    for record in records:
        assert f"--fresh deletes {plan.folder}/records/{record.name}.json" in said
    assert other.is_file()
    assert changed_at(plan.folder)[other.name] == before[other.name]
    assert set(sets.read_manifest(plan.folder)) == {"cheap", "other"}


def test_foreign_hidden_files_stay(finished):
    plan, _ = finished
    ours = [part_of(plan.folder / "cheap.csv"), part_of(plan.folder / "records" / "x.json")]
    theirs = [".gitignore", ".x.part", ".features-old", "notes/.x" + PART, "records/.x.json.part"]
    (plan.folder / "notes").mkdir()
    (plan.folder / "samples" / ("." + "linked" + PART)).symlink_to(plan.folder / "notes")
    for path in (*ours, *(plan.folder / name for name in theirs)):
        path.touch()
    (plan.folder / ".git").mkdir()
    (plan.folder / ".git" / "HEAD").touch()
    with sets.locked(plan.folder):
        pass
    assert not any(path.exists() for path in ours)
    assert (plan.folder / ".git" / "HEAD").is_file()
    assert all((plan.folder / name).is_file() for name in theirs)


def test_collect_merges_seeds_from_other_folders(finished, tmp_path):
    """As if one command had run them all; a damaged file is refused and nothing is copied."""
    plan, _ = finished
    elsewhere = replace(plan, out=tmp_path / "elsewhere", seeds=(1, 2))
    complete(elsewhere)
    target = tmp_path / "target" / plan.folder.name
    for source in (plan.folder, elsewhere.folder):
        with sets.locked(target):
            assert sets.collect(source, target, print) == ["cheap"]
    assert [r.seed for r in sets.read_records(target, "cheap")] == [0] * 3 + [1] * 3 + [2] * 3
    assert sets.strays(target) == []
    path = elsewhere.folder / "samples" / "cheap-noisy-seed1.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    fresh = tmp_path / "fresh" / plan.folder.name
    with sets.locked(fresh), pytest.raises(ValueError, match=r"cheap-noisy-seed1.*SHA-256"):
        sets.collect(elsewhere.folder, fresh, print)
    assert list(fresh.iterdir()) == []


@pytest.mark.parametrize("moves", [0, 1, 3, 5])
def test_a_killed_collect_goes_on(finished, tmp_path, monkeypatch, moves):
    plan, _ = finished
    elsewhere = replace(plan, out=tmp_path / "elsewhere", seeds=(1,))
    complete(elsewhere)
    with monkeypatch.context() as patched:
        patched.setattr("bench.runs.sets.os.replace", dies_after(moves))
        with sets.locked(plan.folder), pytest.raises(KeyboardInterrupt):
            sets.collect(elsewhere.folder, plan.folder, print)
    with sets.locked(plan.folder):
        sets.collect(elsewhere.folder, plan.folder, print)
    assert [r.seed for r in records_of(plan)] == [0] * 3 + [1] * 3
    write(plan.folder, records_of(plan))
    assert problems(plan) == []
    assert sets.strays(plan.folder) == []


def test_a_record_without_its_manifest_is_not_replaced(finished):
    """A lost run.json costs no results: equal records are found, others stop the run."""
    plan, records = finished
    path = plan.folder / "records" / f"{records[0].name}.json"
    before = path.read_bytes()
    (plan.folder / "run.json").unlink()
    other = replace(plan, recipe=replace(plan.recipe, weight_decay=0.5))
    failed = run_plan(other, ["cheap"]).failed["cheap"]
    assert f"{plan.folder}/records/cheap-" in failed
    assert "belongs to no run" in failed
    assert path.read_bytes() == before
    assert complete(plan).computed == {"cheap": 0}


def test_an_edited_record_is_computed_again(finished):
    plan, records = finished
    files = contents(plan.folder)
    path = plan.folder / "records" / f"{records[0].name}.json"
    for text in (path.read_text().replace("0.", "0.1", 1), path.read_text()[:-100]):
        path.write_text(text)
        assert complete(plan).computed == {"cheap": 1}
        assert contents(plan.folder) == files


def test_foreign_files_are_named(finished):
    plan, _ = finished
    assert sets.strays(plan.folder) == []
    (plan.folder / "samples" / "cheap-noisy-seed7.parquet").write_bytes(b"")
    assert sets.strays(plan.folder) == ["samples/cheap-noisy-seed7.parquet belongs to no run"]
    (plan.folder / "run.json").write_text("{}")
    assert "names no run" in sets.strays(plan.folder)[0]


def test_a_damaged_sample_file_is_made_again(finished):
    plan, records = finished
    (plan.folder / "samples" / f"{records[0].name}.parquet").write_bytes(b"")
    assert complete(plan).computed == {"cheap": 1}
    assert problems(plan) == []


def test_one_process_at_a_time(plan):
    with (
        sets.locked(plan.folder),
        pytest.raises(ValueError, match="another run is writing"),
        sets.locked(plan.folder),
    ):
        pass
    with sets.locked(plan.folder):
        pass
    assert list(plan.folder.iterdir()) == []


@pytest.mark.parametrize("content", [b'{"cheap": ', b"\xff\xfe{", b"[]", b'{"cheap": 3}'])
def test_a_damaged_manifest_is_named(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run.json is not a run's manifest.*put it back"):
        sets.read_manifest(tmp_path)


def test_a_manifest_of_an_older_format_is_read(finished):
    """Its sets lack ingredients; their tables are still rendered."""
    plan, _ = finished
    entry = {"key": "0" * 16, "command": "python -m bench run cheap", "finished": True}
    entry["records"] = [r.name for r in records_of(plan)]
    (plan.folder / "run.json").write_text(json.dumps({"cheap": entry}))
    assert problems(plan) == []


def test_unfinished_seeds_survive_a_command_with_other_seeds(plan, monkeypatch):
    of, whole = suite("cheap"), suite("cheap").run

    def stops(work, wanted):
        outcomes = whole(work, wanted)
        yield next(outcomes)
        if work.seed == 1:
            raise RuntimeError("out of memory")
        yield from outcomes

    with monkeypatch.context() as patched:
        patched.setattr(of, "run", stops)
        assert "cheap" in run_plan(replace(plan, seeds=(0, 1)), ["cheap"]).failed
    assert complete(replace(plan, seeds=(2,))).computed == {"cheap": 3}
    assert complete(replace(plan, seeds=(0, 1))).computed == {"cheap": 2}  # of six
    assert [r.seed for r in records_of(plan)] == [0] * 3 + [1] * 3 + [2] * 3


def test_descriptions_and_order_of_datasets_are_in_the_key(plan, monkeypatch):
    """Both change what is trained: the instruction, and the order of batches."""
    first = Job.of(suite("cheap"), plan)
    turned = Job.of(suite("cheap"), replace(plan, names=plan.names[::-1]))
    assert "datasets" in " ".join(keys.changes(first.ingredients, turned.ingredients))
    name = plan.names[0]
    for changed in ({"modality": "another"}, {"classes": first.datasets[name].spec.classes[::-1]}):
        spec = replace(first.datasets[name].spec, **changed)
        other = first.datasets | {name: replace(first.datasets[name], spec=spec)}
        monkeypatch.setattr(Plan, "datasets", lambda self, other=other: other)
        found = keys.changes(first.ingredients, Job.of(suite("cheap"), plan).ingredients)
        assert [line.split()[0] for line in found] == [f"data.{name}", f"evaluated.{name}"]


def test_the_key_holds_every_module_of_the_losses(plan):
    found = set(Job.of(suite("cheap"), plan).ingredients)
    files = sorted((Path(__file__).parents[2] / "kernels").glob("*.py"))
    assert {f"code: kernels/{path.name}" for path in files} <= found


def elsewhere(path, tmp_path):
    """The folder moved away, with a link in its place."""
    target = tmp_path / "elsewhere" / path.name
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    path.symlink_to(target)
    return target


@pytest.mark.parametrize(
    "name", ["records", "samples", "checkpoints", "superseded", "superseded/*"]
)
def test_nothing_is_deleted_through_a_link(finished, tmp_path, name):
    plan, _ = finished
    complete(replace(plan, recipe=replace(plan.recipe, weight_decay=0.5)))
    model = plan.folder / "checkpoints" / "m"
    model.mkdir(parents=True)
    note = {"key": "k", "suite": "cheap", "log": {}, "seconds": 1.0, "peak_mib": 1.0}
    write_sealed(model / "training.json", note | {"files": {}})
    (place,) = plan.folder.glob(name)
    target = elsewhere(place, tmp_path)
    part = target / f".x{PART}"
    part.touch()
    files = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    with sets.locked(plan.folder):
        paths = sets.what_fresh_deletes(plan.folder, ["cheap"])
        sets.delete(plan.folder, ["cheap"], paths)
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == files
    assert place.is_symlink()


def test_a_linked_model_loses_its_link_alone(finished, tmp_path):
    plan, _ = finished
    model = plan.folder / "checkpoints" / "m"
    model.mkdir(parents=True)
    note = {"key": "k", "suite": "cheap", "log": {}, "seconds": 1.0, "peak_mib": 1.0}
    write_sealed(model / "training.json", note | {"files": {}})
    target = elsewhere(model, tmp_path)
    sets.delete(plan.folder, ["cheap"], sets.what_fresh_deletes(plan.folder, ["cheap"]))
    assert not model.is_symlink()
    assert (target / "training.json").is_file()


def test_a_users_files_beside_records_stay(finished):
    plan, records = finished
    complete(replace(plan, recipe=replace(plan.recipe, weight_decay=0.5)))
    (older,) = (plan.folder / "superseded").iterdir()
    name = records[0].name
    theirs = [
        plan.folder / "records" / f"{name} (copy).json",
        plan.folder / "records" / "cheap-my-seed-notes.json",
        plan.folder / "samples" / "cheap-mine-seed0.parquet",
        older / "records" / "mine.json",
    ]
    for path in theirs:
        path.touch()
    complete(plan)  # the first set comes back
    complete(plan, fresh=True)
    assert all(path.is_file() for path in theirs)


def test_exchanged_and_edited_files_are_refused_by_name(finished):
    """Before a table or a comparison is made of them."""
    plan, records = finished
    one, other = (plan.folder / "samples" / f"{r.name}.parquet" for r in records[:2])
    whole = one.read_bytes()
    one.write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=rf"{records[0].name}.*SHA-256.*put it back"):
        records_of(plan)
    one.write_bytes(whole)
    path = plan.folder / "records" / f"{records[0].name}.json"
    text = path.read_text("utf-8")
    path.write_text(text.replace('"accuracy": 0', '"accuracy": 1', 1), "utf-8")
    with pytest.raises(ValueError, match=rf"{records[0].name}.*changed after it was written"):
        records_of(plan)
    path.write_text(text, "utf-8")
    for name in json.loads(text):
        for value in (None, 3, "x", [], {}, [[]]):
            path.write_text(json.dumps(json.loads(text) | {name: value}), "utf-8")
            with pytest.raises(ValueError, match=records[0].name):
                records_of(plan)
    path.write_text("[" * 100_000, "utf-8")
    with pytest.raises(ValueError, match="is not a whole record"):
        records_of(plan)


@pytest.mark.parametrize(
    "change",
    [
        {"records": None}, {"records": []}, {"records": {}}, {"records": [3]}, {"key": None},
        {"records": ["../../x"]}, {"ingredients": []}, {"ready": [None]}, {"command": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_with_wrong_fields_is_named(tmp_path, change):
    entry = {"key": "k", "command": "c", "records": ["cheap-noisy-seed0"], "ingredients": {}}
    (tmp_path / "run.json").write_text(json.dumps({"cheap": entry | change}))
    with pytest.raises(ValueError, match=r"run.json is not a run's manifest.*put it back"):
        sets.read_manifest(tmp_path)
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not a run's manifest"):
        sets.read_manifest(tmp_path)


def test_changed_bytes_of_samples_are_named(finished):
    plan, records = finished
    path = plan.folder / "samples" / f"{records[0].name}.parquet"
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        places = rng.integers(len(whole), size=3)
        changed = bytearray(whole)
        for place in places:
            changed[place] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(changed))
        try:
            read_samples(path)  # by chance, or refused by name
        except ValueError as error:
            assert path.name in str(error)  # noqa: PT017
        with pytest.raises(ValueError, match=path.stem):
            records_of(plan)
