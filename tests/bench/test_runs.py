"""A run from start to table: interrupted, continued, finished, verified."""

import io
import json
import os
import signal
import time
from contextlib import redirect_stderr
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from bench import runs, table
from bench.commands.compare import compare
from bench.report.official import write_official
from bench.report.page import page
from bench.runs.plan import Job, plan_of, specs_of
from bench.runs.progress import Progress
from bench.runs.records import Record
from bench.report.table import COLUMNS
from bench.commands.verify import differences


def complete(plan, **how):
    """All that `python -m bench run cheap` does."""
    job = Job.of("cheap", plan)
    with runs.locked(plan.folder), Progress(3.0 * len(plan.seeds)) as progress:
        records = runs.run_suite(
            job, plan.folder, progress, command="python -m bench run cheap", **how
        )
        table.write(plan.folder, records, specs_of(records[0]))
        write_official(plan.folder, records)
    return records


def contents(folder):
    """Every file's bytes, records without what time and memory are kept in."""
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


@pytest.fixture
def finished(plan):
    return plan, complete(plan)


def problems(plan):
    return differences(plan.folder, runs.read_records(plan.folder, "cheap"), plan.datasets())


def test_table(finished):
    plan, records = finished
    text = (plan.folder / "cheap.csv").read_text()
    frame = pd.read_csv(plan.folder / "cheap.csv")
    assert text.splitlines()[0] == ",".join(COLUMNS)
    assert set(frame.dataset) == {*plan.names, "average"}
    assert set(frame.source) == {"phantom"}
    for row in frame.itertuples():
        if row.dataset != "average":
            record = next(r for r in records if r.method == row.method)
            value = record.metrics[row.dataset][row.metric]
            assert (
                value is None if np.isnan(row.mean) else row.mean == pytest.approx(value, abs=1e-6)
            )
        if not np.isnan(row.ci_low):
            assert row.ci_low <= row.ci_high
    reference = frame[frame.method == "vanilla"]
    assert reference[["diff_to_vanilla", "p_holm", "sd"]].isna().all().all()
    other = frame[(frame.method == "noisy") & frame.metric.isin(["auc", "gen_accuracy", "qwk"])]
    assert other.p_holm.between(0, 1).all()
    assert len(other) == 4 + 4 + 1  # qwk: the ordinal dataset alone, and in no average
    assert frame[frame.metric == "gen_invalid"].method.unique().tolist() == ["vanilla", "noisy"]
    assert not frame[frame.metric.str.startswith("gen_")].primary.any()
    assert frame.small_test.all()
    page = (plan.folder / "cheap.md").read_text()
    assert "PHANTOM" in page.splitlines()[0]
    assert "Fewer than 500" in page
    assert plan.folder.name == "tiny-phantom"


def test_several_seeds(plan):
    complete(replace(plan, seeds=(0, 1)))
    frame = pd.read_csv(plan.folder / "cheap.csv")
    assert set(frame.seeds) == {"0;1"}
    noisy = frame[(frame.method == "noisy") & (frame.metric == "accuracy")]
    assert (noisy.sd > 0).any()
    assert (frame[(frame.method == "majority") & (frame.metric == "accuracy")].sd == 0).all()
    assert (frame.record.str.count(";") == 1).all()


def test_killed_at_five_moments_and_continued_gives_the_same_files(plan, tmp_path):
    plan = replace(plan, seeds=(0, 1))
    start = time.monotonic()
    complete(plan)
    seconds = time.monotonic() - start
    expected = contents(plan.folder)
    again = replace(plan, out=tmp_path / "again")
    rng = np.random.default_rng(0)
    for _ in range(5):
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


def test_an_unfinished_run_continues(finished, monkeypatch):
    plan, records = finished
    before = changed_at(plan.folder)
    manifest = runs.read_manifest(plan.folder)
    manifest["cheap"]["finished"] = False
    (plan.folder / "run.json").write_text(json.dumps(manifest))
    lost = records[1].name
    (plan.folder / "records" / f"{lost}.json").unlink()
    complete(plan)
    after = changed_at(plan.folder)
    assert [name for name in after if after[name] != before[name]] == [f"{lost}.json"]
    assert runs.read_manifest(plan.folder)["cheap"]["finished"]


