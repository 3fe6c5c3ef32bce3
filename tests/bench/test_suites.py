"""Every suite: its face, and one whole run at a size of seconds."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm

from bench import runs, table
from bench.commands.verify import differences
from bench.report.table import COLUMNS
from bench.runs.plan import Job, Plan, plan_of, sized, specs_of
from bench.runs.progress import Scaled
from bench.runs.records import record_name
from bench.suite import MACHINE_SUITES, SUITES, lacking, machine_suite, reference_of, suite
from vitask.recipes import POCKET, RECIPES, Study
from vitask.tsm import TSM, Head

ROOT = Path(__file__).parents[2]
every = pytest.mark.parametrize("name", SUITES)


@every
def test_face_is_complete(name):
    module = suite(name)
    assert module.__doc__
    assert all(text for text in module.METHODS.values())
    for method in module.METHODS:
        assert not set(record_name(name, method, 0)) & set("/\\ :*?")
        assert reference_of(module, method) in {None, *module.METHODS} - {method}
    if module.PUBLISHED is not None:
        assert (ROOT / "leaderboards" / "published" / module.PUBLISHED).is_file()
        assert module.PUBLISHED_NOTE
    assert module.units(POCKET) > 0


@pytest.mark.parametrize("name", [*SUITES, *MACHINE_SUITES])
def test_docs_say_what_it_asks_and_how_to_read_it(name):
    text = (ROOT / "bench" / "suites" / f"{name}.md").read_text()
    assert "**What it asks.**" in text
    assert "**How to read it.**" in text


def test_machine_suites_are_modules_of_their_name():
    assert not set(MACHINE_SUITES) & set(SUITES)
    for name in MACHINE_SUITES:
        assert machine_suite(name).COLUMNS


class Silent:
    """Adds up what it is told."""

    def __init__(self) -> None:
        self.units = 0.0

    def advance(self, units: float, text: str) -> None:
        assert text
        self.units += units

    skip = advance

    def note(self, text: str) -> None:
        assert text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Plan:
    """Two phantoms, one of them RetinaMNIST's; one folder for all suites, as with --all."""
    datasets = ("retinamnist", "breastmnist")
    small = {"stage1_epochs": 1, "stage2_epochs": 1, "tsm_epochs": 1}
    recipe = replace(
        POCKET,
        name="tiny",
        phantom_datasets=datasets,
        phantom_samples=(16, 8, 8),
        phantom_study=Study(datasets=datasets, train_limit=12, **small),
        **small,
    )
    RECIPES["tiny"] = recipe
    yield Plan(
        recipe=recipe, source="phantom", names=datasets, out=tmp_path_factory.mktemp("suites")
    )
    del RECIPES["tiny"]


@every
def test_a_suite_runs_to_its_tables_and_verifies(name, tiny):
    if lacks := lacking(suite(name), tiny):
        pytest.skip(lacks)
    job, told = Job.of(name, sized(tiny, suite(name))), Silent()
    with runs.locked(tiny.folder):
        records = runs.run_suite(job, tiny.folder, Scaled(told, 1.0), command="python -m bench")
        table.write(tiny.folder, records, specs_of(records[0]))
    for record in records:  # it says what its model was made by, beside the suite's own recipe
        kind, _, form = record.method.partition("@")
        assert name == "main" or "changed" in record.extras
        if kind == "vitask_plug":
            assert set(record.extras["tuning of what is plugged in"]) == set(record.data)
        if kind == "vanilla":
            assert record.recipe["exemplar"] is True
            assert record.extras["changed"]["exemplar"] is False
        if form not in ("", "complete"):
            assert record.extras["changed"]["instruction"] == form.removesuffix("_trained")
    assert told.units == pytest.approx(job.module.units(job.plan.recipe), rel=1e-6)
    assert [record.method for record in records] == list(job.module.METHODS)
    frame = pd.read_csv(tiny.folder / f"{name}.csv")
    assert tuple(frame.columns) == COLUMNS
    assert set(frame.method) == set(job.module.METHODS)
    assert set(frame.source) == {"phantom"}
    if name == "corruptions":
        values = frame.pivot(index=["dataset", "method"], columns="metric", values="mean")
        lost = frame[frame.metric == "lost"].set_index(["dataset", "method"])
        for (made, method), row in lost.iterrows():
            clean = values.balanced_accuracy[made.split("+")[0], method]
            whole = clean - values.balanced_accuracy[made, method]
            if made != "average":
                assert row["mean"] == pytest.approx(whole, abs=2e-6)
            assert row["ci_low"] <= row["mean"] <= row["ci_high"]
            assert (method == "vanilla") == bool(np.isnan(row["p_holm"]))
    page = (tiny.folder / f"{name}.md").read_text()
    if name in ("calibration", "corruptions"):
        assert re.search(r"\| tsm \| \d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", page)  # in the section
    assert "PHANTOM" in page.splitlines()[0]
    assert ("bootstrap interval" in page) == frame["ci_low"].notna().any()
    assert ("constrained scoring over" in page) == (frame["metric"] == "macro_f1").any()
    for figure in tiny.folder.glob("*.svg"):
        assert figure.read_text().startswith("<svg")
    again = Job.of(name, plan_of(records[0], roots=(), allow_unverified=(), folder=tiny.folder))
    assert again.identity() == job.identity()
    assert differences(tiny.folder, records, again.evaluated) == []


