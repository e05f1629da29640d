"""Rules for the code that ruff, pyright and import-linter cannot express: sizes, names, imports,
dependencies.

The rules over single files are in conventions.py. An exception is listed here with its reason, or
with a number that may only get smaller.
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

from tests.conventions import (
    EVERYTHING,
    PRODUCT,
    ROOT,
    RULES,
    Rule,
    Source,
    imported,
    public_names,
    sources,
)

BROAD_EXCEPTS = {
    "eventflow/runtime.py": 1,  # a step of retention, which is tried again
    "eventflow/core/errors.py": 2,  # user code whose error is of no interest; a user's __str__
    "eventflow/core/threads.py": 1,  # around a plain function: its future gets it
    "eventflow/engine/attempts.py": 2,  # around an attempt; around what follows it (a Retry)
    "eventflow/engine/calls.py": 1,  # a recorded value that is unreadable
    "eventflow/engine/first_body.py": 2,  # a body's arguments; the encoding of its value
    "eventflow/engine/flow_calls.py": 1,  # around an emission
    "eventflow/engine/outcomes.py": 1,  # a result that cannot be read has no hook
    "eventflow/engine/run_end.py": 1,  # around the encoding of a result
    "eventflow/loop/started.py": 1,  # the task that continues the coroutine raises it
    "eventflow/engine/worker.py": 2,  # around the start of a run
    "eventflow/server/watchdog.py": 1,  # the end of the watchdog ends the process
    "eventflow/engine/execution.py": 3,  # around a run, the binding of its arguments, its result
    "eventflow/testing/trigger_contract.py": 1,  # around a listener, as the reactor does
    "eventflow/routing/plans.py": 3,  # around filters, keys and params: a dead letter each
    "eventflow/routing/router.py": 2,  # around the matching of an event (its first, a later one):
    # others are beside it
    "eventflow/serialization/errors.py": 1,  # reading a field of a user's error
    "eventflow/store/writer.py": 1,  # callers who wait for a commit hear of whatever broke it
    "eventflow/sdk/task.py": 1,  # around an attempt
    "triggers/_files/context.py": 1,  # carried from a thread to its caller
    "triggers/_kafka/fetching.py": 1,  # the client decodes there: damaged bytes raise anything
}

OWN_IMPORTS_IN_FUNCTIONS = {
    ("eventflow/app.py", "asgi"),
    ("eventflow/app.py", "run"),
    ("eventflow/app.py", "open"),
    ("eventflow/hosting.py", "open"),
    ("eventflow/runtime.py", "_remote_blobs"),
    ("eventflow/store/migrate.py", "_keep_old"),
    ("eventflow/store/sqlite.py", "backup"),
    ("eventflow/store/sqlite.py", "check"),
    ("eventflow/store/url.py", "open_store"),
    ("eventflow/web/dry_run.py", "dry_run"),
}
"""The lazy imports of our own code: an embedded App needs neither HTTP nor a server, and a program
that only declares flows neither the engine nor the store. A start does not wait for what only a few
Apps, or a person's request, need.
"""

LAZY = (
    "aiokafka",
    "aioboto3",
    "aiobotocore",
    "asyncpg",
    "numpy",
    "scipy",
    "structlog",
    "uvicorn",
    "watchfiles",
    "pydantic",
    "fastapi",
)
"""What `import eventflow` leaves for those who use it: extras, and what only a server or one
trigger needs.
"""
MAX_FIRST_RUN_MODULES = 120
"""Modules of eventflow that a first run loads, at most (117 now): each takes 0.15 ms or more."""


# --------------------------------------------------------------------------- rules with exceptions

EXCEPTIONS: dict[str, dict[str, int]] = {
    "methods_per_class": {
        "eventflow/app.py:App": 22,  # the public surface
        "eventflow/engine/execution.py:Execution": 24,
        "eventflow/engine/worker.py:Worker": 24,
        "eventflow/store/protocol.py:Store": 41,
        "eventflow/store/sqlite.py:SqliteStore": 53,
        "eventflow/store/writer.py:Writer": 23,
    },
    "parameters": {
        "eventflow/routing/subscriptions.py:subscribe": 12,
    },
    "type_checking_imports": {
        "eventflow/__init__.py": 1,  # checks are loaded when they are used
        "eventflow/app.py": 2,  # what is loaded when an App opens
    },
}
"""By rule, what the tree does not keep yet, and how much of it. A number may only get smaller, and
an exception that is no longer needed is deleted.
"""

TREE_RULES = list({rule.check: rule for rule in RULES}.values())


@pytest.mark.parametrize("rule", TREE_RULES, ids=lambda rule: rule.check.__name__)
def test_the_tree_keeps_the_rules(rule: Rule):
    """Each rule of conventions.py holds for its folders, but for the exceptions listed above."""
    allowed = EXCEPTIONS.get(rule.check.__name__, {})
    violations = [each for source in sources(*rule.folders) for each in rule.check(source)]
    sizes: Counter[str] = Counter()
    for each in violations:
        sizes[each.place] += each.size
    new = {place: size for place, size in sizes.items() if size > allowed.get(place, 0)}
    assert not new, [each for each in violations if each.place in new]
    unused = {place: sizes[place] for place, size in allowed.items() if sizes[place] < size}
    assert not unused, "lower these exceptions, or delete those with 0"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.check.__name__)
def test_a_rule_finds_what_breaks_it(rule: Rule):
    """No rule is vacuous: it reports the source text that breaks it, and only that."""
    assert len(list(rule.check(Source("eventflow/broken.py", rule.broken)))) == 1


SAME_CLASS_NAME: dict[str, int] = {}
"""Names that stand for the same thing in several files, and in how many."""


def test_a_class_name_has_one_meaning():
    """No two classes of the packages have the same name, unless they are the same thing."""
    places: dict[str, list[str]] = {}
    for source in sources(*PRODUCT):
        for each in source.classes:
            places.setdefault(each.name, []).append(source.path)
    found = {name: paths for name, paths in places.items() if len(paths) > 1}
    assert {name: len(paths) for name, paths in found.items()} == SAME_CLASS_NAME, found


def test_a_public_name_is_known_to_the_rule_of_parameters():
    """The rule exempts what `__all__` offers: it must find names there."""
    assert {"App", "Webhook", "running"} <= public_names()


# --------------------------------------------------------------------------- code


def test_wait_for_is_not_used():
    """`asyncio.wait_for` may swallow a cancel on Python 3.11; no file uses it, except the test of a
    flow that does.
    """
    found = [
        source.path
        for source in sources(*EVERYTHING)
        for node in source.nodes
        if source.path != "tests/engine/test_no_hangs.py"
        and (
            (isinstance(node, ast.Attribute) and ast.unparse(node) == "asyncio.wait_for")
            or (
                isinstance(node, ast.ImportFrom)
                and node.module == "asyncio"
                and any(alias.name == "wait_for" for alias in node.names)
            )
        )
    ]
    assert not found


def test_broad_excepts_are_listed():
    """`except Exception` (or wider, or bare) is used in the places listed above only, unless the
    handler raises again.
    """
    found = Counter(
        source.path
        for source in sources(*PRODUCT)
        for node in source.nodes
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
    """No function imports eventflow or triggers, which would hide a circle, but for those above."""
    found = {
        (source.path, function.name)
        for source in sources(*PRODUCT)
        for function in source.functions
        for node in ast.walk(function)
        if any(name.split(".")[0] in PRODUCT for name in imported(node))
    }
    assert found <= OWN_IMPORTS_IN_FUNCTIONS


def test_no_mocks():
    """No test uses a mock: real store, real broker, real HTTP."""
    found = [
        source.path
        for source in sources("tests")
        for node in source.nodes
        for name in imported(node)
        if name.split(".")[0] == "mock" or name.startswith("unittest.mock")
    ]
    assert not found


def test_every_test_states_its_guarantee():
    """Each test has a docstring with what it guarantees."""
    missing = [
        f"{source.path}:{function.lineno} {function.name}"
        for source in sources("tests")
        if Path(source.path).name.startswith("test_")
        for function in source.functions
        if function.name.startswith("test_") and not ast.get_docstring(function)
    ]
    assert not missing


# --------------------------------------------------------------------------- names and imports


@pytest.mark.parametrize("package", PRODUCT)
def test_all_is_honest(package: str):
    """`__all__` lists exactly the public names of a package, each once."""
    module = importlib.import_module(package)
    offered = list(getattr(module, "__all__", []))
    assert len(offered) == len(set(offered)) > 0
    assert [name for name in offered if not hasattr(module, name)] == []
    assert {
        name for name in assigned(ROOT / package / "__init__.py") if not name.startswith("_")
    } <= set(offered)


def assigned(path: Path) -> Iterator[str]:
    """The public and private names that the top level of a file binds, without foreign imports."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PRODUCT:
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def test_import_is_light():
    """`import eventflow` imports no extra, no server and no trigger."""
    names = (*LAZY, "triggers")
    code = f"import sys, eventflow; print(*[name for name in {names!r} if name in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        == []
    )


