"""A monitor over a webhook answers like the webhook alone when an id comes with other content."""

from pathlib import Path

import httpx2
import pytest

from eventflow import App, flow
from eventflow.events.event import Event
from eventflow.testing import MemoryTrigger, running
from eventflow.testing.trigger_contract import ContractLedger, listening
from eventflow.web.api import make_asgi
from tests.conftest import eventually
from triggers import DriftMonitor, Webhook
from triggers._drift.counting_intake import Novelty, RecentIds

pytestmark = pytest.mark.anyio

REFERENCE = {"x": [float(n) for n in range(1000)]}


@flow
async def take(event: Event) -> None:
    """Subscribes to drift events only."""


def app(*, record: bool) -> App:
    made = App("drift")
    source = Webhook("/rows", verify="none")
    monitor = DriftMonitor(
        source, features=["x"], reference=REFERENCE, window=500, record=record, name="drift"
    )
    made.on(monitor, take)
    return made


async def post(made: App, body: bytes) -> int:
    """The status of the response, when the monitor listens."""
    transport = httpx2.ASGITransport(make_asgi(made, auth=False, manage=False))
    headers = {"idempotency-key": "one", "content-type": "application/json"}
    status = 503

    async def is_answered() -> bool:
        nonlocal status
        status = (await client.post("/hooks/rows", content=body, headers=headers)).status_code
        return status != 503

    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        await eventually(is_answered, "the monitor listens")
    return status


@pytest.mark.parametrize("record", [False, True])
async def test_a_known_id_with_other_content_is_a_dead_letter(tmp_path: Path, record: bool):
    """Rows under an id that was counted with other rows are answered 409 and kept as one dead
    letter, also after a restart; the same rows again are answered 200, in any order of keys.
    """
    store = tmp_path / "drift.db"
    async with running(app(record=record), store=store) as made:
        assert await post(made, b'{"x": 1.0, "a": 1}') == 202
        assert await post(made, b'{"x": 1.0, "a": 1}') == 200
        assert await post(made, b'{"x": 2.0, "a": 1}') == 409
    async with running(app(record=record), store=store) as made:
        assert await post(made, b'{"a": 1, "x": 1.0}') == 200
        assert await post(made, b'{"x": 2.0, "a": 1}') == 409
        (letter,) = await made.store.dead_letters(limit=10)
        assert "its id is known with other content" in letter["reason"]
        assert b"2.0" in (await made.store.dead_letter(letter["id"]))["body"]


async def test_repetitions_of_a_source_that_may_differ_are_no_conflict():
    """A repeated alert has its current value and is a duplicate."""
    ledger = ContractLedger()
    source = MemoryTrigger("rows")
    source.repeats_may_differ = True  # type: ignore[attr-defined]
    monitor = DriftMonitor(source, features=["x"], reference=REFERENCE, window=500)
    async with listening(monitor, ledger):
        for x in (1.0, 2.0):
            (receipt,) = await source.send(data={"x": x}, id="one")
            assert receipt.duplicate is (x == 2.0) and not receipt.conflict
    assert not ledger.recorded


def test_ids_of_an_earlier_version_are_known():
    """An id that was stored without its content is a duplicate, with any content; it is stored in
    the new form when its part changes.
    """
    event = Event(id="one", source="/rows", type="rows", data={"x": 1})
    other = Event(id="one", source="/rows", type="rows", data={"x": 2})
    ids = RecentIds(1000, {})
    assert ids.add(event) is Novelty.NEW
    stored = ids.changes()
    old = {"drift:i/0": str(stored["drift:k/0"])[:16]}
    before = RecentIds(1000, old)
    assert before.add(event) is Novelty.KNOWN and before.add(other) is Novelty.KNOWN
    assert before.changes() == {}
    assert before.add(Event(id="two", source="/rows", type="rows", data=1)) is Novelty.NEW
    changes = before.changes()
    assert changes["drift:i/0"] is None and len(str(changes["drift:k/0"])) == 48
    again = RecentIds(1000, {"drift:k/0": changes["drift:k/0"]})
    assert again.add(other) is Novelty.KNOWN
    assert RecentIds(1000, stored).add(other) is Novelty.OTHER_CONTENT
