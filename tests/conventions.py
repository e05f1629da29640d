"""The rules of tests/test_conventions.py, each a function over one parsed source file.

A rule yields `Violation`s. Their sizes are added up by place, so that an exception listed in
test_conventions.py may only shrink. `RULES` gives, for each rule, the folders that it holds for and
a source text that breaks it: the test of the tests.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRODUCT = ("eventflow", "triggers")
EVERYTHING = (*PRODUCT, "tests", "benchmarks", "examples")

MAX_ATTRIBUTES = 15
MAX_METHODS = 20
MAX_PARAMETERS = 8
MAX_FILE_LINES = 800
MAX_FUNCTION_LINES = 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Violation:
    place: str
    """The path, or `path:name`: stable when lines move."""
    size: int = 1
    found: str = ""


@dataclass(frozen=True)
class Source:
    """A Python file: its path below the root, its text, its syntax tree."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.tree))

    @property
    def functions(self) -> list[Function]:
        return [node for node in self.nodes if isinstance(node, Function)]

    @property
    def classes(self) -> list[ast.ClassDef]:
        return [node for node in self.nodes if isinstance(node, ast.ClassDef)]

    def at(self, name: object) -> str:
        return f"{self.path}:{name}"


def sources(*folders: str) -> list[Source]:
    paths = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [read(path) for path in sorted(paths)]


@cache
def read(path: Path) -> Source:
    return Source(path.relative_to(ROOT).as_posix(), path.read_text())


# --------------------------------------------------------------------------- sizes


def file_length(source: Source) -> Iterator[Violation]:
    lines = source.text.count("\n")
    if lines > MAX_FILE_LINES:
        yield Violation(source.path, lines)


def function_length(source: Source) -> Iterator[Violation]:
    for function in source.functions:
        lines = (function.end_lineno or 0) - function.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            yield Violation(source.at(function.name), lines)


def attributes_per_class(source: Source) -> Iterator[Violation]:
    """The attributes that methods set on `self`."""
    for each in source.classes:
        names = {
            node.attr
            for node in ast.walk(each)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        }
        if len(names) > MAX_ATTRIBUTES:
            yield Violation(source.at(each.name), len(names))


def methods_per_class(source: Source) -> Iterator[Violation]:
    for each in source.classes:
        methods = sum(
            isinstance(node, Function)
            and not any(ast.unparse(one) == "overload" for one in node.decorator_list)
            for node in each.body
        )
        if methods > MAX_METHODS:
            yield Violation(source.at(each.name), methods)


def parameters(source: Source) -> Iterator[Violation]:
    """Of internal functions: those of the public surface, and commands, offer options."""
    offered = {node for each in source.classes if each.name in public_names() for node in each.body}
    for function in source.functions:
        is_public = function in offered or function.name in public_names()
        is_command = any("command(" in ast.unparse(each) for each in function.decorator_list)
        arguments = function.args
        count = sum(
            argument.arg not in ("self", "cls")
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        )
        if count > MAX_PARAMETERS and not is_public and not is_command:
            yield Violation(source.at(function.name), count)


@cache
def public_names() -> set[str]:
    """What `__all__` of the packages for users offers."""
    found: set[str] = set()
    for package in ("eventflow", "triggers", "eventflow/testing"):
        for node in ast.parse((ROOT / package / "__init__.py").read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found |= {
                    each.value
                    for each in ast.walk(node.value)
                    if isinstance(each, ast.Constant) and isinstance(each.value, str)
                }
    return found


# --------------------------------------------------------------------------- form


def one_attribute_a_line(source: Source) -> Iterator[Violation]:
    """No statement assigns two attributes: `self.a, self.b = …` or `self.a = self.b = …`."""
    for node in source.nodes:
        if isinstance(node, ast.Assign):
            targets = [each for target in node.targets for each in unpacked(target)]
            attributes = [target for target in targets if isinstance(target, ast.Attribute)]
            if len(attributes) > 1:
                yield Violation(source.path, found=ast.unparse(node))


def one_name_a_line(source: Source) -> Iterator[Violation]:
    """No `a, b = x, y` that only saves a line; a swap or a step (`a, b = b, a + b`) needs it."""
    for node in source.nodes:
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
            continue
        targets = unpacked(node.targets[0])
        stored = {target.id for target in targets if isinstance(target, ast.Name)}
        loaded = {each.id for each in ast.walk(node.value) if isinstance(each, ast.Name)}
        if len(targets) == len(node.value.elts) > 1 and not stored & loaded:
            yield Violation(source.path, found=ast.unparse(node))


def unpacked(target: ast.expr) -> list[ast.expr]:
    return list(target.elts) if isinstance(target, ast.Tuple | ast.List) else [target]


def raised_variables(source: Source) -> Iterator[Violation]:
    """No local variable holds the error that its function raises, unless it is deleted: the error
    refers to the frame, and both would stay in memory until the garbage collector runs. The name of
    an `except ... as` clause is deleted by Python.
    """
    bound = {
        each
        for node in source.nodes
        if isinstance(node, ast.ExceptHandler)
        for each in ast.walk(node)
        if isinstance(each, ast.Raise) and each.exc and ast.unparse(each.exc) == node.name
    }
    deleted = {
        ast.unparse(target)
        for node in source.nodes
        if isinstance(node, ast.Delete)
        for target in node.targets
    }
    for node in source.nodes:
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name) and node not in bound:
            name = node.exc.id
            if name.strip("_")[0].islower() and name not in deleted:
                yield Violation(source.path, found=f"line {node.lineno}: raise {name}")


