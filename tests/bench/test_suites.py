"""Every suite: its attributes, its page, and a complete run that takes seconds."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm

from bench.commands.verify import differences
from bench.report.render import write
from bench.report.table import COLUMNS
from bench.runs import sets
from bench.runs.job import run_job
from bench.runs.plan import Job, Plan, job_of, sized
from bench.runs.records import record_name
from bench.suite import MACHINE_SUITES, SUITES, machine_suite, question, suite
from bench.suites.corruptions import missing
from vitask.recipes import POCKET, RECIPES, Source, Study
from vitask.tsm import TSM, Head

ROOT = Path(__file__).parents[2]
every = pytest.mark.parametrize("name", SUITES)


@every
def test_attributes_are_complete(name):
    of = suite(name)
    assert of.name == name
    assert of.about
    assert question(name).endswith("?")
    assert of.about.startswith(question(name))
    names = [method.name for method in of.methods]
    assert len(set(names)) == len(names)
    for method in of.methods:
        assert method.text
        assert not set(record_name(name, method.name, 0)) & set("/\\ :*?")
        assert method.against in {None, *names} - {method.name}
    if of.published is not None:
        assert (ROOT / "leaderboards" / "published" / of.published.file).is_file()
        assert of.published.note
    assert {training.kind for training in of.models(POCKET).values()} <= {"tsm", "vlm"}


def test_suites_are_the_files_of_their_folder():
    files = {p.stem for p in (ROOT / "bench" / "suites").glob("*.py")} - {"__init__"}
    assert set(SUITES) == files
    code = "from bench.suite import SUITES; print(next(iter(SUITES)))"  # unpatched
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "main\n"


@pytest.mark.parametrize("name", [*SUITES, *MACHINE_SUITES])
def test_the_page_states_the_question_and_how_to_read_it(name):
    text = (ROOT / "bench" / "suites" / f"{name}.md").read_text()
    assert "**What it asks.**" in text
    assert "**How to read it.**" in text


def test_machine_suites_have_columns_and_an_introduction():
    assert not set(MACHINE_SUITES) & set(SUITES)
    for name in MACHINE_SUITES:
        assert machine_suite(name).columns
        assert machine_suite(name).about


class Silent:
    """Adds up the reported units."""

    def __init__(self) -> None:
        self.units = 0.0

    def advance(self, units: float, text: str, *, finished: bool = False) -> None:
        assert text
        self.units += units

    skip = advance

    def note(self, text: str) -> None:
        assert text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Plan:
    """A plan for two phantom datasets; all suites share one folder, as with --all."""
    datasets = ("retinamnist", "breastmnist")
    small = {"stage1_epochs": 1, "stage2_epochs": 1, "tsm_epochs": 1}
    study = Study(datasets=datasets, train_limit=12, **small)
    sources = {"phantom": Source(datasets, (0,), study, (16, 8, 8))}
    recipe = replace(POCKET, name="tiny", sources=POCKET.sources | sources, **small)
    RECIPES["tiny"] = recipe
    yield Plan(
        recipe=recipe, source="phantom", names=datasets, out=tmp_path_factory.mktemp("suites")
    )
    del RECIPES["tiny"]


def run(job: Job, progress: Silent):
    with sets.locked(job.plan.folder):
        return run_job(job, job.plan.folder, progress, command="python -m bench")


def job_of_suite(name: str, plan: Plan) -> Job:
    """A job in the plan's folder, as when one command runs several suites."""
    return Job.of(suite(name), sized(plan, suite(name)))