def test_a_first_run_loads_only_what_it_needs(tmp_path: Path):
    """A script that opens an App, waits for a run and closes it loads neither what only a server
    or a person needs, nor anyio, which takes as long as the store and the engine together, nor
    those modules of Python that take a millisecond or more.
    """
    names = (
        *LAZY,
        *("anyio", "importlib.resources", "pickle", "shutil", "tempfile", "zoneinfo"),
        *("eventflow.cli", "eventflow.dry_run", "eventflow.logs.capture", "eventflow.server"),
        *("eventflow.serialization.s3_blobs", "eventflow.store.audit", "eventflow.store.backup"),
        *("eventflow.store.read_only", "eventflow.web"),
    )
    code = f"""
import asyncio, sys
from eventflow import App, flow

@flow
async def first(n: int) -> int:
    return n

async def main():
    async with App("first", store="sqlite:///first.db") as app:
        await (await app.start(first, n=1)).result()

asyncio.run(main())
print(*[name for name in {names!r} if name in sys.modules])
print(sum(name.startswith("eventflow") for name in sys.modules))
"""
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    unneeded, own = found.stdout.splitlines()
    assert unneeded.split() == []
    assert int(own) <= MAX_FIRST_RUN_MODULES


# --------------------------------------------------------------------------- dependencies


def core() -> list[Requirement]:
    needs = [Requirement(text) for text in metadata.requires("eventflow-reactor") or []]
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def test_few_dependencies():
    """The core requires at most 15 distributions and installs at most 22."""
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
    """Every dependency has a lowest version and no upper bound, which only breaks resolvers."""
    for text in metadata.requires("eventflow-reactor") or []:
        need = Requirement(text)
        if need.name != "eventflow-reactor":
            assert re.fullmatch(r">=[\d.]+", str(need.specifier)), text
