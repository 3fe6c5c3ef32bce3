"""A key changes with the code that decides a result, and only with it."""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.runs.keys import PACKAGES, ROOT, changes, code, fields_read, key, weights
from vitask.recipes import Recipe

PATHS = sorted(p.relative_to(ROOT).as_posix() for n in PACKAGES for p in (ROOT / n).rglob("*.py"))
EXAMPLE = "bench/runs/example.py"
KNOWN = [field.name for field in fields(Recipe)]


def dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path}"
    path.write_text(text.replace(old, new))


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """A copy of the three packages, for tests that do not change it."""
    root = tmp_path_factory.mktemp("copied")
    for path in PATHS:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, root / path)
    return root


@pytest.fixture
def checkout(copied, tmp_path) -> Path:
    """A copy of the three packages, to edit."""
    return shutil.copytree(copied, tmp_path / "checkout")


@pytest.fixture
def digest(tmp_path) -> Callable[..., str]:
    """Returns the digest of a module with the given text, which imports nothing of the project."""

    def of(text: str, path: str = EXAMPLE) -> str:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
        return code([dotted(path)], root=tmp_path)[path]

    return of


@pytest.fixture(scope="module")
def closures(copied) -> dict[str, dict[str, str]]:
    """Module -> its code, for all modules."""
    return {path: code([dotted(path)], root=copied) for path in PATHS}


# Edits that keep a digest


class Reworded(ast.NodeTransformer):
    """Changes all docstrings and adds missing ones."""

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.body.insert(0, ast.Expr(ast.Constant("Another text.")))
        return node

    visit_Module = visit_ClassDef = visit_FunctionDef

    def visit_Expr(self, node):
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else node


def test_documentation_and_formatting_do_not_count(copied, checkout):
    for path in PATHS:
        tree = ast.fix_missing_locations(Reworded().visit(ast.parse((checkout / path).read_text())))
        text = ast.unparse(tree)  # drops comments, changes line ends and quotes
        (checkout / path).write_text(f"# A comment.\n\n{text}  # another\n")
    every = [dotted(path) for path in PATHS]
    assert code(every, root=checkout) == code(every, root=copied)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("raise ValueError(f'{x} is no y; expected z')", "raise ValueError(f'{x + 1}: z!')"),
        ("raise Bad('a', hint='b') from error", "raise Bad('c', hint='d') from error"),
        ("Method('crt', 'Van + CRT', against='x')", "Method('crt', 'reworded', against='x')"),
        ("Metric('auc', 'AUC', averaged=False)", "Metric('auc', f'AU{c}', averaged=False)"),
        ("Method(name='crt', text='a')", "Method(name='crt', text='b')"),
        ("Option('--x', help='a')", "Option('--x', help='b')"),
        ("class A:\n    question = 'a?'", "class A:\n    question = 'b?'"),
        ("class A:\n    title: str = 'a'", "class A:\n    title: str = 'b'"),
        ("published_note = 'a'", "published_note = 'a' 'b'"),
        ("def f(x): return x", "def f(x: int) -> 'int': return x"),
        ("def f():\n    x = []", "def f():\n    x: list[int] = []"),
        ("x = 1", "from typing import TYPE_CHECKING, Any\nx: Any = 1"),
        ("x = 1", "if TYPE_CHECKING:\n    from vitask.gone import x\nx = 1"),
        ("x = 1", "if TYPE_CHECKING:\n    y = 2\nelse:\n    x = 1"),
    ],
)
def test_prose_and_types_do_not_count(digest, before, after):
    assert digest(before) == digest(after)


def test_texts_of_a_suite_do_not_count(digest):
    for before, after in [
        ("SETTINGS = {'a': 'the recipe'}", "SETTINGS = {'a': 'the same recipe'}"),
        ("LOST = (f'lost {by}', 'x')", "LOST = (f'what is lost {by}', 'x')"),
    ]:
        path = "bench/suites/a.py"
        assert digest(before, path) == digest(after, path)
        assert digest(before, "vitask/a.py") != digest(after, "vitask/a.py")
    assert digest("A = {'a': 'b c'}", path) != digest("A = {'b': 'b c'}", path)


