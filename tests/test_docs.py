"""What README and docs say is true: their programs run, their commands parse, and every name that
users meet is in them.

A page's ```python blocks run in order, in one namespace and one empty folder; `await` may stand at
the top, as in a notebook. A block that begins with `# NAME.py` is written there and loaded as
`eventflow serve NAME.py` would; a file of tests is run by pytest, a program with an `asyncio.run`
as one. `test_…` functions elsewhere are called. A block below `<!-- not run: WHY -->` is only
parsed.
"""

import ast
import asyncio
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_overloads

import click
import pytest
from starlette.routing import Route

import eventflow
import eventflow.core.errors
import eventflow.server.server
import eventflow.testing
import triggers
from benchmarks import path as path_benchmark
from eventflow import App, Retry, checkpoint, checks, flow, task
from eventflow.cli import cli
from eventflow.cli.target import load_module
from eventflow.demo.scenario import demo
from eventflow.sdk.task import Task
from eventflow.server.server import Settings
from eventflow.store.sqlite import SqliteStore
from eventflow.testing import running
from eventflow.testing.trigger_contract import CONTRACT, ContractLedger, TriggerHarness
from eventflow.web.api import Api, make_asgi
from eventflow.web.openapi import OPERATIONS
from tests.conftest import wait_until
from tests.logs import events
from tests.server_process import serving
from triggers import S3, At, Cron, Directory, Every, Kafka, Webhook
from triggers.signatures import HMAC, GitLab, Token

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCS = "\n".join(page.read_text() for page in PAGES)
TRIGGER_GUIDE = "guides/write-a-trigger.md"
SECRET = "whsec_c2hvcC1leGFtcGxlLXNlY3JldA=="


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def title(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


class Block(NamedTuple):
    """A fenced block, and where its text begins."""

    page: Path
    line: int
    language: str
    text: str
    is_run: bool

    @property
    def file(self) -> str | None:
        found = re.match(r"# (\w+\.py)\n", self.text)
        return found[1] if found else None


def blocks(path: Path, *languages: str) -> list[Block]:
    text = path.read_text()
    fenced = re.finditer(
        r"^(<!-- not run: .*-->\n)?```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    return [
        Block(path, text.count("\n", 0, found.start(3)) + 1, found[2], found[3], not found[1])
        for found in fenced
        if found[2] in languages
    ]


# --------------------------------------------------------------------------- programs


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=title)
def test_every_program_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The python blocks of a page do what they say, and the apps they make can be opened."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in re.findall(r'env\("(\w+)"\)', path.read_text()):
        monkeypatch.setenv(name, SECRET)
    module = types.ModuleType("docs_page")
    monkeypatch.setitem(sys.modules, "docs_page", module)
    before = set(sys.modules)
    try:
        asyncio.run(_run_page(blocks(path, "python"), vars(module)))
    finally:
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
                del sys.modules[name]


async def _run_page(page: list[Block], names: dict[str, Any]) -> None:
    for block in page:
        where = f"{title(block.page)}:{block.line}"
        code = compile(
            "\n" * (block.line - 1) + block.text, where, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        )
        if not block.is_run:
            continue
        if block.file is not None and block.file.startswith("test_"):
            await asyncio.to_thread(_run_pytest, block.file, block.text)
        elif block.file is not None:
            names |= await asyncio.to_thread(_load_file, block)
        elif "asyncio.run(" in block.text:
            await asyncio.to_thread(eval, code, names)
        else:
            done = eval(code, names)
            if inspect.iscoroutine(done):
                await done
        await _call_tests(names)
    for app in {id(value): value for value in names.values() if isinstance(value, App)}.values():
        async with running(app):
            pass


def _load_file(block: Block) -> dict[str, Any]:
    assert block.file is not None
    Path(block.file).write_text(block.text)
    if "asyncio.run(" in block.text:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, block.file],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    module, _ = load_module(block.file)
    return {name: value for name, value in vars(module).items() if not name.startswith("__")}


def _run_pytest(file: str, text: str) -> None:
    """Runs a file of tests as a reader would who has pasted it."""
    Path(file).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", file],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


