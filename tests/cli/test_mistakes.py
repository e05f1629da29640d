"""What people get wrong, and what the command line says then: one line, the right exit code, no
traceback of ours.
"""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from eventflow.cli.root import cli, main
from tests.conftest import wait_until
from tests.server_process import ROOT, EventflowProcess, eventflow

APP = "from eventflow import App, flow, task\n"

TARGETS: dict[str, tuple[str, str, int, str]] = {
    "no file": ("", "none.py", 3, "there is no file none.py"),
    "no module": ("", "no.such.module:app", 3, "No module named"),
    "no such name": (APP + "app = App('a')\n", "app.py:other", 3, "Apps there: app"),
    "not an app": (APP + "app = 3\n", "app.py:app", 3, "found an int"),
    "nothing": ("", "", 3, "expected file.py, file.py:NAME or package.module:NAME"),
    "a folder": ("", ".", 3, "expected file.py, file.py:NAME or package.module:NAME"),
    "another folder": ("", "/", 3, "/ is a folder; expected file.py"),
    "no Python": (APP, "app.txt", 3, "No module named 'app.txt'"),
    "no app": (APP, "app.py", 3, "found none"),
    "two apps": (APP + "a = App('a')\nb = App('b')\n", "app.py", 3, "app.py:a"),
    "syntax error": ("def x(:\n", "app.py", 3, "app.py:1: invalid syntax"),
    "raises": (APP + "\n\n1 / 0\n", "app.py", 3, "app.py:4: ZeroDivisionError"),
    "missing package": ("import nothing_there\n", "app.py", 3, "app.py:1: ModuleNotFoundError"),
    "exits": ("raise SystemExit(0)\n", "app.py", 3, "app.py:1: SystemExit"),
    "sync flow": (APP + "@flow\ndef f(): pass\n", "app.py", 2, "must be `async def`"),
    "empty secret": (
        APP + "from triggers import Webhook, GitHub, env\n@flow\nasync def f(): pass\n"
        "app = App('a')\napp.on(Webhook('/x', verify=GitHub(secret=env('NOT_SET'))), f)\n",
        "app.py",
        3,
        "$NOT_SET empty or unset; set it before starting, or write it to ./.env",
    ),
    "bad filter": (
        APP + "@flow\nasync def f(): pass\napp = App('a')\napp.on('x', f, where={'a': "
        "[{'nope': 1}]})\n",
        "app.py",
        2,
        "nope",
    ),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets(tmp_path: Path, case: str):
    """A target that cannot be loaded is told by the user's own file and line, not by ours."""
    code, target, exit_code, message = TARGETS[case]
    if code:
        (tmp_path / "app.py").write_text(code)
    done = eventflow(tmp_path, "serve", target, "--port", "0")
    assert done.returncode == exit_code, done.stderr
    assert (
        message in done.stderr
        and "Traceback" not in done.stderr
        and len(done.stderr.splitlines()) == 1
    ), done.stderr
    assert done.stdout == "" and not (tmp_path / ".eventflow").exists()


def test_errors_as_json(tmp_path: Path):
    """With --json an error is one JSON object on stderr, usage errors too."""
    for args, code in (
        (("serve", "none.py"), 3),
        (("ls",), 4),
        (("ls", "--nope"), 2),
        (("nope",), 2),
        (("explain",), 2),
    ):
        done = eventflow(tmp_path, *args, "--json")
        assert done.returncode == code and done.stdout == "", args
        assert set(json.loads(done.stderr)) == {"error", "detail"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("serv",), "did you mean 'serve'"),
        (("deploy", "app.py"), "there are: serve, dev"),
        (("serve", "app.py", "--prot", "1"), "--port"),
        (("serve", "app.py", "--port", "70000"), "65535"),
        (("ls", "rnus"), "runs"),
        (("replay",), "--since"),
        (("replay", "--since", "1d", "--until", "2d"), "--since before --until"),
        (("replay", "o-1", "--type", "x"), "leave it out for one EVENT"),
        (("ls", "events", "--since", "1d", "--until", "2d"), "--since before --until"),
        (("emit", "x", "-d", "{"), "expected JSON"),
        (("emit", "x", "-d", "@none.json"), "none.json"),
        (("run", "app.py:f", "-p", "x"), "NAME=VALUE"),
        (("run", "app.py:f", "-p", "y=1"), "cannot bind parameter 'x'"),
        (("run", "app.py:f", "-p", "x=many"), "cannot bind parameter 'x'"),
        (("run", "app.py:f", "--event", '{"z": 1}'), "cannot bind parameter 'x'"),
        (("run", "app.py:f", "--params", "[]"), "JSON object"),
        (("task", "app.py:t", "-p", "q=1"), "task 't' cannot bind parameter"),
        (
            ("run", "app.py:f", "-p", "x=1", "--idempotency-key", ""),
            "--idempotency-key expected a text",
        ),
        (
            ("serve", "app.py", "--allow-host", "https://shop.example.com"),
            "without scheme and port",
        ),
        (("serve", "app.py", "--allow-host", "shop.example.com:443"), "without scheme and port"),
        (("serve", "app.py", "--store", "sqlite:///."), "expected a file, found the folder ."),
        (("ls", "--store", "."), "expected a file, found the folder ."),
        (
            ("serve", "app.py", "--store", "sqlite:////dev/null"),
            "expected a file, found the device /dev/null",
        ),
        (("ls", "--store", "postgres://db/shop"), "expected sqlite:///PATH"),
        (("ls", "--url", "localhost:8710"), "expected http://HOST:PORT"),
        (("ls", "events", "--state", "failed"), "--state filters runs"),
        (("ls", "dead-letters", "--since", "2026-01-01T00:00:00Z"), "--since filters events"),
        (("doctor", "--accept-loss", "--url", "http://127.0.0.1:9"), "leave --url out"),
    ],
)
def test_usage(tmp_path: Path, args: tuple[str, ...], message: str):
    """A mistyped command, option or parameter exits 2 and says what was meant."""
    (tmp_path / "app.py").write_text(
        APP
        + "@task\nasync def t(x: int): return x\n@flow\nasync def f(x: int): return await t(x)\n"
        "app = App('a')\n"
    )
    done = eventflow(tmp_path, *args)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr


