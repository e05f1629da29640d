"""The examples do what their docstrings say: each runs as a process of its own, with real HTTP,
real files and real kills.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.aws import Aws, Bucket, ministack
from tests.brokers import given_or_noida
from tests.conftest import wait_until
from tests.server_process import ROOT, EventflowProcess, environment

__all__ = ["ministack"]

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
EVENTFLOW = [sys.executable, "-m", "eventflow"]
KEY = b"shop-example-secret"
SECRET = f"whsec_{base64.b64encode(KEY).decode()}"


def example_environment(folder: Path, **more: str) -> dict[str, str]:
    return {"EVENTFLOW_STORE": f"sqlite:///{folder}/store.db", "PYTHONUNBUFFERED": "1", **more}


class ExampleServer(EventflowProcess):
    """`eventflow serve EXAMPLE`, and what a reader would ask with curl."""

    def runs(self, **params: str) -> list[dict[str, Any]]:
        return self.get("/api/runs", **params)["runs"]

    def states(self, **params: str) -> list[str]:
        return sorted(run["state"] for run in self.runs(**params))

    def emit(self, type: str, id: str, data: Any) -> httpx2.Response:
        headers = {"ce-specversion": "1.0", "ce-id": id, "ce-source": "/tests", "ce-type": type}
        return self.post("/api/events", data, **headers)


@contextmanager
def served(example: str, folder: Path, **env: str) -> Iterator[ExampleServer]:
    """The example, ready; at the end it is stopped, and exits with 0, unless the test killed it."""
    path = str(ROOT / "examples" / example)
    server = ExampleServer(folder, path, env=example_environment(folder, **env))
    try:
        assert server.wait_ready(), server.log
        yield server
        if server.process.poll() is None:
            assert server.stop() == 0
    finally:
        server.kill()


# --------------------------------------------------------------------------- what they are


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_stay_short_and_explain_how_to_run_them(path: Path):
    """An example is 40 to 80 lines, and opens with the commands that run it and with what to
    watch.
    """
    text = path.read_text()
    assert 40 <= text.count("\n") <= 80
    head = text.split('"""')[1]
    assert path.name in head or f"examples.{path.stem}" in head
    assert "\n    " in head and "Watch" in head


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_use_the_public_surface(path: Path):
    """An example imports from `eventflow` and `triggers` themselves, and touches nothing
    private.
    """
    found = re.findall(r"(?:from|import) ((?:eventflow|triggers)\S*)", path.read_text())
    assert set(found) <= {"eventflow", "triggers"}
    assert not re.search(r"\w\._\w|\.runtime\b|\.store\b", path.read_text())


# --------------------------------------------------------------------------- daily report


def test_daily_report(tmp_path: Path):
    """A schedule of seconds keeps today's totals; a backfill reports each day of its window once,
    and says which day failed.
    """
    (tmp_path / "data").mkdir()
    sales = [f"2026-05-{day:02}T23:30:00+02:00,north,{day}" for day in (1, 2, 3)]
    sales += [f"{datetime.now().astimezone().isoformat()},south,7.5"]
    (tmp_path / "data/sales.csv").write_text("\n".join(["at,region,amount", *sales, ""]))
    window = [
        "--trigger",
        "daily-report",
        "--from",
        "2026-05-01",
        "--to",
        "2026-05-05",
        "--yes",
        "--json",
    ]
    with served("daily_report.py", tmp_path, EVERY="1") as server:
        wait_until((tmp_path / "reports/today.json").exists, "today's totals are written")
        assert json.loads((tmp_path / "reports/today.json").read_text())["totals"] == {"south": 7.5}
        for started in (4, 0):
            done = subprocess.run(
                [*EVENTFLOW, "backfill", "report", *window],
                cwd=tmp_path,
                env=environment(**example_environment(tmp_path)),
                capture_output=True,
                check=False,
            )
            result = json.loads(done.stdout)
            assert (done.returncode, result["started"], result["states"]) == (
                1,
                started,
                {"completed": 3, "failed": 1},
            )
        assert sorted(path.stem for path in (tmp_path / "reports").glob("2026*")) == [
            "2026-05-01",
            "2026-05-02",
            "2026-05-03",
        ]
        assert json.loads((tmp_path / "reports/2026-05-02.json").read_text())["totals"] == {
            "north": 2.0
        }
        (failed,) = server.runs(flow="report", state="failed")
        assert server.get(f"/api/runs/{failed['id']}")["error"]["message"].startswith(
            "no sales on 2026-04-30"
        )


# --------------------------------------------------------------------------- orders


