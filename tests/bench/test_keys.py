"""Keys change with what decides a result, and with nothing else."""

import ast
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

import pytest

from bench.runs.ingredients import COMPUTING, DATA, NEVER
from bench.runs.keys import CODE, _Bare, changes, code, fields_read, key
from bench.suite import SUITES
from vitask.recipes import Recipe

ROOT = Path(__file__).parents[2]
PACKAGES = ("kernels", "vitask", "bench")
ENTRIES = ("vitask.tsm", "vitask.train", "bench.suites.main", "bench.suites.ranking")
TUNED = set(ENTRIES) - {"vitask.tsm"}  # a task-specific model knows neither VLM nor suites
SUITE_FILES = {"bench.suites.main", "bench.suites.ranking"}
FIELDS = {field.name for field in fields(Recipe)} - NEVER


def modules(entry: str) -> list[str]:
    """What a record or a model of this entry is computed by, as ingredients take it."""
    return [entry, *COMPUTING] if entry.startswith("bench") else [entry]


def ingredients(entry: str, root: Path = ROOT) -> dict[str, str]:
    """The code among an entry's ingredients."""
    return {f"{CODE}{file}": digest for file, digest in code(modules(entry), root=root).items()}


def only(file: str, entries: Collection[str]) -> dict[str, list[str]]:
    """What `Sources.changed` says where one file differs, of these entries."""
    return {entry: [f"code: {file}"] for entry in entries}


