"""TARGET on the command line, to the App, flow or task that it names: `file.py`, `file.py:name` or
`package.module:name`.

`.env` in the working directory is loaded first. An error while the user's file is imported becomes
AppNotFound (exit code 3) with `file:line: error`, without frames of eventflow. An error that
eventflow itself raises there (a sync flow, an empty secret, a missing extra) keeps its class and
exit code, with the line as a note.
"""

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from dotenv import load_dotenv

from eventflow.app import App
from eventflow.cli.output import note
from eventflow.core.errors import AppNotFound, EventflowError
from eventflow.sdk.flow import Flow
from eventflow.sdk.task import Task
from eventflow.serialization.errors import TARGET_PREFIX

T = TypeVar("T", App, Flow[..., Any], Task[..., Any])

ENV_FILE = ".env"
"""In the working directory."""

FORMS = "file.py, file.py:NAME or package.module:NAME"

_EVENTFLOW_DIR = str(Path(__file__).parent.parent)
_TRIGGERS_DIR = str(Path(__file__).parent.parent.parent / "triggers")


def load_app(target: str) -> App:
    """The App of a target; without a name, `app` or the only App in it."""
    module, name = load_module(target)
    return (
        _named(target, module, name or "app", App, "App")
        if name
        else _single(target, module, App, "app", "App")
    )


def load_flow(target: str) -> tuple[Flow[..., Any], App | None]:
    """A flow, and the App of its file when there is one."""
    module, name = load_module(target)
    if name is None:
        flow: Flow[..., Any] = _single(target, module, Flow, "main", "flow")
    else:
        flow = _named(target, module, name, Flow, "flow")
    apps = _instances(module, App)
    return flow, apps[0] if len(apps) == 1 else next(
        (app for app in apps if flow.name in app.flows), None
    )


def note_other_store(target: str, path: str) -> None:
    """A note if the store at `path` will be new, and the folder of the target has one of its name.

    A relative store lies in the working directory, so that the same command in another folder
    starts with an empty ledger.
    """
    file = Path(target.partition(":")[0])
    other = file.resolve().parent / os.path.relpath(path)
    if file.is_file() and not Path(path).exists() and other.exists():
        note(f"{path} is a new store; the folder of {file.name} has one: {other}")


def load_task(target: str) -> Task[..., Any]:
    module, name = load_module(target)
    return (
        _single(target, module, Task, "main", "task")
        if name is None
        else _named(target, module, name, Task, "task")
    )


def load_module(target: str) -> tuple[ModuleType, str | None]:
    """The imported module, and the name after the colon, if any."""
    load_dotenv(ENV_FILE)
    where, _, name = target.partition(":") if not os.path.exists(target) else (target, "", "")
    _note_other_env(where)
    if where.endswith(".py") or os.sep in where:
        return _import_file(target, where), name or None
    if os.path.isfile(where) or not all(part.isidentifier() for part in where.split(".")):
        raise AppNotFound(target, f"expected {FORMS}")
    sys.path.insert(0, os.getcwd())
    return _import_or_fail(target, lambda: importlib.import_module(where)), name or None


def _note_other_env(where: str) -> None:
    """Prints a note if `.env` is beside the target's file, and not in the working directory."""
    other = Path(where).resolve().parent / ENV_FILE
    if os.path.isfile(where) and other.is_file() and not os.path.exists(ENV_FILE):
        note(f"{other} is not read: .env is read from the working directory; start there")


def _import_file(target: str, where: str) -> ModuleType:
    path = Path(where).resolve()
    if not path.is_file():
        raise AppNotFound(
            target,
            f"{where} is a folder; expected {FORMS}"
            if path.is_dir()
            else f"there is no file {where}",
        )
    name = path.stem if path.stem not in sys.modules else f"{TARGET_PREFIX}{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise AppNotFound(target, f"{where} is no Python file")
    module = importlib.util.module_from_spec(spec)
    loader = spec.loader
    sys.path.insert(0, str(path.parent))
    sys.modules[name] = module
    _import_or_fail(target, lambda: loader.exec_module(module))
    return module


def _import_or_fail(target: str, load: Any) -> Any:
    try:
        return load()
    except EventflowError as error:
        if getattr(error, "location", None) is None:  # else it is in the message
            error.add_note(f"at {_error_location(error)}")
        raise
    except SyntaxError as error:
        raise AppNotFound(
            target, f"{error.filename}:{error.lineno}: {error.msg}: {(error.text or '').strip()}"
        ) from None
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | GeneratorExit):
            raise
        raise AppNotFound(
            target, f"{_error_location(error)}: {type(error).__name__}: {error}"
        ) from None


def _error_location(error: BaseException) -> str:
    """`FILE:LINE` of the innermost frame in the user's code."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if not _library(frame.filename)
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "import"


def _library(name: str) -> bool:
    return (
        name.startswith((_EVENTFLOW_DIR, _TRIGGERS_DIR, "<frozen", sys.base_prefix))
        or "site-packages" in name
    )


def _instances(module: ModuleType, kind: type[T]) -> list[T]:
    found: list[T] = []
    for value in vars(module).values():
        if isinstance(value, kind) and not any(value is known for known in found):
            found.append(value)
    return found


def _named(target: str, module: ModuleType, name: str, kind: type[T], noun: str) -> T:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if isinstance(value, kind):
        return value
    names = ", ".join(key for key, each in vars(module).items() if isinstance(each, kind)) or "none"
    found = "nothing" if value is None else _with_article(type(value).__name__)
    if kind is Flow and isinstance(value, Task):
        found = f"a task, which `eventflow task {target}` calls"
    elif kind is Flow and inspect.iscoroutinefunction(value):
        found = "a function; decorate it with @flow"
    raise AppNotFound(
        target,
        f"expected {name!r} to be {_with_article(noun)}, found {found}; {noun}s there: {names}",
    )


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOUaeiou' else 'a'} {noun}"


def _single(target: str, module: ModuleType, kind: type[T], usual: str, noun: str) -> T:
    found = _instances(module, kind)
    if len(found) == 1:
        return found[0]
    usually = vars(module).get(usual)
    if isinstance(usually, kind):
        return usually
    names = ", ".join(key for key, each in vars(module).items() if isinstance(each, kind))
    if names:
        raise AppNotFound(
            target,
            f"expected one {noun}, found {names}; say which: {target}:{names.split(', ')[0]}",
        )
    raise AppNotFound(target, f"expected {_with_article(noun)} in it, found none")