def test_an_event_that_starts_nothing(tmp_path: Path):
    """`emit` says what the event starts, and if nothing, why."""
    (tmp_path / "app.py").write_text(
        APP + "@flow\nasync def f(x: int): return x\napp = App('app')\n"
        "app.on('order.placed', f, where={'x': [1, 2]})\n"
        "app.on('order.paid', f, where=lambda e: e['x'] > 0)\n"
    )
    assert eventflow(tmp_path, "run", "app.py:f", "-p", "x=1").returncode == 0  # makes the store
    for args, message in (
        (("order.placed", "-d", '{"x": 1}'), "starts events/f, run "),
        (("order.placed", "-d", '{"x": 3}'), "events/f: filtered, x"),
        (("order.placd",), "starts nothing, no subscription accepts order.placd"),
        (("order.paid", "-d", '{"x": 1}'), "events/f#2: invalid, TypeError: 'Event' object is not"),
    ):
        done = eventflow(tmp_path, "emit", *args, "--app", "app.py")
        assert done.returncode == 0 and message in done.stdout, (args, done.stdout, done.stderr)
    assert "its data is event.data (in <lambda>, " in done.stdout and "app.py:6)" in done.stdout


def test_where_a_run_failed(tmp_path: Path):
    """The one line about a run that failed, and its line in the log, name the user's line."""
    (tmp_path / "app.py").write_text(APP + "@flow\nasync def f():\n    return 1 / 0\n")
    done = eventflow(tmp_path, "run", "app.py:f")
    (line,) = [each for each in done.stderr.splitlines() if each.startswith("error: ")]
    assert "ZeroDivisionError: division by zero (app.py:4); eventflow show" in line
    assert "app.py:4" in next(each for each in done.stderr.splitlines() if "run.failed" in each)


def test_a_new_store_in_another_folder(tmp_path: Path):
    """A command in another folder than before says that its store is new, and where another is."""
    (tmp_path / "app.py").write_text(APP + "@flow\nasync def f(): return 1\napp = App('app')\n")
    first = eventflow(tmp_path, "run", "app.py:f")
    assert first.returncode == 0 and "new store" not in first.stderr
    (tmp_path / "sub").mkdir()
    second = eventflow(tmp_path / "sub", "run", "../app.py:f")
    assert second.returncode == 0
    assert f"the folder of app.py has one: {tmp_path}/.eventflow/app.db" in second.stderr
    assert "new store" not in eventflow(tmp_path / "sub", "run", "../app.py:f").stderr


