"""A run that goes on in another process, with another hash seed and fewer imported modules."""

from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.conftest import wait_until
from tests.server_process import EventflowProcess

APP = """
import asyncio
import dataclasses
import datetime as dt
import json
from pathlib import Path

import msgspec
import pydantic

from eventflow import App, flow, task
from eventflow.core.errors import TaskFailed

HERE = Path(__file__).parent

def note(text):
    with (HERE / "diary.txt").open("a") as diary:
        diary.write(text + "\\n")

class Line(pydantic.BaseModel):
    names: frozenset[str]

class Order(pydantic.BaseModel):
    tags: set[str]
    lines: list[Line] = []

class Struct(msgspec.Struct):
    tags: set[str]
    more: dict[str, set[str]]

@dataclasses.dataclass
class Data:
    order: Order
    at: dt.datetime

class Refused(Exception):
    def __init__(self, code, detail):
        super().__init__(f"{code}: {detail}")
        self.code = code

class NoConnection(OSError):
    def __init__(self, *args, **kwargs):
        self.response = kwargs.pop("response", None)
        self.request = kwargs.pop("request", None)
        super().__init__(*args, **kwargs)

def words(n):
    return {f"word-{i}" for i in range(n)}

def order(n):
    return Order(tags=words(n), lines=[Line(names=frozenset(words(n)))])

@task
async def use(value, what: str) -> None:
    note(f"use {what}")

@task
async def pause(name: str) -> None:
    note("pause")
    while not (HERE / "go").exists():
        await asyncio.sleep(0.01)

@task
async def fail(how: str) -> None:
    note(f"fail {how}")
    if how == "json":
        json.loads("{x")
    if how == "open":
        open("/nope/x")
    if how == "own":
        raise Refused(404, "gone")
    if how == "connection":
        raise NoConnection("refused", response=None, request={"url": "https://shop"})
    if how == "pydantic":
        Order(tags=5)
    import only_the_body
    only_the_body.fail(how)

@flow
async def child_of_model(value: Order) -> int:
    return len(value.tags)

@flow
async def child_of_struct(value: Struct) -> int:
    return len(value.tags)

async def branch(tags, order):
    await use([tags], f"branch {len(tags)}")
    return len(tags)

async def caught(how):
    try:
        await fail(how)
    except Refused as error:
        return f"Refused {error.code}"
    except pydantic.ValidationError as error:
        return f"ValidationError {error.error_count()}"
    except NoConnection as error:
        return f"NoConnection {error.request} {error.errno} {error}"
    except OSError as error:
        return f"OSError {error.errno} {error}"
    except json.JSONDecodeError as error:
        return f"JSONDecodeError {error.pos}"
    except ValueError as error:
        return f"ValueError {error}"
    except TaskFailed as error:
        return f"TaskFailed {error.error_type}"

@flow
async def handle(n: int) -> list:
    struct = Struct(words(n), {word: words(n) for word in words(n)})
    await use(order(n), "model")
    await use(struct, "struct")
    await use(Data(order(n), dt.datetime(2026, 1, 1, tzinfo=dt.UTC)), "dataclass")
    await use([{"deep": order(n)}], "list")
    lengths = [await child_of_model(order(n)), await child_of_struct(struct)]
    sizes = {f"{i}": i for i in range(1, 6)}
    branches = [
        branch(frozenset(words(sizes[each])), {word: 1 for word in words(n)})
        for each in set(sizes)
    ]
    lengths += sorted(await asyncio.gather(*branches))
    kinds = ("json", "open", "own", "connection", "pydantic", "sub", "other", "two")
    errors = [await caught(how) for how in kinds]
    await pause("once")
    return [lengths, errors]

app = App("shop")
app.add(handle)
"""

ONLY_THE_BODY = """
class Sub(OSError):
    def __init__(self, code, detail):
        super().__init__(code, detail)
        self.detail = detail

class Other(Exception):
    pass

class Two(ValueError):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")

def fail(how):
    if how == "sub":
        raise Sub(7, "no")
    if how == "other":
        raise Other("x")
    raise Two(1, 2)
"""