class FlakyScorer(BaseHTTPRequestHandler):
    """A scorer that answers each order 503, then breaks, and only then scores it; it refuses the
    order named bad.
    """

    asked: dict[str, int]

    def do_POST(self) -> None:
        order = json.loads(self.rfile.read(int(self.headers["content-length"])))
        tries = self.asked[order["id"]] = self.asked.get(order["id"], 0) + 1
        status = 422 if order["id"] == "bad" else {1: 503, 2: 500}.get(tries, 200)
        body = json.dumps({"score": order["total"] / 100}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        if status == 503:
            self.send_header("retry-after", "0.1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def scorer() -> Iterator[tuple[str, dict[str, int]]]:
    asked: dict[str, int] = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Scorer", (FlakyScorer,), {"asked": asked}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/score", asked
    server.shutdown()
    thread.join()
    server.server_close()


def order(server: ExampleServer, ident: str, data: Any) -> httpx2.Response:
    """A Standard Webhooks sender, by hand."""
    body, now = json.dumps(data), int(time.time())
    sign = base64.b64encode(
        hmac.digest(KEY, f"{ident}.{now}.{body}".encode(), hashlib.sha256)
    ).decode()
    headers = {
        "webhook-id": ident,
        "webhook-timestamp": str(now),
        "webhook-signature": f"v1,{sign}",
    }
    return server.client.post(
        "/hooks/orders", content=body, headers={**headers, "content-type": "application/json"}
    )


def test_orders_are_scored_through_bad_moments(tmp_path: Path, scorer: tuple[str, dict[str, int]]):
    """An order is scored although the scorer fails twice; a duplicate, forged, empty and refused
    one are distinguished.
    """
    url, asked = scorer
    with served("orders_webhook.py", tmp_path, ORDERS_SECRET=SECRET, SCORER_URL=url) as server:
        assert order(server, "m1", {"id": "o1", "total": 50}).status_code == 202
        again = order(server, "m1", {"id": "o1", "total": 50})
        assert again.status_code == 200 and again.json()["duplicate"]
        forged = {
            "webhook-id": "m9",
            "webhook-timestamp": str(int(time.time())),
            "webhook-signature": "v1,AAAA",
        }
        assert (
            server.client.post(
                "/hooks/orders", json={"id": "o9", "total": 9}, headers=forged
            ).status_code
            == 401
        )
        assert order(server, "m2", {"id": "o2", "total": 0}).status_code == 202
        assert order(server, "m3", {"id": "bad", "total": 5}).status_code == 202
        wait_until(
            lambda: server.states() == ["completed", "failed"], "one order is scored, one refused"
        )
        (scored,) = server.runs(state="completed")
        tasks = server.get(f"/api/runs/{scored['id']}")["tasks"]
        assert [(task["name"], task["attempts"]) for task in tasks] == [
            ("score", 3),
            ("file_score", 1),
        ]
        assert [verdict["outcome"] for verdict in server.get("/api/events/m2")["verdicts"]] == [
            "filtered"
        ]
    (line,) = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert json.loads(line)["order"] == "o1" and json.loads(line)["score"] == 0.5
    assert asked == {"o1": 3, "bad": 1}


def test_the_orders_docstring_sends_an_order(tmp_path: Path, scorer: tuple[str, dict[str, int]]):
    """The shell lines that the example prints for its reader are accepted as a signed order."""
    head = (ROOT / "examples/orders_webhook.py").read_text().split('"""')[1]
    send = head[head.index("    key=") : head.index("Watch")]
    with served(
        "orders_webhook.py", tmp_path, ORDERS_SECRET=SECRET, SCORER_URL=scorer[0]
    ) as server:
        shell = send.replace("http://", "").replace(
            "localhost:8710", str(server.client.base_url).rstrip("/")
        )
        reply = subprocess.run(
            ["bash", "-c", shell], capture_output=True, text=True, check=True
        ).stdout
        assert json.loads(reply)["event_id"] == "msg-1"
        wait_until(lambda: server.states() == ["completed"], "the order is scored")


# --------------------------------------------------------------------------- landing files


def test_landing_files_become_reports(tmp_path: Path):
    """A file is reported, its bad rows set aside; a bad file is a failed run; what lands while
    nothing runs is found.
    """
    landing = tmp_path / "landing"
    landing.mkdir()
    (landing / "monday.csv").write_text("region,amount\nnorth,10\nsouth,x\nnorth,5.5\n")
    with served("landing_csv.py", tmp_path) as server:
        (landing / "broken.csv").write_text("region,price\nnorth,10\n")
        wait_until(lambda: server.states() == ["completed", "failed"], "both files were dealt with")
        (failed,) = server.runs(state="failed")
        assert "missing amount" in failed["error"]["message"]
        server.kill()
    (landing / "tuesday.csv").write_text("region,amount\nwest,1\nwest,2\n")
    with served("landing_csv.py", tmp_path) as server:
        wait_until(
            lambda: server.states() == ["completed", "completed", "failed"],
            "the file of the night is reported",
        )
    assert json.loads((tmp_path / "reports/monday.json").read_text()) == {
        "totals": {"north": 15.5},
        "rejected_rows": 1,
    }
    assert json.loads((tmp_path / "reports/tuesday.json").read_text()) == {
        "totals": {"west": 3.0},
        "rejected_rows": 0,
    }
    assert (tmp_path / "rejects/monday.csv").read_text().startswith("line,reason\n3,")
    assert not (tmp_path / "reports/broken.json").exists()
    assert sorted(path.suffix for path in landing.iterdir()) == [""]  # only done/ is left


# --------------------------------------------------------------------------- landing objects


@pytest.mark.parametrize("way", ["poll", "queue"])
def test_landing_objects_become_reports(ministack: Aws, tmp_path: Path, way: str):
    """An object is reported in its bucket, by polling and by queue; a bad one is a failed run; what
    lands while nothing runs is found; mended and put again, it is reported.
    """
    bucket = Bucket(ministack)
    queue = bucket.queue() if way == "queue" else None
    env = {**ministack.env, "SALES_BUCKET": bucket.name, "SALES_QUEUE": queue.url if queue else ""}
    bucket.put("in/monday sales.csv", "region,amount\nnorth,10\nsouth,x\nnorth,5.5\n")
    with served("landing_s3.py", tmp_path, **env) as server:
        bucket.put("in/broken.csv", "region,price\nnorth,10\n")
        wait_until(
            lambda: server.states() == ["completed", "failed"],
            "both objects were dealt with",
            within=40,
        )
        (failed,) = server.runs(state="failed")
        assert "missing amount" in failed["error"]["message"]
        server.kill()
    bucket.put("in/broken.csv", "region,amount\nwest,1\nwest,2\n")
    with served("landing_s3.py", tmp_path, **env) as server:
        wait_until(
            lambda: server.states() == ["completed", "completed", "failed"],
            "the mended one is reported",
            within=40,
        )
    assert json.loads(bucket.read("reports/monday sales.csv.json")) == {
        "totals": {"north": 15.5},
        "rejected_rows": 1,
    }
    assert json.loads(bucket.read("reports/broken.csv.json")) == {
        "totals": {"west": 3.0},
        "rejected_rows": 0,
    }


# --------------------------------------------------------------------------- inside FastAPI


@contextmanager
def fastapi(folder: Path) -> Iterator[tuple[httpx2.Client, subprocess.Popen[str]]]:
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "examples.fastapi_scoring:api",
        "--app-dir",
        str(ROOT),
        "--port",
        "0",
    ]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(**example_environment(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout and process.stderr
        lines = iter(process.stderr.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://[\d.:]+", line)))
        with httpx2.Client(base_url=url, timeout=20) as client:
            yield client, process
    finally:
        process.kill()
        process.wait()
        assert process.stdout and process.stderr
        process.stdout.close()
        process.stderr.close()


def test_fastapi_answers_are_remembered(tmp_path: Path):
    """The same order is the same run, also after a kill -9; other figures are a 409; the model is
    loaded once per start.
    """
    orders = [{"id": f"o{n}", "total": n} for n in range(300)]
    with fastapi(tmp_path) as (client, process):
        first = client.post("/score", json={"id": "o-1", "total": 99.5}).json()
        assert first["score"] == 0.267 and not first["known"]
        assert client.post("/score", json={"id": "o-1", "total": 99.5}).json() == {
            **first,
            "known": True,
        }
        assert client.post("/score", json={"id": "o-1", "total": 98}).status_code == 409
        assert client.get("/runs/zzzzzzzzzzzzz").status_code == 404
        batch = client.post("/batch", json=orders).json()["run"]
        process.send_signal(signal.SIGKILL)
        assert process.stdout and process.stdout.read().count("model loaded") == 1
    with fastapi(tmp_path) as (client, _):
        assert client.post("/score", json={"id": "o-1", "total": 99.5}).json() == {
            **first,
            "known": True,
        }
        scores = client.get(f"/runs/{batch}").json()
        assert len(scores) == 300 and scores == sorted(scores)


# --------------------------------------------------------------------------- a fan-out, killed


def fan_out(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "examples/fan_out.py")]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(**example_environment(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def recorded(folder: Path) -> int:
    """What the journal held when the process died; read by nobody else then."""
    with sqlite3.connect(f"file:{folder}/store.db?mode=ro", uri=True) as connection:
        (count,) = connection.execute("SELECT count(*) FROM journal").fetchone()
    connection.close()
    return count


def test_fan_out_killed_half_way_repeats_nothing_recorded(tmp_path: Path):
    """Killed among 10,000 items, the second start computes exactly those that were not recorded; a
    third one none.
    """
    first = fan_out(tmp_path)
    assert first.stderr
    for line in first.stderr:
        if int(line.split(",")[0]) >= 4:
            break
    first.kill()
    first.communicate()
    known = recorded(tmp_path)
    assert 0 < known < 10_000
    out, errors = fan_out(tmp_path).communicate(timeout=60)
    assert f"{10_000 - known:,} computed here" in out, errors
    again, _ = fan_out(tmp_path).communicate(timeout=60)
    assert again.splitlines() == [out.splitlines()[0], "0 computed here"]


# --------------------------------------------------------------------------- drift


def alert(
    server: ExampleServer, feature: str, since: str = "2026-07-01T00:00:00Z"
) -> httpx2.Response:
    alert_data = {"model": "digits", "feature": feature, "statistic": 0.31, "starts_at": since}
    return server.post("/hooks/drift", alert_data, authorization="Bearer secret")


def arrive(count: int, folder: Path) -> None:
    command = [sys.executable, str(ROOT / "examples/digits_model.py"), str(count)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


def epochs(folder: Path) -> list[tuple[int, int]]:
    """(epoch, rows trained on), for each epoch that was begun, over all lives of the server."""
    whole = (folder / "serve.log").read_text().split("\n")[:-1]
    lines = [json.loads(line) for line in whole if "model.epoch_begun" in line]
    return [(line["epoch"], line["rows"]) for line in lines]


def registered(folder: Path) -> list[Path]:
    return sorted((folder / "models/digits").glob("*.json"))


def test_drift_retrains_on_from_the_epoch_it_was_killed_in(tmp_path: Path):
    """Killed in epoch 7 it goes on with epoch 7 and registers once; alerts meanwhile make one
    successor, with the new data.
    """
    arrive(900, tmp_path)
    with served("drift_retrain.py", tmp_path, DRIFT_TOKEN="secret", EPOCH_SECONDS="0.8") as server:
        assert alert(server, "pixels").status_code == 202
        wait_until(
            lambda: (5, 780) in epochs(tmp_path), "the training is well under way", within=60
        )
        assert alert(server, "pixels").status_code == 200  # sent again: a duplicate
        assert alert(server, "labels").status_code == 202
        wait_until(lambda: (7, 780) in epochs(tmp_path), "epoch 7 is under way", within=60)
        server.kill()
    before = epochs(tmp_path)
    assert not registered(tmp_path)
    arrive(1797, tmp_path)
    with served("drift_retrain.py", tmp_path, DRIFT_TOKEN="secret", EPOCH_SECONDS="0.4") as server:
        wait_until(lambda: len(epochs(tmp_path)) > len(before), "the training goes on", within=60)
        assert alert(server, "brightness").status_code == 202
        wait_until(
            lambda: server.states(flow="retrain") == ["completed"] * 2,
            "two models were judged",
            within=90,
        )
        first, second = sorted(server.runs(flow="retrain"), key=lambda run: run["id"])
        assert [server.get(f"/api/runs/{run['id']}")["result"][:8] for run in (first, second)] == [
            "promoted"
        ] * 2
        verdicts = [
            server.get(f"/api/events/{event['id']}")["verdicts"][0] for event in drifts(server)
        ]
        assert [verdict["run"] for verdict in verdicts] == [first["id"], second["id"], second["id"]]
        wait_until(
            lambda: not list(tmp_path.glob("store.db.checkpoints/*/*")), "no checkpoint is left"
        )
    again = epochs(tmp_path)[len(before) :]
    assert [epoch for epoch, _ in before] == list(range(1, before[-1][0] + 1)) and before[-1][
        0
    ] in (7, 8)
    assert again[0][0] == before[-1][0]  # the one under way, and no other, is trained again
    assert [epoch for epoch, _ in again] == [*range(again[0][0], 13), *range(1, 13)]
    assert {rows for _, rows in again[-12:]} == {1677}
    assert len(registered(tmp_path)) == 2
    assert not list((tmp_path / "models/digits").glob("*.part"))


def drifts(server: ExampleServer) -> list[dict[str, Any]]:
    found = (
        server.client.get("/api/events", params={"type": "drift.detected"})
        .raise_for_status()
        .json()["events"]
    )
    return sorted(found, key=lambda event: event["id"])


def test_the_drift_docstring_sends_an_alert(tmp_path: Path):
    """The shell lines that the example prints for its reader make the data, and an alert that
    trains and registers a model.
    """
    head = (ROOT / "examples/drift_retrain.py").read_text().split('"""')[1]
    assert "python examples/digits_model.py 900" in head
    arrive(900, tmp_path)
    send = head[head.index("    curl") : head.index("Watch")].replace("\\\\\n", "\\\n")
    with served("drift_retrain.py", tmp_path, DRIFT_TOKEN="secret") as server:
        where = str(server.client.base_url).rstrip("/")
        subprocess.run(
            ["bash", "-c", f"set -e; {send.replace('localhost:8710', where)}"],
            check=True,
            capture_output=True,
        )
        wait_until(partial(are_judged, server, 1), "the model is judged", within=60)
    show = [sys.executable, str(ROOT / "examples/model_registry.py"), "digits"]
    text = subprocess.run(show, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert f"champion: {registered(tmp_path)[0].stem}" in text and "'accuracy': 0.9" in text


def are_judged(server: ExampleServer, models: int) -> bool:
    return server.states(flow="retrain") == ["completed"] * models


def test_a_model_that_is_no_better_is_rejected(tmp_path: Path):
    """On the same data the gate keeps the champion and says why; on changed data it lets the better
    one by.
    """
    arrive(900, tmp_path)
    with served("drift_retrain.py", tmp_path, DRIFT_TOKEN="secret") as server:
        for number, (count, verdict) in enumerate(
            [(900, "promoted"), (900, "rejected"), (1797, "promoted")], start=1
        ):
            arrive(count, tmp_path)
            assert alert(server, "pixels", f"2026-07-0{number}T00:00:00Z").status_code == 202
            wait_until(partial(are_judged, server, number), f"model {number} is judged", within=60)
            newest = max(server.runs(flow="retrain"), key=lambda run: run["id"])
            assert server.get(f"/api/runs/{newest['id']}")["result"].startswith(verdict)
        (failed,) = server.client.get("/api/events", params={"type": "check.failed"}).json()[
            "events"
        ]
        data = server.get(f"/api/events/{failed['id']}")["event"]["data"]
        assert data["check"] == "better" and data["column"] == "accuracy"
    versions = registered(tmp_path)
    assert len(versions) == 2
    champion = (tmp_path / "models/digits/champion").read_text()
    assert (
        json.loads((tmp_path / f"models/digits/{champion}.json").read_text())["scores"]["accuracy"]
        > 0.9
    )


# --------------------------------------------------------------------------- kafka


def test_kafka_orders_are_scored_once_over_a_kill(tmp_path: Path):
    """Orders in one topic, scores in another, junk in a third: a kill -9 half-way loses nothing and
    scores nothing twice.
    """
    with given_or_noida(tmp_path / "broker") as broker:
        for topic in ("orders", "scores", "dead-orders"):
            asyncio.run(broker.create(topic))
        orders = [{"id": f"o-{n}", "customer": f"c-{n % 7}", "total": n} for n in range(60)]
        asyncio.run(broker.send("orders", *orders[:30], b"{junk", *orders[30:]))
        env = {"KAFKA_BOOTSTRAP_SERVERS": broker.server}
        with served("kafka_orders.py", tmp_path, **env) as server:
            wait_until(lambda: len(server.runs(limit="100")) >= 10, "some orders are in")
            server.kill()
        with served("kafka_orders.py", tmp_path, **env) as server:
            wait_until(
                lambda: server.get("/api/counts")["completed"] == 60, "all orders are scored"
            )
            wait_until(
                lambda: all(not row["waiting"] for row in server.get("/api/sinks")["sinks"]),
                "all is sent",
            )
            assert server.get("/api/counts")["dead"] == 1
            scores = asyncio.run(broker.read("scores", 60))
            dead, *again = asyncio.run(
                broker.read("dead-orders", 1)
            )  # a letter may come twice, over a kill
        found = {
            json.loads(record.value)["order"]: json.loads(record.value)["score"]
            for record in scores
        }
        assert set(found) == {order["id"] for order in orders} and found["o-8"] == 12.0
        ids = {dict(record.headers)["ce_id"] for record in scores}
        assert len(ids) == 60
        assert {record.value for record in (dead, *again)} == {
            b"{junk"
        } and b"unexpected character" in dict(dead.headers)["eventflow.error.reason"]
