"""The house's own laws: sizes, imports, names, dependencies. Lint holds what lint can say; this
file holds the rest.

A number that may only go down is a ratchet: lower it when the code allows, and give a reason in the
commit that raises it.
"""

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGES = ("eventflow", "triggers")

LONGEST_FILE = 800
LONGER_FILES: dict[str, int] = {}
"""Files that are longer still, and what they may not grow beyond. Split one, and take it out."""

LONGEST_FUNCTION = 60

BROAD_EXCEPTS = {
    "eventflow/runtime.py": 1,  # a lifespan that fails to open: handed to whoever opens the App
    "eventflow/core/errors.py": 1,  # rebuilding a recorded error calls the user's constructor
    "eventflow/engine/attempts.py": 2,  # around an attempt; around its hook
    "eventflow/engine/execution.py": 1,  # around a run
    "eventflow/intake/reactor.py": 1,  # around a listener
    "eventflow/sinks/dispatcher.py": 2,  # around a sink: its sending, its end
    "eventflow/store/writer.py": 1,  # callers who wait for a commit hear of whatever broke it
    "eventflow/sdk/task.py": 1,  # around an attempt
}

OWN_IMPORTS_IN_FUNCTIONS = {("eventflow/app.py", "asgi"), ("eventflow/app.py", "run")}
"""The lazy imports of our own code: an embedded App needs neither HTTP nor a server."""

LAZY = (
    "aiokafka",
    "aioboto3",
    "aiobotocore",
    "asyncpg",
    "numpy",
    "scipy",
    "uvicorn",
    "watchfiles",
    "pydantic",
    "fastapi",
)
"""What `import eventflow` leaves for those who use it: extras, and what only a server or one
trigger needs.
"""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(module: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (
        node
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []


# --------------------------------------------------------------------------- sizes


def test_no_file_is_longer_than_one_sitting():
    """No file of the packages is longer than LONGEST_FILE lines; those that were may only
    shrink.
    """
    long = {
        shown(path): lines
        for path in sources(*PACKAGES)
        if (lines := path.read_text().count("\n")) > LONGEST_FILE
    }
    assert long.keys() <= LONGER_FILES.keys()
    assert all(lines <= LONGER_FILES[name] for name, lines in long.items()), long


def test_no_function_is_longer_than_a_screen():
    """No function of the packages is longer than LONGEST_FUNCTION lines."""
    long = [
        f"{shown(path)}:{node.lineno} {node.name}"
        for path in sources(*PACKAGES)
        for node in functions(tree(path))
        if (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
    ]
    assert not long


def test_every_file_says_what_it_is():
    """Each file with code in it opens with a docstring."""
    mute = [
        shown(path)
        for path in sources(*PACKAGES)
        if (module := tree(path)).body and not ast.get_docstring(module)
    ]
    assert not mute


# --------------------------------------------------------------------------- code


def test_nobody_waits_with_wait_for():
    """`asyncio.wait_for` may swallow a cancel on Python 3.11; it stands nowhere, tests and examples
    included.
    """
    found = [
        f"{shown(path)}:{node.lineno}"
        for path in sources(*PACKAGES, "tests", "benchmarks", "examples")
        for node in ast.walk(tree(path))
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "wait_for"
            and ast.unparse(node.value) == "asyncio"
        )
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "asyncio"
            and any(a.name == "wait_for" for a in node.names)
        )
    ]
    assert not found


def test_broad_excepts_stand_where_they_must():
    """`except Exception` (or wider, or bare) stands in the places named above; re-raising swallows
    nothing.
    """
    found = Counter(
        shown(path)
        for path in sources(*PACKAGES)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ExceptHandler) and is_broad(node.type) and not always_raises(node)
    )
    assert found <= Counter(BROAD_EXCEPTS)


def is_broad(caught: ast.expr | None) -> bool:
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    return any(
        name is None or ast.unparse(name) in {"Exception", "BaseException"} for name in names
    )


def always_raises(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.body[-1], ast.Raise)


def test_our_own_code_is_imported_at_the_top():
    """No function imports eventflow or triggers: such an import hides a circle. Two are allowed,
    and named above.
    """
    found = {
        (shown(path), function.name)
        for path in sources(*PACKAGES)
        for function in functions(tree(path))
        for node in ast.walk(function)
        if any(name.split(".")[0] in PACKAGES for name in imported(node))
    }
    assert found <= OWN_IMPORTS_IN_FUNCTIONS


def test_no_mocks():
    """No test stands on a mock: real store, real broker, real HTTP."""
    found = [
        shown(path)
        for path in sources("tests")
        for node in ast.walk(tree(path))
        if any(
            name.split(".")[0] == "mock" or name.startswith("unittest.mock")
            for name in imported(node)
        )
    ]
    assert not found


def test_every_test_states_its_guarantee():
    """Each test has a docstring that says what it holds."""
    mute = [
        f"{shown(path)}:{node.lineno} {node.name}"
        for path in sources("tests")
        for node in functions(tree(path))
        if node.name.startswith("test_")
        and path.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert not mute


# --------------------------------------------------------------------------- names and imports


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_honest(package: str):
    """`__all__` names exactly what a package offers: each name is there, once, and no public name
    is left out.
    """
    module = importlib.import_module(package)
    offered = list(getattr(module, "__all__", []))
    assert len(offered) == len(set(offered)) > 0
    assert [name for name in offered if not hasattr(module, name)] == []
    assert {
        name for name in assigned(ROOT / package / "__init__.py") if not name.startswith("_")
    } <= set(offered)


def assigned(path: Path) -> Iterator[str]:
    """The names of ours that a file's top level binds, by import, definition or assignment."""
    for node in tree(path).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def test_import_is_light():
    """`import eventflow` brings in no extra, no server and no trigger."""
    code = f"import sys, eventflow; print(*[name for name in {(*LAZY, 'triggers')!r} if name in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        == []
    )


# --------------------------------------------------------------------------- dependencies


def core() -> list[Requirement]:
    needs = [Requirement(text) for text in metadata.requires("eventflow-reactor") or []]
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def test_few_dependencies():
    """The core asks for at most 15 distributions and installs at most 22."""
    assert len(core()) <= 15
    installed = closure(core())
    assert len(installed) <= 22, sorted(installed)


def closure(needs: list[Requirement]) -> set[str]:
    """Every distribution that installing `needs` brings in here, from installed metadata."""
    seen: set[tuple[str, str]] = set()
    left = [(need, extra) for need in needs for extra in ("", *need.extras)]
    while left:
        need, extra = left.pop()
        name = canonicalize_name(need.name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in metadata.requires(name) or []:
            further = Requirement(text)
            if further.marker is None or further.marker.evaluate({"extra": extra}):
                left += [(further, asked) for asked in ("", *further.extras)]
    return {name for name, _ in seen}


def test_dependencies_have_floors_and_no_caps():
    """Every dependency names the lowest version that works; a cap would make the user's resolver
    fail for nothing.
    """
    for text in metadata.requires("eventflow-reactor") or []:
        need = Requirement(text)
        if need.name != "eventflow-reactor":
            assert re.fullmatch(r">=[\d.]+", str(need.specifier)), text
