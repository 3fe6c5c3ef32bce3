"""What a newcomer types, and what comes back."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import doctor, runs
from bench.__main__ import app
from bench.suite import SUITES, suite
from vitask.recipes import RECIPES

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "pandas", "transformers", "sklearn", "medmnist", "timm", "pyarrow")
LIGHT = f"""
import runpy, sys
sys.argv = ["bench", *sys.argv[1:]]
try:
    runpy.run_module("bench", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
found = [name for name in {HEAVY} if name in sys.modules]
assert not found, found
"""


def bench(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("words", [["--help"], ["list"], ["run", "--help"], ["data", "--help"]])
def test_answers_at_once_without_torch(words):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *words], cwd=ROOT, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # processor time: the machine may be busy with other things
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_list_names_everything():
    text = bench("list").output
    for name in [*SUITES, *RECIPES, *suite("main").METHODS, "organsmnist", "chestmnist"]:
        assert name in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "mian"], "no suite 'mian'; did you mean main?"),
        (["run", "main", "--recipe", "pockets"], "no recipe 'pockets'; did you mean pocket?"),
        (["run", "main", "--data", "fantom"], "did you mean phantom?"),
        (["run", "main", "--datasets", "brestmnist"], "did you mean breastmnist"),
        (["run", "main", "--allow-unverified", "bloodmist"], "did you mean bloodmnist"),
        (["run", "main", "--seeds", "0,one"], "whole numbers"),
        (["run"], "--all"),
        (["run", "main", "--all"], "--all"),
        (["run", "main", "--resume", "--fresh"], "one of them"),
        (["run", "main", "--limit", "0"], "limit"),
        (["data", "check", "--data", "medmist"], "did you mean medmnist?"),
        (["data", "download", ".", "--datasets", "brestmnist"], "did you mean breastmnist"),
        (["forget"], "forget"),
    ],
)
def test_misuse_exits_2_and_names_the_nearest(words, message):
    done = bench(*words)
    assert done.exit_code == 2
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "words",
    [
        [
            "run",
            "main",
            "--data",
            "medmnist",
            "--datasets",
            "breastmnist",
            "--data-root",
            "nowhere",
        ],
        ["report", "--out", "nowhere"],
        ["verify", "nowhere"],
        ["predict", "nowhere", "nowhere"],
        ["data", "check", "--data-root", "nowhere"],
        ["list", "--data-root", "nowhere"],
        ["run", "ablation", "--data", "medmnist", "--data-root", "nowhere"],
    ],
    ids=" ".join,
)
def test_what_is_not_there_exits_1_with_one_message(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = bench(*words)
    assert done.exit_code == 1
    assert done.output.startswith("error: ")
    assert "nowhere" in done.output
    assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []  # and nothing was run


def test_run_report_verify(plan):
    words = ["run", "cheap", "--recipe", "tiny", "--limit", 12, "--out", plan.out]
    done = bench(*words)
    assert done.exit_code == 0, done.output
    assert "100%" in done.output
    folder = plan.out / "tiny-phantom-limit12"
    written = {name: (folder / name).read_bytes() for name in ("cheap.csv", "cheap.md")}
    (folder / "cheap.csv").write_text("lost")
    (folder / "cheap.md").unlink()
    assert bench("verify", "--out", plan.out).exit_code == 1
    assert bench("report", folder).exit_code == 0
    assert written == {name: (folder / name).read_bytes() for name in written}
    done = bench("verify", folder)
    assert (done.exit_code, done.output) == (0, f"{folder}: 3 record(s) of cheap: ok\n")


def test_a_failing_suite_does_not_take_the_others_down(plan, monkeypatch):
    broken = suite("cheap").__dict__ | {"run": None}
    monkeypatch.setitem(SUITES, "broken", "broken_suite")
    module = type(sys)("broken_suite")
    module.__dict__.update(broken)
    monkeypatch.setitem(sys.modules, "broken_suite", module)
    monkeypatch.delitem(SUITES, "main")
    words = ["--recipe", "tiny", "--datasets", "breastmnist", "--out", plan.out]
    done = bench("run", "broken", "cheap", *words)
    assert done.exit_code == 1
    assert "failed: broken: TypeError" in done.output
    assert "Traceback" in done.output  # a fault of ours, not of the user
    assert "100%" in done.output  # what failed is not waited for
    (csv,) = plan.out.glob("*/cheap.csv")
    written = {path: path.stat().st_mtime_ns for path in csv.parent.glob("records/cheap-*")}
    assert bench("run", "broken", "cheap", *words).exit_code == 1
    assert written == {path: path.stat().st_mtime_ns for path in written}  # it continues
    manifest = json.loads((csv.parent / "run.json").read_text())
    assert {name: entry["finished"] for name, entry in manifest.items()} == {
        "broken": False,
        "cheap": True,
    }
    csv.unlink()
    for command in ("report", "verify"):
        done = bench(command, csv.parent)
        assert done.exit_code == 1
        assert "lacks 3 of 3 records of suite 'broken'" in done.output
        assert csv.is_file()  # what the others have is written again, and checked
    assert "3 record(s) of cheap: ok" in done.output


def test_a_suite_without_its_data_does_not_take_the_others_down(plan, monkeypatch):
    def evaluated(plan, datasets):
        raise ValueError("labels.csv is missing")

    module = type(sys)("broken_suite")
    module.__dict__.update(suite("cheap").__dict__ | {"evaluated": evaluated})
    monkeypatch.setitem(SUITES, "broken", "broken_suite")
    monkeypatch.setitem(sys.modules, "broken_suite", module)
    words = ["--recipe", "tiny", "--datasets", "breastmnist", "--out", plan.out]
    done = bench("run", "broken", "cheap", *words)
    assert done.exit_code == 1
    assert "failed: broken: ValueError: labels.csv is missing" in done.output
    assert len(list(plan.out.glob("*/cheap.csv"))) == 1


def test_verify_goes_on_after_a_suite_whose_data_are_gone(plan, monkeypatch):
    def evaluated(plan, datasets):
        raise ValueError("labels.csv is missing")

    module = type(sys)("away_suite")
    module.__dict__.update(suite("cheap").__dict__)
    monkeypatch.setitem(SUITES, "away", "away_suite")
    monkeypatch.setitem(sys.modules, "away_suite", module)
    words = ["--recipe", "tiny", "--datasets", "breastmnist", "--out", plan.out]
    assert bench("run", "away", "cheap", *words).exit_code == 0
    (folder,) = plan.out.iterdir()
    assert bench("verify", folder).exit_code == 0
    monkeypatch.setattr(module, "evaluated", evaluated, raising=False)
    done = bench("verify", folder)
    assert done.exit_code == 1
    assert f"{folder}: away was not verified: ValueError: labels.csv is missing" in done.output
    assert f"{folder}: 3 record(s) of cheap: ok" in done.output


@pytest.mark.parametrize(
    ("file", "read", "advice"),
    [
        ("run.json", runs.read_manifest, "put it back, or remove the folder"),
        (runs.UNFINISHED, runs.unfinished, "remove it: suites that had finished"),
    ],
)
@pytest.mark.parametrize("content", [b'{"cheap": ', b"\xff\xfe{", b"[]", b'{"cheap": 3}'])
def test_a_damaged_note_of_a_run_is_named(tmp_path, file, read, advice, content):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is (no JSON|not what a run writes).*; {advice}"):
        read(tmp_path)


def test_what_lacks_something_is_left_out_of_all_and_fails_by_name(plan, monkeypatch):
    module = type(sys)("lacking_suite")
    module.__dict__.update(suite("cheap").__dict__ | {"unavailable": lambda plan: "no package"})
    for name in set(SUITES) - {"cheap"}:
        monkeypatch.delitem(SUITES, name)
    monkeypatch.setitem(SUITES, "lacking", "lacking_suite")
    monkeypatch.setitem(sys.modules, "lacking_suite", module)
    words = ["--recipe", "tiny", "--datasets", "breastmnist", "--out", plan.out]
    done = bench("run", "--all", *words)
    assert done.exit_code == 0, done.output
    assert "lacking is left out: no package" in done.output
    done = bench("run", "cheap", "lacking", *words)
    assert done.exit_code == 1
    assert "failed: lacking: ValueError: suite lacking: no package" in done.output
    assert "error: suite lacking: no package" in bench("run", "lacking", *words).output


def test_the_recorded_command_names_no_paths(plan):
    words = ["run", "cheap", "--recipe", "tiny", "--data-root", plan.out / "data", "--resume"]
    (plan.out / "data").mkdir(parents=True)
    words += [f"--out={plan.out}", "--datasets", "breastmnist"]
    sys.argv[1:] = [str(word) for word in words]
    assert bench(*words).exit_code == 0
    (record, *_) = plan.out.glob("*/records/*.json")
    command = "python -m bench run cheap --recipe tiny --data-root DATA_ROOT"
    assert json.loads(record.read_text())["command"] == (
        f"{command} --out=OUT --datasets breastmnist"
    )


def test_data_check_reports_copies_and_bad_files(shared):
    done = bench("data", "check", "--data-root", shared / "medmnist")
    assert done.exit_code == 1
    assert "pneumoniamnist" in done.output
    assert "--allow-unverified" in done.output
    assert "breastmnist/train/000115 = breastmnist/test/000076" in done.output
    words = ["--datasets", "pneumoniamnist", "--allow-unverified", "pneumoniamnist"]
    done = bench("data", "check", "--data-root", shared / "medmnist", *words)
    assert done.exit_code == 0
    assert "NOT the official file" in done.output


def test_doctor_tells_the_hub_package_apart(monkeypatch, tmp_path):
    def version(name):
        return "0.18.2" if name == "kernels" else real(name)

    real = doctor.version
    hub = [one for one in doctor.examine([tmp_path]) if "hub package" in one.what]
    assert [one.ok for one in hub] == [True]
    monkeypatch.setattr(doctor, "version", version)
    findings = doctor.examine([tmp_path])
    bad = {one.what: one.value for one in findings if one.ok is False}
    assert "0.18.2" in bad["hub package kernels"]
    assert "no .npz" in bad[f"data root {tmp_path}"]
    assert "torch" in {one.what for one in findings}
    done = bench("doctor")
    assert done.exit_code == 1
    assert "BAD hub package kernels" in done.output


def test_the_hub_package_is_refused_before_anything_is_imported(monkeypatch, plan):
    monkeypatch.setattr("vitask.guard.version", lambda name: "0.18.2")
    done = bench("run", "cheap", "--recipe", "tiny", "--out", plan.out)
    assert done.exit_code == 1
    assert not plan.out.exists()


def test_a_training_part_of_one_class_is_named():
    from vitask.baselines import linear_probe
    from vitask.data import load, subset
    from vitask.features import Features

    one = {"breastmnist": subset(load("breastmnist", source="phantom"), train=1)}
    with pytest.raises(ValueError, match=r"breastmnist: its 1 training image\(s\).*--limit"):
        linear_probe(one, Features(one, lambda images: images))
