"""medmnist's Evaluator computes our metrics from our result files."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from bench.report.official import is_official, official_texts, write_official
from bench.runs.judge import candidates_card
from bench.runs.records import Record, write_samples
from vitask.data import medmnist
from vitask.data.medmnist import result_name
from vitask.data.spec import Dataset, Split, ids
from vitask.prompts import candidates
from vitask.score import Prediction

FLAGS = ("breastmnist", "retinamnist", "chestmnist")
READ = """
import sys
from medmnist.evaluator import Evaluator
for path in sys.argv[1:]:
    Evaluator.parse_and_evaluate(path, run="again")
"""


def small(flag, size):
    """A small dataset in the form of an official one."""
    rng = np.random.default_rng(size)
    spec = replace(medmnist.spec(flag), n_samples={"train": 50, "val": 50, "test": 50})
    parts = {}
    for part in ("train", "val", "test"):
        shape = (50, len(spec.classes))
        labels = (
            (rng.random(shape) < 0.3) * 1 if spec.multi_label else rng.permutation(50) % shape[1]
        )
        images = np.zeros((50, size, size), np.uint8)
        parts[part] = Split(images, labels.astype(np.int64), ids(flag, part, 50))
    return Dataset(spec, parts, size, "medmnist", "0" * 32, True)


def record_of(plan, datasets, folder):
    rng = np.random.default_rng(0)
    known = {n: candidates(d.spec, d.splits["train"].labels) for n, d in datasets.items()}
    predictions = [
        Prediction(n, "candidates", rng.normal(size=(50, len(known[n].texts)))) for n in datasets
    ]
    record = Record(
        suite="main", method="vitask_with_ep", seed=3, key="", command="", recipe={},
        plan={"limit": None}, trained_on={},
        data={name: dataset.card() for name, dataset in datasets.items()},
        candidates={n: candidates_card(known[n], d.splits["test"].labels)
                    for n, d in datasets.items() if d.spec.multi_label},
        prompts={}, prompts_sha256="", samples_sha256="", metrics={}, confusion={}, extras={},
        versions={}, commit="", hardware={},
    )  # fmt: skip
    write_samples(folder / "samples" / f"{record.name}.parquet", predictions, datasets)
    return record


def test_medmnist_computes_the_same_metrics(plan, tmp_path):
    home, written = tmp_path / "home", []
    (home / ".medmnist").mkdir(parents=True)
    for size in (28, 64):
        datasets = {flag: small(flag, size) for flag in FLAGS}
        record = record_of(plan, datasets, tmp_path / str(size))
        written += write_official(tmp_path / str(size), [record])
        for flag, dataset in datasets.items():
            test = dataset.splits["test"].labels.reshape(50, -1)
            np.savez(home / ".medmnist" / medmnist.file_name(flag, size), test_labels=test)
    assert len(written) == 6
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ, *map(str, written)],
        env=os.environ | {"HOME": str(home)}, check=True, capture_output=True,
    )  # fmt: skip
    expected = {path.name.replace(f"@{record.name}", "@again") for path in written}
    assert {path.name for path in tmp_path.rglob("*@again.csv")} == expected


def test_files_with_old_metrics_are_replaced(plan, tmp_path):
    record = record_of(plan, {"breastmnist": small("breastmnist", 28)}, tmp_path)
    old = tmp_path / "official" / f"breastmnist_test_[AUC]0.001_[ACC]0.001@{record.name}.csv"
    kept = tmp_path / "official" / "breastmnist_test_[AUC]0.001_[ACC]0.001@mine.csv"
    old.parent.mkdir()
    old.touch()
    kept.touch()
    (path,) = write_official(tmp_path, [record])
    assert sorted(old.parent.iterdir()) == sorted([path, kept])


@pytest.mark.parametrize(
    "change",
    [{"source": "phantom"}, {"source": "card"}, {"md5_ok": False},
     {"images": {"train": 50, "val": 50, "test": 49}},
     {"images": {"train": 49, "val": 50, "test": 50}}],
    ids=str,
)  # fmt: skip
def test_only_complete_verified_medmnist_runs_are_official(plan, tmp_path, change):
    record = record_of(plan, {"breastmnist": small("breastmnist", 28)}, tmp_path)
    card = record.data["breastmnist"]
    assert is_official(card)
    card |= change
    assert not is_official(card)
    assert official_texts(tmp_path, [record]) == {}


def test_limited_runs_and_other_suites_are_not_official(plan, tmp_path):
    record = record_of(plan, {"breastmnist": small("breastmnist", 28)}, tmp_path)
    assert official_texts(tmp_path, [record]) != {}
    assert official_texts(tmp_path, [replace(record, plan={"limit": 50})]) == {}
    samples = tmp_path / "samples"
    (samples / f"{record.name}.parquet").rename(samples / "other-vitask_with_ep-seed3.parquet")
    assert official_texts(tmp_path, [replace(record, suite="other")]) == {}


def test_result_name():
    assert (
        result_name("octmnist", 224, auc=0.6716, accuracy=0.5, run="3")
        == "octmnist_224_test_[AUC]0.672_[ACC]0.500@3.csv"
    )
