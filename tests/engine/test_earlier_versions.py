"""Runs that an earlier version recorded go on: its fingerprints and its names of asyncio tasks."""

import asyncio
import itertools
from collections import Counter
from functools import partial
from typing import Any

import msgspec
import orjson
import pydantic
import pytest

from eventflow.loop import flow_loop, scopes
from eventflow.runs.run import NeedsAttention
from eventflow.sdk.flow import flow, sleep
from eventflow.sdk.task import task
from tests.engine.replay_check.simulation import START_TIME, Simulation

RAN: Counter[str] = Counter()


class Order(pydantic.BaseModel):
    tags: set[str]


class Struct(msgspec.Struct):
    tags: set[str]


@task
async def step(name: str, value: Any = None) -> str:
    RAN[name] += 1
    return name


@flow
async def child(value: Order) -> int:
    await step("child")
    await sleep(3600)
    return len(value.tags)


def unsorted_sets(data: bytes, order: tuple[str, ...]) -> bytes:
    """A fingerprint in which the sets are as a process with another hash seed wrote them."""
    text = orjson.dumps(sorted(order)).decode()
    return data.decode().replace(text, orjson.dumps(order).decode()).encode()


@pytest.mark.parametrize("order", [*itertools.permutations("abc")], ids="".join)
def test_p5_fingerprints_with_unsorted_sets_are_those_of_the_same_call(order: tuple[str, ...]):
    """Recorded calls of tasks and of a child flow answer the same calls in a process that sorts
    sets, and nothing runs again.
    """
    RAN.clear()

    @flow
    async def calls() -> list[Any]:
        first = await step("model", Order(tags={"a", "b", "c"}))
        second = await step("struct", [Struct({"a", "b", "c"})])
        return [first, second, await child(Order(tags={"a", "b", "c"}))]

    sim = Simulation()
    row = sim.add(calls)
    sim.run_process(until=START_TIME + 1_000_000)
    recorded = [entry for entry in row.journal if entry.fingerprint]
    assert len(recorded) >= 3
    for entry in recorded:
        entry.fingerprint = unsorted_sets(entry.fingerprint or b"", order)
    sim.run_process()
    assert row.value == ["model", "struct", 3]
    assert RAN == {"model": 1, "struct": 1, "child": 1}


def test_other_members_of_a_set_hold_the_run():
    """A call with another set is a changed call, whatever the order of the recorded one."""
    RAN.clear()
    tags = {"a", "b", "c"}

    @flow
    async def calls() -> str:
        await step("model", Order(tags=tags))
        await sleep(3600)
        return "end"

    sim = Simulation()
    row = sim.add(calls)
    sim.run_process(until=START_TIME + 1_000_000)
    tags.add("d")
    sim.run_process()
    assert isinstance(row.outcome, NeedsAttention) and "step#0" in row.reason


def test_p5_names_of_asyncio_tasks_that_an_earlier_version_gave_are_found(
    monkeypatch: pytest.MonkeyPatch,
):
    """A run whose asyncio tasks were named before sets, models and the order of keys counted
    continues under these names; a task that begins later has one of today's, and both replay.
    """
    RAN.clear()

    async def branch(name: str, value: Any) -> str:
        await step(f"{name} first")
        await sleep(3600)
        return await step(f"{name} second")

    @flow
    async def calls() -> list[str]:
        return list(
            await asyncio.gather(
                branch("dict", {"b": 1, "a": 2}),
                branch("set", {"x", "y"}),
                branch("model", Order(tags={"x"})),
                branch("plain", 1),
            )
        )

    sim = Simulation()
    row = sim.add(calls)
    earlier = partial(scopes.task_label, earlier=True)
    monkeypatch.setattr(flow_loop, "task_label", earlier)
    sim.run_process(until=START_TIME + 1_000_000)
    monkeypatch.undo()
    assert sum(RAN.values()) == 4
    sim.run_process()
    assert row.value == [f"{name} second" for name in ("dict", "set", "model", "plain")]
    assert set(RAN.values()) == {1} and len(RAN) == 8