# Edits that change it


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("if x > 3: raise ValueError('a')", "if x > 4: raise ValueError('a')"),
        ("raise ValueError('a')", "raise TypeError('a')"),
        ("raise Exit(1)", "raise Exit(2)"),
        ("raise ValueError('a', f('b'))", "raise ValueError('a', f('c'))"),
        ("Method('crt', 'a')", "Method('rda', 'a')"),
        ("Method('crt', 'a', against='x')", "Method('crt', 'a', against='y')"),
        ("Method('crt', 'a', 'x')", "Method('crt', 'a', 'y')"),
        ("Metric('auc', 'a', ranks=('x',))", "Metric('auc', 'a', ranks=('y',))"),
        ("Training('a', 'b')", "Training('a', 'c')"),
        ("def f():\n    question = 'a?'", "def f():\n    question = 'b?'"),
        ("def f():\n    text = g(a)", "def f():\n    text = h(a)"),
        ("class A:\n    title = g(a)", "class A:\n    title = h(a)"),
        ("x.text = 'a'", "x.text = 'b'"),
        ("f(text=a)", "f(text=b)"),
        ("f(text=g('a'))", "f(text=g('b'))"),
        ("x = 'a'", "x = 'b'"),
        ("x = f'{a}'", "x = f'{b}'"),
        ("x = 1", "x = 1.0"),
        ("x = 1", "x = True"),
        ("x = None", "x = ..."),
        ("x = {**a, 1: b}", "x = {1: b, **a}"),
        ("f(*a)", "f(a)"),
        ("x = a, b", "x = [a, b]"),
        ("if not TYPE_CHECKING:\n    x = 1", "if not TYPE_CHECKING:\n    x = 2"),
        ("class A:\n    x: int", "class A:\n    x: float"),  # a dataclass reads its annotations
        ("@op\ndef f(x: int): pass", "@op\ndef f(x: float): pass"),
        ("def f(): return 1", "def f(): yield 1"),
        ("def f(): pass", "async def f(): pass"),
        ("def f(a, /, *, b=1): pass", "def f(a, *, b=1): pass"),
        ("from numpy import sin as f", "from numpy import cos as f"),
    ],
)
def test_executed_code_counts(digest, before, after):
    assert digest(before) != digest(after)


def test_texts_count_where_a_model_may_read_them(digest):
    for template in ("processor(text='{}')", "question = '{}'"):
        for path, same in (("vitask/a.py", False), (EXAMPLE, True)):
            first, second = (digest(template.format(text), path) for text in "ab")
            assert (first == second) is same


def test_types_of_kernels_count(digest):
    """Triton compiles arguments that are annotated as constants."""
    for before, after in [
        ("def f(x): pass", "def f(x: tl.constexpr): pass"),
        ("def f():\n    x = 1", "def f():\n    x: tl.constexpr = 1"),
    ]:
        assert digest(before, "kernels/a.py") != digest(after, "kernels/a.py")


def numbers(source: str) -> Iterator[ast.Constant]:
    """Executed numbers: not in types, f-strings, or fields and values of a recipe."""

    def of(node: ast.AST) -> Iterator[ast.Constant]:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield node
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns"):
                for inner in value if isinstance(value, list) else [value]:
                    if isinstance(inner, ast.AST) and not isinstance(inner, ast.JoinedStr):
                        yield from of(inner)

    yield from of(ast.parse(source))


@given(st.data())
def test_a_changed_number_changes_its_module_and_the_keys_of_importers(copied, closures, data):
    changed = data.draw(st.sampled_from([p for p in PATHS if p != "vitask/recipes.py"]))
    original = (copied / changed).read_bytes()
    found = list(numbers(original.decode()))
    if not found:
        return
    number = data.draw(st.sampled_from(found))
    lines = original.splitlines(keepends=True)
    line = lines[number.lineno - 1]
    other = repr(number.value + 1).encode()
    lines[number.lineno - 1] = line[: number.col_offset] + other + line[number.end_col_offset :]
    (copied / changed).write_bytes(b"".join(lines))
    try:
        for path in [changed, *data.draw(st.lists(st.sampled_from(PATHS), max_size=5))]:
            before, after = closures[path], code([dotted(path)], root=copied)
            expected = [f"code: {changed}"] if changed in before else []
            assert changes(ingredients(before), ingredients(after)) == expected
            assert (key(before) == key(after)) is (changed not in before)
    finally:
        (copied / changed).write_bytes(original)


