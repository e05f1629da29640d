"""`replay --dry-run` as a person types it: over a server, beside one with changed code, and with
none.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.server_process import EventflowProcess, eventflow, serving

WATCH = """
from eventflow import App, Event, absent, count, sequence
from eventflow import flow
from triggers import Webhook

@flow
async def look(events: list[Event]) -> int:
    return len(events)

@flow
async def handle(total: float) -> float:
    return total

app = App("watch")
orders = Webhook("/orders", verify="none", id="id")
app.on(orders, handle, where={"total": [{"numeric": [">", 100]}]}, name="large")
app.on(count("login.failed", 5, within=600, by="user"), look, name="brute")
app.on(sequence("order.placed", then="order.paid", within=600, by="order"), look, name="paid")
app.on(absent("order.shipped", 0.2, after="order.paid", by="order"), look, name="unshipped")
"""

CHANGED = WATCH.replace('">", 100', '">", 10').replace('"login.failed", 5', '"login.failed", 3')

MONITOR = """
from eventflow import App
from eventflow import flow
from triggers import Drift, DriftMonitor, Numeric, Webhook

@flow
async def retrain(drift: Drift) -> str:
    return drift.status

features = {"amount": Numeric(warn=0.5)}
monitor = DriftMonitor(
    Webhook("/scores", verify="none", id="id"),
    features=features, reference="reference.json", window="batch",
    rows=lambda event: event.data["rows"], confirm=1, clear=1, cooldown=0, model="prices",
)
app = App("scores")
app.on(monitor, retrain)
"""

CLOUDEVENT = {"content-type": "application/cloudevents+json"}
BY_FOUR = [("login.failed", {"user": "ada"})] * 4
ORDER = [("order.placed", {"order": "o-1"}), ("order.paid", {"order": "o-1"})]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EventflowProcess]:
    """A server with a small and a large order, four failed logins, and an order that was paid and
    never shipped.
    """
    folder = tmp_path_factory.mktemp("watch")
    (folder / "changed.py").write_text(CHANGED)
    (folder / "watch.py").write_text(WATCH)
    with serving(folder, file="watch.py") as served:
        fill(served)
        yield served


def fill(served: EventflowProcess) -> None:
    for total in (50, 500):
        served.post("/hooks/orders", {"id": f"total-{total}", "total": total})
    for number, (kind, data) in enumerate([*BY_FOUR, *ORDER]):
        event = {
            "specversion": "1.0",
            "id": f"e{number}",
            "source": "/shop",
            "type": kind,
            "data": data,
        }
        served.client.post("/api/events", content=json.dumps(event), headers=CLOUDEVENT)
    wait_until(
        lambda: served.get("/api/counts")["completed"] == 4,
        "large, paid (two events) and unshipped are done",
    )


def dry(folder: Path, *args: str) -> Any:
    done = eventflow(folder, "replay", "--since", "7d", "--dry-run", "--json", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def started(answer: dict[str, Any]) -> dict[str, int]:
    return {each["subscription"]: each["runs"] for each in answer["subscriptions"]}


def ids(served: EventflowProcess) -> dict[str, str]:
    return {row["event_id"]: row["id"] for row in served.get("/api/events", limit=1000)["events"]}


def test_the_server_shows_what_its_code_would_start(shop: EventflowProcess):
    """A filter, a count, a sequence and an absence over the last seven days, each run with its key
    and events; none starts.
    """
    before, known = shop.get("/api/counts"), ids(shop)
    answer = dry(shop.folder)
    assert (
        started(answer) == {"large": 1, "brute": 0, "paid": 1, "unshipped": 1}
        and answer["events"] == 8
    )
    runs = {run["subscription"]: run for run in answer["runs"]}
    assert runs["large"]["events"] == [known["total-500"]]
    assert (runs["paid"]["key"], runs["paid"]["events"]) == ("o-1", [known["e4"], known["e5"]])
    assert (runs["unshipped"]["mode"], runs["unshipped"]["events"]) == ("pattern", [known["e5"]])
    assert shop.get("/api/counts") == before
    text = eventflow(shop.folder, "replay", "--since", "1w", "--dry-run").stdout
    assert (
        f"o-1  2: {known['e4']}, {known['e5']}" in text
        and "3 runs would start" in text.splitlines()[-1]
    )
    assert "brute: 0 runs of 0 events; 4 received, 4 still wait at the end" in text
    assert "1 filtered: total" in text


def test_changed_code_is_tried_on_the_ledger_of_a_running_server(shop: EventflowProcess):
    """With --app the program in that file is asked, while the server that has the store goes on
    with its own.
    """
    answer = dry(shop.folder, "--app", "changed.py")
    assert started(answer) == {"large": 2, "brute": 1, "paid": 1, "unshipped": 1}
    (brute,) = (run for run in answer["runs"] if run["subscription"] == "brute")
    known = ids(shop)
    assert brute["key"] == "ada" and brute["events"] == [known["e0"], known["e1"], known["e2"]]
    assert started(
        dry(shop.folder, "--app", "changed.py", "--to", "brute", "--type", "login.failed")
    ) == {"brute": 1}


def test_without_a_server(tmp_path: Path):
    """The file at rest is read as it is: with --app it answers, without one nobody knows the
    flows.
    """
    (tmp_path / "watch.py").write_text(WATCH)
    (tmp_path / "changed.py").write_text(CHANGED)
    with serving(tmp_path, file="watch.py") as served:
        fill(served)
        assert served.stop() == 0
    assert started(dry(tmp_path, "--app", "changed.py")) == {
        "large": 2,
        "brute": 1,
        "paid": 1,
        "unshipped": 1,
    }
    assert started(dry(tmp_path, "--app", "watch.py", "--until", "5m")) == {
        "large": 0,
        "brute": 0,
        "paid": 0,
        "unshipped": 0,
    }
    alone = eventflow(tmp_path, "replay", "--since", "7d", "--dry-run")
    assert alone.returncode == 4 and "--app" in alone.stderr


def test_a_replay_of_a_time_starts_the_subscriptions_to_the_trigger(tmp_path: Path):
    """A replay of many events gives each to the subscriptions on its own trigger, and passes over
    what nothing subscribes to.
    """
    (tmp_path / "watch.py").write_text(WATCH)
    unmatched = {
        "specversion": "1.0",
        "id": "unmatched",
        "source": "/shop",
        "type": "nothing.subscribes",
        "data": {"total": 1000},
    }
    with serving(tmp_path, file="watch.py") as served:
        served.post("/hooks/orders", {"id": "small", "total": 50})
        served.post("/hooks/orders", {"id": "large", "total": 500})
        served.client.post("/api/events", content=json.dumps(unmatched), headers=CLOUDEVENT)
        done = eventflow(tmp_path, "replay", "--since", "7d", "--to", "handle")
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "2 events, 1 run started"
        assert "no subscription or flow 'handle' accepts nothing.subscribes" in done.stderr
        assert len(served.get("/api/runs")["runs"]) == 2


def amounts(seed: int, count: int, mean: float) -> list[dict[str, float]]:
    draw = random.Random(seed)
    return [{"amount": draw.gauss(mean, 1)} for _ in range(count)]


def test_a_lower_threshold_of_drift(tmp_path: Path):
    """Windows that stayed below the threshold tell how often a lower one would have started a
    training; none starts.
    """
    (tmp_path / "reference.json").write_text(json.dumps(amounts(0, 4000, 0.0)))
    (tmp_path / "scores.py").write_text(MONITOR)
    (tmp_path / "changed.py").write_text(MONITOR.replace("warn=0.5", "warn=0.15, alert=0.9"))
    with serving(tmp_path, file="scores.py") as served:
        for number, mean in enumerate([0.0, 0.5, 0.0, 0.5, 0.0, 0.0, 0.5, 0.0]):
            sent = served.post(
                "/hooks/scores", {"id": f"b{number}", "rows": amounts(number + 1, 1000, mean)}
            )
            assert sent.status_code == 202, sent.text
        (trigger,) = served.get("/api/triggers")["triggers"]
        assert trigger["totals"]["drift_windows_judged"] == 8
        answer = dry(tmp_path)
        assert (answer["would_start"], answer["simulated"]) == (0, [])
        again = dry(tmp_path, "--app", "changed.py", "--to", "retrain")
        assert again["would_start"] == 3
        text = eventflow(
            tmp_path, "replay", "--since", "7d", "--dry-run", "--app", "changed.py"
        ).stdout
        assert text.count("the warning begins at 0.15") == 3 and "psi of amount is 0." in text
        assert (
            "would have sent 6 events, in place of 0 recorded" in text
            and "3 runs would start" in text
        )
        assert served.get("/api/runs")["runs"] == [] and served.stop() == 0
    assert dry(tmp_path, "--app", "changed.py")["runs"] == again["runs"]


@pytest.mark.parametrize(
    "ago", ["90s", "15m", "2h", "7d", "1w", "1d12h", "2020-01-31T08:00:00+01:00"]
)
def test_times_are_instants_or_how_long_ago(shop: EventflowProcess, ago: str):
    """--since and --until take durations back from now beside instants."""
    done = eventflow(shop.folder, "ls", "events", "--since", ago, "--json")
    assert done.returncode == 0 and len(json.loads(done.stdout)["events"]) >= 8
    none = eventflow(shop.folder, "ls", "events", "--until", ago).stdout
    assert none.startswith("no events with --until 20")


@pytest.mark.parametrize("wrong", ["yesterday", "7", "7x", "2026-01-31", "", "-7d"])
def test_a_time_that_is_none_is_refused(shop: EventflowProcess, wrong: str):
    """What is neither an instant with its zone nor a duration exits 2 and says what was
    expected.
    """
    done = eventflow(shop.folder, "ls", "events", f"--since={wrong}")
    assert done.returncode == 2 and "an age" in done.stderr
