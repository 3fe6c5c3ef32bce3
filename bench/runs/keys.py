"""Keys: equal keys, equal results; different keys, a reason that can be named.

The code that decides a result is found statically: the modules that a module imports, directly or
through others, each by the digest of its syntax tree without prose. Documentation, comments,
titles, texts and error messages therefore change no key.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from bench.errors import ROOT

PACKAGES = ("kernels", "vitask", "bench")
CODE = "code: "
SHOWN = {"Method", "Metric", "Published", "Chart"}  # only their first argument decides anything
PROSE = {"text", "title", "note"}  # their arguments that decide nothing
ABOUT = {"question", "published"}  # attributes of a suite's class that decide nothing
VALUES = {"Recipe", "Study", "replace"}  # what makes a recipe's values
RECIPES = "vitask/recipes.py"  # a recipe's values enter as values, not as code


def code(modules: Iterable[str], leave: Collection[str] = (), root: Path = ROOT) -> dict[str, str]:
    """Path -> digest of each module of this project that these import, themselves included.

    `from package.module import name` depends on that module alone, not on the `__init__` of its
    package, which only re-exports; `from package import name` depends on the `__init__`.
    leave: prefixes of paths that are left out, such as model families that are not in use.
    """
    found: dict[str, str] = {}
    todo = [_file(root, module) for module in modules]
    while todo:
        path = todo.pop()
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        if name in found or name.startswith(tuple(leave)):
            continue
        digest, imported, _ = _read(root, path, path.stat().st_mtime_ns)
        found[name] = digest
        todo += imported
    return dict(sorted(found.items()))


def fields_read(paths: Iterable[str], known: Collection[str], root: Path = ROOT) -> frozenset[str]:
    """The names among `known`, fields of a recipe, that these modules read as attributes.

    Directly, or by a method or property of the recipe, such as `epochs`.
    """
    read: set[str] = set()
    for name in paths:
        if name != RECIPES:
            path = root / name
            if not path.is_file():
                path = Path(str(sys.modules[path.stem].__file__))
            read |= _read(root, path, path.stat().st_mtime_ns)[2]
    made = _methods(root / RECIPES, (root / RECIPES).stat().st_mtime_ns)
    todo = read & made.keys()
    while todo:
        found = made[todo.pop()] - read
        read |= found
        todo |= found & made.keys()
    return frozenset(read & set(known))


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A line for each ingredient that differs; for code its file."""
    lines = []
    for name in sorted({*before, *after}):
        if name in before and name in after:
            if before[name] != after[name]:
                values = "" if name.startswith(CODE) else f" {before[name]} → {after[name]}"
                lines.append(f"{name}{values}")
        else:
            lines.append(f"{name} ({'new' if name in after else 'gone'})")
    return lines


def key(ingredients: Mapping[str, Any]) -> str:
    """16 hexadecimal digits, whatever the order of the ingredients."""
    text = json.dumps(ingredients, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def weights(folder: Path) -> str:
    """Digest of the names and bytes of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


@cache
def _read(root: Path, path: Path, modified: int) -> tuple[str, tuple[Path, ...], frozenset[str]]:
    """Digest, imported files of the project, and all attributes that are read."""
    tree = ast.parse(path.read_bytes())
    tree = _Bare(recipes=path == root / RECIPES).visit(tree)
    imported = tuple(dict.fromkeys(_imports(root, tree)))
    attributes = frozenset(n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute))
    digest = hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]
    return digest, imported, attributes


@cache
def _methods(recipes: Path, modified: int) -> dict[str, frozenset[str]]:
    """Method or property of a recipe -> the attributes that it reads."""
    return {
        function.name: frozenset(n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute))
        for one in ast.parse(recipes.read_bytes()).body
        if isinstance(one, ast.ClassDef) and one.name == "Recipe"
        for function in one.body
        if isinstance(function, ast.FunctionDef)
    }


def _imports(root: Path, tree: ast.AST) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            submodules = [name for name in inner if _exists(root, name)]
            names = submodules if len(submodules) == len(inner) else [node.module, *submodules]
        else:
            continue
        yield from (_file(root, name) for name in names if name.split(".")[0] in PACKAGES)


def _exists(root: Path, module: str) -> bool:
    return module.split(".")[0] in PACKAGES and _file(root, module).is_file()


def _file(root: Path, module: str) -> Path:
    if module.split(".")[0] not in PACKAGES:  # a suite of a user's
        return Path(str(sys.modules[module].__file__))
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


class _Bare(ast.NodeTransformer):
    """Takes prose, types and recipes' values out of a syntax tree."""

    def __init__(self, *, recipes: bool) -> None:
        self._recipes = recipes

    def visit_If(self, node: ast.If) -> Any:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            return [self.visit(one) for one in node.orelse]
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> Any:
        """Docstrings, wherever they are."""
        bare = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if bare else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> Any:
        return _Silent().visit(node)

    def visit_Assert(self, node: ast.Assert) -> Any:
        node.msg = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> Any:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        node.returns = None
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        node.body = [one for one in node.body if not _names(one) & ABOUT]
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node

    def visit_Assign(self, node: ast.Assign) -> Any:
        return None if self._recipe(node) else self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        return None if self._recipe(node) else self.generic_visit(node)

    def _recipe(self, node: ast.Assign | ast.AnnAssign) -> bool:
        """Whether a statement gives names to recipes."""
        if not self._recipes or not _names(node) or node.value is None:
            return False
        made = {n.func.id for n in ast.walk(node.value)
                if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}  # fmt: skip
        return all(name.isupper() for name in _names(node)) and bool(made & VALUES)

    def visit_Call(self, node: ast.Call) -> Any:
        self.generic_visit(node)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in SHOWN:
            node.args = node.args[:1] + [a for a in node.args[2:] if name == "Method"]
            node.keywords = [k for k in node.keywords if k.arg not in PROSE]
        return node


def _names(node: ast.stmt) -> set[str]:
    """The names that a statement gives a value to."""
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        targets = [node.target]
    else:
        return set()
    return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}


class _Silent(ast.NodeTransformer):
    """Takes the texts out of a raise statement: its message says nothing about results."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> Any:
        return ast.Constant("")

    def visit_Constant(self, node: ast.Constant) -> Any:
        return ast.Constant("") if isinstance(node.value, str) else node