def ingredients(digests: dict[str, str]) -> dict[str, str]:
    return {f"code: {path}": digest for path, digest in digests.items()}


# Recipes


def test_values_of_recipes_do_not_count_but_their_code_does(checkout):
    path = "vitask/recipes.py"
    before = code(["vitask.recipes"], root=checkout)
    with (checkout / path).open("a") as file:
        file.write('\nMINE = replace(POCKET, name="mine")\nRECIPES["mine"] = MINE\n')
    added = code(["vitask.recipes"], root=checkout)
    assert changes(before, added) == [f"{path} {before[path]} → {added[path]}"]  # a statement
    edited(checkout / path, '\nRECIPES["mine"] = MINE\n', "")
    edited(checkout / path, "tsm_learning_rate=3e-3", "tsm_learning_rate=1e-3")
    edited(checkout / path, "lora_rank: int = 16", "lora_rank: int = 8\n    another: int = 1")
    assert code(["vitask.recipes"], root=checkout) == before
    edited(checkout / path, "self.batch_size % 4", "self.batch_size % 8")
    assert code(["vitask.recipes"], root=checkout) != before


def test_fields_are_those_that_modules_read():
    read = fields_read(["vitask/tsm.py"], KNOWN)
    assert "tsm_epochs" in read
    assert "rda_weight" not in read
    assert fields_read(["vitask/recipes.py"], KNOWN) == set()
    assert fields_read(PATHS, ["no_field"]) == set()


def test_reading_a_property_of_a_recipe_reads_its_fields(checkout):
    (checkout / EXAMPLE).write_text("def f(recipe):\n    return recipe.epochs\n")
    found = fields_read([EXAMPLE], KNOWN, root=checkout)
    assert found == {"stage1_epochs", "stage2_epochs"}


def test_setting_a_field_or_naming_it_in_a_message_does_not_read_it(checkout):
    text = "r.warmup = 1\nreplace(r, warmup=1)\nraise ValueError(f'{r.warmup}')\n"
    (checkout / EXAMPLE).write_text(text)
    assert fields_read([EXAMPLE], KNOWN, root=checkout) == set()


# Imports


def test_every_import_of_python_is_found():
    """Except the `__init__` of packages, which Python always runs."""
    script = (
        "import json, sys, vitask.train\n"
        "files = [getattr(one, '__file__', None) for one in sys.modules.values()]\n"
        "print(json.dumps([file for file in files if file]))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported = {Path(file).resolve() for file in json.loads(done.stdout.splitlines()[-1])}
    ours = {path for path in PATHS if ROOT / path in imported}
    assert {"kernels/linear.py", "vitask/train.py"} <= ours
    missing = ours - code(["vitask.train"]).keys()
    missing -= code(["vitask.data"]).keys()  # re-exported by that `__init__`
    assert {path for path in missing if not path.endswith("__init__.py")} == set()


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import bench.a.b", {"bench/a/b.py"}),
        ("import bench.a", {"bench/a/__init__.py", "bench/a/c.py"}),
        ("import bench.a as x, bench.a.b as y",
         {"bench/a/__init__.py", "bench/a/b.py", "bench/a/c.py"}),
        ("from bench.a.b import x", {"bench/a/b.py"}),
        ("from bench.a import b", {"bench/a/b.py"}),
        ("from bench.a import x", {"bench/a/__init__.py", "bench/a/c.py"}),
        ("from bench.a import *", {"bench/a/__init__.py", "bench/a/c.py"}),
        ("def f():\n    from bench.a.b import x", {"bench/a/b.py"}),
        ("try:\n    import numpy\nexcept ImportError:\n    import bench.a.b", {"bench/a/b.py"}),
        ("import json, benchmarks.a, os.path", set()),
        ("if TYPE_CHECKING:\n    import bench.a.b", set()),
        ("if typing.TYPE_CHECKING:\n    import bench.a.c\nelse:\n    import bench.a.b",
         {"bench/a/b.py"}),
    ],
)  # fmt: skip
def test_an_import_depends_on_what_it_names(tmp_path, statement, expected):
    (tmp_path / "bench/a").mkdir(parents=True)
    (tmp_path / "bench/a/__init__.py").write_text("from bench.a.c import x\n")
    (tmp_path / "bench/a/b.py").write_text("import bench.a.b\nx = 1\n")
    (tmp_path / "bench/a/c.py").write_text("x = 2\n")
    (tmp_path / "bench/entry.py").write_text(statement)
    assert code(["bench.entry"], root=tmp_path).keys() - {"bench/entry.py"} == expected
    left = code(["bench.entry"], ["bench/a/"], root=tmp_path)
    assert left.keys() == {"bench/entry.py"}