@every
def test_a_suite_runs_to_its_tables_and_verifies(name, tiny):
    if lacks := suite(name).lacking(tiny):
        pytest.skip(lacks)
    job, told = job_of_suite(name, tiny), Silent()
    with sets.locked(tiny.folder):
        records, computed = run_job(job, tiny.folder, told, command="python -m bench")
        write(tiny.folder, records)
    assert computed == len(records) == len(job.suite.methods)
    for record in records:  # names its model's differences from the suite's recipe
        kind, _, form = record.method.partition("@")
        assert name == "main" or "changed" in record.extras
        if kind == "vitask_plug":
            assert set(record.extras["training of the plugged TSM"]) == set(record.data)
        if kind == "vanilla":
            assert record.recipe["exemplar"] is True
            assert record.extras["changed"]["exemplar"] is False
        if form not in ("", "complete"):
            assert record.extras["changed"]["instruction"] == form.removesuffix("_trained")
    assert told.units == pytest.approx(job.units, rel=1e-6)
    assert [record.method for record in records] == [method.name for method in job.suite.methods]
    frame = pd.read_csv(tiny.folder / f"{name}.csv")
    assert tuple(frame.columns) == COLUMNS
    assert set(frame.method) == {method.name for method in job.suite.methods}
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
            assert (method == "vanilla") == bool(np.isnan(row["p"]))
    page = (tiny.folder / f"{name}.md").read_text()
    if name in ("calibration", "corruptions"):
        assert re.search(r"\| tsm \| \d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]", page)  # in the section
    assert "PHANTOM" in page.splitlines()[0]
    assert ("bootstrap interval" in page) == frame["ci_low"].notna().any()
    assert ("constrained scoring over" in page) == (frame["metric"] == "macro_f1").any()
    for figure in tiny.folder.glob("*.svg"):
        assert figure.read_text().startswith("<svg")
    again = job_of(records[0], {}, roots=(), allow_unverified=(), folder=tiny.folder)
    assert again.ingredients == job.ingredients
    assert differences(tiny.folder, records, again.evaluated) == []


def test_baselines_reuse_the_models_of_the_ablation(tiny):
    known = sets.read_manifest(tiny.folder)
    if not {"ablation", "baselines"} <= set(known):
        pytest.skip("runs after the suites")
    found = {name: sets.read_records(tiny.folder, name) for name in ("ablation", "baselines")}
    for method in ("vanilla", "crt", "vanilla_with_ep"):
        one, other = (next(r for r in rs if r.method == method) for rs in found.values())
        assert (one.metrics, one.extras) == (other.metrics, other.extras)
    folders = [p.name for p in (tiny.folder / "checkpoints").iterdir()]
    assert sorted(n for n in folders if n.startswith(("study-crt-", "study-ep-"))) == [
        "study-crt-seed0",
        "study-ep-seed0",
    ]


def test_suites_share_identical_models(tiny):
    """`ablation` and `cost` follow suites with the same models, so nothing is trained twice."""
    notes = sorted((tiny.folder / "checkpoints").glob("*/training.json"))
    if not notes:
        pytest.skip("runs after the suites")
    before = {note: note.stat().st_mtime_ns for note in notes}
    with sets.locked(tiny.folder):
        job = job_of_suite("cost", tiny)
        names = [method.name for method in job.suite.methods]
        paths = sets.what_fresh_deletes(tiny.folder, ["cost"])
        sets.delete(tiny.folder, ["cost"], [path for path in paths if path.is_file()])
        computed = run_job(job, tiny.folder, Silent(), command="python -m bench")[1]
    assert computed == len(names)
    assert {note: note.stat().st_mtime_ns for note in notes} == before


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("main", POCKET.datasets("phantom")),
        ("ablation", POCKET.sources["phantom"].study.datasets),
        ("exemplars", ("dermamnist",)),
        ("instructions", POCKET.datasets("phantom")),
        ("external", ("retinamnist",)),
    ],
)
def test_suites_train_on_their_default_datasets_unless_some_are_chosen(name, expected):
    plan = Plan(recipe=POCKET, source="phantom", names=POCKET.datasets("phantom"))
    assert sized(plan, suite(name)).names == expected
    chosen = replace(plan, names=("bloodmnist",))
    kept = ("retinamnist",) if name == "external" else ("bloodmnist",)
    assert sized(chosen, suite(name)).names == kept
    assert sized(chosen, suite(name)).recipe.name == POCKET.name


