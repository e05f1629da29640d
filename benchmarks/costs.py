"""What each feature costs on top of a plain run of one task, in CPU time.

    python -m benchmarks costs [--quick] [--rounds N] [filter …]

For each row, one process runs the plain app and the app with the feature in turn, several times,
each with the same number of events, accepted 100 at a time. It prints µs of CPU of all threads per
event (`time.process_time`, from the first event until the last run is settled and the last message
sent) beyond the plain app's: the median of the pairs' differences, and the difference of the two
minima, which other load on the machine disturbs least. The first pair of a process is a warm-up.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import load, ours
from eventflow import App, Batch, Event, OutboxMessage, checkpoint, count, emit, flow, task
from eventflow.logs.capture import configure
from eventflow.server.server import tune_interpreter

COLUMNS = "{:<58} {:>10} {:>10} {:>10}"


class CountingSink:
    """Counts the messages that it is sent."""

    name = "counting"

    def __init__(self) -> None:
        self.sent = 0

    async def send(self, *messages: OutboxMessage) -> None:
        self.sent += len(messages)

    async def close(self) -> None: ...


@flow
async def second(amount: int) -> int:
    return amount


@flow
async def with_emit(amount: int) -> dict[str, int]:
    value = await ours.score(amount)
    await emit("amount.scored", value)
    return value


@task
async def score_with_checkpoint(amount: int) -> dict[str, int]:
    checkpoint().save({"amount": amount}, step=1)
    return {"total": amount * 2}


@flow
async def with_checkpoint(amount: int) -> dict[str, int]:
    return await score_with_checkpoint(amount)


@flow
async def of_events(events: list[Event]) -> dict[str, int]:
    return await ours.score(events[0].data["amount"])


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One row: `declare` makes an app with the feature; an event starts `runs_per_event` runs."""

    what: str
    declare: Callable[[App, Any, CountingSink], None]
    runs_per_event: int = 1
    is_sent: bool = False


def plain(app: App, trigger: Any, _: CountingSink) -> None:
    app.on(trigger, ours.one_task)


def filtered(app: App, trigger: Any, _: CountingSink) -> None:
    app.on(trigger, ours.one_task, where={"currency": ["EUR"]})


def called(app: App, trigger: Any, _: CountingSink) -> None:
    app.on(trigger, ours.one_task, where=lambda event: event.data["currency"] == "EUR")


def keyed(app: App, trigger: Any, _: CountingSink) -> None:
    app.on(trigger, ours.one_task, key="order")


def second_run(app: App, trigger: Any, _: CountingSink) -> None:
    app.on(trigger, ours.one_task)
    app.on(trigger, second)


def second_filtered(app: App, trigger: Any, _: CountingSink) -> None:
    app.on(trigger, ours.one_task)
    app.on(trigger, second, where={"currency": ["USD"]})


def batched(app: App, trigger: Any, _: CountingSink) -> None:
    app.on(trigger, of_events, deliver=Batch(1, within=60))


def counted(app: App, trigger: Any, _: CountingSink) -> None:
    app.on(count(trigger, 1, within=60), of_events)


def emitting(app: App, trigger: Any, _: CountingSink) -> None:
    app.on(trigger, with_emit)


def sending(app: App, trigger: Any, sink: CountingSink) -> None:
    app.on(trigger, with_emit)
    app.send("amount.scored", sink)


def saving(app: App, trigger: Any, _: CountingSink) -> None:
    app.on(trigger, with_checkpoint)


COSTS = {
    "filter": Cost(what="a filter: a pattern over the data", declare=filtered),
    "callable": Cost(what="a filter: a callable", declare=called),
    "key": Cost(what="an ordering key, each event with one of its own", declare=keyed),
    "second": Cost(
        what="a second subscription: a second run, without a task",
        declare=second_run,
        runs_per_event=2,
    ),
    "refused": Cost(
        what="a second subscription whose filter refuses the event", declare=second_filtered
    ),
    "window": Cost(what="a window: Batch of one event", declare=batched),
    "pattern": Cost(what="a pattern: count of one event", declare=counted),
    "emit": Cost(what="an emit, to which no flow subscribes", declare=emitting),
    "sink": Cost(what="an emit and a sink that takes it", declare=sending, is_sent=True),
    "checkpoint": Cost(what="a checkpoint in the task", declare=saving),
}
PLAIN = Cost(what="a plain run of one task", declare=plain)


