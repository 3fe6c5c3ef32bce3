"""Models and features that suites share, and find again after a kill."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.api import run_plan
from bench.runs.models import kept
from bench.runs.plan import Plan, sized
from bench.runs.work import Work
from bench.suite import suite
from vitask.recipes import POCKET, Source, Study

ROOT = Path(__file__).parents[2]
SUITES = ("ablation", "calibration")  # both need the same three models
MODELS = 7
# `python -m bench` with one more recipe: two suites in seconds.
TINY = """
import runpy
from dataclasses import replace
from vitask.recipes import POCKET, RECIPES, Source, Study

small = {"stage1_epochs": 1, "stage2_epochs": 1, "tsm_epochs": 1}
study = Study(datasets=("breastmnist",), train_limit=12, **small)
phantom = Source(POCKET.datasets("phantom"), (0,), study, (16, 8, 8))
RECIPES["tiny"] = replace(POCKET, name="tiny", sources={"phantom": phantom})
runpy.run_module("bench", run_name="__main__")
"""


def started(out: Path) -> subprocess.Popen:
    words = ["run", *SUITES, "--recipe", "tiny", "--out", str(out)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", TINY, *words], cwd=ROOT, **quiet)


def killed_with(out: Path, models: int, seconds: float) -> dict[str, int]:
    """Kill a run so many seconds after so many models; returns `left(out)`."""
    with started(out) as process:
        while len(list(out.glob("*/checkpoints/[a-z]*/training.json"))) < models:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(seconds)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    return left(out)


def left(out: Path) -> dict[str, int]:
    """Complete models and records: name -> time of writing."""
    whole = [
        *out.glob("*/checkpoints/[a-z]*/training.json"),
        *out.glob("*/unfinished/*/records/*.json"),
        *out.glob("*/records/*.json"),
    ]
    return {
        path.parent.name if path.name == "training.json" else path.name: path.stat().st_mtime_ns
        for path in whole
    }


def results(out: Path) -> dict[str, bytes]:
    """Every file except the models; records without seconds and memory."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        content, name = path.read_bytes(), path.relative_to(out).as_posix()
        if path.parent.name == "records":
            record = json.loads(content)
            record.pop("measured")
            content = json.dumps(record).encode()
        if "/checkpoints/" not in name:
            found[name] = content
    return found


@pytest.mark.long
def test_killed_in_the_middle_of_suites_that_share_models(tmp_path):
    """It ends with the files of an undisturbed run and repeats nothing."""
    with started(tmp_path / "whole") as process:
        pass
    assert process.returncode == 0
    rng, before = np.random.default_rng(0), dict[str, int]()
    for models in (rng.integers(1, 4), rng.integers(4, MODELS + 1)):
        before |= killed_with(tmp_path / "again", models, rng.uniform(0, 0.3))
    with started(tmp_path / "again") as process:
        pass
    assert process.returncode == 0
    assert before.items() <= left(tmp_path / "again").items()
    expected, found = results(tmp_path / "whole"), results(tmp_path / "again")
    assert {f"tiny-phantom/{name}.{kind}" for name in SUITES for kind in ("csv", "md")} < set(found)
    assert found == expected


@pytest.fixture
def limited(tmp_path):
    """Eight of a suite's 32 or 12 images: equal in number, but different."""
    study = Study(datasets=("breastmnist",), train_limit=12)
    phantom = Source(POCKET.datasets("phantom"), (0,), study, (40, 8, 8))
    return Plan(
        recipe=replace(POCKET, train_limit=32, sources={"phantom": phantom}),
        source="phantom",
        names=("breastmnist",),
        limit=8,
        out=tmp_path,
    )


def test_features_are_shared_by_the_same_images_only(limited):
    class Silent:
        def note(self, text):
            assert text

    def work_of(name):
        plan = sized(limited, suite(name))
        data = plan.datasets()
        return Work(name, plan.recipe, data, data, 0, limited.out, {}, Silent(), cache)

    cache = {}
    main, ablation, other = work_of("main"), work_of("ablation"), work_of("calibration")
    images = [w.datasets["breastmnist"].splits["train"].images for w in (main, ablation)]
    assert images[0].shape == images[1].shape
    assert (images[0] != images[1]).any()
    features = [w.image("breastmnist", "train") for w in (main, ablation)]
    assert not torch.equal(*features)
    for seen, own in zip(features, images, strict=True):
        torch.testing.assert_close(seen, main.untuned.vlm.image_features(own))
    assert other.image is ablation.image
    assert ablation.self_check.keys() == {"breastmnist"}


def test_a_model_is_found_by_its_key_under_another_name(tmp_path):
    def prepare():
        return lambda: ("weights", {"loss": 1.0})

    def save(model, folder):
        folder.mkdir()
        (folder / "model").write_text(model)

    def load(folder):
        return (folder / "model").read_text()

    how = (prepare, save, load)
    found = [
        kept(tmp_path, name, key, "cheap", *how)[1]["found"]
        for name, key in (("a", "1"), ("b", "1"), ("b", "2"), ("a", "2"), ("a", "1"), ("a", "3"))
    ]
    assert found == [False, True, False, True, True, False]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "a-1", "b"}  # none is lost
    assert kept(tmp_path, "a", "1", "cheap", *how)[1]["found"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vlm": "nowhere/at/all"}, "no vision language model at 'nowhere/at/all'"),
        ({"tsm": "resnt18"}, "timm has no model 'resnt18'; did you mean resnet18"),
        ({"tsm": "inception_v3"}, "'inception_v3' cannot take images of 32 pixels"),
        ({"tsm": "coat_tiny", "variant": "all"}, "coat_tiny"),
    ],
)
def test_models_that_cannot_be_used_stop_a_run_before_it_begins(limited, change, message):
    plan = replace(limited, recipe=replace(limited.recipe, **change))
    with pytest.raises(ValueError, match=message):
        run_plan(plan, ["main"])
    assert not list(limited.out.glob("*/checkpoints"))
    assert not list(limited.out.glob("*/run.json"))
