"""W1h: W1 through real HTTP webhooks, beside the sum of a bare uvicorn's time and the limit loop's
time for one event.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import echo, limit, load
from benchmarks.measure import Figure

# `gated_floor`: its gate is 0.14, the ratio at commit 30f7f6b; that of the floor is not reached.
FIGURES = (
    Figure(
        key="http",
        what="runs/s through webhooks",
        unit="/s",
        floor=0.35,
        goal=0.50,
        gated_floor=0.20,
    ),
)

APP = """
from benchmarks.ours import one_task
from eventflow import App
from triggers import Webhook

app = App("bench")
orders = Webhook("/orders", verify="none")
app.on(orders, one_task, params=lambda event: {"amount": event.data["data"]["amount"]})
"""


async def eventflow(quick: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return {
            "http": await asyncio.to_thread(
                serve_and_load, Path(folder), 2_000 if quick else 20_000
            )
        }


@contextmanager
def serving(folder: Path, app: str) -> Iterator[str]:
    """`eventflow serve` on this app's text, with `bench.db` in the folder; yields its URL, and
    kills it.
    """
    (folder / "app.py").write_text(app)
    store = f"sqlite:///{folder / 'bench.db'}"
    eventflow = str(Path(sys.executable).with_name("eventflow"))
    call = [eventflow, "serve", str(folder / "app.py"), "--store", store, "--port", "0"]
    with (
        (folder / "log").open("wb") as stderr,
        subprocess.Popen(call, stdout=subprocess.PIPE, stderr=stderr) as server,
    ):
        try:
            assert server.stdout is not None
            yield json.loads(server.stdout.readline())["url"]
        finally:
            server.kill()


def serve_and_load(folder: Path, events: int) -> float:
    """Runs/s from the first request to the last run settled, with the server, the load and this
    count in three processes.
    """
    with serving(folder, APP) as url:
        began = time.perf_counter()
        echo.load_from_outside(int(url.rpartition(":")[2]), "/hooks/orders", events)
        wait_until_settled(url, (folder / "bench.db.token").read_text().strip(), events)
        return events / (time.perf_counter() - began)


def wait_until_settled(url: str, token: str, events: int) -> None:
    """Asks the server for its counts until every delivery is completed."""
    asked = urllib.request.Request(
        f"{url}/api/counts", headers={"Authorization": f"Bearer {token}"}
    )
    deadline = time.perf_counter() + 120
    while (counts := json.load(urllib.request.urlopen(asked, timeout=10)))["completed"] < events:
        if time.perf_counter() > deadline:
            raise TimeoutError(f"expected {events} completed runs within 120 s, found {counts}")
        time.sleep(0.01)


async def bare(quick: bool) -> dict[str, float]:
    answers = await asyncio.to_thread(echo.rate, 10_000 if quick else 40_000)
    runs = await limit.throughput("single", 10_000 if quick else 30_000)
    return {"http": 1 / (1 / answers + 1 / runs)}


SIDES = {"eventflow": eventflow, "limit": bare}

if __name__ == "__main__":
    print(load.run(bare(quick=False)))