def test_settings_next_to_the_app_in_another_folder(tmp_path: Path):
    """A `.env` beside the app is not read from another folder: a note says so, unless there is one
    in the working directory.
    """
    (tmp_path / "app.py").write_text(APP + "@flow\nasync def f(): return 1\napp = App('app')\n")
    (tmp_path / ".env").write_text("SECRET=1\n")
    assert ".env" not in eventflow(tmp_path, "run", "app.py:f").stderr
    elsewhere = tmp_path / "sub"
    elsewhere.mkdir()
    done = eventflow(elsewhere, "run", "../app.py:f")
    assert done.returncode == 0 and f"{tmp_path}/.env is not read" in done.stderr
    (elsewhere / ".env").write_text("")
    assert ".env" not in eventflow(elsewhere, "run", "../app.py:f").stderr


def test_a_task_in_the_place_of_a_flow(tmp_path: Path):
    """`run` of a task or a plain function says which command or decorator is meant."""
    (tmp_path / "app.py").write_text(
        APP + "@task\nasync def t(): return 1\nasync def g(): return 1\n"
    )
    done = eventflow(tmp_path, "run", "app.py:t")
    assert done.returncode == 3 and "`eventflow task app.py:t` calls" in done.stderr, done.stderr
    done = eventflow(tmp_path, "run", "app.py:g")
    assert done.returncode == 3 and "a function; decorate it with @flow" in done.stderr


def test_a_task_from_a_thread(tmp_path: Path):
    """A task called from a thread fails its run and says how to call it; exit 1."""
    (tmp_path / "app.py").write_text(
        APP + "import asyncio\n@task\nasync def t(): return 1\n@flow\nasync def f(): return await "
        "asyncio.to_thread(t)\n"
    )
    done = eventflow(tmp_path, "run", "app.py:f")
    assert (
        done.returncode == 1 and "called from a thread" in done.stderr and "await t(" in done.stderr
    )


def test_an_event_in_the_place_of_a_run(tmp_path: Path):
    """A command on a run that is given the sender's id of an event names the event's runs."""
    (tmp_path / "app.py").write_text(
        APP + "@flow\nasync def f(): return 1\napp = App('app')\napp.on('x', f)\n"
    )
    assert eventflow(tmp_path, "run", "app.py:f").returncode == 0  # makes the store
    for kind, ident in (("x", "o-1"), ("y", "o-2")):
        assert eventflow(tmp_path, "emit", kind, "--id", ident, "--app", "app.py").returncode == 0
    run = json.loads(eventflow(tmp_path, "ls", "--json").stdout)["runs"][0]
    for command in ("retry", "logs", "cancel"):
        done = eventflow(tmp_path, command, "o-1")
        assert done.returncode == 5, (command, done.stderr)
        assert f"it names an event; its runs: {run['id']}" in done.stderr
    assert "it started no run" in eventflow(tmp_path, "logs", "o-2").stderr


def test_nothing_there(tmp_path: Path):
    """Without a store or a server there is nothing to ask: 4; an unknown run is 5; looking makes no
    store.
    """
    assert eventflow(tmp_path, "ls").returncode == 4
    assert eventflow(tmp_path, "ls", "--store", "sqlite:///x.db").returncode == 4
    assert eventflow(tmp_path, "ls", "--url", "http://127.0.0.1:9").returncode == 4
    assert not (tmp_path / "x.db").exists()
    (tmp_path / "app.py").write_text(APP + "@flow\nasync def f(): return 1\napp = App('app')\n")
    assert eventflow(tmp_path, "run", "app.py:f").returncode == 0
    for args in (
        ("show", "zzz"),
        ("explain", "zzz"),
        ("retry", "zzz"),
        ("logs", "zzz"),
        ("pause", "zzz"),
    ):
        done = eventflow(tmp_path, *args)
        assert done.returncode == 5, (args, done.stderr)
    for ident in ("7", "99999999999999999999", "²"):
        done = eventflow(tmp_path, "redrive", ident, "--app", "app.py")
        assert done.returncode == 5 and "`eventflow ls dead-letters` lists" in done.stderr, (
            done.stderr
        )
    for args in (("show", ""), ("retry", ""), ("pause", "")):
        done = eventflow(tmp_path, *args)
        assert done.returncode == 2 and "found an empty text" in done.stderr, (args, done.stderr)
    done = eventflow(tmp_path, "emit", "x", "--id", "", "--app", "app.py")
    assert done.returncode == 2 and "id: expected a non-empty string" in done.stderr


