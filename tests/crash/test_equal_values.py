"""Values with sets, killed in the middle of a call that has them, and read by processes of other
hash seeds: no run is held, nothing recorded runs again, nothing is started twice.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import wait_until
from tests.serialization import identities
from tests.server_process import EventflowProcess, start

APP = """
import asyncio
import time
from pathlib import Path
from typing import Any

import pydantic

from eventflow import App, Event, Retry, current_task, flow, task
from tests.serialization.identities import PICKLED, RESULTS, Model, values
from triggers import Webhook

HERE = Path(__file__).parent
VALUES = values()

def note(text):
    with (HERE / "diary.txt").open("a") as diary:
        diary.write(text + "\\n")

async def wait_for_go():
    while not (HERE / "go").exists():
        await asyncio.sleep(0.01)

@task
async def use(value, name: str) -> None:
    note(f"use {name}")

@task(retries=Retry(attempts=2, delay=0))
async def hold(value, name: str) -> str:
    note(f"hold {name} {current_task().attempt}")
    if current_task().attempt == 1:
        raise OSError("the first attempt fails")
    await wait_for_go()
    return name

def maker(number, name):
    value, annotation = RESULTS[name]

    async def make():
        note(f"make {name}")
        return value

    make.__annotations__["return"] = annotation if annotation is not None else Any
    make.__name__ = make.__qualname__ = f"make_{number}"
    return task(codec="pickle")(make) if name == PICKLED else task(make)

MAKERS = {name: maker(number, name) for number, name in enumerate(RESULTS)}

@flow
async def argument(name: str) -> str:
    value = VALUES[name]
    await use(value, name)
    return await hold(value, name)

@flow
async def result(name: str) -> str:
    value = await MAKERS[name]()
    await use(value, name)
    return await hold(value, name)

@flow
async def child(value: Model, more: dict[str, set[str]]) -> int:
    await hold(value, "child")
    return len(value.tags)

@flow
async def parent() -> int:
    words = {f"word-{n}" for n in range(12)}
    return await child(VALUES["model"], {word: words for word in words})

@flow
async def takes(value: Model, more: dict[str, int]) -> str:
    note("takes")
    return "taken"

@task
async def fails(how: str) -> None:
    note(f"fails {how}")
    import only_the_body
    if not (HERE / "go").exists():
        # The loop stands still between the commit of the error and its delivery.
        asyncio.get_running_loop().call_soon(lambda: time.sleep(3600))
    raise only_the_body.KINDS[how]

@flow
async def catches(how: str) -> str:
    try:
        await fails(how)
    except OSError as error:
        caught = f"OSError {error.args}"
    except (LookupError, ExceptionGroup) as error:
        caught = type(error).__mro__[1].__name__ if how == "lookup" else type(error).__name__
    note(f"caught {caught}")
    return caught

@flow
async def hears(event: Event) -> str:
    return event.id

app = App("values")
for each in (argument, result, parent, child, takes, catches):
    app.add(each)
app.on(Webhook("/orders", verify="none", id="id", name="orders"), hears)
"""

ONLY_THE_BODY = """
class Refused(OSError):
    def __init__(self, code, words):
        super().__init__(code, "refused")
        self.words = words

class Missing(LookupError):
    def __reduce__(self):
        return (Missing, ())

