"""The command line: answers, files, messages and exit codes."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench.__main__ import app
from bench.commands import doctor
from bench.errors import told
from bench.suite import SUITES, suite
from vitask.errors import InputError
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
    # processor time, as the machine may be busy
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_list_names_everything():
    text = bench("list").output
    for name in [*SUITES, *RECIPES, "organsmnist", "chestmnist"]:
        assert name in text
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", SUITES)
def test_list_shows_the_methods_of_a_suite(name):
    text = bench("list", name).output
    for method in suite(name).methods:
        assert method.name in text
    assert max(map(len, text.splitlines())) <= 80


def test_version_and_help():
    assert bench("--version").output.startswith("vitask 0.")
    text = " ".join(bench("run", "--help").output.split())
    assert all(name in text for name in SUITES)
    assert "…" not in text
    assert bench().exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "mian"], "no suite 'mian'; did you mean main?"),
        (["run", "main", "--recipe", "pockets"], "no recipe 'pockets'; did you mean pocket?"),
        (["run", "main", "--data", "fantom"], "did you mean phantom?"),
        (["run", "main", "--datasets", "brestmnist"], "did you mean breastmnist"),
        (["run", "main", "--allow-unverified", "bloodmist"], "did you mean bloodmnist"),
        (["run", "main", "--seeds", "0,one"], "whole numbers"),
        (["run", "main", "--seeds", "0,4294967296"], "4294967296 is not a seed"),
        (["run", "main", "--seeds", "9" * 5000], "9... is not a seed"),
        (["run"], "--all"),
        (["run", "main", "--all"], "--all"),
        (["run", "main", "--resume", "--fresh"], "one of them"),
        (["run", "main", "--limit", "0"], "limit"),
        (["run", "main", "--set", "lora_rnk=4"], "did you mean lora_rank"),
        (["run", "main", "--set", "lora_rank=four"], "lora_rank"),
        (["recipe", "pockets"], "did you mean pocket?"),
        (["list", "mian"], "did you mean main?"),
        (["data", "check", "--data", "medmist"], "did you mean medmnist?"),
        (["data", "download", ".", "--datasets", "brestmnist"], "did you mean breastmnist"),
        (["forget"], "forget"),
    ],
)
def test_misuse_exits_2_and_names_the_nearest_match(words, message):
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
        ["collect", "target", "nowhere"],
        ["run", "main", "--recipe", "nowhere.toml"],
        ["list", "--data-root", "nowhere"],
        ["run", "ablation", "--data", "medmnist", "--data-root", "nowhere"],
    ],
    ids=" ".join,
)
def test_missing_files_exit_1_with_one_message(words, tmp_path, monkeypatch):
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


def test_run_ends_with_its_table_and_its_page(plan):
    words = ["run", "cheap", "--recipe", "tiny", "--limit", 12, "--out", plan.out]
    done = bench(*words)
    lines = done.stdout.splitlines()
    assert lines[-1] == str(plan.out / "tiny-phantom-limit12" / "cheap.md")
    assert [line.split()[0] for line in lines[-4:-1]] == ["majority", "vanilla", "noisy"]
    assert "average, PHANTOM data" in lines[-5]
    assert max(map(len, lines[-5:-1])) <= 80
    again = bench(*words)
    assert again.stdout.splitlines()[-1] == "nothing to compute: all results were there"
    assert bench(*words, "--resume").stdout == again.stdout


def test_settings_enter_the_folder_name_the_record_and_the_key(plan):
    words = ["run", "cheap", "--recipe", "tiny", "--limit", 12, "--out", plan.out]
    assert bench(*words, "--set", "lora_rank=4").exit_code == 0
    (record,) = plan.out.glob("tiny+lora_rank=4-phantom-limit12/records/cheap-noisy-*")
    content = json.loads(record.read_text())
    assert content["recipe"]["lora_rank"] == 4
    assert content["plan"]["settings"] == {"lora_rank": 4}
    assert bench("verify", record.parents[1]).exit_code == 0
    many = [f"--set={name}=0.5" for name in ("rda_weight", "crt_weight", "weight_decay")]
    assert bench(*words, *many).exit_code == 0
    names = {path.name for path in plan.out.iterdir()} - {"tiny+lora_rank=4-phantom-limit12"}
    assert [len(name) for name in names] == [len("tiny+01234567-phantom-limit12")]


def test_a_recipe_file_runs_under_its_name(plan, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('base = "tiny"\nweight_decay = 0.5\n')
    words = ["run", "cheap", "--recipe", file, "--limit", 12, "--out", plan.out]
    done = bench(*words)
    assert done.exit_code == 0, done.output
    (record,) = plan.out.glob("mine-phantom-limit12/records/cheap-noisy-*")
    assert json.loads(record.read_text())["recipe"]["weight_decay"] == 0.5
    file.write_text('base = "tiny"\nweigth_decay = 0.5\n')
    done = bench(*words)
    assert done.exit_code == 1
    assert "mine.toml" in done.output
    assert "weight_decay" in done.output


def test_a_printed_recipe_can_be_run(plan, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(bench("recipe", "tiny").output)
    words = ["run", "cheap", "--recipe", file, "--limit", 12, "--out", plan.out]
    assert bench(*words).exit_code == 0
    assert (
        bench("run", "cheap", "--recipe", "tiny", "--limit", 12, "--out", plan.out).exit_code == 0
    )
    keys = {json.loads(path.read_text())["cheap"]["key"] for path in plan.out.glob("*/run.json")}
    assert len(keys) == 1  # the name does not count


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only"])
def test_an_out_that_cannot_be_written_is_refused_before_anything_runs(
    plan, tmp_path, kind, monkeypatch
):
    out = tmp_path / "out"
    if kind == "a file":
        out.touch()
    elif kind == "below a file":
        out.touch()
        out = out / "deeper"
    else:
        monkeypatch.setattr("bench.api.os.access", lambda *_: False)  # root may write anywhere
    ran = []
    monkeypatch.setattr("bench.api.run_job", lambda *_, **__: ran.append(1))
    done = bench("run", "cheap", "--recipe", "tiny", "--out", out)
    assert done.exit_code == 1
    assert done.output.startswith(f"error: --out {out}")
    assert len(done.output.splitlines()) == 1
    assert not ran


def test_collect_merges_runs(plan, tmp_path):
    words = ["run", "cheap", "--recipe", "tiny", "--limit", 12]
    for seed in (0, 1):
        assert bench(*words, "--seeds", seed, "--out", tmp_path / str(seed)).exit_code == 0
    folders = [tmp_path / str(seed) / "tiny-phantom-limit12" for seed in (0, 1)]
    done = bench("collect", tmp_path / "all", *folders)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "all" / "tiny-phantom-limit12" / "cheap.csv").read_text()
    assert ",0;1," in text
    assert bench("verify", "--out", tmp_path / "all").exit_code == 0
    done = bench("collect", tmp_path / "all", tmp_path / "nowhere")
    assert done.exit_code == 1
    assert "nowhere" in done.output


def test_compare_takes_methods_or_runs(plan, tmp_path):
    words = ["run", "cheap", "--recipe", "tiny", "--limit", 12]
    for name in ("a", "b"):
        assert bench(*words, "--out", tmp_path / name).exit_code == 0
    a, b = (tmp_path / name / "tiny-phantom-limit12" for name in ("a", "b"))
    csv = tmp_path / "rows.csv"
    done = bench("compare", "noisy", "vanilla", "--suite", "cheap", "--run", a, "--csv", csv)
    assert done.exit_code == 0, done.output
    assert "macro_f1" in done.output
    assert csv.read_text().startswith("dataset,metric,noisy,vanilla,difference,low,high,p\n")
    done = bench("compare", a, b, "--suite", "cheap", "--method", "noisy", "--metric", "auc")
    assert done.exit_code == 0, done.output
    assert "12 shared test images" in done.output
    assert "macro_f1" not in done.output
    done = bench("compare", a, "vanilla", "--suite", "cheap")
    assert done.exit_code == 1
    assert "vanilla is not a run" in done.output
    assert bench("compare", "noisy", "vanilla", "--suite", "main", "--run", a).exit_code == 1
    words = ["compare", "noisy", "vanilla", "--suite", "cheap", "--run", a, "--csv"]
    manifest = (a / "run.json").read_bytes()
    for place in (a / "run.json", next(a.glob("records/*")), "/proc/x.csv", tmp_path / (249 * "a")):
        done = bench(*words, place)
        assert done.exit_code == 1
        assert done.output.startswith(f"error: --csv {place} cannot be written: ")
    assert (a / "run.json").read_bytes() == manifest
    assert bench(*words, a / "new.csv").exit_code == 0


def other_suite(monkeypatch, name, **changed):
    """A changed suite `cheap` under another name."""
    of = type("Other", (type(suite("cheap")),), {"name": name, **changed})
    module = type(sys)(f"{name}_suite")
    module.SUITE, module.__file__ = of(), __file__
    of.__module__ = module.__name__
    monkeypatch.setitem(SUITES, name, module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.SUITE


def without_labels(self, plan, datasets):
    raise InputError("labels.csv is missing")


def test_the_other_suites_run_after_one_fails(plan, monkeypatch):
    other_suite(monkeypatch, "broken", run=None)
    words = ["--recipe", "tiny", "--datasets", "breastmnist", "--out", plan.out]
    done = bench("run", "broken", "cheap", *words)
    assert done.exit_code == 1
    assert "failed: broken: TypeError" in done.output
    assert "Traceback" in done.output  # our error, not the user's
    (csv,) = plan.out.glob("*/cheap.csv")
    written = {path: path.stat().st_mtime_ns for path in csv.parent.glob("records/cheap-*")}
    assert bench("run", "broken", "cheap", *words).exit_code == 1
    assert written == {path: path.stat().st_mtime_ns for path in written}
    assert list(json.loads((csv.parent / "run.json").read_text())) == ["cheap"]


def test_the_other_suites_are_rendered_if_one_lacks_records(plan, monkeypatch):
    other_suite(monkeypatch, "torn")
    words = ["--recipe", "tiny", "--datasets", "breastmnist", "--out", plan.out]
    assert bench("run", "torn", "cheap", *words).exit_code == 0
    (folder,) = plan.out.iterdir()
    for path in folder.glob("records/torn-*"):
        path.unlink()
    (folder / "cheap.csv").unlink()
    for command in ("report", "verify"):
        done = bench(command, folder)
        assert done.exit_code == 1
        assert "lacks 3 of 3 records of suite 'torn'" in done.output
        assert (folder / "cheap.csv").is_file()  # the other suites' files are rewritten and checked
    assert "3 record(s) of cheap: ok" in done.output


def test_the_other_suites_run_if_one_lacks_its_data(plan, monkeypatch):
    other_suite(monkeypatch, "broken", evaluated=without_labels)
    words = ["--recipe", "tiny", "--datasets", "breastmnist", "--out", plan.out]
    done = bench("run", "broken", "cheap", *words)
    assert done.exit_code == 1
    assert "failed: broken: labels.csv is missing" in done.output
    assert len(list(plan.out.glob("*/cheap.csv"))) == 1


def test_verify_continues_after_a_suite_without_its_data(plan, monkeypatch):
    of = other_suite(monkeypatch, "away")
    words = ["--recipe", "tiny", "--datasets", "breastmnist", "--out", plan.out]
    assert bench("run", "away", "cheap", *words).exit_code == 0
    (folder,) = plan.out.iterdir()
    assert bench("verify", folder).exit_code == 0
    monkeypatch.setattr(type(of), "evaluated", without_labels)
    done = bench("verify", folder)
    assert done.exit_code == 1
    assert f"{folder}: away was not verified: labels.csv is missing" in done.output
    assert f"{folder}: 3 record(s) of cheap: ok" in done.output


def test_all_skips_a_suite_that_cannot_run_and_naming_it_fails(plan, monkeypatch):
    for name in set(SUITES) - {"cheap"}:
        monkeypatch.delitem(SUITES, name)
    other_suite(monkeypatch, "lacking", lacking=lambda self, plan: "no package")
    words = ["--recipe", "tiny", "--datasets", "breastmnist", "--out", plan.out]
    done = bench("run", "--all", *words)
    assert done.exit_code == 0, done.output
    assert "lacking is left out: no package" in done.output
    done = bench("run", "cheap", "lacking", *words)
    assert done.exit_code == 1
    assert "failed: lacking: suite lacking: no package" in done.output
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


def test_a_train_split_of_one_class_is_named():
    from vitask.baselines import linear_probe
    from vitask.data import load, subset
    from vitask.features import Features

    one = {"breastmnist": subset(load("breastmnist", source="phantom"), train=1)}
    with pytest.raises(ValueError, match=r"breastmnist: its 1 training image\(s\).*--limit"):
        linear_probe(one, Features(one, lambda images: images))


@pytest.mark.parametrize("word", ["list", "verify"])
def test_another_locale_changes_no_answer(plan, word):
    """Records hold "±" and "→"; a terminal without them prints escapes."""
    words = ["run", "cheap", "--recipe", "tiny", "--datasets", "breastmnist", "--out", plan.out]
    assert bench(*words).exit_code == 0
    (folder,) = plan.out.iterdir()
    code = (
        "import sys, runpy; sys.path.insert(0, 'tests/bench')\n"
        "from bench.suite import SUITES; SUITES['cheap'] = 'cheap_suite'\n"
        "runpy.run_module('bench', run_name='__main__')\n"
    )
    environment = os.environ | {
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, word, *([str(folder)] if word == "verify" else [])],
        cwd=ROOT, env=environment, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert word == "list" or b"3 record(s) of cheap: ok" in done.stdout


def test_what_the_system_refuses_is_told_and_a_fault_of_ours_is_shown():
    for number in errno.errorcode:
        error = OSError(number, os.strerror(number), "a.csv")
        text = None if number in (errno.EPIPE, errno.ESHUTDOWN) else f"a.csv: {error.strerror}"
        assert told(error) == text
        nameless = OSError(number, os.strerror(number))
        ours = text is None or isinstance(nameless, FileNotFoundError | FileExistsError)
        assert told(nameless) == (None if ours else error.strerror)
    assert told(OSError("a text")) is told(FileNotFoundError("a text")) is told(KeyError()) is None


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(28, "No space left on device", "x/a.json"), "x/a.json: No space left on device"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "lower the recipe's batch sizes"),
    ],
)
def test_faults_of_the_machine_are_told_in_a_line(plan, monkeypatch, error, text):
    """And the work that is complete is kept."""
    of = suite("cheap")
    whole = of.run

    def stops(work, wanted):
        yield next(whole(work, wanted))
        raise error

    words = ["--recipe", "tiny", "--datasets", "breastmnist", "--out", plan.out]
    with monkeypatch.context() as patched:
        patched.setattr(of, "run", stops)
        done = bench("run", "cheap", *words)
    assert done.exit_code == 1
    assert f"failed: cheap: {text}" in done.output or text in done.output
    assert "Traceback" not in done.output
    assert "1 of 3 methods were computed before" in bench("run", "cheap", *words).output


def test_one_image_a_split_is_refused_before_anything_runs(plan):
    done = bench("run", "cheap", "--recipe", "tiny", "--limit", 1, "--out", plan.out)
    assert done.exit_code == 1
    assert "expected 2 or more" in done.output
    assert not list(plan.out.glob("*/records"))


def test_a_card_that_cannot_be_used_is_named_in_the_list_and_the_others_count(tmp_path):
    for name in ("deep", "twice"):
        (tmp_path / f"{name}.npz").touch()
    (tmp_path / "deep.json").write_text("[" * 10**5)
    (tmp_path / "twice.json").write_text('{"name": 1, "name": 2}')
    done = bench("list", "--data-root", tmp_path)
    text = " ".join(done.output.split())
    assert done.exit_code == 0
    assert "deep cannot be used:" in text
    assert "twice cannot be used:" in text
    assert "chestmnist" in text