def test_a_damaged_store(tmp_path: Path):
    """A store that is no database exits 65, also for doctor; one that lost acknowledged commits
    opens with --accept-loss.
    """
    (tmp_path / "app.py").write_text(APP + "@flow\nasync def f(): return 1\n")
    assert eventflow(tmp_path, "run", "app.py:f").returncode == 0
    store = tmp_path / ".eventflow" / "app.db"
    old = store.read_bytes()
    assert eventflow(tmp_path, "run", "app.py:f").returncode == 0
    store.write_bytes(old)
    done = eventflow(tmp_path, "doctor")
    assert done.returncode == 65 and "--accept-loss" in done.stdout
    assert eventflow(tmp_path, "ls").returncode == 65
    assert eventflow(tmp_path, "doctor", "--accept-loss").returncode == 0
    assert eventflow(tmp_path, "ls").returncode == 0
    store.write_bytes(b"no database" * 1000)
    assert eventflow(tmp_path, "ls").returncode == 65


def test_a_file_that_is_no_store(tmp_path: Path):
    """Another file than a store, named by mistake, is told with 65, and nothing is written beside
    it.
    """
    (tmp_path / "notes.txt").write_text("nothing to see here")
    done = eventflow(tmp_path, "ls", "--store", "notes.txt")
    assert done.returncode == 65 and "notes.txt is damaged, or no store" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    done = eventflow(tmp_path, "doctor", "--store", "mysql:///shop", "--json")
    assert done.returncode == 2 and "expected sqlite:///PATH" in done.stdout


def test_a_replay_of_many_that_starts_nothing(tmp_path: Path):
    """Events without a subscription are left out and reported with the reason; when there are no
    others, it exits 2.
    """
    (tmp_path / "app.py").write_text(
        APP
        + "@flow\nasync def f(): return 1\napp = App('app')\napp.on('wanted', f)\n@flow\nasync def "
        "other(): return 1\n"
    )
    assert eventflow(tmp_path, "run", "app.py:f").returncode == 0
    for kind in ("unwanted", "unwanted", "wanted"):
        assert eventflow(tmp_path, "emit", kind, "--app", "app.py").returncode == 0
    done = eventflow(tmp_path, "replay", "--since", "1h", "--app", "app.py")
    assert done.returncode == 0 and "1 run started" in done.stdout
    done = eventflow(tmp_path, "replay", "--since", "1h", "--to", "nope", "--app", "app.py")
    assert done.returncode == 2 and done.stderr.count("'nope'") == 1, done.stderr


def test_a_server_elsewhere_is_what_doctor_looks_at(tmp_path: Path):
    """With --url, doctor tells of that server alone, and not of a store that happens to lie
    here.
    """
    (tmp_path / "app.py").write_text(APP + "@flow\nasync def f(): return 1\n")
    assert eventflow(tmp_path, "run", "app.py:f").returncode == 0
    done = eventflow(tmp_path, "doctor", "--url", "http://127.0.0.1:9", "--json")
    checks = {each["check"]: each["detail"] for each in json.loads(done.stdout)["findings"]}
    assert done.returncode == 4 and "no server answers at http://127.0.0.1:9" in checks["ledger"]
    assert checks.keys() == {"python", "extras", "ledger"}


