"""The commands a person types, over one running server; and the same without one."""

import json
import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from eventflow.runs.run import parse_id
from tests.conftest import wait_until
from tests.server_process import (
    SHOP,
    EventflowProcess,
    eventflow,
    serving,
    start,
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EventflowProcess]:
    """A server with three orders: one done, one filtered, one dead; and a failed run."""
    with serving(tmp_path_factory.mktemp("shop")) as served:
        served.post("/hooks/orders", {"id": "good", "total": 5})
        served.post("/hooks/orders", {"id": "good", "total": 5})
        served.post("/hooks/orders", {"id": "small", "total": -1})
        served.client.post("/hooks/orders", content=b"{", headers={"webhook-id": "broken"})
        wait_until(lambda: served.get("/api/counts")["completed"] == 1, "the order is done")
        yield served


def run_of(served: EventflowProcess, event: str) -> str:
    return served.get(f"/api/events/{event}")["runs"][0]["id"]


def failed_run(served: EventflowProcess) -> str:
    run = served.start("failing", message="no such luck")
    served.wait_for(run, "failed")
    return run


def asked(served: EventflowProcess, *args: str) -> Any:
    done = eventflow(served.folder, *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --------------------------------------------------------------------------- looking


def test_ls(shop: EventflowProcess):
    """`ls` lists each kind, aligned for people, whole for programs."""
    text = eventflow(shop.folder, "ls").stdout.splitlines()
    assert text[0].split()[:4] == ["ID", "FLOW", "STATE", "STARTED"] and "completed" in "\n".join(
        text
    )
    assert {row["event_id"] for row in asked(shop, "ls", "events")["events"]} >= {
        "good",
        "small",
        "broken",
    }
    assert (
        asked(shop, "ls", "runs", "--state", "completed", "--flow", "handle")["runs"][-1]["state"]
        == "completed"
    )
    assert "webhook-orders/handle" in eventflow(shop.folder, "ls", "flows").stdout
    triggers = eventflow(shop.folder, "ls", "triggers").stdout
    assert "listening" in triggers and "SINCE START" in triggers
    assert "unexpected end" in eventflow(shop.folder, "ls", "dead-letters").stdout
    assert "\x1b[" not in "\n".join(text)


def test_ls_names_the_flow_that_was_probably_meant(shop: EventflowProcess, tmp_path: Path):
    """An empty list repeats its filters, and names the flow or trigger that is spelled alike."""
    typo = eventflow(shop.folder, "ls", "--flow", "handel").stdout
    assert (
        typo == "no runs with --flow handel; the app has no flow 'handel': did you mean 'handle'?\n"
    )
    other = eventflow(shop.folder, "ls", "events", "--trigger", "hook", "--type", "x").stdout
    assert other.startswith("no events with --trigger hook --type x; the app has no trigger 'hook'")
    known = eventflow(shop.folder, "ls", "--flow", "handle", "--state", "dead").stdout
    assert known == "no runs with --flow handle --state dead\n"


def test_explain(shop: EventflowProcess):
    """`explain` says for each subscription what became of an event, by our id or the sender's, and
    how often it came.
    """
    text = eventflow(shop.folder, "explain", "good").stdout
    assert "run started" in text and "completed" in text and run_of(shop, "good") in text
    assert "1, the last" in text.partition("duplicates")[2].splitlines()[0]
    text = eventflow(shop.folder, "explain", "small").stdout
    assert "filtered" in text and "total" in text
    assert "dead" in eventflow(shop.folder, "explain", "broken").stdout
    assert asked(shop, "explain", "good")["verdicts"][0]["outcome"] == "run"


def test_show(shop: EventflowProcess):
    """`show` tells a run's state, its tasks with attempts and errors, and what it returned; a part
    of the id serves.
    """
    text = eventflow(shop.folder, "show", run_of(shop, "good")).stdout
    assert "completed" in text and "double#0" in text and '{"score":10.0}' in text
    run = failed_run(shop)
    text = eventflow(shop.folder, "show", run).stdout
    assert "fail#0" in text and "no such luck" in text and "ValueError" in text
    assert asked(shop, "show", run)["tasks"][0]["attempts"] == 2
    assert asked(shop, "show", "small")["event_id"] == "small"


def test_logs(shop: EventflowProcess):
    """`logs` shows what a run printed, `-f` until it has ended; as JSON one line each."""
    run = run_of(shop, "good")
    assert "handling 5.0" in eventflow(shop.folder, "logs", run, "-f").stdout
    done = eventflow(shop.folder, "logs", run, "--json")
    (line,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert line["event"] == "handling 5.0" and line["timestamp"].endswith("Z")


# --------------------------------------------------------------------------- doing


def test_emit(shop: EventflowProcess):
    """`emit` records an event for the subscriptions to its type; with the same id, once."""
    args = ("emit", "thing.made", "-d", '{"total": 4}', "--id", "thing-1")
    first, again = asked(shop, *args), asked(shop, *args)
    assert (first["duplicate"], again["duplicate"], first["id"]) == (False, True, again["id"])
    shop.wait_for(run_of(shop, "thing-1"), "completed")
    data = shop.folder / "data.json"
    data.write_text('{"total": 6}')
    assert "recorded" in eventflow(shop.folder, "emit", "thing.made", "-d", "@data.json").stdout


def test_retry_and_cancel(shop: EventflowProcess):
    """`retry` lets a failed run go again, `cancel` ends one that runs."""
    run = failed_run(shop)
    assert "pending again" in eventflow(shop.folder, "retry", run).stdout
    shop.wait_for(run, "failed")
    assert len(shop.get(f"/api/runs/{run}")["tasks"][0]["errors"]) == 4
    long = shop.start("sleepy", seconds=60)
    shop.wait_for(long, "running")
    assert "asked to stop" in eventflow(shop.folder, "cancel", long).stdout
    assert shop.wait_for(long, "cancelled")["reason"]


@pytest.mark.parametrize("option", ["-m", "--reason"])
def test_the_reason_of_a_cancel_reaches_run_and_journal(shop: EventflowProcess, option: str):
    """`cancel -m WHY` of a running run is in its row, in its journal, in `show` and in `ls`."""
    long = shop.start("sleepy", seconds=60)
    shop.wait_for(long, "running")
    assert eventflow(shop.folder, "cancel", long, option, "the order was void").returncode == 0
    assert "the order was void" in shop.wait_for(long, "cancelled")["reason"]
    with closing(sqlite3.connect(f"file:{shop.store}?mode=ro", uri=True)) as ledger:
        (entry,) = ledger.execute(
            "SELECT value FROM journal WHERE run = ? AND call_key = '@cancel'", (parse_id(long),)
        ).fetchone()
    assert json.loads(entry) == "the order was void"
    assert "the order was void" in eventflow(shop.folder, "show", long).stdout
    rows = asked(shop, "ls", "runs", "--state", "cancelled")["runs"]
    assert "the order was void" in next(row["reason"] for row in rows if row["id"] == long)


def test_the_reason_of_a_cancel_before_the_start(tmp_path: Path):
    """`cancel -m WHY` without a server ends a run that nobody works on, with this reason."""
    with serving(tmp_path) as served:
        run = served.start("sleepy", seconds=60)
        served.wait_for(run, "running")
    done = eventflow(tmp_path, "cancel", run, "-m", "never mind", "--app", "shop.py")
    assert done.returncode == 0, done.stderr
    shown = eventflow(tmp_path, "show", run)
    assert "never mind" in shown.stdout, shown


def test_replay(shop: EventflowProcess):
    """`replay` runs an event again, or all of a time; `--dry-run` only tells."""
    before = len(shop.get("/api/events/good")["runs"])
    assert "would start" in eventflow(shop.folder, "replay", "good", "--dry-run").stdout
    assert "1 run started" in eventflow(shop.folder, "replay", "good", "--to", "handle").stdout
    assert len(shop.get("/api/events/good")["runs"]) == before + 1
    done = asked(
        shop, "replay", "--since", "2020-01-01T00:00:00Z", "--type", "webhook.received", "--dry-run"
    )
    (failures,) = [
        each for each in done["subscriptions"] if each["subscription"] == "webhook-orders/handle"
    ]
    assert failures["runs"] >= 1 and failures["filtered"] >= 1


def test_redrive(shop: EventflowProcess):
    """`redrive` tries a dead letter once more with mended data."""
    shop.client.post("/hooks/orders", content=b"{", headers={"webhook-id": "mend-me"})
    letter = asked(shop, "ls", "dead-letters")["dead_letters"][0]
    done = asked(shop, "redrive", str(letter["id"]), "-d", '{"total": 7}')
    assert done["verdicts"][0]["outcome"] == "run"
    again = eventflow(shop.folder, "redrive", str(letter["id"]))
    assert again.returncode == 2 and "already" in again.stderr


def test_pause_and_resume(shop: EventflowProcess):
    """The runs of a paused trigger wait until `resume`."""
    assert "paused" in eventflow(shop.folder, "pause", "webhook-orders").stdout
    shop.post("/hooks/orders", {"id": "while-paused", "total": 1})
    run = run_of(shop, "while-paused")
    assert shop.get(f"/api/runs/{run}")["state"] == "paused"
    assert eventflow(shop.folder, "resume", "webhook-orders").returncode == 0
    shop.wait_for(run, "completed")


def test_doctor_and_backup(shop: EventflowProcess):
    """`doctor` finds a running server's ledger sound; `backup` copies it, never over a file."""
    found = {row["check"]: row for row in asked(shop, "doctor", "--app", "shop.py")["findings"]}
    assert found["ledger"]["ok"] and shop.url in found["server"]["detail"]
    assert (
        str(shop.process.pid) in found["lock"]["detail"]
        and "webhook-orders" in found["webhooks"]["detail"]
    )
    assert "warning" in eventflow(shop.folder, "doctor", "--app", "shop.py").stdout
    copy = shop.folder / "copy.sqlite"
    assert eventflow(shop.folder, "backup", copy.name).returncode == 0 and copy.stat().st_size > 0
    assert eventflow(shop.folder, "backup", copy.name).returncode == 2


def test_run_by_the_server(shop: EventflowProcess):
    """`run` sends to the server that has the store, waits, and prints the result."""
    done = eventflow(shop.folder, "run", "shop.py:handle", "-p", "total=8")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"score": 16.0})
    assert shop.url in done.stderr
    done = eventflow(shop.folder, "run", "shop.py:failing", "-p", "message=42", "--json")
    assert (
        done.returncode == 1
        and "ValueError: 42" in json.loads(done.stderr.splitlines()[-1])["detail"]
    )