@pytest.mark.parametrize(("name", "expected"), [("main", (0, 1, 2)), ("ablation", (4, 5))])
def test_suites_run_the_recipes_seeds_unless_some_are_chosen(name, expected):
    real = POCKET.sources["medmnist"]
    real = replace(real, study=replace(real.study, seeds=(4, 5)))
    recipe = replace(POCKET, sources=POCKET.sources | {"medmnist": real})
    plan = Plan(recipe=recipe, source="medmnist", names=recipe.datasets("medmnist"))
    assert sized(plan, suite(name)).seeds == expected
    assert sized(replace(plan, seeds=(0, 1, 2)), suite(name)).seeds == (0, 1, 2)
    assert sized(replace(plan, source="phantom"), suite(name)).seeds == (0,)


def test_settings_also_apply_to_studies():
    plan = Plan(recipe=POCKET, source="medmnist", names=POCKET.datasets("medmnist"))
    by_hand = replace(plan, recipe=replace(POCKET, lora_rank=4, stage1_epochs=9),
                      settings={"lora_rank": 4, "stage1_epochs": 9})  # fmt: skip
    found = sized(by_hand, suite("ablation")).recipe
    assert (found.lora_rank, found.stage1_epochs) == (4, 9)
    assert found.train_limit == POCKET.sources["medmnist"].study.train_limit


def test_a_model_tuned_on_a_fraction_keeps_all_candidates(tiny):
    """A few images of ChestMNIST lack some label sets of the full split."""
    phantom = replace(tiny.recipe.sources["phantom"], samples=(200, 8, 8))
    recipe = replace(tiny.recipe, sources=tiny.recipe.sources | {"phantom": phantom})
    chest = replace(tiny, names=("chestmnist",), recipe=recipe, limit=150)
    own = sized(chest, suite("data_fraction"))
    job = Job.of(suite("data_fraction"), replace(own, recipe=replace(own.recipe, train_limit=150)))
    records, _ = run(job, Silent())
    assert len(records) == len(job.suite.methods)


def test_limit_applies_to_external_sets(tiny):
    job = job_of_suite("external", replace(tiny, limit=5))
    sizes = [len(split) for d in job.evaluated.values() for split in d.splits.values()]
    assert max(sizes) <= 5


def test_exemplars_have_several_patch_tokens():
    own = suite("exemplars").models(POCKET)["tsm"].recipe
    model = TSM(own.tsm, {"toy": Head(0, 2)}, own.tsm_image_size)
    assert model.features(np.zeros((1, 28, 28), np.uint8), "all").shape[1] == 16


def test_architectures_shrink_for_small_images_only():
    def recipes(recipe):
        models = suite("architectures").models(recipe).items()
        return {name: model.recipe for name, model in models if model.kind == "vlm"}

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


def test_a_dataset_without_corruptions_is_named():
    record = SimpleNamespace(
        method="tsm", trained_on={"own": {}}, extras={"severities": {}, "unavailable": {"own": {}}}
    )
    ((title, text),) = suite("corruptions").sections([record], None)
    assert "not available here" in title
    assert "| own | – | MedMNIST-C lists none" in text


@pytest.mark.parametrize(("size", "why"), [(28, "28"), (224, "has no AlexNet")])
def test_missing_relative_errors_are_explained(size, why):
    def found(metrics):
        record = SimpleNamespace(
            trained_on={"own": {"size": size}},
            extras={"severities": {"own+blur": [0.5]}, "unavailable": {"own": {"ink": "no ink"}}},
            metrics={"own+blur": {"lost": 0.1} | metrics},
        )
        return missing(record)

    assert found({"be": 1.0, "rbe": 1.0}) == [("own", "ink", "no ink")]
    (ink, (base, what, text)) = found({})
    assert (ink[1], base, what) == ("ink", "own", "`be`, `rbe`")
    assert why in text