def test_doctor_knows_every_extra(tmp_path: Path):
    """Each extra that a user may install is told as installed or not."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ].keys()
    (message,) = [row["detail"] for row in asked(tmp_path, "doctor") if row["check"] == "extras"]
    assert [extra for extra in extras - {"dev", "s3-modern"} if extra not in message] == []


def asked(folder: Path, *args: str) -> list[dict[str, str]]:
    return json.loads(eventflow(folder, *args, "--json").stdout)["findings"]


def test_a_backup_that_cannot_be_written(tmp_path: Path):
    """A backup to a folder that is not there says which, and exits 2."""
    (tmp_path / "app.py").write_text(APP + "@flow\nasync def f(): return 1\n")
    assert eventflow(tmp_path, "run", "app.py:f").returncode == 0
    done = eventflow(tmp_path, "backup", "nowhere/copy.db")
    assert (
        done.returncode == 2
        and f"cannot write the backup {tmp_path}/nowhere/copy.db" in done.stderr
    ), done.stderr


def test_env_file(tmp_path: Path):
    """Whatever loads a target reads .env; what the environment says goes first."""
    (tmp_path / "app.py").write_text(
        APP + "import os\n@flow\nasync def f(): return os.environ['PLACE']\n"
    )
    (tmp_path / ".env").write_text("PLACE=file\n")
    assert json.loads(eventflow(tmp_path, "run", "app.py:f").stdout) == "file"
    assert json.loads(eventflow(tmp_path, "run", "app.py:f", PLACE="here").stdout) == "here"
    (tmp_path / "shop.py").write_text(APP + "import os\napp = App(os.environ['PLACE'])\n")
    found = {row["check"]: row["detail"] for row in asked(tmp_path, "doctor", "--app", "shop.py")}
    assert found["app"].startswith("file: ") and "file.db" in found["store"]


NOT_UTF8: dict[str, list[str]] = {
    **{command: [command, "a\udcff"] for command in cli.commands},
    "an unknown command": ["a\udcff"],
    "an option": ["ls", "--a\udcff"],
    "the value of an option": ["emit", "order.placed", '--data={"a": "\udcff"}'],
    "a store": ["ls", "--store", "sqlite:///a\udcff.db"],
    "JSON": ["show", "a\udcff", "--json"],
}


@pytest.mark.parametrize("case", NOT_UTF8)
def test_an_argument_that_is_not_utf8_is_a_usage_error(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Every command ends with exit code 2 and one line that names the argument."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(NOT_UTF8[case])
    errors = capsys.readouterr().err
    assert end.value.code == 2 and len(errors.splitlines()) == 1
    assert "\\xff" in errors and "expected text in UTF-8" in errors
    if "--json" in NOT_UTF8[case]:
        assert json.loads(errors)["error"] == "usage"


def test_a_setting_that_is_not_utf8_is_a_usage_error(tmp_path: Path):
    """The error names the environment variable, without its value, which may be a token."""
    done = subprocess.run(
        [sys.executable, "-m", "eventflow", "ls"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "EVENTFLOW_TOKEN": "to\udcffken"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "$EVENTFLOW_TOKEN: expected text in UTF-8" in done.stderr and "ken" not in done.stderr


def test_a_folder_that_cannot_be_watched_ends_dev(tmp_path: Path):
    """`dev` in a folder with a name that is not UTF-8 ends with an error and leaves no server
    behind.
    """
    code = APP + "@flow\nasync def f():\n    return 7\napp = App('a')\napp.add(f)\n"
    (tmp_path / "app.py").write_text(code)
    folder = tmp_path / "b\udcff"
    folder.mkdir()
    with (tmp_path / "out").open("w") as out:
        dev = subprocess.Popen(
            [sys.executable, "-m", "eventflow", "dev", "app.py", "--port", "0"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=out,
            stderr=out,
        )
    try:
        wait_until(lambda: (folder / "x").touch() or dev.poll() is not None, "dev has ended")
    finally:
        dev.kill()
        dev.wait()
    text = (tmp_path / "out").read_text()
    assert dev.returncode == 2 and "cannot be watched" in text and "Traceback" not in text
    assert "ready" not in text or "app.stopped" in text


def test_a_folder_whose_name_is_not_utf8_can_hold_the_app(tmp_path: Path):
    """The working directory may have any name, because no argument contains it."""
    folder = tmp_path / "b\udcff"
    folder.mkdir()
    code = APP + "@flow\nasync def f():\n    return 7\napp = App('a')\napp.add(f)\n"
    (folder / "app.py").write_text(code)
    done = eventflow(folder, "run", "app.py")
    assert done.returncode == 0 and done.stdout.strip() == "7", done.stderr
    listed = eventflow(folder, "ls", "--json")
    assert json.loads(listed.stdout)["runs"][0]["state"] == "completed", listed.stderr
    server = EventflowProcess(folder, "app.py")
    try:
        assert server.wait_ready(), server.log
    finally:
        server.kill()
