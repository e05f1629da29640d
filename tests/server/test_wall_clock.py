"""A server whose wall clock jumps, between two processes and within one: nothing ends early, new
work is on time, and nothing that is still needed is removed.
"""

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests import wall_clock
from tests.conftest import wait_until
from tests.server_process import EventflowProcess, serving

APP = """
import asyncio, os, time
from datetime import timedelta
from pathlib import Path

from eventflow import App, Debounce, Event, Retry, emit, flow, sleep, task
from triggers import Every, Webhook

HERE = Path(__file__).parent

@task
async def note(text: str) -> None:
    with (HERE / "diary.txt").open("a") as diary:
        diary.write(f"{text} {time.monotonic()}\\n")

@task
async def rest(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "rested"

@flow
async def quick(n: int) -> int:
    await note(f"quick-{n}")
    return n

@flow
async def naps(seconds: float) -> str:
    await sleep(seconds)
    return "napped"

@flow
async def naps_later(seconds: float) -> str:
    await rest(0)
    await sleep(seconds)
    return "napped"

@flow
async def has_child(seconds: float) -> str:
    return await naps(seconds)

def with_timeouts(seconds: int) -> list:
    # A flow for each kind of timeout.
    bounded = task(name=f"bounded_{seconds}", timeout=seconds)(rest.fn)

    async def in_block(rests: float) -> str:
        await rest(0)
        async with asyncio.timeout(seconds):
            return await rest(rests)

    async def limited(rests: float) -> str:
        return await rest(rests)

    async def has_bounded(rests: float) -> str:
        return await bounded(rests)

    return [
        flow(name=f"in_block_{seconds}")(in_block),
        flow(name=f"limited_{seconds}", timeout=seconds)(limited),
        flow(name=f"in_memory_{seconds}", timeout=seconds, timeout_counts="running")(limited),
        flow(name=f"has_bounded_{seconds}")(has_bounded),
    ]

async def fail_once(key: str) -> str:
    path = HERE / f"failed-{key}"
    if not path.exists():
        path.touch()
        raise ValueError("the first attempt")
    return "retried"

soon = task(name="soon", retries=Retry(attempts=2, delay=1.5, jitter=False))(fail_once)
late = task(name="late", retries=Retry(attempts=2, delay=90, jitter=False))(fail_once)

@flow
async def retries(key: str, seconds: float) -> str:
    return await (soon if seconds < 2 else late)(key)

@flow(retries=Retry(attempts=2, delay=1.5, jitter=False))
async def tried_again(key: str) -> str:
    return await fail_once(key)

@flow(concurrency=1)
async def one_at_a_time(n: int) -> int:
    await rest(0)
    return n

@flow
async def gathers(events: list[Event]) -> int:
    return len(events)

@flow
async def makes() -> None:
    await emit("thing.made", {})

@flow
async def tick(event: Event) -> None:
    pass

class Outside:
    name = "outside"

    async def send(self, *messages) -> None:
        if not os.environ.get("SINK"):
            raise OSError("the sink is down")
        with (HERE / "sent.txt").open("a") as sent:
            sent.writelines(f"{message.event.id}\\n" for message in messages)

    async def close(self) -> None:
        pass

app = App("clocks", retention=timedelta(days=float(os.environ.get("KEEP_DAYS", 30))))
app.on(Webhook("/quick", verify="none", id="id"), quick)
app.on(Webhook("/gathers", verify="none", id="id"), gathers, deliver=Debounce(40, max_wait=100))
app.on(Webhook("/soon", verify="none", id="id"), gathers, deliver=Debounce(1.5, max_wait=10))
app.on(Webhook("/queue", verify="none", id="id"), one_at_a_time)
app.on(Every(seconds=1, name="tick"), tick)
app.send("thing.made", Outside())
flows = (naps, naps_later, has_child, retries, tried_again, makes)
for each in (*flows, *with_timeouts(3), *with_timeouts(600)):
    app.add(each)
"""

YEARS = 3 * 365 * 86_400.0


