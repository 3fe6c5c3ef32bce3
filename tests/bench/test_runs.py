"""A run from start to table: killed, continued, finished, verified, extended."""

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

from bench.api import run_plan
from bench.commands.compare import chosen, compare_methods, compare_runs
from bench.commands.verify import differences
from bench.report.page import page
from bench.report.table import COLUMNS
from bench.runs import sets
from bench.runs.files import file_sha256
from bench.runs.job import run_job
from bench.runs.plan import Job, plan_of
from bench.runs.progress import Progress
from bench.runs.records import Record
from bench.suite import Method, suite


def complete(plan, **how):
    """Does the same as `python -m bench run cheap`."""
    done = run_plan(plan, ["cheap"], command="python -m bench run cheap", **how)
    assert done.failed == {}
    return done


def records_of(plan):
    return sets.read_records(plan.folder, "cheap")


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


@pytest.fixture
def finished(plan):
    complete(plan)
    return plan, records_of(plan)


def problems(plan):
    return differences(plan.folder, records_of(plan), plan.datasets())


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
    assert reference[["reference", "difference", "p", "p_images", "sd"]].isna().all().all()
    other = frame[(frame.method == "noisy") & frame.metric.isin(["auc", "gen_accuracy", "qwk"])]
    assert other.p.between(0, 1).all()
    assert other.p.equals(other.p_images)
    assert set(other.reference) == {"vanilla"}
    assert len(other) == 4 + 4 + 1  # qwk: only for the ordinal dataset, and never averaged
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


@pytest.mark.parametrize("moves", range(0, 14, 3))
def test_a_killed_move_is_completed(finished, monkeypatch, moves):
    plan, _ = finished
    other = replace(plan, recipe=replace(plan.recipe, weight_decay=0.5), seeds=(0, 1))
    real, left = os.replace, [moves]

    def dying(source, target):
        if "records" in str(target) or "samples" in str(target):
            if left[0] == 0 and ".part" not in str(source):
                raise KeyboardInterrupt
            left[0] -= ".part" not in str(source)
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("bench.runs.sets.os.replace", dying)
        with pytest.raises(KeyboardInterrupt):
            run_plan(other, ["cheap"])
    with sets.locked(plan.folder):
        pass
    assert {r.recipe["weight_decay"] for r in records_of(plan)} == {0.5}
    assert sets.strays(plan.folder) == []
    assert not (plan.folder / "unfinished").exists()
    older = plan.folder / "superseded" / Job.of(suite("cheap"), plan).key
    assert len(sets.read_records(older, "cheap")) == 3


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
    ours = [plan.folder / ".cheap.csv.part", plan.folder / "records" / ".x.json.part"]
    for path in (*ours, plan.folder / ".gitignore"):
        path.touch()
    (plan.folder / ".git").mkdir()
    (plan.folder / ".git" / "HEAD").touch()
    with sets.locked(plan.folder):
        pass
    assert not any(path.exists() for path in ours)
    assert (plan.folder / ".git" / "HEAD").is_file()
    assert (plan.folder / ".gitignore").is_file()


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


def test_folder_names(plan):
    assert replace(plan, limit=7).folder.name == "tiny-phantom-limit7"
    chosen = replace(plan, names=("breastmnist",)).folder.name
    assert chosen.startswith("tiny-phantom-")
    assert len(chosen) == len("tiny-phantom-") + 8
    assert replace(plan, names=tuple(reversed(plan.names))).folder == plan.folder


def test_limit_holds_for_every_split(plan):
    found = replace(plan, limit=9).datasets()
    assert {len(split) for d in found.values() for split in d.splits.values()} == {9}


