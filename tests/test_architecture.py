"""Rules of the house that a machine can hold: imports, file sizes, forbidden calls, the layout."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "vitask", "bench")  # each imports only itself and what stands left of it
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in FILES}
TOP_LEVEL = {
    "bench",
    "kernels",
    "leaderboards",
    "tests",
    "vitask",
    "docs",
    "CONTRIBUTING.md",
    "LICENSE",
    "README.md",
    "constraints-oldest.txt",
    "constraints.txt",
    "pyproject.toml",
    "tox.ini",
}  # fmt: skip  (and dot files)


def imports(tree: ast.AST) -> set[str]:
    """Top-level names of all imported modules, wherever the import stands."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names.add(node.module or "")
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("file", TREES)
def test_text_files_name_their_encoding(file):
    """Otherwise the user's locale decides what a file says."""
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            given = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant)]
            named = "utf-8" in given or {k.arg for k in node.keywords} & {"encoding"}
            own = isinstance(node.func, ast.Name)  # our write_text, and open() in text mode
            if name in ("read_text", "write_text") and not own:
                assert named, f"{file}, line {node.lineno}: {name} without encoding"
            if name in ("open", "fdopen", "NamedTemporaryFile") and "open" in name:
                binary = [v for v in given if isinstance(v, str) and re.fullmatch("[rwxab+]+", v)]
                text = any("b" not in mode for mode in binary) or (own and not binary)
                assert named or not text, f"{file}, line {node.lineno}: {name} without encoding"


@pytest.mark.parametrize("file", TREES)
def test_imports_point_one_way(file):
    own = file.split("/")[0]
    beyond = set(PACKAGES[PACKAGES.index(own) + 1 :]) | {"tests"}
    assert not imports(TREES[file]) & beyond


# The wings of bench: each imports only itself and what stands left of it.
WINGS = ("errors", "suite", "stats", "runs", "suites", "report", "machine", "api", "commands", "")


def wing(path: str) -> str:
    """bench/runs/plan.py -> runs; bench/__main__.py and bench/__init__.py -> the empty name."""
    first = path.split("/")[1].removesuffix(".py")
    return first if first in WINGS else ""


def modules_imported(tree: ast.AST) -> set[str]:
    """Full names of all imported modules of bench, types included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] == "bench"}


def executed(tree: ast.AST) -> ast.AST:
    """Without what is imported for the type checker alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    return tree


@pytest.mark.parametrize("file", [f for f in TREES if f.startswith("bench/")])
def test_wings_import_no_wing_above_them(file):
    own = WINGS.index(wing(file))
    tree = executed(ast.parse((ROOT / file).read_text()))
    found = {name.split(".")[1] for name in modules_imported(tree)} & set(WINGS)
    assert {name for name in found if WINGS.index(name) > own} == set()


def test_no_modules_import_each_other_in_a_circle():
    files = {path.removesuffix(".py").replace("/", "."): path for path in TREES}
    graph = {}
    for module, path in files.items():
        tree = executed(ast.parse((ROOT / path).read_text()))
        used = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(files)
                used |= inner or {node.module} & set(files)
        graph[module] = used - {module}
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("file", [f for f in TREES if f.startswith("bench/")])
def test_suites_are_not_probed_for_optional_names(file):
    """`getattr(x, name, default)` on a suite: its class has the defaults."""
    tree = TREES[file]
    probes = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr")
        and (node.func.id == "hasattr" or len(node.args) == 3)
        and ast.unparse(node.args[0]) != "functional"  # of torch: what this release has
    ]
    assert probes == []


@pytest.mark.parametrize("file", TREES)
def test_functions_fit_a_screen_or_two(file):
    if "triton.jit" in (ROOT / file).read_text():
        pytest.skip("Triton kernels are one function each")
    lengths = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > 100} == {}


@pytest.mark.parametrize("file", [f for f in TREES if f.startswith("kernels/")])
def test_kernels_stand_alone(file):
    allowed = {"kernels", "torch", "triton", "jaxtyping", *sys.stdlib_module_names}
    assert imports(TREES[file]) <= allowed


