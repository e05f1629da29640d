"""Debian's Prometheus and Alertmanager, a rule on a metric of the example, and one retraining:
acceptance on the real thing.
"""

import json
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.conftest import wait_until
from tests.server_process import EventflowProcess, start

ROOT = Path(__file__).parent.parent.parent
NEEDED = ("prometheus", "prometheus-alertmanager")
TIMEOUT_SECONDS = 60.0

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, NEEDED)),
    reason=f"{' and '.join(NEEDED)} are not installed (apt-get install {' '.join(NEEDED)})",
)

RULES = """
groups:
  - name: drift
    rules:
      - alert: FeatureDrift
        expr: eventflow_trigger_drift_statistic{metric="psi"} > 0.2
        for: 1s
        labels: {model: prices, severity: critical}
        annotations:
          value: "{{ $value }}"
          threshold: "0.2"
          summary: "{{ $labels.feature }} has drifted"
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def daemon(folder: Path, *command: str) -> Iterator[None]:
    with (folder / f"{command[0]}.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def alertmanager(folder: Path, hook: str) -> Iterator[int]:
    """Groups at once, and repeats as often as it can."""
    port = free_port()
    (folder / "alertmanager.yml").write_text(
        json.dumps(
            {
                "route": {
                    "receiver": "retrain",
                    "group_by": ["alertname"],
                    "group_wait": "0s",
                    "group_interval": "1s",
                    "repeat_interval": "1s",
                },
                "receivers": [
                    {
                        "name": "retrain",
                        "webhook_configs": [
                            {
                                "url": hook,
                                "send_resolved": True,
                                "http_config": {"authorization": {"credentials": "secret"}},
                            }
                        ],
                    }
                ],
            }
        ),
    )
    with daemon(
        folder,
        "prometheus-alertmanager",
        "--config.file=alertmanager.yml",
        f"--storage.path={folder}/alerts",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ):
        yield port


@contextmanager
def prometheus(folder: Path, target: str, alerts: int) -> Iterator[int]:
    port = free_port()
    (folder / "rules.yml").write_text(RULES)
    (folder / "prometheus.yml").write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": ["rules.yml"],
                "alerting": {
                    "alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alerts}"]}]}]
                },
                "scrape_configs": [
                    {"job_name": "eventflow", "static_configs": [{"targets": [target]}]}
                ],
            }
        )
    )
    with daemon(
        folder,
        "prometheus",
        "--config.file=prometheus.yml",
        f"--storage.tsdb.path={folder}/tsdb",
        f"--web.listen-address=127.0.0.1:{port}",
    ):
        yield port


def events(server: EventflowProcess) -> list[dict[str, Any]]:
    """What the alerts' endpoint recorded, the oldest first."""
    return [
        each
        for each in reversed(server.get("/api/events", limit=200)["events"])
        if each["trigger"] == "drift-alerts"
    ]


def runs(server: EventflowProcess, flow: str) -> list[dict[str, Any]]:
    return server.get("/api/runs", flow=flow)["runs"]


@pytest.mark.timeout(300)
def test_an_alert_that_fires_repeats_and_resolves_retrains_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A real rule on the example's drifting metric fires, is repeated by Alertmanager and resolves:
    one retraining run.
    """
    monkeypatch.setenv("DRIFT_TOKEN", "secret")
    shutil.copy(ROOT / "examples" / "drift_alerts.py", tmp_path)
    draw = random.Random(1)
    server = start(tmp_path, "--open-metrics", file="drift_alerts.py")

    def score(count: int, mean: float) -> None:
        for _ in range(count):
            answer = server.client.post("/hooks/scores", json={"amount": draw.gauss(mean, 2)})
            assert answer.status_code == 202

    try:
        target = server.url.removeprefix("http://")
        with (
            alertmanager(tmp_path, f"{server.url}/hooks/alerts") as alerts,
            prometheus(tmp_path, target, alerts) as port,
        ):
            api = f"http://127.0.0.1:{port}"
            score(400 + 200, 10.0)
            wait_until(lambda: ready(api), "Prometheus has the metric", within=TIMEOUT_SECONDS)
            assert events(server) == []
            score(200, 12.0)
            wait_until(lambda: events(server), "the alert has come", within=TIMEOUT_SECONDS)
            wait_until(
                lambda: events(server)[0]["duplicates"] >= 2,
                "Alertmanager has repeated it",
                within=TIMEOUT_SECONDS,
            )
            score(200, 10.0)
            wait_until(
                lambda: len(events(server)) == 2, "the alert has resolved", within=TIMEOUT_SECONDS
            )
        detected, resolved = events(server)
        assert (detected["type"], resolved["type"]) == ("drift.detected", "drift.resolved")
        (run,) = runs(server, "retrain")
        assert server.wait_for(run["id"], "completed")["state"] == "completed"
        reported = server.get(f"/api/events/{detected['id']}")["event"]["data"]
        assert (
            reported["model"],
            reported["feature"],
            reported["metric"],
            reported["severity"],
        ) == (
            "prices",
            "amount",
            "psi",
            "critical",
        )
        assert reported["statistic"] > reported["threshold"] == 0.2
    finally:
        server.kill()


def ready(api: str) -> bool:
    try:
        found = httpx2.get(
            f"{api}/api/v1/query", params={"query": "eventflow_trigger_drift_statistic"}
        ).json()
    except httpx2.HTTPError:
        return False
    return bool(found["data"]["result"])