NOTEBOOKS = {("docs/guides/library.md", "## Jupyter")}
"""Pages and sections whose blocks are cells, with an `await` at the top."""


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "python")], ids=title)
def test_every_program_runs_when_saved_as_a_file(path: Path, tmp_path: Path):
    """The blocks of a page run as programs when they are saved: those with a name under it, the
    others one behind the other in a file that imports the named ones; and the command line finds
    their App.
    """
    files: dict[str, str] = {}
    for block in blocks(path, "python"):
        above = path.read_text().splitlines()[: block.line]
        heading = next((line for line in reversed(above) if line.startswith("## ")), "")
        if block.is_run and (title(path), heading) not in NOTEBOOKS:
            name = block.file or "page.py"
            modules = [file[:-3] for file in files if not file.startswith("test_")]
            start = "" if block.file else "".join(f"from {each} import *\n" for each in modules)
            files[name] = f"{files.get(name, start)}\n\n{block.text}"
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    secrets = dict.fromkeys(re.findall(r'env\("(\w+)"\)', path.read_text()), SECRET)
    for name, text in files.items():
        if not name.startswith("test_"):  # those are run by the test above
            _run_file(tmp_path, secrets, name)
        is_script = re.search(r"^(assert )?asyncio\.run\(", text, re.MULTILINE)
        if re.search(r"^app = App\(", text, re.MULTILINE) and not is_script:
            _run_file(tmp_path, secrets, "-m", "eventflow", "doctor", "--app", name)


