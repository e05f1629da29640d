"""An item that cannot be recorded as it is costs itself alone: it becomes a dead letter with the
reason, and the items beside it are recorded.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest

from eventflow import App, Event, UsageError, emit, flow, task
from eventflow.events.event import Undecodable, format_id
from eventflow.testing import MemoryTrigger, drain, result_of, running
from eventflow.web import actions
from triggers import RunState

pytestmark = pytest.mark.anyio

LONE = "a\ud800b"
"""A lone surrogate: `str` holds it, UTF-8 and so the ledger do not."""


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def event(**attributes: Any) -> Event:
    return Event(**{"id": "bad", "source": "/s", "type": "t", **attributes})


def undecodable(**fields: Any) -> Undecodable:
    return Undecodable(**{"id": "bad", "source": "/s", "body": b"\xff", "error": "e", **fields})


ITEMS: dict[str, Event | Undecodable] = {
    **{
        f"surrogate in {name}": event(**{name: LONE})
        for name in ("id", "source", "type", "subject", "datacontenttype", "dataschema", "data")
    },
    "surrogate in a key": event(data={LONE: 1}),
    "surrogate in an extension": event(extensions={"x": LONE}),
    "surrogate in the name of an extension": event(extensions={LONE: "x"}),
    "integer of 70 bits": event(data={"n": 2**70}),
    "integer of 70 bits in an extension": event(extensions={"x": 2**70}),
    "NaN": event(data={"x": [1, {"y": math.nan}]}),
    "infinity": event(data=[None, -math.inf]),
    "300 levels": event(data=nested(300)),
    "100,000 levels": event(data=nested(100_000)),
    "a set": event(data={1, 2}),
    "keys that are no text": event(data={1: 2}),
    "an id that is no text": event(id=5),
    "no id": event(id=None),
    "a subject that is no text": event(subject=["x"]),
    "extensions that are no mapping": event(extensions=[1]),
    **{
        f"surrogate in the {name} of a dead letter": undecodable(**{name: LONE})
        for name in ("id", "source", "type", "error")
    },
    "surrogate in the headers of a dead letter": undecodable(headers={LONE: LONE}),
    "headers that are no text": undecodable(headers={1: b"x"}),
}


@flow
async def take(event: Event) -> str:
    return event.id


async def _by_a_trigger(app: App, trigger: MemoryTrigger, *items: Any) -> None:
    await trigger.send(*items)


async def _by_the_app(app: App, trigger: MemoryTrigger, *items: Any) -> None:
    await app.accept(*items)


@pytest.mark.parametrize(
    ("what", "way"),
    [(what, _by_a_trigger) for what in ITEMS]
    + [(what, _by_the_app) for what, item in ITEMS.items() if isinstance(item, Event)],
)
async def test_an_item_that_cannot_be_recorded_robs_no_other(what: str, way: Callable[..., Any]):
    """Between two good events, in one call: both run, it is one dead letter, and its repetition is
    a duplicate.
    """
    orders = MemoryTrigger("orders")
    app = App("unstorable")
    app.on(orders, take)
    app.on("t", take, name="emitted")
    async with running(app):
        for _ in range(2):
            await way(app, orders, event(id="before"), ITEMS[what], event(id="after"))
        await drain(app)
        counts = await app.store.counts()
        assert (counts["events"], counts["duplicates"]) == (3, 3)
        assert (counts["completed"], counts["dead"]) == (2, 1)
        (letter,) = [each for each in await app.store.events() if not each["matched"]]
        assert letter["event_id"] in ("bad", "a\\ud800b", "5", "None")


async def test_data_is_kept_when_only_an_attribute_is_unusable():
    """The dead letter has the data, and the attribute in a form that can be read."""
    orders = MemoryTrigger("orders")
    app = App("unstorable")
    app.on(orders, take)
    async with running(app):
        (receipt,) = await orders.send(event(subject=LONE, data={"total": 3}))
        whole = await app.store.event(receipt.ledger_id)
    kept = Event.from_json(whole["body"])
    assert (kept.subject, kept.data) == ("a\\ud800b", {"total": 3})


@pytest.mark.parametrize("data", [{"n": 2**70}, {"x": math.nan}])
async def test_data_that_was_not_recorded_is_not_redriven_as_none(data: Any):
    """The dead letter shows the data. A redrive without data is refused; one with data runs."""
    orders = MemoryTrigger("orders")
    app = App("unstorable")
    app.on(orders, take)
    async with running(app):
        (receipt,) = await orders.send(event(data=data))
        whole = await app.store.event(receipt.ledger_id)
        assert whole["body"] == ascii(data).encode()
        (letter,) = await app.store.dead_letters()
        with pytest.raises(UsageError, match="with data"):
            await actions.redrive(app, format_id(letter["id"]), {}, by="test")
        await actions.redrive(app, format_id(letter["id"]), {"data": {"n": 1}}, by="test")
        await drain(app)
        assert (await app.store.counts())["completed"] == 1


def _raises(_: Event) -> Any:
    raise ValueError(f"no such file: {LONE}")


OPTIONS: dict[str, dict[str, Any]] = {
    "where": {"where": _raises},
    "params": {"params": _raises},
    "key": {"key": _raises},
    "a key with a surrogate": {"key": lambda _: LONE},
}


@pytest.mark.parametrize("option", OPTIONS)
async def test_user_code_that_quotes_a_lone_surrogate(option: str):
    """What a filter, `params=` or `key=` raises or returns is the verdict of its own subscription;
    another one on the same event runs.
    """
    orders = MemoryTrigger("orders")
    app = App("unstorable")
    app.on(orders, take, name="bad", **OPTIONS[option])
    app.on(orders, take, name="good")
    async with running(app):
        await orders.send(event(id="1"))
        await drain(app)
        (one,) = await app.store.events()
        (bad, good) = one["verdicts"]
    assert bad[:2] == ["bad", "invalid"] and "a\\ud800b" in bad[2]
    assert good[:2] == ["good", "run"]


EMITS: dict[str, dict[str, Any]] = {
    "type": {"event_type": LONE},
    "subject": {"subject": LONE},
    "extension": {"note": LONE},
    "number": {"note": 2**70},
    "id": {"id": "7"},
    "source": {"source": "/fake"},
    "time": {"time": "2026-01-01T00:00:00Z"},
}


@task
async def emits_in_a_task(what: str) -> None:
    await emit(**{"event_type": "t", **EMITS[what]})


@flow
async def emits(what: str, by_task: bool) -> str:
    try:
        if by_task:
            await emits_in_a_task(what)
        else:
            await emit(**{"event_type": "t", **EMITS[what]})
    except UsageError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("by_task", [False, True])
@pytest.mark.parametrize("what", EMITS)
async def test_emit_refuses_what_cannot_be_recorded(what: str, by_task: bool):
    """An attribute that could not be recorded, or would replace one of the event's own, is an error
    of the call that gives it, which names it.
    """
    app = App("unstorable")
    app.add(emits)
    async with running(app):
        found = await result_of(app, emits, what=what, by_task=by_task)
    assert found.startswith("emit(")


@flow
async def deep(depth: int) -> list[Any]:
    return nested(depth)


@pytest.mark.parametrize("depth", [250, 251, 252, 253])
async def test_a_result_too_deep_for_its_event_ends_its_run(depth: int):
    """A run whose result can be stored, but not inside an event, completes; its event comes without
    the result.
    """
    app = App("unstorable")
    app.on(RunState(deep, "completed"), take)
    async with running(app):
        assert await result_of(app, deep, depth=depth) == nested(depth)
        await drain(app)
        counts = await app.store.counts()
        assert counts["completed"] == 2
