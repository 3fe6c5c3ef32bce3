"""A key says what decides a result: equal keys, equal results; different keys, a named reason.

Code enters a key by the modules that a computation imports. Each module counts by its syntax tree
without formatting, prose and types: who rewords a title computes nothing again. Prose is

- docstrings, comments, and the messages of `raise` and `assert`;
- every `help="..."`;
- in `bench`, the texts called `text`, `title`, `question`, `note` or `published_note`, given as
  arguments or assigned in a class or module, the second argument of `Method`, `Metric` and
  `Published`, and every text in a suite's file that has a blank in it: names have none.
  In `vitask` a text may be what a model reads, so there all these count.

The named recipes and the fields of `Recipe` are left out too: they enter a key as values.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from bench.errors import ROOT
from vitask.errors import InputError

PACKAGES = ("kernels", "vitask", "bench")
CODE = "code: "  # before a module's path, as the name of an ingredient
RECIPES, SUITES = "vitask/recipes.py", "bench/suites/"
PROSE = {"text", "title", "question", "note", "help", "published_note"}
TYPES = {"typing", "collections.abc", "jaxtyping"}  # a name from there matters where it is used
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.ClassDef)
CHECKING = {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def code(
    modules: Iterable[str], leave: Collection[str] = (), *, root: Path = ROOT
) -> dict[str, str]:
    """Path -> digest of these modules and all that they import, directly or through others.

    modules: dotted names; leave: starts of paths that are left out, with what only they import.
    Imports inside functions count, those under `if TYPE_CHECKING:` do not. `from a.b import c`
    depends on a/b.py and not on a/__init__.py, which only re-exports; `import a` and
    `from a import c` depend on a/__init__.py, unless c is a module itself. A module that is
    imported by a computed name is not found: name it in `modules`.
    """
    found: dict[str, str] = {}
    todo = [_file(root, name) for name in modules]
    while todo:
        path = todo.pop()
        if path not in found and not path.startswith(tuple(leave)):
            module = _read(root, path)
            found[path] = module.digest
            todo += [_file(root, *names) for names in module.imports]
    return dict(sorted(found.items()))


def fields_read(
    paths: Iterable[str], known: Collection[str], *, root: Path = ROOT
) -> frozenset[str]:
    """The names in `known`, fields of a recipe, that these modules read as attributes.

    Where they read a property of `Recipe`, they read its fields. `vitask/recipes.py` itself, which
    checks all fields, does not count.
    """
    attributes = (_read(root, path).attributes for path in paths if path != RECIPES)
    read = set().union(*attributes)
    properties = _properties((root / RECIPES).read_bytes())
    while more := {field for name in read for field in properties.get(name, ())} - read:
        read |= more
    return frozenset(read & set(known))


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """One line for each ingredient that differs; none if and only if the keys are equal."""
    lines = []
    for name in sorted({*before, *after}):
        if name not in before or name not in after:
            lines.append(f"{name} ({'new' if name in after else 'gone'})")
        elif _json(before[name]) != _json(after[name]):
            values = "" if name.startswith(CODE) else f" {before[name]} → {after[name]}"
            lines.append(name + values)
    return lines


def key(ingredients: Mapping[str, Any]) -> str:
    """16 hexadecimal digits; the order of the ingredients does not matter."""
    return _digest(_json(ingredients))


def weights(folder: Path) -> str:
    """Digest of the names and bytes of all files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise InputError(f"{folder} holds no files; expected a folder with a model's weights")
    digests = {}
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digests[path.relative_to(folder).as_posix()] = content
    return key(digests)


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file(root: Path, *names: str) -> str:
    """The file of the first of these modules that exists."""
    for name in names:
        if name.split(".")[0] not in PACKAGES and "SUITE" in dir(sys.modules.get(name)):  # a user's
            return str(sys.modules[name].__file__)
        stem = name.replace(".", "/")
        for path in (f"{stem}/__init__.py", f"{stem}.py"):
            if name.split(".")[0] in PACKAGES and (root / path).is_file():
                return path
    raise InputError(
        f"no module {names[-1]!r} under {root}; "
        f"expected a dotted name in {', '.join(PACKAGES)}, such as 'vitask.train'"
    )


class _Module(NamedTuple):
    digest: str
    imports: set[tuple[str, ...]]  # the modules that each import may mean, likeliest first
    attributes: set[str]


def _read(root: Path, path: str) -> _Module:
    return _module(path, (root / path).read_bytes())