def test_another_place(shop: EventflowProcess):
    """`--url` with $EVENTFLOW_TOKEN reaches a server elsewhere; a wrong token is exit code 4."""
    elsewhere = shop.folder / "elsewhere"
    elsewhere.mkdir()
    done = eventflow(elsewhere, "ls", "--url", shop.url, EVENTFLOW_TOKEN=shop.token)
    assert done.returncode == 0 and "completed" in done.stdout
    done = eventflow(elsewhere, "ls", "--url", shop.url, EVENTFLOW_TOKEN="wrong")
    assert done.returncode == 4 and "bearer token" in done.stderr


# --------------------------------------------------------------------------- without a server


def test_without_a_server(tmp_path: Path):
    """With the server down the same commands work on the store; what they start waits for the next
    server.
    """
    with serving(tmp_path) as served:
        served.post("/hooks/orders", {"id": "good", "total": 5})
        run = failed_run(served)
        wait_until(lambda: served.get("/api/counts")["completed"] == 1, "the order is done")
        served.stop()
    assert "run started" in eventflow(tmp_path, "explain", "good").stdout
    assert (
        "handling 5.0"
        in eventflow(
            tmp_path, "logs", asked(served, "explain", "good")["runs"][0]["id"], "-f"
        ).stdout
    )
    done = eventflow(tmp_path, "retry", run)
    assert done.returncode == 0 and "no server is running" in done.stderr
    assert asked(served, "show", run)["state"] == "pending"
    assert eventflow(tmp_path, "pause", "webhook-orders").returncode == 0
    assert eventflow(tmp_path, "resume", "webhook-orders").returncode == 0
    done = eventflow(tmp_path, "emit", "thing.made", "-d", '{"total": 2}')
    assert done.returncode == 4 and "--app" in done.stderr
    done = eventflow(
        tmp_path, "emit", "thing.made", "-d", '{"total": 2}', "--id", "offline", "--app", "shop.py"
    )
    assert done.returncode == 0, done.stderr
    assert asked(served, "doctor")["ok"] is True
    with serving(tmp_path) as again:
        again.wait_for(run, "failed")
        again.wait_for(run_of(again, "offline"), "completed")


