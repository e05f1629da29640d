"""busy: how long a webhook's sender waits for its 202 while the flows' thread computes without a
pause, in plain Python.

Only one thread at a time runs Python, so the way in and the writer must take the interpreter back
from a flow that has no reason to give it up: for the request, for each statement of the commit, for
the answer.
"""

import asyncio
import http.client
import json
import tempfile
import time
from pathlib import Path
from statistics import quantiles

from benchmarks.measure import Figure, alone
from benchmarks.w1h import serving

FIGURES = (
    Figure(
        key="p50",
        what="webhook to its 202 while flows compute, p50",
        unit="ms",
        floor=25,
        goal=10,
        combine=alone,
        lower_is_better=True,
    ),
    Figure(
        key="p99",
        what="the same, p99",
        unit="ms",
        floor=60,
        goal=20,
        combine=alone,
        lower_is_better=True,
    ),
)

APP = """
import time
from eventflow import App
from eventflow import flow
from triggers import Webhook

app = App("bench")

@flow
async def crunch(ms: int) -> int:
    end, total = time.thread_time() + ms / 1000, 0
    while time.thread_time() < end:
        total += sum(range(100))
    return total

@flow
async def note(n: int) -> int:
    return n

app.on(Webhook("/crunch", verify="none"), crunch)
app.on(Webhook("/note", verify="none"), note)
"""
CRUNCH = 100
"""Milliseconds of computing in one run, without an `await`."""


async def eventflow(quick: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return await asyncio.to_thread(answer_times, Path(folder), 100 if quick else 400)


def answer_times(folder: Path, asked: int) -> dict[str, float]:
    with serving(folder, APP) as url:
        line = http.client.HTTPConnection(url.removeprefix("http://"))
        for _ in range(asked):  # more than can be done while the others are asked
            post(line, "/hooks/crunch", {"ms": CRUNCH})
        spans = quantiles((timed(line, n) for n in range(asked)), n=100)
        return {"p50": spans[49], "p99": spans[98]}


def timed(line: http.client.HTTPConnection, n: int) -> float:
    """Milliseconds to the answer."""
    began = time.perf_counter()
    post(line, "/hooks/note", {"n": n})
    return (time.perf_counter() - began) * 1e3


def post(line: http.client.HTTPConnection, path: str, body: dict[str, int]) -> None:
    line.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    answer = line.getresponse()
    answer.read()
    if answer.status != 202:
        raise RuntimeError(f"expected 202, found {answer.status}")


SIDES = {"eventflow": eventflow}