@cache
def _module(path: str, source: bytes) -> _Module:
    reader = _Reader(path)
    return _Module(_digest(reader.text(ast.parse(source, path))), reader.imports, reader.attributes)


@cache
def _properties(source: bytes) -> dict[str, set[str]]:
    """Name -> the attributes that it reads."""
    return {
        node.name: {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and [ast.unparse(one) for one in node.decorator_list] == ["property"]
    }


def _silent(node: ast.expr) -> ast.expr:
    """The empty string in the place of a text."""
    constant = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return ast.Constant("") if constant or isinstance(node, ast.JoinedStr) else node


class _Reader:
    """Writes a syntax tree as text, without prose, types and recipes; consumes the tree.

    `ast.dump` would do, but for fields without a value: Python's versions write different ones.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.untyped = not path.startswith("kernels/")
        self.prose = PROSE if path.startswith("bench/") else {"help"}
        self.imports: set[tuple[str, ...]] = set()
        self.attributes: set[str] = set()

    def text(self, node: Any, scope: ast.AST | None = None) -> str:
        """scope: the class or function that the node is in; None for the module."""
        if isinstance(node, list):
            return ",".join(filter(None, [self.text(one, scope) for one in node]))
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) in CHECKING:
            return self.text(node.orelse, scope)
        if self.untyped and isinstance(node, ast.AnnAssign) and not isinstance(scope, ast.ClassDef):
            node = ast.Assign([node.target], node.value) if node.value else node
        if self.strip(node, scope):
            return ""
        inner = node if isinstance(node, SCOPES) else scope
        fields = ""
        for name, value in ast.iter_fields(node):
            if value is not None and name != "ctx":  # load or store: the place says it
                text = self.text(value, inner)
                fields += f"{name}=[{text}]" if text else ""
        return f"{type(node).__name__}({fields})"

    def strip(self, node: ast.AST, scope: ast.AST | None) -> bool:
        """Takes out what decides no result; True: the whole node. Notes imports and attributes."""
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                return True
            case ast.Constant(value=str(text)) if " " in text and self.path.startswith(SUITES):
                node.value = ""
            case ast.Attribute(ctx=ast.Load()):
                self.attributes.add(node.attr)
            case ast.Import():
                self.imported((alias.name,) for alias in node.names)
            case ast.ImportFrom(module=module):
                if module is None or node.level:
                    raise InputError(f"{self.path}, line {node.lineno}: import by the full name")
                self.imported((f"{module}.{alias.name}", module) for alias in node.names)
                if module in TYPES:
                    node.names = [alias for alias in node.names if alias.asname]
                return not node.names
            case ast.Raise(exc=ast.Call() as made):
                made.args = [_silent(value) for value in made.args]
                for given in made.keywords:
                    given.value = _silent(given.value)
            case ast.Assert(msg=ast.expr() as message):
                node.msg = _silent(message)
            case ast.Call(func=ast.Attribute(attr="note" | "advance" | "skip")):  # progress
                node.args = [_silent(value) for value in node.args]
            case ast.keyword() if node.arg in self.prose:
                node.value = _silent(node.value)
            case ast.Call(func=ast.Name(id="Method" | "Metric" | "Published")):
                node.args[1:2] = map(_silent, node.args[1:2])
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                # Triton, custom operators and some decorators read annotations as the code runs.
                if self.untyped and not node.decorator_list:
                    node.returns = None
                    for argument in ast.walk(node.args):
                        if isinstance(argument, ast.arg):
                            argument.annotation = None
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                if name in self.prose and node.value and not isinstance(scope, FUNCTIONS):
                    node.value = _silent(node.value)
                return self.path == RECIPES and _is_recipe(node, name, scope)
        return False

    def imported(self, modules: Iterable[tuple[str, ...]]) -> None:
        self.imports |= {names for names in modules if names[-1].split(".")[0] in PACKAGES}


def _is_recipe(node: ast.AST, name: str, scope: ast.AST | None) -> bool:
    """Whether an assignment in vitask/recipes.py makes recipes or is a field of `Recipe`."""
    if scope is None:
        calls = {ast.unparse(one.func) for one in ast.walk(node) if isinstance(one, ast.Call)}
        return name == "RECIPES" or (
            name.isupper() and bool(calls & {"Recipe", "Source", "Study", "replace"})
        )
    in_class = isinstance(scope, ast.ClassDef) and scope.name == "Recipe"
    return in_class and isinstance(node, ast.AnnAssign)