def test_run_and_task_here(tmp_path: Path):
    """`run` without a server works in this process, with parameters or an event, and leaves a run;
    `task` leaves none.
    """
    start(tmp_path).kill()
    done = eventflow(tmp_path, "run", "shop.py:handle", "--params", '{"total": 3}')
    assert (done.returncode, json.loads(done.stdout)) == (0, {"score": 6.0}), done.stderr
    (tmp_path / "e.json").write_text('{"total": 4}')
    done = eventflow(tmp_path, "run", "shop.py:handle", "--event", "@e.json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"score": 8.0})
    done = eventflow(tmp_path, "run", "shop.py:failing", "-p", "message=no")
    assert (
        done.returncode == 1
        and "ValueError: no" in done.stderr
        and "Traceback" not in done.stderr
        and done.stdout == ""
    )
    done = eventflow(tmp_path, "run", "shop.py:handle", "-p", "totl=3")
    assert done.returncode == 2 and "total" in done.stderr
    done = eventflow(tmp_path, "task", "shop.py:double", "-p", "total=21")
    assert (done.returncode, json.loads(done.stdout)) == (0, 42.0)
    rows = json.loads(eventflow(tmp_path, "ls", "--json").stdout)["runs"]
    assert [row["state"] for row in rows] == ["failed", "completed", "completed"]


class DevServer(EventflowProcess):
    """`eventflow dev`."""

    command_name = "dev"


@contextmanager
def developing(folder: Path, app: str = SHOP) -> Iterator[DevServer]:
    """`eventflow dev`, ready; at the end Ctrl-C stops it."""
    (folder / "app.py").write_text(app)
    server = DevServer(folder, "app.py", env={"NO_COLOR": ""})
    try:
        assert server.wait_ready(), server.log
        yield server
        server.signal(signal.SIGINT)
        assert server.wait() == 0
    finally:
        server.kill()


def test_dev_restarts_on_a_change(tmp_path: Path):
    """`dev` serves the new code after a file changes, on the same port; a syntax error waits for
    the next change.
    """
    app = (
        "from eventflow import App, flow\n@flow\nasync def f() -> int:\n    return {}\napp = "
        "App('dev')\napp.add(f)\n"
    )
    with developing(tmp_path, app.format(1)) as served:
        assert served.wait_for(served.start("f"), "completed")["result"] == 1
        (tmp_path / "app.py").write_text("def broken(:\n")
        wait_until(lambda: "app.py:1: invalid syntax" in served.log, "the error is logged")
        wait_until(
            lambda: "it restarts when a *.py file or .env changes" in served.log,
            "the log says what to do",
        )
        (tmp_path / "app.py").write_text(app.format(2))
        assert served.process.stdout is not None
        again = json.loads(served.process.stdout.readline())
        assert again["url"] == served.url
        assert served.wait_for(served.start("f"), "completed")["result"] == 2


def test_dev_restarts_when_the_env_file_changes(tmp_path: Path):
    """`dev` serves with the new variables after `.env` is written."""
    app = (
        "import os\nfrom eventflow import App, flow\n@flow\nasync def f() -> str:\n"
        "    return os.environ.get('GREETING', 'none')\napp = App('dev')\napp.add(f)\n"
    )
    with developing(tmp_path, app) as served:
        assert served.wait_for(served.start("f"), "completed")["result"] == "none"
        (tmp_path / ".env").write_text("GREETING=hello\n")
        assert served.process.stdout is not None
        assert json.loads(served.process.stdout.readline())["url"] == served.url
        assert served.wait_for(served.start("f"), "completed")["result"] == "hello"
        assert ".env changed, restarting" in served.log


def test_dev_outlives_its_server(tmp_path: Path):
    """A server that is killed under `dev` begins anew on the same socket and takes its runs up; its
    log has no colours in a file; a target that is not there fails at once, with 3.
    """
    with developing(tmp_path) as served:
        run = served.start("sleepy", seconds=0.5)
        wait_until(lambda: "resting" in served.diary, "the task is under way")
        os.kill(served.ready_line["pid"], signal.SIGKILL)
        assert served.process.stdout is not None
        again = json.loads(served.process.stdout.readline())
        assert again["url"] == served.url and again["pid"] != served.ready_line["pid"]
        assert served.wait_for(run, "completed")["result"] == "rested"
        assert "ended by SIGKILL, restarting" in served.log and "\x1b[" not in served.log
    done = eventflow(tmp_path, "dev", "none.py")
    assert done.returncode == 3 and "there is no file none.py" in done.stderr


def test_dev_ends_with_its_terminal(tmp_path: Path):
    """SIGHUP, which a closed terminal sends, ends `dev` and its server: none stays behind with the
    port and the store.
    """
    (tmp_path / "app.py").write_text(SHOP)
    server = DevServer(tmp_path, "app.py")
    try:
        assert server.wait_ready(), server.log
        child = Path(f"/proc/{server.ready_line['pid']}")
        assert child.exists()
        server.signal(signal.SIGHUP)
        server.wait()
        wait_until(lambda: not child.exists(), "the server has ended")
    finally:
        server.kill()


def test_demo_is_there(tmp_path: Path):
    """`eventflow demo --help` reaches the demo."""
    assert eventflow(tmp_path, "demo", "--help").returncode == 0