def test_a_stopped_command_keeps_the_suites_that_it_had_finished(finished):
    """As after a kill in a later suite, or while the tables were written."""
    from bench.__main__ import _run

    plan, _ = finished
    before, files = changed_at(plan.folder), contents(plan.folder)
    runs.note_unfinished(plan.folder, {"cheap": runs.run_key(Job.of("cheap", plan))})
    (plan.folder / "cheap.csv").unlink()
    assert _run(["cheap"], plan, resume=False, fresh=False) == {}
    assert changed_at(plan.folder) == before
    assert set(contents(plan.folder)) == set(files)
    assert runs.unfinished(plan.folder) == {}
    assert _run(["cheap"], plan, resume=False, fresh=False) == {}
    assert changed_at(plan.folder) != before


def test_fresh_throws_away_the_named_suites_alone(finished):
    plan, records = finished
    manifest = runs.read_manifest(plan.folder)
    other = plan.folder / "records" / "other-x-seed0.json"
    other.write_text("{}")
    (plan.folder / "run.json").write_text(json.dumps(manifest | {"other": manifest["cheap"]}))
    runs.start_over(plan.folder, ["cheap"])
    assert other.is_file()
    assert not (plan.folder / "records" / f"{records[0].name}.json").exists()
    assert list(runs.read_manifest(plan.folder)) == ["other"]


def test_strangers_among_the_files_are_named(finished):
    from bench.commands.verify import strays

    plan, _ = finished
    assert strays(plan.folder) == []
    (plan.folder / "samples" / "cheap-noisy-seed7.parquet").write_bytes(b"")
    assert strays(plan.folder) == ["samples/cheap-noisy-seed7.parquet belongs to no run"]
    (plan.folder / "run.json").write_text("{}")
    assert "names no run" in strays(plan.folder)[0]


def test_a_finished_run_is_computed_again_unless_resumed(finished):
    plan, _ = finished
    before, files = changed_at(plan.folder), contents(plan.folder)
    complete(plan, resume=True)
    assert changed_at(plan.folder) == before
    complete(plan)
    assert all(time != before[name] for name, time in changed_at(plan.folder).items())
    assert contents(plan.folder) == files


def test_resume_takes_nothing_of_another_key(finished):
    plan, _ = finished
    before = changed_at(plan.folder)
    other = replace(plan, recipe=replace(plan.recipe, weight_decay=0.5))
    records = complete(other, resume=True)
    assert all(time != before[name] for name, time in changed_at(plan.folder).items())
    assert {r.recipe["weight_decay"] for r in records} == {0.5}


def test_a_damaged_sample_file_is_made_again(finished):
    plan, records = finished
    (plan.folder / "samples" / f"{records[0].name}.parquet").write_bytes(b"")
    complete(plan, resume=True)
    assert problems(plan) == []


def test_one_process_at_a_time(plan):
    with (
        runs.locked(plan.folder),
        pytest.raises(ValueError, match="another run is writing"),
        runs.locked(plan.folder),
    ):
        pass
    with runs.locked(plan.folder):
        pass
    assert list(plan.folder.iterdir()) == []


def test_folder_names(plan):
    assert replace(plan, limit=7).folder.name == "tiny-phantom-limit7"
    chosen = replace(plan, names=("breastmnist",)).folder.name
    assert chosen.startswith("tiny-phantom-")
    assert len(chosen) == len("tiny-phantom-") + 8
    assert replace(plan, names=tuple(reversed(plan.names))).folder == plan.folder


def test_limit_holds_for_every_part(plan):
    found = replace(plan, limit=9).datasets()
    assert {len(split) for d in found.values() for split in d.splits.values()} == {9}