def _run_file(folder: Path, secrets: dict[str, str], *args: str) -> None:
    done = subprocess.run(
        [sys.executable, *args],
        cwd=folder,
        env={**os.environ, **secrets, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, (args, done.stdout, done.stderr)


async def _call_tests(names: dict[str, Any]) -> None:
    for name in [name for name in names if name.startswith("test_")]:
        done = names.pop(name)()
        if inspect.iscoroutine(done):
            await done


def test_the_readme_shows_what_its_program_prints(tmp_path: Path):
    """README's first screen, done: its program served, its request sent, its answer and its log
    lines found.
    """
    (program, *_), (shown, *_) = blocks(README, "python"), blocks(README, "text")
    asked, answer = blocks(README, "sh")[1].text, blocks(README, "json")[0].text
    (tmp_path / "shop.py").write_text(program.text)
    (tmp_path / ".env").write_text(re.findall(r"echo '(.+)' > .env", README.read_text())[0])
    headers = dict(pair.split(": ", 1) for pair in re.findall(r"-H '([^']+)'", asked))
    with serving(tmp_path, "--dev") as server:
        reply = server.client.post(
            "/hooks/orders", content=re.findall(r"-d '([^']+)'", asked)[0], headers=headers
        )
        assert reply.status_code == 202
        assert reply.json().keys() == json.loads(answer).keys()
        wait_until(lambda: '"run.completed"' in server.log, "the run is completed")
        lines = [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]
    by_event = {line["event"]: line for line in lines}
    printed = re.findall(r"^[\d:.]+ [ WE] (\w+\.\w+) +(.*)", shown.text, re.MULTILINE)
    assert sorted(by_event) == sorted(event for event, _ in printed)
    for event, fields in printed:
        assert set(re.findall(r"(\w+)=", fields)) <= by_event[event].keys()


def test_the_readme_shows_the_token_message_of_the_program():
    """README's first screen has the lines that the server prints about its new token."""
    (shown, *_) = blocks(README, "text")
    source = inspect.getsource(eventflow.server.server)
    (created,) = re.findall(r"eventflow: the API token.*", shown.text)
    assert created in source and "\n  Authorization: Bearer " in shown.text


# --------------------------------------------------------------------------- commands


def commands(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The `eventflow` and `make` commands of a page's shell blocks, as words."""
    for block in blocks(path, "sh", "console"):
        text = block.text.replace("\\\n", " ")
        for number, line in enumerate(text.splitlines()):
            command = (
                line.removeprefix("$ ")
                if line.startswith("$ ")
                else line
                if block.language == "sh"
                else ""
            )
            for part in re.split(r"\s(?:&&|\|)\s", command):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield block.line + number, [words[0].rpartition("/")[2], *words[1:]]


@pytest.mark.parametrize("path", PAGES, ids=title)
def test_every_eventflow_command_parses(path: Path):
    """Each `eventflow …` line in a shell block names a command, its options and enough
    arguments.
    """
    for line, (program, *args) in commands(path):
        if program != "eventflow" or args in (["--version"], ["--help"]):
            continue
        group = cli.make_context("eventflow", [args[0], "--help"], resilient_parsing=True)
        command = cli.get_command(group, args[0])
        assert command is not None, f"{title(path)}:{line}: no command {args[0]}"
        try:
            (demo if args[0] == "demo" else command).make_context(args[0], args[1:])
        except click.UsageError as error:
            pytest.fail(
                f"{title(path)}:{line}: eventflow {shlex.join(args)}: {error.format_message()}"
            )


@pytest.mark.parametrize("path", PAGES, ids=title)
def test_every_make_target_exists(path: Path):
    """Each `make TARGET` in a shell block is in the Makefile; README has demo and test."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {args[0] for _, (program, *args) in commands(path) if program == "make" and args}
    assert named <= targets
    if path == README:
        assert {"demo", "test"} <= named


def test_the_plain_commands_of_the_readme_are_those_of_make():
    """What README writes out for those without make is what make does."""
    written = " ".join(shlex.join(words) for _, words in commands(README))
    recipes = (ROOT / "Makefile").read_text()
    for make, plain in (
        ("$(BIN)/eventflow demo", "eventflow demo"),
        ("-m pytest -n 2", "-m pytest -n 2"),
    ):
        assert make in recipes and plain in written


# --------------------------------------------------------------------------- command line


def options() -> list[tuple[str, str, str]]:
    """(command, option, help) for all there are."""
    group = click.Context(cli)
    found = [
        (name, command)
        for name in cli.list_commands(group)
        if (command := cli.get_command(group, name))
    ]
    return [
        (name, longest, getattr(each, "help", None) or "")
        for name, command in [*found, ("demo", demo)]
        for each in command.params
        if isinstance(each, click.Option)
        for longest in [max(each.opts, key=len)]
    ]


def section(text: str, heading: str) -> str:
    found = re.search(
        rf"^#+ `?{re.escape(heading)}\b.*?(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"no section {heading}"
    return found[0]


def test_every_command_and_option_is_in_the_reference():
    """docs/reference/cli.md has a section per command, which names each of its options with the
    words of --help.
    """
    reference = page("reference/cli.md")
    shared = section(reference, "Options that most commands share")
    for command, option, help_text in options():
        own = section(reference, f"eventflow {command}")
        assert f"`{option}" in own or (f"`{option}" in shared and help_text in shared), (
            f"{command} {option}"
        )
        assert help_text in own + shared, f"{command} {option}: {help_text}"


def test_every_option_in_the_reference_exists():
    """cli.md names no option that a command does not have."""
    reference = page("reference/cli.md")
    known = {(command, option) for command, option, _ in options()}
    for command in {command for command, _, _ in options()}:
        for option in re.findall(
            r"^\| `(--[\w-]+)", section(reference, f"eventflow {command}"), re.MULTILINE
        ):
            assert (command, option) in known, f"{command} {option}"


def test_every_serving_option_is_a_setting():
    """`eventflow serve` and `app.run()` take the same: config.md names every field of Settings."""
    config = page("reference/config.md")
    missing = [name for name in Settings.__struct_fields__ if f"`{name}`" not in config]
    assert missing == []


# --------------------------------------------------------------------------- HTTP


def routes() -> set[tuple[str, str]]:
    api = Api(App("any"), lambda: False)
    return {
        (method, re.sub(r"{(\w+):\w+}", r"{\1}", route.path))
        for route in api.routes()
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }


def test_every_route_is_in_the_reference():
    """docs/reference/http.md has each method and path, and each status that openapi.json promises
    for it.
    """
    reference = page("reference/http.md")
    table = {(method.upper(), path): answers for method, path, _, answers in OPERATIONS}
    assert routes() == table.keys()
    for (method, path), answers in table.items():
        row = re.search(rf"^\| `{method} {re.escape(path)}.*$", reference, re.MULTILINE)
        assert row is not None, f"{method} {path}"
        assert set(answers.split()) <= set(re.findall(r"\b\d{3}\b", row[0])), row[0]


def test_every_route_in_the_reference_exists():
    """http.md names no method and path that the app does not answer."""
    rows = re.findall(r"^\| `([A-Z]+) (/[^`?\s]*)", page("reference/http.md"), re.MULTILINE)
    assert {(method, path) for method, path in rows if not path.startswith("/hooks")} <= routes()


# --------------------------------------------------------------------------- events, errors


def test_every_logged_event_is_documented():
    """The table of log lines in docs/reference/events.md has what modules declare in LOG_EVENTS."""
    table, _, _ = page("reference/events.md").partition("## CloudEvents")
    rows = re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \| (.*) \|$", table, re.MULTILINE)
    assert rows == sorted((event, description) for event, description, _ in events.declared())


def test_every_error_and_exit_code_is_documented():
    """errors.md names each class of the tree, and its exit code when it has one of its own."""
    reference = page("reference/errors.md")
    for name, error in vars(eventflow.core.errors).items():
        if inspect.isclass(error) and issubclass(error, eventflow.EventflowError):
            row = re.search(rf"^.*\b{name}\b.*$", reference, re.MULTILINE)
            assert row is not None, name
            if "exit_code" in vars(error) and name != "EventflowError":
                assert re.search(rf"\b{error.exit_code}\b", row[0]), row[0]


# --------------------------------------------------------------------------- names


PUBLIC = [
    (module, name) for module in (eventflow, triggers, eventflow.testing) for name in module.__all__
]


@pytest.mark.parametrize(
    ("module", "name"),
    PUBLIC,
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_every_public_name_is_documented(module: types.ModuleType, name: str):
    """What `__all__` lists stands in the docs, and has a docstring of its own."""
    assert re.search(rf"`[^`\n]*\b{name}\b[^`\n]*`", DOCS) or re.search(
        rf"^.*\bimport\b.*\b{name}\b", DOCS, re.MULTILINE
    )
    value = getattr(module, name)
    assert inspect.getdoc(getattr(value, "fn", value)), f"{name} has no docstring"


CALLABLES: list[tuple[Any, str]] = [
    (App, "reference/config.md"),
    (SqliteStore, "reference/config.md"),
    (App.on, "reference/config.md"),
    (App.asgi, "reference/config.md"),
    (make_asgi, "reference/config.md"),
    (App.start, "guides/library.md"),
    (App.open, "guides/library.md"),
    (App.close, "guides/library.md"),
    (App.emit, "guides/flows.md"),
    (flow, "guides/flows.md"),
    (task, "guides/flows.md"),
    (Task.map, "guides/flows.md"),
    (Retry, "guides/flows.md"),
    (Webhook, "guides/webhook.md"),
    (Kafka, "guides/kafka.md"),
    (HMAC, "guides/webhook.md"),
    (Token, "guides/webhook.md"),
    (GitLab, "guides/webhook.md"),
    (Directory, "guides/files.md"),
    (S3, "guides/s3.md"),
    (Cron, "guides/schedules.md"),
    (Every, "guides/schedules.md"),
    (At, "guides/schedules.md"),
    (running, "guides/testing.md"),
    (checkpoint, "guides/checkpoints.md"),
    *(
        (getattr(checks, name), "guides/checkpoints.md")
        for name in checks.__all__
        if name[0].islower()
    ),
]
INNER = {"clock", "random_bytes", "rng", "sink", "passive", "own_loop"}
"""Parameters for tests and for eventflow itself; the pages need not name them."""


@pytest.mark.parametrize(
    ("call", "name"), CALLABLES, ids=lambda value: getattr(value, "__qualname__", value)
)
def test_every_keyword_is_documented(call: Any, name: str):
    """Each keyword-only parameter of what users call stands on its page, as code."""
    text = page(name)
    for keyword in _keywords(call):
        assert re.search(rf"`{keyword}`|\b{keyword}=", text), (
            f"{name}: {call.__qualname__}({keyword}=)"
        )


def _keywords(call: Any) -> list[str]:
    """Of a decorator, those of its overload with options."""
    signature = inspect.signature([*get_overloads(call), call][-2] if get_overloads(call) else call)
    return [
        p.name
        for p in signature.parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.name not in INNER
    ]


def test_every_extra_is_documented():
    """README names each extra that the distribution has, and no other."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    install = section(README.read_text(), "Install")
    assert {name for name in extras if re.search(rf"`{name}`|\[{name}\]", install)} == extras.keys()
    for name in re.findall(r"eventflow-reactor\[([\w,]+)\]", DOCS):
        assert set(name.split(",")) <= extras.keys()


# --------------------------------------------------------------------------- architecture


def test_every_package_has_its_layer():
    """docs/architecture.md names each file and folder of the package in its layers, and none that
    is not there.
    """
    rows = section(page("architecture.md"), "Module layers")
    cells = [row.split("|")[2] for row in re.findall(r"^\|.*$", rows, re.MULTILINE)]
    named = set(re.findall(r"`(\w+(?:\.py|/))`", " ".join(cells)))
    found = {
        f"{each.name}/" if each.is_dir() else each.name for each in (ROOT / "eventflow").iterdir()
    }
    assert named == found - {"__pycache__/", "py.typed"}


def files_named(text: str) -> set[str]:
    """The source files that a text of architecture.md names, relative to the repository."""
    names = set(re.findall(r"(?<![\w/.])(?:\w+/)*\w+\.py\b", text))
    return {name if name.startswith("triggers/") else f"eventflow/{name}" for name in names}


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def definitions(file: str) -> set[str]:
    """The functions and classes of a file, and its methods as `Class.method`."""
    nodes = ast.parse((ROOT / file).read_text()).body
    found = {node.name for node in nodes if isinstance(node, DEFINITIONS)}
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            methods = (each for each in node.body if isinstance(each, DEFINITIONS))
            found |= {f"{node.name}.{each.name}" for each in methods}
    return found


def test_every_file_and_method_of_the_architecture_exists():
    """docs/architecture.md names only files that are there, and each method with its own file."""
    text = page("architecture.md")
    for file in files_named(text):
        assert (ROOT / file).exists(), file
    anywhere = {name for file in files_named(text) for name in definitions(file)}
    assert set(re.findall(r"`(_?[A-Z]\w*\.\w+)`", text)) <= anywhere
    for row in text.splitlines():
        cells = row.split("|")
        if len(cells) == 7:  # a hop: number, thread, file, call, what it does
            calls = set(re.findall(r"`([\w.]+)`", cells[4]))
            known = {name for file in files_named(row) for name in definitions(file)}
            assert calls <= known, row


def test_the_architecture_names_every_file_that_an_event_visits(tmp_path: Path):
    """docs/architecture.md has each file that `benchmarks path` counts for a webhook with a task,
    an emitted event and a sink.
    """
    subscriptions = list(path_benchmark.SCENARIOS.values())[-1]
    server = path_benchmark.ProfiledServer(ROOT, tmp_path, path_benchmark.APP + subscriptions)
    try:
        for amount in range(20):
            server.post(amount)
        visited = set(server.sample(20)["calls"])
    finally:
        server.close()
    assert "eventflow/sinks/relay.py" in visited
    assert visited <= files_named(page("architecture.md"))


def test_every_test_that_the_reliability_page_names_exists():
    """Each `test_NAME` in docs/reliability.md, `*` for any ending, is a test."""
    files = ROOT.glob("tests/**/*.py")
    tests = set(re.findall(r"def (test_\w+)", "\n".join(file.read_text() for file in files)))
    for name, star in re.findall(r"`(test_\w+)(\*?)`", page("reliability.md")):
        assert name in tests or (star and any(test.startswith(name) for test in tests)), name


def test_the_roadmap_names_tests_that_exist():
    """What the roadmap says works is shown by tests that are there."""
    for name in re.findall(r"`(tests/[^`]+)`", page("roadmap.md")):
        assert list(ROOT.glob(name)), name


def test_every_promise_of_the_contract_is_in_its_guide():
    """write-a-trigger.md lists the promises of CONTRACT in order, with their docstrings."""
    rows = re.findall(r"^\| `([a-z]+(?:_[a-z]+)+)` \| (.*) \|$", page(TRIGGER_GUIDE), re.MULTILINE)
    promises = [(each.__name__, (inspect.getdoc(each) or "").rstrip(".")) for each in CONTRACT]
    assert [row for row in rows if row[0] in dict(promises)] == promises


@pytest.mark.parametrize("owner", [TriggerHarness, ContractLedger], ids=lambda each: each.__name__)
def test_every_member_of_the_contract_is_in_its_guide(owner: type):
    """write-a-trigger.md names what an author of a trigger overrides and reads."""
    members = {name for name in vars(owner) if not name.startswith("_")} - {"accept", "cursor"}
    if owner is ContractLedger:
        members |= {name for name in vars(ContractLedger()) if not name.startswith("_")}
        members -= {"ledger_ids", "log"}
    missing = [name for name in members if not re.search(rf"`{name}\b", page(TRIGGER_GUIDE))]
    assert not missing


# --------------------------------------------------------------------------- links


@pytest.mark.parametrize("path", PAGES, ids=title)
def test_every_relative_link_resolves(path: Path):
    """A link to a file or a heading of this repository leads there."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        where, _, heading = link.partition("#")
        target = (path.parent / where).resolve() if where else path
        assert target.exists(), f"{title(path)}: {link}"
        if heading:
            headings = [
                re.sub(r"[^\w\- ]", "", found).strip().lower().replace(" ", "-")
                for found in re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            ]
            assert heading in headings, f"{title(path)}: {link}"


def test_every_page_can_be_reached():
    """Each page of docs/ is linked from README or from another page."""
    linked: set[Path] = set()
    for path in PAGES:
        links = re.findall(r"\]\(([^)\s:]+)\)", path.read_text())
        linked |= {(path.parent / link.partition("#")[0]).resolve() for link in links}
    assert {path for path in PAGES if path != README} <= linked
