"""The log events of the packages, read from the source: those declared in `LOG_EVENTS` and those
given to a logger. test_log.py compares the two, tests/test_docs.py the first with
docs/reference/events.md.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEVELS = {"debug", "info", "warning", "error", "exception", "critical", "log", "_log", "log_line"}
NAME = re.compile(r"[a-z_]+\.[a-z_]+")


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in ("eventflow", "triggers"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())


def declared() -> list[tuple[str, str, str]]:
    """(event, description, module) of each row of each `LOG_EVENTS`."""
    return [
        (event, description, module)
        for module, tree in modules()
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LOG_EVENTS"
        for event, description in ast.literal_eval(node.value).items()
    ]


def logged() -> set[tuple[str, str]]:
    """(event, module) of each literal that is the first argument of a logger's method, or a branch
    of it.
    """
    return {
        (text.value, module)
        for module, tree in modules()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] in LEVELS
        for argument in call.args[:1]
        for text in ast.walk(argument)
        if isinstance(text, ast.Constant)
        and isinstance(text.value, str)
        and NAME.fullmatch(text.value)
    }