def test_record_survives_its_file(finished):
    plan, records = finished
    path = plan.folder / "records" / f"{records[0].name}.json"
    again = Record.read(path)
    assert again.text() == path.read_text()
    assert again.measured["sha256"] == again.digest()
    specs = specs_of(again)
    assert specs == {name: d.spec for name, d in plan.datasets().items()}
    assert plan_of(again, roots=(), allow_unverified=(), folder=plan.folder) == plan


def test_verify_agrees(finished):
    assert problems(finished[0]) == []


@pytest.mark.parametrize("kind", ["records", "samples", "."])
def test_verify_sees_one_changed_byte(finished, kind):
    plan, _ = finished
    rng = np.random.default_rng(1)
    for path in sorted(p for p in (plan.folder / kind).iterdir() if p.is_file())[:3]:
        whole = path.read_bytes()
        place = int(rng.integers(len(whole)))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = problems(plan)
        except ValueError as error:  # no longer readable: as good an answer
            found = [str(error)]
        assert found, f"{path.name}, byte {place}"
        path.write_bytes(whole)
    assert problems(plan) == []


def test_verify_sees_a_changed_label_in_the_data(finished):
    plan, records = finished
    datasets = plan.datasets()
    for dataset in datasets.values():
        label = dataset.splits["test"].labels.reshape(30, -1)[17]
        label[:] = 1 - label.clip(max=1)
    found = differences(plan.folder, records, datasets)
    assert len(found) == len(records) * len(datasets)
    assert "1 label(s) differ" in found[0]
    assert "/test/000017" in found[0]


def test_verify_sees_a_forged_sample_file(finished):
    """A label changed in the samples, with every checksum put right again."""
    plan, records = finished
    path = plan.folder / "samples" / f"{records[0].name}.parquet"
    rows = pq.read_table(path)
    columns = rows.to_pydict()
    columns["label"][0] = [1 - v for v in columns["label"][0]]
    pq.write_table(rows.from_pydict(columns, schema=rows.schema), path)
    record = Record.read(plan.folder / "records" / f"{records[0].name}.json")
    record.samples_sha256 = runs.file_sha256(path)
    record.write(plan.folder)
    assert "label(s) differ" in problems(plan)[0]


def test_verify_sees_a_forged_metric(finished):
    plan, records = finished
    records[0].metrics["retinamnist"]["accuracy"] = 0.99
    records[0].write(plan.folder)
    assert "0.99 in the record" in problems(plan)[0]


def test_sets_of_the_same_images_are_drawn_as_one(plan, monkeypatch):
    """Two more names for the same images add nothing to what is known."""
    plan = replace(plan, names=("breastmnist",))
    cheap = Job.of("cheap", plan).module

    def evaluated(plan, datasets):
        (dataset,) = datasets.values()
        return {
            name: replace(dataset, spec=replace(dataset.spec, name=name))
            for name in ("breastmnist", "breastmnist+a", "breastmnist+b")
        }

    monkeypatch.setattr(cheap, "METHODS", dict.fromkeys(("majority", "vanilla"), "one"))
    monkeypatch.setattr(cheap, "evaluated", evaluated, raising=False)
    monkeypatch.setattr(cheap, "images_of", lambda name: name.split("+")[0], raising=False)
    complete(plan)
    frame = pd.read_csv(plan.folder / "cheap.csv").set_index(["dataset", "method", "metric"])
    columns = ["mean", "ci_low", "ci_high", "diff_low", "diff_high", "n_test"]
    for metric in ("accuracy", "macro_f1"):
        one, average = (frame.loc[n, "majority", metric] for n in ("breastmnist", "average"))
        assert one[columns].tolist() == pytest.approx(average[columns].tolist(), nan_ok=True)
        assert average.ci_low < average["mean"] < average.ci_high or one.ci_low == one.ci_high
    assert "Fewer than 500 test images: breastmnist. Read" in (plan.folder / "cheap.md").read_text()