def test_an_excluded_module_excludes_the_modules_that_only_it_imports(checkout):
    (checkout / "vitask/families").mkdir(exist_ok=True)
    for name, text in {"one": "import vitask.tree\n", "two": "import vitask.rows_of_two\n"}.items():
        (checkout / f"vitask/families/{name}.py").write_text(text)
    (checkout / "vitask/rows_of_two.py").write_text("")
    (checkout / EXAMPLE).write_text("from vitask.families import one, two\n")
    found = code(["bench.runs.example"], ["vitask/families/two"], root=checkout).keys()
    assert {"vitask/families/one.py", "vitask/tree.py"} <= found
    assert not found & {"vitask/families/two.py", "vitask/rows_of_two.py"}


@pytest.mark.parametrize("module", ["vitask.gone", "tests.conftest", "numpy", ""])
def test_an_unknown_module_is_named(module):
    with pytest.raises(ValueError, match=rf"no module '{module}'.*such as 'vitask.train'"):
        code([module])


def test_a_relative_import_is_refused(digest):
    with pytest.raises(ValueError, match=r"bench/runs/example.py, line 2: .*full name"):
        digest("\nfrom . import keys")


# Ingredients


def test_changes_name_the_differences():
    before = {
        "recipe.learning_rate": 0.003,
        "versions.torch": "2.14",
        "code: vitask/train.py": "ab12",
        "code: bench/y.py": "ab12",
        "seed": 0,
    }
    after = {
        "seed": 0,
        "code: bench/x.py": "cd34",
        "code: vitask/train.py": "cd34",
        "versions.torch": "2.15",
        "recipe.learning_rate": 0.001,
    }
    assert changes(before, after) == [
        "code: bench/x.py (new)",
        "code: bench/y.py (gone)",
        "code: vitask/train.py",
        "recipe.learning_rate 0.003 → 0.001",
        "versions.torch 2.14 → 2.15",
    ]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FLAT = st.dictionaries(st.sampled_from(["a", "b", "code: c"]), VALUES)


@given(FLAT, FLAT)
def test_keys_differ_if_and_only_if_a_change_can_be_named(before, after):
    assert (key(before) == key(after)) is (changes(before, after) == [])


@given(FLAT)
def test_keys_ignore_the_order_of_ingredients_and_survive_json(found):
    assert key(dict(reversed(found.items()))) == key(found)
    again = json.loads(json.dumps(found))
    assert key(again) == key(found)
    assert changes(found, again) == []


def test_a_tuple_and_its_list_give_the_same_key():
    assert changes({"x": (1, 2)}, {"x": [1, 2]}) == []
    assert key({"x": (1, 2)}) == key({"x": [1, 2]})
    assert changes({"x": 1}, {"x": 1.0}) == ["x 1 → 1.0"]


def test_weights_count_by_names_and_bytes(tmp_path):
    def of(**files: bytes) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, content in files.items():
            (folder / "inner").mkdir(parents=True, exist_ok=True)
            (folder / "inner" / name).write_bytes(content)
        return weights(folder)

    first = of(a=b"1", b=b"2")
    assert of(b=b"2", a=b"1") == first
    others = [of(a=b"1", b=b"3"), of(a=b"1", c=b"2"), of(a=b"12"), of(a=b"1"), of(a=b"2", b=b"1")]
    assert len({first, *others}) == 6
    with pytest.raises(ValueError, match="holds no files"):
        of()