@pytest.mark.parametrize("file", TREES)
def test_every_folder_of_modules_is_a_package(file):
    folder = (ROOT / file).parent
    assert (folder / "__init__.py").is_file(), f"{folder.name}/ would be missing in a wheel"


def forbidden(tree: ast.AST) -> list[str]:
    """Calls that would run what a file holds: unpickling and remote code."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            given = (node.arg, node.value.value)
            if given in {
                ("allow_pickle", True),
                ("weights_only", False),
                ("trust_remote_code", True),
            }:
                found.append(f"line {node.value.lineno}: {node.arg}={node.value.value}")
    return found + [f"import of {n}" for n in imports(tree) & {"pickle", "dill", "cloudpickle"}]


@pytest.mark.parametrize("file", TREES)
def test_nothing_is_unpickled_and_no_remote_code_runs(file):
    assert forbidden(TREES[file]) == []
    for call in (n for n in ast.walk(TREES[file]) if isinstance(n, ast.Call)):
        name, given = ast.unparse(call.func), {k.arg for k in call.keywords}
        if name == "torch.load":
            assert "weights_only" in given, f"line {call.lineno}: say weights_only=True"
        if name in ("np.load", "numpy.load"):
            assert "allow_pickle" in given, f"line {call.lineno}: say allow_pickle=False"


@pytest.mark.parametrize(
    "code",
    [
        "np.load(f, allow_pickle=True)",
        "torch.load(f, weights_only=False)",
        "AutoModel.from_pretrained(f, trust_remote_code=True)",
        "from pickle import load",
    ],
)
def test_the_forbidden_is_recognised(code):
    assert forbidden(ast.parse(code))


def test_no_file_is_too_long():
    everything = [*FILES, *(ROOT / "tests").rglob("*.py")]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in everything}
    assert {file: n for file, n in lengths.items() if n > 500} == {}


def tracked() -> list[str]:
    """Paths of all files that are or would be committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [path for path in done.stdout.splitlines() if (ROOT / path).exists()]


def test_top_level_stays_as_it_is():
    top = {path.split("/")[0] for path in tracked()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_only_tests_and_ci_know_of_the_folder_beside_the_checkout():
    beside = "../" + "shared"
    files = [p for p in tracked() if not p.startswith(("tests/", ".ci/"))]
    texts = {p: (ROOT / p).read_text(errors="ignore") for p in files}
    assert [p for p, text in texts.items() if beside in text] == []


def readme_tree() -> tuple[set[str], set[str]]:
    """Paths in the README's layout: (folders, files)."""
    block = re.search(r"## Layout\n+```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block, "README.md has no '## Layout' followed by a block"
    folders, files, parents = set(), set(), []
    for line in block[1].splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        words = line.strip().split("  ")[0].split()  # two blanks end the names
        parents = parents[:indent]
        for word in words:
            path = "/".join([*parents, word.rstrip("/")])
            (folders if word.endswith("/") else files).add(path)
        if words and words[0].endswith("/"):
            parents.append(words[0].rstrip("/"))
    return folders, files


def test_readme_tree_is_true():
    folders, files = readme_tree()
    assert [f for f in sorted(folders) if not (ROOT / f).is_dir()] == []
    assert [f for f in sorted(files) if not (ROOT / f).is_file()] == []
    for name in PACKAGES:  # and complete: every module is named, or its folder as a whole
        shown = {f for f in folders if f.startswith(f"{name}/")}
        missing = {
            path
            for path in TREES
            if path.startswith(f"{name}/")
            and not path.endswith("__init__.py")
            and path not in files
            and not any(path.startswith(f + "/") and not _opened(f, files) for f in shown)
        }
        assert missing == set(), f"not in the README's layout: {sorted(missing)}"


def _opened(folder: str, files: set[str]) -> bool:
    """Whether the README lists the folder's files one by one."""
    return any(file.startswith(folder + "/") for file in files)


@pytest.mark.parametrize("arguments", [["--help"], ["list"]], ids=" ".join)
def test_command_line_answers_without_torch(arguments):
    code = (
        "import sys, runpy\n"
        "sys.argv = ['bench', *sys.argv[1:]]\n"
        "try:\n    runpy.run_module('bench', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'timm', 'medmnist', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, f'imported: {sorted(heavy)}'\n"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