def test_another_source_of_the_suite_is_another_key(plan, monkeypatch, tmp_path):
    job = Job.of("cheap", plan)
    before = runs.record_keys(job)
    (tmp_path / "other.py").write_text("METHODS = {}")
    monkeypatch.setattr(job.module, "__file__", str(tmp_path / "other.py"))
    after = runs.record_keys(job)
    assert before.keys() == after.keys()
    assert not set(before.values()) & set(after.values())


def test_time_left_follows_what_was_worked_not_what_was_there(monkeypatch):
    clock, text = iter((0.0, 20.0, 80.0)), io.StringIO()
    monkeypatch.setattr("bench.progress.time.monotonic", lambda: next(clock))
    progress = Progress(100.0, Console(file=text, width=100))
    progress.skip(80.0, "there already")
    progress.advance(10.0, "worked")
    assert "50%  1:20 passed, about 1:20 left  worked" in text.getvalue()


def test_a_suite_that_fails_leaves_nothing_to_wait_for(plan, monkeypatch):
    """Neither the rest of its seed nor its other seeds."""
    job, text = Job.of("cheap", replace(plan, seeds=(0, 1))), io.StringIO()
    whole = job.module.run

    def broken(*asked):
        yield next(whole(*asked))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(job.module, "run", broken)
    progress = Progress(6.0 + 1.0, Console(file=text, width=100))  # and a suite of one unit
    with pytest.raises(RuntimeError, match="out of memory"):
        runs.run_suite(job, plan.folder, progress, command="python -m bench run cheap")
    assert text.getvalue().splitlines()[-1].startswith(" 50%")  # one unit is done, one is left


def test_the_page_names_all_that_produced_it(finished):
    plan, records = finished
    again = [
        replace(
            record,
            seed=1,
            command=f"{record.command} --seeds 1",
            commit="5eed1",
            hardware=record.hardware | {"threads": 64},
        )
        for record in records
    ]
    text = page(pd.read_csv(plan.folder / "cheap.csv"), [*records, *again], plan.folder)
    lines = text[text.index("## What produced this") :].splitlines()
    first, other = records[0], again[0]
    for what, values in {
        "command": [f"`{first.command}`", f"`{other.command}`"],
        "commit": [f"`{first.commit}`", "`5eed1`"],
    }.items():
        assert [line for line in lines if line.startswith(f"- {what}:")] == [
            f"- {what}: {value}" for value in values
        ]
    threads = [line for line in lines if line.startswith("- hardware:")]
    assert len(threads) == 2
    assert "threads 64," in threads[1]
    assert "**" not in text[text.index("Nothing is set in bold") : text.index("## What produced")]


def test_torn_groups_are_refused(plan, monkeypatch):
    dataset = plan.datasets()["breastmnist"]
    torn = {
        part: replace(split, groups=np.array([f"patient {i}" for i in range(len(split))]))
        for part, split in dataset.splits.items()
    }
    monkeypatch.setattr("bench.plan.load", lambda *_, **__: replace(dataset, splits=torn))
    with pytest.raises(ValueError, match=r"breastmnist: 30 group\(s\) have images in two parts"):
        replace(plan, names=("breastmnist",)).datasets()


def test_two_methods_compare_as_the_table_does(finished):
    plan, records = finished
    table = pd.read_csv(plan.folder / "cheap.csv")
    found = compare(plan.folder, records, "noisy", "vanilla")
    for row in found.itertuples():
        same = (table.dataset == row.dataset) & (table.metric == row.metric)
        theirs = table[same & (table.method == "noisy")].iloc[0]
        assert row.difference == pytest.approx(theirs.diff_to_vanilla, abs=1e-6)
        assert found["p (Holm)"][row.Index] == pytest.approx(theirs.p_holm, abs=1e-6)
    turned = compare(plan.folder, records, "vanilla", "noisy")
    assert turned.difference.to_numpy() == pytest.approx(-found.difference.to_numpy())
    with pytest.raises(ValueError, match=r"no method 'nosy'; did you mean noisy"):
        compare(plan.folder, records, "nosy", "vanilla")
    with pytest.raises(ValueError, match="twice"):
        compare(plan.folder, records, "noisy", "noisy")