ERRORS = [
    "JSONDecodeError 1",
    "OSError 2 [Errno 2] No such file or directory: '/nope/x'",
    "Refused 404",
    "NoConnection {'url': 'https://shop'} None refused",
    "ValidationError 1",
    "OSError 7 [Errno 7] no",
    "TaskFailed only_the_body:Other",
    "ValueError 1 and 2",
]


@pytest.mark.parametrize("n", [3, 12], ids=["literal arguments", "hashed arguments"])
def test_p4_p5_a_run_goes_on_after_kill_9_in_a_process_with_another_hash_seed(
    tmp_path: Path, n: int
):
    """Sets in models, structs, dataclasses, child flows and asyncio tasks, and errors of every
    kind: two kills later, in three processes of three hash seeds, nothing recorded runs again, no
    run is held, and each `except` took the branch that it would have taken without a kill.
    """
    (tmp_path / "shop.py").write_text(APP)
    (tmp_path / "only_the_body.py").write_text(ONLY_THE_BODY)
    run = ""
    found: dict[str, Any] = {}
    for life, target in enumerate(["shop.py", "shop:app", "shop.py"], start=1):
        server = EventflowProcess(tmp_path, target, env={"PYTHONHASHSEED": str(life)})
        try:
            assert server.wait_ready(), server.log_tail
            run = run or server.start("handle", n=n)
            if life == 3:
                (tmp_path / "go").touch()
                found = server.wait_for(run, "completed", "failed", "held")
            else:
                wait_until(partial(_has_paused, server, life), "the flow is at its pause")
        finally:
            server.kill()
    assert found["state"] == "completed", found
    assert found["result"] == [[n, n, 1, 2, 3, 4, 5], ERRORS]
    bodies = server.diary
    assert bodies.count("pause") == 3
    assert all(bodies.count(each) == 1 for each in bodies if each != "pause"), bodies


def _has_paused(server: EventflowProcess, times: int) -> bool:
    return server.diary.count("pause") == times


KEYS = """
from eventflow import App, flow, task
from pathlib import Path

@task
async def charge(tags: set[str]) -> None:
    with Path(__file__).with_name("diary.txt").open("a") as diary:
        diary.write(f"charge {len(tags)}\\n")

@flow
async def order(tags: set[str], names: dict[str, int], total: float = 1) -> int:
    await charge(tags)
    return len(tags)

app = App("keys")
app.add(order)
"""


def test_p5_an_idempotency_key_is_known_after_kill_9_with_another_hash_seed(tmp_path: Path):
    """A known key with equal parameters is the first run, other parameters are a conflict, an empty
    key is refused, in each process that follows a kill -9; the first run is the only one.
    """
    (tmp_path / "keys.py").write_text(KEYS)
    words = [f"word-{n}" for n in range(12)]
    params = {"tags": words, "names": dict.fromkeys(words, 1)}
    again = {"names": dict(reversed(params["names"].items())), "tags": words}
    first = ""
    for life in range(1, 4):
        server = EventflowProcess(tmp_path, "keys.py", env={"PYTHONHASHSEED": str(life)})
        try:
            assert server.wait_ready(), server.log_tail
            answer = _start_order(server, "order-1", params if life % 2 else again)
            first = first or answer.json()["id"]
            assert answer.json() == {"id": first, "flow": "order", "duplicate": life > 1}
            assert answer.status_code == (202 if life == 1 else 200)
            other = _start_order(server, "order-1", {**params, "tags": words[1:]})
            assert (other.status_code, other.json()["error"]) == (409, "refused"), other.text
            for empty in ("", " "):
                refused = _start_order(server, empty, params)
                assert refused.status_code == 409 and "not empty" in refused.text, refused.text
            if life > 1:
                assert server.wait_for(first, "completed")["result"] == len(words)
            assert [run["id"] for run in server.get("/api/runs")["runs"]] == [first]
        finally:
            server.kill()
    assert set(server.diary) == {f"charge {len(words)}"}


def _start_order(server: EventflowProcess, key: str, params: dict[str, Any]) -> httpx2.Response:
    return server.post("/api/runs", {"flow": "order", "params": params, "idempotency_key": key})