KINDS = {
    "os": Refused(7, {f"word-{n}" for n in range(12)}),
    "lookup": Missing("x", object()),
    "group": ExceptionGroup("both", [Missing("a"), ExceptionGroup("deep", [Refused(8, {"x"})])]),
}
"""


def life(folder: Path, seed: int) -> EventflowProcess:
    (folder / "values.py").write_text(APP)
    (folder / "only_the_body.py").write_text(ONLY_THE_BODY)
    options = ("--store", f"sqlite:///{folder}/store.db")
    return start(folder, *options, file="values.py", env={"PYTHONHASHSEED": str(seed)})


@pytest.mark.parametrize("what", ["argument", "result"])
def test_p4_p5_a_call_killed_in_its_second_attempt_is_the_same_call(
    tmp_path: Path, what: str
) -> None:
    """Arguments of every kind, and results of every codec as arguments: killed twice in the second
    attempt of a call, in three processes of three hash seeds, each run completes.
    """
    names = list(identities.values() if what == "argument" else identities.RESULTS)
    server = life(tmp_path, 1)
    try:
        runs = {name: server.start(what, name=name) for name in names}
        _wait_for_second_attempts(server, len(names))
        server.kill()
        server = life(tmp_path, 2)
        _wait_for_second_attempts(server, len(names) + 4)  # suspects run four at a time
        server.kill()
        (tmp_path / "go").touch()
        server = life(tmp_path, 3)
        for name, run in runs.items():
            found = server.wait_for(run, "completed", "failed", "held", "dead")
            assert (found["state"], found["result"]) == ("completed", name), found
            assert _count(server, f"use {name}") == _count(server, f"hold {name} 1") == 1
            assert _count(server, f"make {name}") == (what == "result")
    finally:
        server.kill()


def _wait_for_second_attempts(server: EventflowProcess, count: int) -> None:
    def are_there() -> bool:
        return len([line for line in server.diary if line.endswith(" 2")]) >= count

    wait_until(are_there, f"{count} second attempts have begun")


def _count(server: EventflowProcess, line: str) -> int:
    return server.diary.count(line)


def test_p2_a_child_a_start_and_an_event_are_known_in_another_process(tmp_path: Path) -> None:
    """A child flow in flight with a set in its parameters, a start with an idempotency key, and an
    event: made again with a process of another hash seed, or with keys in another order, they are
    the same.
    """
    tags = [f"tag-{n}" for n in range(8)]
    given = {"value": {"tags": tags, "other-name": ["x", "y"]}, "more": {"a": 1, "b": 2}}
    again = {"more": {"b": 2, "a": 1}, "value": {"other-name": ["x", "y"], "tags": tags}}
    server = life(tmp_path, 1)
    try:
        run = server.start("parent")
        wait_until(lambda: "hold child 2" in server.diary, "the child's body runs")
        first = _start_with_key(server, given)
        assert server.send("e", {"id": "e", "a": 1, "b": {"c": 2, "d": 3}})[0] == 202
        server.kill()
        (tmp_path / "go").touch()
        server = life(tmp_path, 2)
        found = server.wait_for(run, "completed", "failed", "held")
        assert (found["state"], found["result"]) == ("completed", 12), found
        flows = [each["flow"] for each in server.get("/api/runs")["runs"]]
        assert flows.count("child") == 1
        second = _start_with_key(server, again)
        assert (second["id"], second["duplicate"]) == (first["id"], True)
        assert server.send("e", {"b": {"d": 3, "c": 2}, "id": "e", "a": 1})[0] == 200
        server.wait_for(first["id"], "completed")
        assert server.diary.count("takes") == 1
    finally:
        server.kill()


def _start_with_key(server: EventflowProcess, params: dict[str, Any]) -> dict[str, Any]:
    body = {"flow": "takes", "params": params, "idempotency_key": "k"}
    answer = server.post("/api/runs", body)
    assert answer.status_code in (200, 202), answer.text
    return answer.json()


CAUGHT = {"os": "OSError (7, 'refused')", "lookup": "TaskFailed", "group": "ExceptionGroup"}


@pytest.mark.parametrize("how", CAUGHT)
def test_p4_an_error_killed_between_its_record_and_its_delivery(tmp_path: Path, how: str) -> None:
    """An error whose class only the task's body imports is durable, and the flow has not received
    it: in the next process the flow takes the `except` branch of the recorded class.
    """
    server = life(tmp_path, 1)
    try:
        run = server.start("catches", how=how)
        wait_until(lambda: _has_error(tmp_path / "store.db"), "the error is recorded")
        assert not [line for line in server.diary if line.startswith("caught")]
        server.kill()
        server = life(tmp_path, 2)
        found = server.wait_for(run, "completed", "failed", "held")
        expected = {
            "os": "OSError (7, 'refused')",
            "lookup": "TaskFailed",
            "group": "ExceptionGroup",
        }
        assert (found["state"], found["result"]) == ("completed", expected[how]), found
        assert server.diary == [f"fails {how}", f"caught {expected[how]}"]
    finally:
        server.kill()


def _has_error(store: Path) -> bool:
    with closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as ledger:
        return ledger.execute("SELECT count(*) FROM journal WHERE kind = 1").fetchone()[0] > 0
