"""What the API and the commands show of a run that waits for a retry of its flow."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.server_process import EventflowProcess, eventflow, serving

APP = """
from pathlib import Path

from eventflow import App, flow, task

HERE = Path(__file__).parent

@task
async def charge(n: int) -> str:
    if not (HERE / "up").exists():
        raise ConnectionError("the bank is down, token=s3cr3t-value")
    return "charged"

@flow
async def pay(n: int) -> str:
    return await charge(n)

@flow(retries=[0.05, 600, 3600])
async def order(n: int) -> str:
    return await pay(n)

@flow
async def outer(n: int) -> str:
    return await order(n)

app = App("shop")
app.on("order.placed", order)
app.add(pay)
app.add(outer)
"""


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[EventflowProcess]:
    (tmp_path / "shop.py").write_text(APP)
    with serving(tmp_path) as served:
        yield served


def _waiting(shop: EventflowProcess, attempt: int) -> dict[str, Any]:
    """The run, when it waits after this many attempts."""
    found: dict[str, Any] = {}

    def is_waiting() -> bool:
        for row in shop.get("/api/runs", flow="order")["runs"]:
            if row["state"] == "waiting" and f"attempt {attempt} of 4" in (row["reason"] or ""):
                found.update(shop.get(f"/api/runs/{row['id']}"))
        return bool(found)

    wait_until(is_waiting, f"the run waits after attempt {attempt}")
    return found


def _text(shop: EventflowProcess, *words: str) -> str:
    done = eventflow(shop.folder, *words)
    assert done.returncode == 0, done.stderr
    return re.sub(r"\s+", " ", done.stdout)


def test_every_view_names_the_next_attempt_and_the_reason(shop: EventflowProcess):
    """API, `ls`, `show` and `explain` name attempt, due time and error, with secrets left out; the
    errors of earlier attempts stay visible after the run has completed.
    """
    assert eventflow(shop.folder, "emit", "order.placed", "-d", '{"n": 1}', "--id", "o-1")
    run = _waiting(shop, 2)
    assert run["retry"] == {"attempt": 3, "attempts": 4, "next_at": run["due_at"]}
    assert [(each["number"], each["type"]) for each in run["failed_attempts"]] == [
        (1, "builtins:ConnectionError"),
        (2, "builtins:ConnectionError"),
    ]
    why = "attempt 2 of 4 failed: ConnectionError: the bank is down"
    assert run["reason"].startswith(why) and run["error"] is None
    (verdict,) = shop.get("/api/events/o-1")["verdicts"]
    assert (verdict["state"], verdict["due_at"]) == ("waiting", run["due_at"])
    assert verdict["reason"].startswith(why)
    shown = _text(shop, "show", run["id"])
    assert why in shown and "retry attempt 3 of 4, in 9 min" in shown
    assert "FAILED ATTEMPT" in shown.upper() and "s3cr3t-value" not in shown
    for words in (("ls",), ("explain", "o-1")):
        assert f"retry in 9 min; {why}" in _text(shop, *words)
    assert "attempt=1 attempts=4" in _text(shop, "logs", run["id"])
    assert "retried with its parent" in _text(shop, "ls", "--flow", "pay")
    assert 'outcome="retried"' in shop.client.get("/metrics").text
    (shop.folder / "up").touch()
    assert "without waiting further" in _text(shop, "retry", run["id"])
    wait_until(
        lambda: shop.get(f"/api/runs/{run['id']}")["state"] == "completed", "the run completes"
    )
    run = shop.get(f"/api/runs/{run['id']}")
    assert (run["result"], run["retry"], run["reason"]) == ("charged", None, None)
    assert len(run["failed_attempts"]) == 2


def test_a_waiting_run_is_cancelled_by_hand(shop: EventflowProcess):
    """`eventflow cancel` ends the wait of the run, and that of its child."""
    eventflow(shop.folder, "emit", "order.placed", "-d", '{"n": 2}')
    run = _waiting(shop, 2)
    _text(shop, "cancel", run["id"], "-m", "enough")
    wait_until(
        lambda: {row["state"] for row in shop.get("/api/runs")["runs"]} == {"cancelled"},
        "both are cancelled",
    )
    assert shop.get(f"/api/runs/{run['id']}")["reason"] == "enough"


def test_a_parent_and_what_it_waits_for(shop: EventflowProcess):
    """`retry` of a run that awaits its child names the child; `logs -f` ends with the state."""
    parent = shop.start("outer", n=3)
    child = _waiting(shop, 2)["id"]
    done = eventflow(shop.folder, "retry", parent)
    assert done.returncode == 2 and child in done.stderr, done.stderr
    (shop.folder / "up").touch()
    _text(shop, "retry", child)
    done = eventflow(shop.folder, "logs", parent, "-f")
    assert f"run {parent} is completed" in done.stderr, done.stderr


def test_logs_follow_without_a_server(shop: EventflowProcess):
    """`logs -f` says that the run has not ended when no server is there to continue it."""
    shop.start("outer", n=4)
    child = _waiting(shop, 2)["id"]
    shop.stop()
    done = eventflow(shop.folder, "logs", child, "-f")
    assert f"run {child} is waiting, and no server is running" in done.stderr, done.stderr