SKIP = "# fmt" + ": skip"


def format_skips(source: Source) -> Iterator[Violation]:
    """A format skip stands only where a table of data ends: a literal dict, list, tuple or set."""
    ends = [
        (node.end_lineno, node.end_col_offset or 0)
        for node in source.nodes
        if isinstance(node, ast.Dict | ast.List | ast.Tuple | ast.Set)
    ]
    for number, line in enumerate(source.text.splitlines(), 1):
        code, skip, _ = line.partition(SKIP)
        last = len(code.rstrip(" )]},"))  # where the closing brackets begin
        if skip and not any(row == number and column > last for row, column in ends):
            yield Violation(source.path, found=line.strip())


def type_checking_imports(source: Source) -> Iterator[Violation]:
    """No import of our own code below `if TYPE_CHECKING:`, which would hide a circle. Those of
    triggers/__init__.py show type checkers the names that are loaded lazily.
    """
    if source.path == "triggers/__init__.py":
        return
    for node in source.nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for each in ast.walk(node):
                for name in imported(each):
                    if name.split(".")[0] in PRODUCT:
                        yield Violation(source.path, found=name)


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


# --------------------------------------------------------------------------- tests


def literal_sleeps(source: Source) -> Iterator[Violation]:
    """No sleep of so many seconds, written as a number, and none in a loop that looks whether to go
    on: tests wait with `eventually` or `wait_until` of conftest.py, which fail with what they
    waited for. A sleep that is the subject of a test, such as a body's, has the name of a constant.
    """
    loops = [loop for loop in source.nodes if isinstance(loop, ast.While) and _may_end(loop)]
    in_loops = {each for loop in loops for each in ast.walk(loop)}
    for node in source.nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in SLEEPS and node.args:
            seconds = node.args[0]
            is_literal = not any(isinstance(each, ast.Name) for each in ast.walk(seconds))
            if is_literal and (node in in_loops or ast.unparse(seconds) != "0"):
                yield Violation(source.path, found=f"line {node.lineno}: {ast.unparse(node)}")


SLEEPS = ("time.sleep", "asyncio.sleep", "anyio.sleep")


def _may_end(loop: ast.While) -> bool:
    is_endless = isinstance(loop.test, ast.Constant)
    return not is_endless or any(
        isinstance(each, ast.Break | ast.Return) for each in ast.walk(loop)
    )


# --------------------------------------------------------------------------- words


def file_docstring(source: Source) -> Iterator[Violation]:
    if source.tree.body and not ast.get_docstring(source.tree):
        yield Violation(source.path)


def files_in_docstrings(source: Source) -> Iterator[Violation]:
    """A file that the docstring of a file mentions is in the tree."""
    for name in re.findall(r"[\w/]+\.py\b", ast.get_docstring(source.tree) or ""):
        if not any(f"/{path}".endswith(f"/{name}") for path in known_files()):
            yield Violation(source.path, found=name)


@cache
def known_files() -> set[str]:
    paths = (path for folder in EVERYTHING for path in (ROOT / folder).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix() for path in paths} | EXAMPLE_FILES


EXAMPLE_FILES = {"app.py", "file.py", "NAME.py", "shop.py"}
"""The files of users, in examples."""

OLD_WORDS = frozenset(
    """
    afresh beside bequeath bury courier desk door doors foresee foreseen foreseeing foresight
    foretold forgiven gist hear heard hearing hears heed heir herald house lament lamented lapse
    lapsed lookout news obey outlet outlets owed rehearsal rehearse ripe said say says sight
    strand succession tell telling tells told weave weaver weaving word woven
    """.split()
)
"""Words of earlier names. No identifier contains one, alone or between underscores or capitals."""