def test_a_record_survives_its_file(finished):
    plan, records = finished
    path = plan.folder / "records" / f"{records[0].name}.json"
    again = Record.read(path)
    assert again.text() == path.read_text()
    assert again.measured["sha256"] == again.digest()
    assert again.specs == {name: d.spec for name, d in plan.datasets().items()}
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
        except ValueError as error:  # unreadable also counts as noticed
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
    """A changed label in the samples, with all checksums corrected."""
    plan, records = finished
    path = plan.folder / "samples" / f"{records[0].name}.parquet"
    rows = pq.read_table(path)
    columns = rows.to_pydict()
    columns["label"][0] = [1 - v for v in columns["label"][0]]
    pq.write_table(rows.from_pydict(columns, schema=rows.schema), path)
    record = Record.read(plan.folder / "records" / f"{records[0].name}.json")
    record.samples_sha256 = file_sha256(path)
    record.write(plan.folder)
    assert "label(s) differ" in problems(plan)[0]


def test_verify_sees_a_forged_metric(finished):
    plan, records = finished
    records[0].metrics["retinamnist"]["accuracy"] = 0.99
    records[0].write(plan.folder)
    assert "0.99 in the record" in problems(plan)[0]


def test_datasets_with_the_same_images_are_drawn_together(plan, monkeypatch):
    """Two more names for the same images add no information."""
    plan = replace(plan, names=("breastmnist",))
    of = suite("cheap")

    def evaluated(plan, datasets):
        (dataset,) = datasets.values()
        return {
            name: replace(dataset, spec=replace(dataset.spec, name=name))
            for name in ("breastmnist", "breastmnist+a", "breastmnist+b")
        }

    methods = (Method("majority", "one", "vanilla"), Method("vanilla", "one"))
    monkeypatch.setattr(of, "methods", methods)
    monkeypatch.setattr(of, "evaluated", evaluated)
    monkeypatch.setattr(of, "images_of", lambda name: name.split("+")[0])
    complete(plan)
    frame = pd.read_csv(plan.folder / "cheap.csv").set_index(["dataset", "method", "metric"])
    columns = ["mean", "ci_low", "ci_high", "difference_low", "difference_high", "n_test"]
    for metric in ("accuracy", "macro_f1"):
        one, average = (frame.loc[n, "majority", metric] for n in ("breastmnist", "average"))
        assert one[columns].tolist() == pytest.approx(average[columns].tolist(), nan_ok=True)
        assert average.ci_low < average["mean"] < average.ci_high or one.ci_low == one.ci_high
    assert "Fewer than 500 test images: breastmnist. Read" in (plan.folder / "cheap.md").read_text()


def test_time_left_counts_only_the_work_of_this_run():
    clock, text = iter((0.0, 20.0, 80.0, 80.0)), io.StringIO()
    progress = Progress(100.0, Console(file=text, width=20), clock=lambda: next(clock))
    progress.skip(80.0, "found")
    progress.advance(10.0, "computed")
    assert " 50%  1:20 elapsed, about 1:20 left  computed\n" in text.getvalue()  # not wrapped


def test_piped_progress_prints_a_line_per_ten_seconds_and_per_model():
    text, now = io.StringIO(), [0.0]
    progress = Progress(100.0, Console(file=text, width=80), clock=lambda: now[0])
    for second in range(25):
        now[0] = float(second)
        progress.advance(1.0, f"epoch {second}", finished=second == 15)
    assert [line.rpartition("  ")[2] for line in text.getvalue().splitlines()] == [
        "epoch 0", "epoch 10", "epoch 15",
    ]  # fmt: skip


def test_progress_drops_the_remaining_work_of_a_failed_suite(plan, monkeypatch):
    """The rest of its seed and its other seeds."""
    job, text = Job.of(suite("cheap"), replace(plan, seeds=(0, 1))), io.StringIO()
    whole = job.suite.run

    def broken(work, wanted):
        yield next(whole(work, wanted))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(job.suite, "run", broken)
    one = job.units / 3  # three methods
    progress = Progress(6 * one + one, Console(file=text))  # and another suite of one unit
    with pytest.raises(RuntimeError, match="out of memory"):
        run_job(job, plan.folder, progress, command="python -m bench run cheap")
    assert progress.seconds_left() is not None
    assert progress._done / progress._units == pytest.approx(0.5)  # one is done, one is left


