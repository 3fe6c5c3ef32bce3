"""Random answers to random labels, and a real, cheap suite on phantom data."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.runs.plan import Plan
from bench.runs.records import Record
from bench.suite import SUITES
from tests.bench.cheap_runs import complete, records_of
from vitask.data.spec import TASKS, DatasetSpec
from vitask.decision import Scored, scored
from vitask.prompts import candidates
from vitask.recipes import POCKET, RECIPES
from vitask.score import Prediction

HERE = Path(__file__).parent
CLASSES = dict(zip(TASKS, (4, 2, 5, 6), strict=True))


def spec_of(task: str, *, name: str = "toy") -> DatasetSpec:
    return DatasetSpec(
        name=name,
        task=task,
        classes=tuple(f"class {i}" for i in range(CLASSES[task])),
        modality="toy",
        n_channels=1,
        n_samples={"train": 1, "val": 1, "test": 1},
        license="none",
        source="a test",
        head=name,
    )


def answers_of(
    task: str, rng: np.random.Generator, labels: np.ndarray, *, kind: str = "candidates"
) -> tuple[Scored, Prediction]:
    """Answers that are mostly right, with ties among their scores."""
    spec = spec_of(task)
    known = candidates(spec, labels)
    if kind == "labels":
        log_p = np.log(np.round(rng.uniform(0.01, 0.99, labels.shape), 2))
        prediction = Prediction(spec.name, kind, log_p)
    else:
        log_p = np.round(rng.normal(size=(len(labels), len(known.texts))), 1)
        if labels.ndim == 1:
            log_p[np.arange(len(labels)), labels] += 1
        texts = [f" {known.texts[i].upper()}." for i in log_p.argmax(1)]
        texts = [t if rng.random() < 0.9 else "what?" for t in texts]
        prediction = Prediction(spec.name, kind, log_p, texts)
    return scored(spec, labels, prediction, known), prediction


def labels_of(task: str, rng: np.random.Generator, count: int) -> np.ndarray:
    shape = (count, CLASSES[task])
    if task.startswith("multi-label"):
        return (rng.random(shape) < 0.25).astype(np.int64)
    return rng.integers(CLASSES[task], size=count)


Maker = Callable[..., list[Scored]]


@pytest.fixture
def make() -> Maker:
    """make(task, count, methods, seed, kind) -> answers of each method to the same images."""

    def build(
        task: str, count: int = 80, methods: int = 1, seed: int = 0, kind: str = "candidates"
    ) -> list[Scored]:
        rng = np.random.default_rng(seed)
        labels = labels_of(task, rng, count)
        return [answers_of(task, rng, labels, kind=kind)[0] for _ in range(methods)]

    return build


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A plan for the suite `cheap` on three small phantom datasets."""
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setitem(SUITES, "cheap", "cheap_suite")
    names = ("chestmnist", "retinamnist", "breastmnist")
    phantom = replace(POCKET.sources["phantom"], datasets=names, samples=(40, 10, 30))
    recipe = replace(POCKET, name="tiny", sources=POCKET.sources | {"phantom": phantom})
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    monkeypatch.setattr(sys, "argv", ["bench", "run", "cheap", "--recipe", "tiny"])
    out = tmp_path / "out"
    return Plan(recipe=recipe, source="phantom", names=names, out=out, seeds=(0,))


@pytest.fixture
def finished(plan: Plan) -> tuple[Plan, list[Record]]:
    """A finished run of `cheap`, and its records."""
    complete(plan)
    return plan, records_of(plan)
