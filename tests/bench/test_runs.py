"""A run from start to table: rendered, verified, compared."""

import io
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from bench import api
from bench.commands.compare import chosen, compare_methods, compare_runs
from bench.commands.verify import differences
from bench.report.page import page
from bench.report.table import COLUMNS
from bench.runs.job import run_job
from bench.runs.plan import Job, plan_of
from bench.runs.progress import Progress
from bench.runs.records import Record
from bench.suite import Method, suite
from tests.bench.cheap_runs import complete, problems
from vitask.errors import InputError
from vitask.files import file_sha256


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
    record = Record.read(other.folder / "records" / "cheap-noisy-seed0.json")
    record.samples_sha256 = file_sha256(path)
    record.write(other.folder)
    with pytest.raises(ValueError, match="different labels; the runs are of different data"):
        compare_runs((plan.folder, other.folder), "cheap", "noisy")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_are_refused_before_anything_runs(plan, seed):
    with pytest.raises(InputError, match=f"seeds: {seed} is not a seed"):
        replace(plan, seeds=(seed,))
    with pytest.raises(InputError, match=f"seeds: {seed} is not a seed"):
        api.run("main", seeds=[seed])