async def cpu_per_event(cost: Cost, events: int) -> float:
    """Microseconds of CPU of this process per event."""
    with (
        tempfile.TemporaryDirectory() as folder,
        (Path(folder) / "bench.log").open("ab", buffering=1 << 20) as stream,
    ):
        logs = configure(stream=stream, pretty=False, capture=False)
        tune_interpreter()
        trigger = ours.Memory()
        sink = CountingSink()
        app = App("bench", store=f"sqlite:///{Path(folder) / 'bench.db'}")
        cost.declare(app, trigger, sink)
        try:
            async with app:
                opened = ours.Ours(app, await trigger.opened)
                given = load.bodies(events)
                began = time.process_time()
                await submit(opened.accept, given)
                await load.settle(opened.count, events * cost.runs_per_event, 0.01)
                if cost.is_sent:
                    await load.settle(lambda: sent(sink), events, 0.01)
                spent = time.process_time() - began
                counts = await app.store.counts()
                if counts["completed"] != events * cost.runs_per_event:
                    raise RuntimeError(f"{cost.what}: expected only completed runs, found {counts}")
                return spent / events * 1e6
        finally:
            logs.close()


async def sent(sink: CountingSink) -> int:
    return sink.sent


async def submit(accept: Callable[..., Awaitable[Any]], given: Sequence[bytes]) -> None:
    """Sends the events in batches of 100 with four callers: few enough that none waits for room in
    the ledger.
    """
    chunks = iter([given[start : start + 100] for start in range(0, len(given), 100)])

    async def caller() -> None:
        for chunk in chunks:
            await accept(*chunk)

    await asyncio.gather(*(caller() for _ in range(4)))


async def pairs(cost: Cost, rounds: int, events: int) -> list[tuple[float, float]]:
    """µs per event of the plain app and of the app with the feature, in turn."""
    found: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        if number % 2:
            base = await cpu_per_event(PLAIN, events)
            mine = await cpu_per_event(cost, events)
        else:
            mine = await cpu_per_event(cost, events)
            base = await cpu_per_event(PLAIN, events)
        found.append((base, mine))
    return found[1:]


def print_row(name: str, rounds: int, quick: bool) -> bool:
    """Measures and prints one row in a separate process; whether that succeeded."""
    command = [sys.executable, "-m", "benchmarks.costs", "--pairs", name]
    command += ["--rounds", str(rounds), *["--quick"] * quick]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    what = COSTS[name].what
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"{what}: CANNOT RUN: {reason}", flush=True)
        return False
    found: list[tuple[float, float]] = json.loads(done.stdout)
    base = min(one for one, _ in found)
    least = min(one for _, one in found) - base
    middle = median(mine - plain for plain, mine in found)
    print(COLUMNS.format(what, f"{base:.0f}", f"{middle:+.1f}", f"{least:+.1f}"), flush=True)
    return True


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks costs")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(COSTS))
    parser.add_argument("--quick", action="store_true", help="small samples")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", choices=COSTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.pairs:
        events = 500 if options.quick else 4_000
        print(json.dumps(load.run(pairs(COSTS[options.pairs], options.rounds, events))))
        return 0
    if unknown := set(options.rows) - set(COSTS):
        parser.error(f"expected rows among {', '.join(COSTS)}; found {', '.join(unknown)}")
    print(COLUMNS.format("µs of CPU per run", "plain", "median", "minimum"))
    rows = [print_row(name, options.rounds, options.quick) for name in options.rows or COSTS]
    return 0 if all(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