OLD_NAMES = frozenset(
    """
    AGAIN ASKS ASK_EVERY AT_ONCE BEGAN BREATH CALM DEATHS FAREWELL FULL_PATIENCE HEIR LAST_CALL
    LINGER LOOK MOST NOBODY PATIENCE PUT_OFF SHARE SPIN TURN Asked Beside Doors Desk Errand Fate
    Gathered Gather Handover Head Herald House Lateness Letter Master Outbound Plan Pool Rooms
    Stage Proof Play Place Served Straight Strand Tally Told Underway Watched Way WayOut Weaver
    Where Word Woven came commit_ahead complain held_back hold_back is_crowded is_far is_quiet
    know_events know_patterns know_windows parked patience patiently retells take_ahead
    tell_parent
    """.split()
)
"""Earlier names whose words are in use for other things."""

OLD_NAMES_STAY = (
    "eventflow/cli/aliases.py",
    "tests/cli/test_aliases.py",
    "tests/conventions.py",
    "tests/store/kept/kept_app.py",  # its flows have the names that the kept store has
)


def old_names(source: Source) -> Iterator[Violation]:
    if source.path in OLD_NAMES_STAY or "/schema/" in source.path:
        return
    for name in sorted(identifiers(source)):
        words = {word.lower() for part in name.split("_") for word in WORD.findall(part)}
        if name.strip("_") in OLD_NAMES or words & OLD_WORDS:
            yield Violation(source.path, found=name)


WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def identifiers(source: Source) -> set[str]:
    """Every name that the file defines; attributes of other objects are theirs."""
    found: set[str] = set()
    for node in source.nodes:
        match node:
            case (
                ast.ClassDef(name=name)
                | ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
            ):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                found.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()):
                found.add(name)
            case _:
                pass
    return found


# --------------------------------------------------------------------------- all of them


@dataclass(frozen=True)
class Rule:
    check: Callable[[Source], Iterator[Violation]]
    folders: tuple[str, ...]
    broken: str
    """A source text with exactly one violation."""


RULES: list[Rule] = [
    Rule(file_length, EVERYTHING, "x = 1\n" * (MAX_FILE_LINES + 1)),
    Rule(function_length, PRODUCT, "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    Rule(
        attributes_per_class,
        PRODUCT,
        "class A:\n    def __init__(self):\n"
        + "".join(f"        self.a{n} = 1\n" for n in range(MAX_ATTRIBUTES + 1)),
    ),
    Rule(
        methods_per_class,
        PRODUCT,
        "class A:\n" + "".join(f"    def m{n}(self): ...\n" for n in range(MAX_METHODS + 1)),
    ),
    Rule(
        parameters,
        PRODUCT,
        f"def f({', '.join(f'a{n}' for n in range(MAX_PARAMETERS + 1))}): ...\n",
    ),
    Rule(one_attribute_a_line, EVERYTHING, "self.a, self.b = f()\nself.c = 1\n"),
    Rule(one_attribute_a_line, EVERYTHING, "self.a = self.b = 0\n"),
    Rule(one_name_a_line, PRODUCT, "a, b = 1, 2\nc, d = d, c\ne, f = g()\n"),
    Rule(
        raised_variables,
        PRODUCT,
        "def f(error):\n    raise error\ntry:\n    f()\nexcept A as raised:\n    raise raised\n",
    ),
    Rule(format_skips, EVERYTHING, f"x = f([1],  2)  {SKIP}\ny = {{1:  2}}  {SKIP}\n"),
    Rule(
        type_checking_imports,
        PRODUCT,
        "if TYPE_CHECKING:\n    import asyncio\n    from eventflow.app import App\n",
    ),
    Rule(file_docstring, EVERYTHING, "x = 1\n"),
    Rule(files_in_docstrings, EVERYTHING, '"""See web/api.py and nowhere.py."""\n'),
    Rule(old_names, EVERYTHING, "def told(): ...\n"),
    Rule(old_names, EVERYTHING, "class PartTold: ...\nstored = 1\n"),
    Rule(old_names, EVERYTHING, "PATIENCE = 5\n"),
    Rule(literal_sleeps, ("tests",), "time.sleep(0.5)\nasyncio.sleep(0)\ntime.sleep(PACE)\n"),
    Rule(literal_sleeps, ("tests",), "while not done():\n    asyncio.sleep(0)\n"),
]