class Sources:
    """A copy of the three packages' Python files that can be edited."""

    def __init__(self, root: Path) -> None:
        self.root, self._clock = root, itertools.count(1)
        for path in (p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
            copy = root / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        self.before = self.codes()

    def codes(self) -> dict[str, dict[str, str]]:
        return {entry: ingredients(entry, self.root) for entry in ENTRIES}

    def write(self, file: str, text: str) -> None:
        ast.parse(text)
        path = self.root / file
        path.write_text(text)
        later = path.stat().st_mtime_ns + next(self._clock) * 1_000_000
        os.utime(path, ns=(later, later))

    def edit(self, file: str, old: str, new: str) -> None:
        """Exactly one place of a file."""
        text = (self.root / file).read_text()
        assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
        self.write(file, text.replace(old, new))

    def restore(self, file: str) -> None:
        self.write(file, (ROOT / file).read_text())

    def changed(self) -> dict[str, list[str]]:
        """Entry -> the ingredients that differ from the unedited sources, of changed keys alone."""
        found = {}
        for entry, after in self.codes().items():
            before = self.before[entry]
            assert (key(before) == key(after)) == (before == after)
            if before != after:
                found[entry] = changes(before, after)
        return found


@pytest.fixture
def sources(tmp_path):
    return Sources(tmp_path)


def described_otherwise(text: str) -> str:
    """Every docstring is another one, every comment is gone, every line is set anew."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            node.body[0].value = ast.Constant("Something else.")
    return "# A comment.\n" + ast.unparse(tree) + "\n\n# Another one.\n"


def test_a_copy_elsewhere_has_the_same_digests(sources):
    assert sources.before == {entry: ingredients(entry) for entry in ENTRIES}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("kernels/problem.py", '"""', '"""In other words. '),
        ("vitask/objective.py", "    contrastive = weights.crt != 0\n",
         "    # a comment\n\n    contrastive = (\n        weights.crt\n        != 0)  # another\n"),
        ("bench/runs/judge.py", '"""Everything that an outcome says of the test images."""', ""),
    ],
    ids=["docstring", "comment and layout", "no docstring"],
)  # fmt: skip
def test_documentation_and_layout_change_no_digest(file, old, new, sources):
    text = (ROOT / file).read_text()
    sources.write(file, text.replace(old, new, 1))
    assert (sources.root / file).read_text() != text
    assert sources.changed() == {}


def test_all_modules_described_and_laid_out_otherwise_have_the_same_digests(sources):
    held = {name.removeprefix(CODE) for found in sources.before.values() for name in found}
    assert {file.split("/")[0] for file in held} == set(PACKAGES)
    for file in held:
        sources.write(file, described_otherwise((ROOT / file).read_text()))
    assert sources.changed() == {}


EXECUTED = [  # file, a part of one executed line, another in its place, entries that depend on it
    ("kernels/problem.py", "IGNORE_INDEX = -100", "IGNORE_INDEX = -1", TUNED),
    ("vitask/objective.py", "crt_weight if stage == 2", "crt_weight if stage == 1", TUNED),
    ("vitask/vlm.py", "text = attention if torch", "text = name if torch", TUNED),
    ("vitask/train.py", "text = response(answer(dataset.spec, label))",
     "text = answer(dataset.spec, label)", TUNED),
    ("vitask/validation.py", "np.log(0.5)", "np.log(0.6)", set(ENTRIES)),
    ("vitask/tsm.py", "float() / 255", "float() / 256", set(ENTRIES)),
    ("vitask/baselines.py", "SMALLEST = 1e-6", "SMALLEST = 1e-7", {"bench.suites.main"}),
    ("bench/runs/work.py", "DIGITS = 2.0**-10", "DIGITS = 2.0**-9", SUITE_FILES),
    ("bench/runs/judge.py", "round(v, 12)", "round(v, 11)", SUITE_FILES),
    ("bench/stats/metrics.py", "ECE_BINS = 15", "ECE_BINS = 10", SUITE_FILES),
    ("bench/stats/items.py", "DIGITS = 6", "DIGITS = 5", SUITE_FILES),
    ("bench/suites/main.py", 'if "tsm" in wanted', 'if "tsm" not in wanted', {"bench.suites.main"}),
    ("bench/suites/ranking.py", "BINS = 50", "BINS = 40", {"bench.suites.ranking"}),
]  # fmt: skip


def test_an_executed_line_changes_the_keys_of_those_alone_that_hold_its_module(sources):
    for file, old, new, entries in EXECUTED:
        assert {e for e in ENTRIES if f"code: {file}" in sources.before[e]} == entries, file
        sources.edit(file, old, new)
        assert sources.changed() == only(file, entries), (file, new)
        sources.restore(file)
        assert sources.changed() == {}


def statements(tree: ast.AST) -> int:
    """Statements inside functions, but for documentation."""
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.stmt) and node is not function
    }
    return sum(
        not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        and not isinstance(node, ast.Pass)
        for node in inside
    )


def test_no_statement_of_a_function_is_passed_over():
    """Whatever its variables are named: `text` and `note` decide something there."""
    files = set().union(*(code(modules(SUITES[name])) for name in SUITES))
    for file in files:
        text = (ROOT / file).read_text()
        bare = _Bare(recipes=file == "vitask/recipes.py").visit(ast.parse(text))
        assert statements(bare) == statements(ast.parse(text)), file


PROSE = [  # file, a text that is shown, another
    ("bench/suites/main.py", "the training split's class frequencies for every image", "guesses"),
    ("bench/suites/main.py", "is tuning with exemplars better than vanilla tuning?", "is it?"),
    ("bench/suites/main.py", "The model, the images and their number differ", "Much differs"),
    ("bench/suites/ranking.py", "Overlap of the two distributions", "What both share"),
    ("bench/suites/ranking.py", "Probability that the right image ranks above", "How often above"),
    ("bench/suites/ranking.py", '"Mean token probability of the true response")', '"p")'),
    ("bench/suite.py", "Macro-F1 over the fixed label set, by constrained scoring", "F1"),
    ("bench/suite.py", "the VLM tuned by instructions alone (Van)", "Van"),
    ("bench/suite.py", "has no method {name!r}; did you mean", "lacks {name!r}; try"),
    ("bench/stats/metrics.py", "log-probabilities are NaN or all infinite in some rows", "bad"),
    ("vitask/baselines.py", "image(s) are all of class {labels[0]}; ", "images are alike; "),
    ("vitask/tsm.py", "features {kind!r}; expected one of", "no features {kind!r} among"),
    ("vitask/recipes.py", "the branches share one forward", "they share one"),
    ("vitask/shared.py", "negatives share the instruction", "another instruction"),
]  # fmt: skip


def test_texts_that_are_only_shown_change_no_key(sources):
    for file, old, new in PROSE:
        sources.edit(file, old, new)
        assert sources.changed() == {}, old
        sources.restore(file)


def test_texts_of_a_metric_of_one_suite_change_no_key(tmp_path):
    sources = Sources(tmp_path)
    entry = "bench.suites.corruptions"
    before = ingredients(entry, tmp_path)
    file = "bench/suites/corruptions.py"
    sources.edit(file, "Balanced accuracy lost against the clean images", "What is lost")
    assert ingredients(entry, tmp_path) == before
    sources.edit(file, '            "lost",\n', '            "taken",\n')
    assert changes(before, ingredients(entry, tmp_path)) == [f"code: {file}"]


DECIDING = [  # file, what looks alike but decides something, another, entries
    ("bench/suites/main.py", 'Method("untuned",', 'Method("plain",', {"bench.suites.main"}),
    ("bench/suites/main.py", 'before tuning", "vanilla")', 'before tuning", "tsm")',
     {"bench.suites.main"}),
    ("bench/suites/ranking.py", '"the VLM before tuning", "vanilla")', '"the VLM before tuning")',
     {"bench.suites.ranking"}),
    ("bench/suites/ranking.py", '"Van + CRT", "vanilla")', '"Van + CRT", against="untuned")',
     {"bench.suites.ranking"}),
    ("bench/suite.py", 'Method("vanilla", "the VLM', 'Method("van", "the VLM', SUITE_FILES),
    ("vitask/baselines.py", "len(np.unique(labels)) < 2", "len(np.unique(labels)) < 3",
     {"bench.suites.main"}),
    ("bench/suites/ranking.py", 'Metric("overlap",', 'Metric("shared",', {"bench.suites.ranking"}),
    ("vitask/recipes.py", "if self.batch_size % 4:", "if self.batch_size % 8:", set(ENTRIES)),
]  # fmt: skip


def test_names_references_and_conditions_beside_texts_do(sources):
    for file, old, new, entries in DECIDING:
        sources.edit(file, old, new)
        assert sources.changed() == only(file, entries), new
        sources.restore(file)


def test_values_of_recipes_are_no_code_but_what_recipes_do_is(sources):
    file = "vitask/recipes.py"
    for old, new in [
        ("    tsm_learning_rate=3e-3,\n", "    tsm_learning_rate=1e-3,\n"),
        ("    val_limit=200,\n", ""),
        ('name="internvl3_1b"', 'name="another"'),
        ('SMALL = Study(datasets=("dermamnist", ', 'SMALL = Study(datasets=("octmnist", '),
        ("PAPER = Recipe(\n", 'FOURTH = Recipe(name="fourth")\n\nPAPER = Recipe(\n'),
    ]:
        sources.edit(file, old, new)
        assert sources.changed() == {}, new
        sources.restore(file)
    for old, new in [
        ("return self.stage1_epochs + self.stage2_epochs", "return self.stage1_epochs"),
        ("            tsm_epochs=size.tsm_epochs,\n", ""),
        ("exemplar=False, rda_weight=0.0, crt_weight=0.0", "rda_weight=0.0, crt_weight=0.0"),
        ("tsm_weight_decay: float = 0.05", "tsm_weight_decay: float = 0.5"),
    ]:
        sources.edit(file, old, new)
        assert sources.changed() == only(file, ENTRIES), new
        sources.restore(file)


def test_another_modules_capital_names_are_code(sources):
    """Only recipes are values: elsewhere what `replace` makes counts."""
    added = "OTHER = replace(Weights(1.0, 1.0), rda=2.0)"
    sources.edit("vitask/objective.py", "\n\ndef joint_loss(", f"\n\n{added}\n\n\ndef joint_loss(")
    assert sources.changed() == only("vitask/objective.py", TUNED)


def test_what_is_imported_for_types_alone_does_not_count(sources):
    file = "bench/suites/main.py"
    assert "TYPE_CHECKING" in (ROOT / file).read_text()
    for new in (
        "if TYPE_CHECKING:\n    from bench.report.answers import Answers\n",
        "if False:\n    from bench.report.answers import Answers\n",
    ):
        sources.edit(file, "if TYPE_CHECKING:\n", new)
        closure = code([SUITES["main"]], root=sources.root)
        if new.startswith("if False"):
            assert "bench/report/answers.py" in closure  # the same import, not for types
        else:
            assert closure == code([SUITES["main"]])
        sources.restore(file)
    file = "vitask/objective.py"
    negated = "if not TYPE_CHECKING:\n    from vitask import baselines\n"
    sources.edit(file, "\n\ndef joint_loss(", f"\n\n{negated}\n\ndef joint_loss(")
    assert "vitask/baselines.py" in code(["vitask.train"], root=sources.root)


def test_types_of_arguments_and_results_change_no_digest(sources):
    sources.edit("vitask/objective.py", "(recipe: Recipe, stage: int) -> Weights:",
                 "(recipe, stage: float) -> object:")  # fmt: skip
    assert sources.changed() == {}


LOADED = """
import sys
from importlib import import_module
from pathlib import Path
for name in sys.argv[1:]:
    import_module(name)
for module in list(sys.modules.values()):
    file = getattr(module, "__file__", None)
    if file and Path(file).is_relative_to(Path.cwd()):
        print(Path(file).relative_to(Path.cwd()).as_posix())
"""


def loaded(sources: Sources, *names: str) -> set[str]:
    """The project's modules that importing these really loads.

    A package's own file loads what it re-exports, too; if no closure holds it, it is empty here.
    """
    held = code(names, root=sources.root)
    for path in sources.root.rglob("__init__.py"):
        file = path.relative_to(sources.root).as_posix()
        if file not in held:
            sources.write(file, "")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADED, *names],
        cwd=sources.root, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {f for f in done.stdout.splitlines() if (sources.root / f).read_text()}


def test_training_loads_no_module_that_its_closure_lacks(sources):
    found = loaded(sources, "vitask.train")
    assert {"vitask/train.py", "vitask/vlm.py", "kernels/problem.py"} <= found
    assert found <= set(code(["vitask.train"]))


def test_suites_load_no_module_that_their_closure_lacks(sources):
    names = [SUITES["main"], SUITES["calibration"], *COMPUTING]
    found = loaded(sources, *names)
    assert {"bench/runs/work.py", "vitask/tsm.py", "bench/stats/metrics.py"} <= found
    assert found <= set(code(names))


def test_fields_of_a_recipe_are_those_that_a_module_reads():
    read = fields_read(["vitask/tsm.py"], FIELDS)
    assert "tsm_epochs" in read
    assert "rda_weight" not in read
    assert read <= FIELDS
    assert "rda_weight" in fields_read(["vitask/objective.py"], FIELDS)
    assert fields_read(["vitask/recipes.py"], FIELDS) == set()  # it reads whatever others ask for
    assert fields_read(["vitask/tsm.py", "vitask/objective.py"], FIELDS) == read | fields_read(
        ["vitask/objective.py"], FIELDS
    )


def test_what_a_recipe_makes_of_its_fields_is_read_with_them(tmp_path):
    """`Recipe.epochs` is made of both stages' lengths: who asks for it depends on both."""
    (tmp_path / "vitask").mkdir()
    shutil.copyfile(ROOT / "vitask" / "recipes.py", tmp_path / "vitask" / "recipes.py")
    file = tmp_path / "vitask" / "some.py"
    file.write_text("def some(recipe):\n    return recipe.epochs + recipe.warmup\n")
    read = fields_read(["vitask/some.py"], FIELDS, root=tmp_path)
    assert read == {"stage1_epochs", "stage2_epochs", "warmup"}


def test_every_field_of_a_recipe_decides_a_model_but_those_of_data():
    """Two sizes enter with the data that they choose."""
    assert FIELDS - fields_read(code(["vitask.train"], DATA), FIELDS) == {
        "corrupted_limit",
        "source_size",
    }
    alone = fields_read(code(["vitask.tsm"], DATA), FIELDS)
    tsm = {name for name in FIELDS if name.startswith("tsm")}
    assert alone == tsm | {"step"}  # its optimiser's `step` counts as read: rather too much


def test_changes_name_what_differs():
    before = {"recipe.learning_rate": 0.003, "code: vitask/train.py": "a1", "gone": 1, "same": 2}
    after = {"same": 2, "code: vitask/train.py": "b2", "recipe.learning_rate": 0.001, "new": None}
    assert changes(before, after) == [
        "code: vitask/train.py",
        "gone (gone)",
        "new (new)",
        "recipe.learning_rate 0.003 → 0.001",
    ]
    assert changes(before, dict(reversed(before.items()))) == []
    assert changes({"code: x.py": "1"}, {}) == ["code: x.py (gone)"]


def test_a_key_depends_on_values_and_not_on_their_order():
    ingredients = {"b": [1, 2], "a": {"y": 0.5, "x": "ä"}, "c": None}
    backwards = {"c": None, "a": {"x": "ä", "y": 0.5}, "b": [1, 2]}
    assert key(ingredients) == key(backwards)
    assert len(key(ingredients)) == 16
    int(key(ingredients), 16)
    others = [ingredients | {"b": [2, 1]}, ingredients | {"c": 0}, ingredients | {"d": None},
              {"b": [1, 2], "a": {"y": 0.5, "x": "ä"}}]  # fmt: skip
    assert len({key(one) for one in [ingredients, *others]}) == 1 + len(others)


ALWAYS = {
    "bench/suite.py", "bench/runs/work.py", "bench/runs/judge.py", "bench/runs/models.py",
    "bench/stats/metrics.py", "bench/stats/items.py", "vitask/score.py", "vitask/prompts.py",
    "vitask/train.py", "vitask/tsm.py", "vitask/validation.py",
}  # fmt: skip
OWN = {
    "main": {"vitask/baselines.py"},
    "calibration": {"vitask/calibration.py"},
    "corruptions": {"vitask/data/corruption.py"},
    "baselines": {"bench/suites/ablation.py"},  # whose models it trains
}


@pytest.mark.parametrize("name", SUITES)
def test_all_that_takes_part_in_a_records_numbers_is_held_and_no_report(name):
    held = set(code([SUITES[name], *COMPUTING], DATA))
    assert held >= ALWAYS | OWN.get(name, set()) | {f"bench/suites/{name}.py"}
    suites = {file for file in held if file.startswith("bench/suites/")}
    assert suites <= {f"bench/suites/{name}.py"} | OWN.get(name, set())
    above = ("bench/report/", "bench/commands/", "bench/machine/", "bench/api.py", "bench/__main__")
    assert [file for file in held if file.startswith(above)] == []
    assert [file for file in held if file.startswith(DATA)] == []