class ServerSequence:
    """The servers of one folder, one after another, each with another hash seed. `ids`: those of
    the runs, in the order of their starts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "clocks.py").write_text(APP)
        self.ids: list[str] = []
        self._sent = 0
        self._served = 0
        self._works = 0

    def serve(self, **env: str):
        self._served += 1
        return serving(
            self.folder,
            *("--log", "json", "--grace", "1"),
            file="clocks.py",
            env={"PYTHONHASHSEED": str(self._served), **env},
        )

    def start(self, server: EventflowProcess, flow: str, **params: Any) -> str:
        self.ids.append(server.start(flow, **params))
        return self.ids[-1]

    def post(self, server: EventflowProcess, path: str) -> str:
        """One event at a webhook; returns the id of its run."""
        self._sent += 1
        ident = f"{path}-{self._sent}"
        status, answer, _ = server.send(ident, {"id": ident, "n": self._sent}, path)
        assert status == 202, answer
        (run,) = server.get(f"/api/events/{answer['id']}")["runs"]
        self.ids.append(run["id"])
        return run["id"]

    def check_new_work(
        self, server: EventflowProcess, jump: Callable[[], object] | None = None
    ) -> None:
        """New work of each kind: no wait ends early, none is held, and ids increase. `jump` sets
        the clock while all of it is under way.
        """
        began = time.monotonic()
        self._works += 1
        waits: dict[str, object] = {
            self.start(server, "naps", seconds=1.5): "napped",
            self.start(server, "naps_later", seconds=1.5): "napped",
            self.start(server, "has_child", seconds=1.5): "napped",
            self.start(server, "retries", key=f"{self._works}", seconds=1.5): "retried",
            self.start(server, "tried_again", key=f"flow-{self._works}"): "retried",
            self.post(server, "soon"): 1,
        }
        limits = ("in_block", "limited", "in_memory", "has_bounded")
        waits |= {self.start(server, f"{each}_600", rests=1.5): "rested" for each in limits}
        too_long = [self.start(server, f"{each}_3", rests=3000.0) for each in limits]
        if jump is not None:
            jump()
        quick = [self.post(server, path) for path in ("quick", "queue") for _ in range(5)]
        for run in quick:
            assert server.wait_for(run, "completed", "failed")["state"] == "completed"
        for run in waits:
            assert server.get(f"/api/runs/{run}")["state"] in UNDER_WAY or time.monotonic() > (
                began + 1.5
            ), run
        for run, result in waits.items():
            found = server.wait_for(run, "completed", "failed")
            assert found["result"] == result, found
        for run in too_long:
            assert server.get(f"/api/runs/{run}")["state"] in UNDER_WAY or time.monotonic() > (
                began + 3
            ), run
        for run in too_long:
            found = server.wait_for(run, "completed", "failed")
            assert "Time" in found["error"]["type"], found
        assert server.client.get("/readyz").status_code == 200
        assert self.ids == sorted(set(self.ids))

    def tick(self, server: EventflowProcess) -> tuple[str | None, list[dict[str, Any]]]:
        """The condition of the schedule, and what it fired, newest first."""
        (condition,) = (
            trigger["condition"]
            for trigger in server.get("/api/triggers")["triggers"]
            if trigger["name"] == "tick"
        )
        return condition, server.get("/api/events?trigger=tick&limit=1000")["events"]


UNDER_WAY = ("pending", "running", "waiting")


def states(server: EventflowProcess, runs: Mapping[str, str]) -> dict[str, str]:
    return {name: server.get(f"/api/runs/{run}")["state"] for name, run in runs.items()}


@wall_clock.needs_faketime
@pytest.mark.parametrize("end", ["stopped", "killed"])
@pytest.mark.parametrize("jump", ["-1h", "+1y"])
def test_a_restart_under_another_clock(tmp_path: Path, jump: str, end: str) -> None:
    """A server is stopped or killed, started with its clock set back or forward, and again with the
    right one. What waits ends when the wall clock says so, and not before; new work of each kind
    takes its time; ids increase; retention removes what is old, and nothing that is still needed.
    """
    servers = ServerSequence(tmp_path)
    with servers.serve(**wall_clock.starting_at("+0")) as server:
        done = [servers.post(server, "quick") for _ in range(3)]
        short = {
            "sleeps long": servers.start(server, "naps", seconds=90.0),
            "sleeps short": servers.start(server, "naps_later", seconds=50.0),
            "waits for its child": servers.start(server, "has_child", seconds=80.0),
            "waits for an attempt": servers.start(server, "retries", key="late", seconds=90.0),
            "gathers": servers.post(server, "gathers"),
        }
        alive = {"sleeps for years": servers.start(server, "naps", seconds=YEARS)}
        assert server.send("bad", {"id": "bad", "n": "no number"}, "quick")[0] == 202
        server.wait_for(servers.start(server, "makes"), "completed")
        for run in done:
            server.wait_for(run, "completed")
        wait_until(lambda: "waiting" in states(server, alive).values(), "it has left memory")
        wait_until((tmp_path / "failed-late").exists, "the first attempt has failed")
        servers.check_new_work(server)
        wait_until(lambda: servers.tick(server)[1], "the schedule fires")
        _, fired = servers.tick(server)
        if end == "stopped":
            assert server.stop() == 0
        server.kill()
    with servers.serve(**wall_clock.starting_at(jump)) as server:
        servers.check_new_work(server)
        if jump == "+1y":
            fresh = servers.tick(server)[1][: -len(fired)]
            skips = [
                server.get(f"/api/events/{each['id']}")["event"].get("skipped", 0) for each in fresh
            ]
            assert [n > 30_000_000 for n in skips].count(True) == 1, "one event for the year"
            for run in short.values():
                assert server.wait_for(run, "completed", "failed")["state"] == "completed"
            wait_until(
                lambda: all(
                    server.client.get(f"/api/runs/{run}").status_code == 404 for run in done
                ),
                "retention has removed what ended a year ago",
                within=40,
            )
        else:
            assert set(states(server, short).values()) <= set(UNDER_WAY)
            condition, all_fired = servers.tick(server)
            assert condition and "the clock is behind" in condition
            assert len(all_fired) - len(fired) <= 2  # fired before its end
        assert states(server, alive) == {"sleeps for years": "waiting"}
        (letter,) = server.get("/api/dead-letters")["dead_letters"]
        assert "no number" in str(server.get(f"/api/dead-letters/{letter['id']}"))
        assert not (tmp_path / "sent.txt").exists()
        server.kill()
    with servers.serve(**wall_clock.starting_at("+0"), SINK="works") as server:
        servers.check_new_work(server)
        wait_until((tmp_path / "sent.txt").exists, "the message is sent")
        assert states(server, alive) == {"sleeps for years": "waiting"}
        run = servers.start(server, "naps_later", seconds=100.0)
        due = datetime.fromisoformat(server.wait_for(run, "waiting")["due_at"])
        assert abs(due - datetime.now(UTC) - timedelta(seconds=100)) < timedelta(seconds=30)
        assert server.get("/api/counts")["conflicts"] == 0
        assert server.stop() == 0


@wall_clock.needs_faketime
@pytest.mark.timeout(300)  # a wait that is held lasts for an hour
@pytest.mark.parametrize("jump", ["-1h", "+1y"])
def test_a_clock_that_is_set_under_a_server(tmp_path: Path, jump: str) -> None:
    """The clock is set while work of each kind is under way, and set right again: waits last as
    long as they were asked to, the server stays ready, and a run that has left memory is due by the
    wall clock.
    """
    servers = ServerSequence(tmp_path)
    clock = tmp_path / "clock"
    clock.write_text("+0")
    with servers.serve(KEEP_DAYS="3650", **wall_clock.offset_from(clock)) as server:
        asleep = {"sleeps long": servers.start(server, "naps", seconds=900.0)}
        wait_until(lambda: "waiting" in states(server, asleep).values(), "it has left memory")
        servers.check_new_work(server, lambda: clock.write_text(jump))
        servers.check_new_work(server)
        if jump == "+1y":
            wait_until(
                lambda: "completed" in states(server, asleep).values(), "it is due", within=40
            )
        servers.check_new_work(server, lambda: clock.write_text("+0"))
        if jump == "-1h":
            assert states(server, asleep) == {"sleeps long": "waiting"}
        assert '"server.failed"' not in server.log
        assert server.stop() == 0