def test_baselines_rivals_are_the_models_of_the_ablation(tiny):
    known = runs.read_manifest(tiny.folder) if (tiny.folder / "run.json").is_file() else {}
    if not {"ablation", "baselines"} <= set(known):
        pytest.skip("runs after the suites")
    found = {name: runs.read_records(tiny.folder, name) for name in ("ablation", "baselines")}
    for method in ("vanilla", "crt", "vanilla_with_ep"):
        one, other = (next(r for r in rs if r.method == method) for rs in found.values())
        assert (one.metrics, one.extras) == (other.metrics, other.extras)
    folders = [p.stem for p in (tiny.folder / "checkpoints").glob("*.json")]
    assert len([stem for stem in folders if stem in ("study-crt-seed0", "study-ep-seed0")]) == 2


def test_suites_share_models_that_are_the_same(tiny):
    """`ablation` and `cost` come after others that need the same; nothing was trained twice."""
    notes = sorted((tiny.folder / "checkpoints").glob("study-v*.json"))
    if not notes:
        pytest.skip("runs after the suites")
    before = {note: note.stat().st_mtime_ns for note in notes}
    with runs.locked(tiny.folder):
        job = Job.of("cost", sized(tiny, suite("cost")))
        runs.run_suite(job, tiny.folder, Silent(), command="python -m bench")
    assert {note: note.stat().st_mtime_ns for note in notes} == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("main", POCKET.phantom_datasets),
        ("ablation", POCKET.phantom_study.datasets),
        ("exemplars", ("dermamnist",)),
        ("instructions", POCKET.phantom_datasets),
        ("external", ("retinamnist",)),
    ],
)
def test_suites_train_on_their_own_datasets_unless_some_are_chosen(name, expected):
    plan = Plan(recipe=POCKET, source="phantom", names=POCKET.phantom_datasets)
    assert sized(plan, suite(name)).names == expected
    chosen = replace(plan, names=("bloodmnist",))
    kept = ("retinamnist",) if name == "external" else ("bloodmnist",)
    assert sized(chosen, suite(name)).names == kept
    assert sized(chosen, suite(name)).recipe.name == POCKET.name


@pytest.mark.parametrize(("name", "expected"), [("main", (0, 1, 2)), ("ablation", (4, 5))])
def test_suites_run_the_recipes_seeds_unless_some_are_chosen(name, expected):
    recipe = replace(POCKET, medmnist_study=replace(POCKET.medmnist_study, seeds=(4, 5)))
    plan = Plan(recipe=recipe, source="medmnist", names=POCKET.medmnist_datasets)
    assert sized(plan, suite(name)).seeds == expected
    assert sized(replace(plan, seeds=(0, 1, 2)), suite(name)).seeds == (0, 1, 2)
    assert sized(replace(plan, source="phantom"), suite(name)).seeds == (0,)


def test_tuned_on_a_part_it_answers_among_the_whole_sets_answers(tiny):
    """Of few images of ChestMNIST not all label sets are known that the whole part has."""
    chest = replace(
        tiny,
        names=("chestmnist",),
        recipe=replace(tiny.recipe, phantom_samples=(200, 8, 8)),
        limit=150,
    )
    own = sized(chest, suite("data_fraction"))
    own = replace(own, recipe=replace(own.recipe, train_limit=150))
    job = Job.of("data_fraction", own)
    with runs.locked(own.folder):
        records = runs.run_suite(job, own.folder, Silent(), command="python -m bench")
    assert len(records) == len(job.module.METHODS)


def test_limit_holds_for_external_sets(tiny):
    job = Job.of("external", sized(replace(tiny, limit=5), suite("external")))
    parts = [len(split) for d in job.evaluated.values() for split in d.splits.values()]
    assert max(parts) <= 5


def test_exemplars_have_several_patch_tokens():
    own = suite("exemplars").seen(POCKET)
    model = TSM(own.tsm, {"toy": Head(0, 2)}, own.tsm_image_size)
    assert model.features(np.zeros((1, 28, 28), np.uint8), "all").shape[1] == 16


def test_architectures_are_small_for_small_images_and_as_usual_for_large_ones():
    recipes = suite("architectures").recipes
    small = {name: own.tsm for name, own in recipes(POCKET).items()}
    assert small == {
        "cnn": "test_resnet", "vit_cls": "test_vit", "vit_pooled": "test_vit2",
        "hybrid": "test_coatnet",
    }  # fmt: skip
    paper = RECIPES["paper"]
    assert recipes(paper)["vit_cls"] == paper
    for own in recipes(paper).values():
        weights = timm.get_pretrained_cfg(own.tsm, allow_unregistered=False)
        assert own.tsm in timm.list_models(pretrained=True)
        assert weights.input_size == (3, paper.tsm_image_size, paper.tsm_image_size)


def test_a_set_without_corruptions_is_named():
    record = SimpleNamespace(
        method="tsm", trained_on={"own": {}}, extras={"severities": {}, "unavailable": {"own": {}}}
    )
    ((title, text),) = suite("corruptions").sections([record], None)
    assert "not available here" in title
    assert "| own | – | MedMNIST-C lists none" in text


@pytest.mark.parametrize(("size", "why"), [(28, "28"), (224, "has no AlexNet")])
def test_medmnist_cs_own_errors_are_named_where_they_are_missing(size, why):
    def missing(metrics):
        record = SimpleNamespace(
            trained_on={"own": {"size": size}},
            extras={"severities": {"own+blur": [0.5]}, "unavailable": {"own": {"ink": "no ink"}}},
            metrics={"own+blur": {"lost": 0.1} | metrics},
        )
        return suite("corruptions").missing(record)

    assert missing({"be": 1.0, "rbe": 1.0}) == [("own", "ink", "no ink")]
    (ink, (base, what, text)) = missing({})
    assert (ink[1], base, what) == ("ink", "own", "`be`, `rbe`")
    assert why in text