def test_the_page_names_everything_that_produced_it(finished):
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
    frame = pd.read_csv(plan.folder / "cheap.csv")
    text = page(frame, [*records, *again], suite("cheap"))
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
    assert (
        "**"
        not in text[text.index("The best values are not bolded") : text.index("## What produced")]
    )


def test_groups_across_splits_are_refused(plan, monkeypatch):
    dataset = plan.datasets()["breastmnist"]
    torn = {
        name: replace(split, groups=np.array([f"patient {i}" for i in range(len(split))]))
        for name, split in dataset.splits.items()
    }
    monkeypatch.setattr("bench.runs.plan.load", lambda *_, **__: replace(dataset, splits=torn))
    with pytest.raises(ValueError, match=r"breastmnist: 30 group\(s\) have images in two splits"):
        replace(plan, names=("breastmnist",)).datasets()


def test_compared_methods_match_the_table(finished):
    plan, _ = finished
    table = pd.read_csv(plan.folder / "cheap.csv")
    found = compare_methods(plan.folder, "cheap", "noisy", "vanilla")
    for row in found.itertuples():
        same = (table.dataset == row.dataset) & (table.metric == row.metric)
        theirs = table[same & (table.method == "noisy")].iloc[0]
        assert row.difference == pytest.approx(theirs.difference, abs=1e-6, nan_ok=True)
        assert row.p == pytest.approx(theirs.p, abs=1e-6, nan_ok=True)
    turned = compare_methods(plan.folder, "cheap", "vanilla", "noisy")
    difference = found.difference.to_numpy()
    assert turned.difference.to_numpy() == pytest.approx(-difference, nan_ok=True)
    with pytest.raises(ValueError, match=r"no method 'nosy'; did you mean noisy"):
        compare_methods(plan.folder, "cheap", "nosy", "vanilla")
    with pytest.raises(ValueError, match="twice"):
        compare_methods(plan.folder, "cheap", "noisy", "noisy")
    some = chosen(found, suite("cheap"), ["auc"], ["breastmnist"])
    assert some[["dataset", "metric"]].to_numpy().tolist() == [["breastmnist", "auc"]]
    with pytest.raises(ValueError, match="no metric 'aux'"):
        chosen(found, suite("cheap"), ["aux"], [])


def test_two_runs_are_compared_on_their_common_images(finished, tmp_path):
    plan, _ = finished
    other = replace(plan, out=tmp_path / "other", limit=20, seeds=(0, 1))
    complete(other)
    folders = (plan.folder, other.folder)
    found, notes = compare_runs(folders, "cheap", "noisy")
    assert notes[0] == "shared seeds: 0"
    assert "breastmnist: 20 shared test images" in notes
    assert set(found.dataset) == {*plan.names, "average"}
    columns = [str(folder) for folder in folders]
    assert found.difference.to_numpy() == pytest.approx(
        (found[columns[0]] - found[columns[1]]).to_numpy(), nan_ok=True
    )
    same, _ = compare_runs((plan.folder, plan.folder / ".." / plan.folder.name), "cheap", "noisy")
    assert (same.difference.dropna() == 0).all()
    (other.folder / "run.json").unlink()
    with pytest.raises(ValueError, match="no run of suite 'cheap'"):
        compare_runs(folders, "cheap", "noisy")


def test_runs_with_different_test_labels_are_not_compared(finished, tmp_path):
    plan, _ = finished
    other = replace(plan, out=tmp_path / "other")
    complete(other)
    path = other.folder / "samples" / "cheap-noisy-seed0.parquet"
    rows = pq.read_table(path)
    columns = rows.to_pydict()
    columns["label"][0] = [1 - v for v in columns["label"][0]]
    pq.write_table(rows.from_pydict(columns, schema=rows.schema), path)
    with pytest.raises(ValueError, match="different labels; the runs are of different data"):
        compare_runs((plan.folder, other.folder), "cheap", "noisy")
