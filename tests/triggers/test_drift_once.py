"""A drift starts one retraining and not a hundred: a real server, a statistic that swings round its
threshold, and kills.
"""

from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from tests.conftest import wait_until
from tests.server_process import EventflowProcess, serving

SAMPLES = 1000
KILLED_AT = (150, 420, 700)

APP = """
from pathlib import Path
import numpy as np
from eventflow import App, Singleflight, current_run, sleep
from eventflow import flow, task
from triggers import Drift, DriftMonitor, Numeric, Webhook

LET_GO = Path(__file__).with_name("let_go")
REFERENCE = {name: np.random.default_rng(1).normal(size=5000).tolist() for name in "xyz"}

@task
async def may_end() -> bool:
    return LET_GO.exists()

@flow
async def retrain(drift: Drift) -> dict:
    while not await may_end():
        await sleep(0.3)
    features = [event.data["feature"] for event in current_run().events]
    return {"newest": drift.feature, "all": features}

app = App("drift")
rows = Webhook("/rows", verify="none", max_body=1 << 20)
features = {name: Numeric(warn=0.15, alert=9) for name in "xyz"}
monitor = DriftMonitor(
    rows, features=features, reference=REFERENCE, window=200, per="feature", name="drift"
)
app.on(monitor, retrain, deliver=Singleflight())
"""


def batch(rng: np.random.Generator, number: int) -> list[dict[str, float]]:
    """A window of rows: x swings all the time, y has moved from the 750th on, z from the 850th."""
    means = {
        "x": 0.36 + 0.03 * float(rng.normal()),
        "y": 1.0 * (number >= 750),
        "z": 1.0 * (number >= 850),
    }
    columns = {name: rng.normal(mean, 1.0, 200).round(4).tolist() for name, mean in means.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def send(server: EventflowProcess, number: int, rows: list[dict[str, float]]) -> None:
    """As a sender does who wants it to arrive: again, under the same id, until it is
    acknowledged.
    """

    def acknowledged() -> bool:
        try:
            return server.post(
                "/hooks/rows", rows, **{"webhook-id": f"window-{number}"}
            ).status_code in (200, 202)
        except httpx2.TransportError:
            return False

    wait_until(acknowledged, f"window {number} is recorded")


def runs(server: EventflowProcess, state: str | None = None) -> list[dict[str, Any]]:
    return server.get("/api/runs", flow="retrain", **({"state": state} if state else {}))["runs"]


def test_a_swinging_metric_starts_one_run_and_what_comes_meanwhile_one_more(tmp_path: Path):
    """1,000 samples round the threshold are one detection; drifts found during its run are gathered
    into one successor, which sees the newest; three `kill -9`s in between change nothing.
    """
    (tmp_path / "app.py").write_text(APP)
    rng, over, first = np.random.default_rng(16), 0, 0
    for end in (*KILLED_AT, SAMPLES):
        with serving(tmp_path, file="app.py") as server:  # ended by kill -9
            for number in range(first, end):
                send(server, number, batch(rng, number))
                over += number % 10 == 0 and gauge(server, "x") >= 0.15
            first = end
            if end == SAMPLES:
                assert 20 < over < 80, "the statistic swings round its threshold"
                found = server.get("/api/events", trigger="drift", type="drift.detected")["events"]
                assert len(found) == 3, "one of each feature"
                assert sorted(run["state"] for run in runs(server)) == ["pending", "running"]
                (tmp_path / "let_go").touch()
                wait_until(lambda: len(runs(server, "completed")) == 2, "both trainings end")
                trained = [
                    server.get(f"/api/runs/{run['id']}")["result"] for run in reversed(runs(server))
                ]
                assert trained == [
                    {"newest": "x", "all": ["x"]},
                    {"newest": "z", "all": ["y", "z"]},
                ]


def gauge(server: EventflowProcess, feature: str) -> float:
    """The statistic of the last window, from /metrics."""
    begin, label = "eventflow_trigger_drift_statistic{", f'feature="{feature}"'
    lines = server.client.get("/metrics").text.splitlines()
    (found,) = [line for line in lines if line.startswith(begin) and label in line]
    return float(found.rpartition(" ")[2])
