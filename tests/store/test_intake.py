"""Intake: an event with its verdicts, runs and cursors is recorded once, in one transaction."""

import pytest

from eventflow.core.errors import StoreError
from eventflow.events.event import Receipt
from eventflow.store.protocol import Append, Arrival, Fenced, RecordEvents
from eventflow.store.sqlite import _Limits  # pyright: ignore[reportPrivateUsage]
from tests.store.ledger import Ledger, Reopen, value

pytestmark = pytest.mark.anyio


async def test_p1_a_receipt_means_that_it_is_in_the_file(ledger: Ledger, reopen: Reopen):
    """What `record` returned for is there after the store was closed and opened again."""
    run = ledger.run()
    arrival = ledger.arrival("a", run, body=b'{"x":1}')
    (receipt,) = await ledger.store.record([arrival], trigger="t")
    assert receipt == Receipt(arrival.id, "a", matched=1)
    ledger = reopen()
    event = await ledger.store.event(arrival.id)
    assert (event["event_id"], event["body"], event["matched"]) == ("a", b'{"x":1}', 1)
    assert [row["id"] for row in event["runs"]] == [run.id]


async def test_p2_a_duplicate_starts_nothing_and_is_counted_on_the_first(ledger: Ledger):
    """The second of an identity records no run, no dead letter and no delivery; it returns the
    first one's ledger id.
    """
    first = ledger.arrival("a", ledger.run())
    await ledger.store.record([first])
    ledger.clock.forward(5)
    (receipt,) = await ledger.store.record([ledger.arrival("a", ledger.run(), dead=[("s", "no")])])
    assert receipt == Receipt(first.id, "a", duplicate=True, matched=1)
    event = await ledger.store.event(first.id)
    assert (event["duplicates"], event["last_duplicate_at"], len(event["runs"])) == (
        1,
        ledger.clock.now(),
        1,
    )
    counts = await ledger.store.counts()
    assert (counts["accepted"], counts["duplicates"], counts["events"], counts["runs"]) == (
        1,
        1,
        1,
        1,
    )


async def test_p2_duplicates_inside_one_batch(ledger: Ledger):
    """Of equal identities in one call, the first is recorded and the others are its duplicates."""
    arrivals = [ledger.arrival(name, ledger.run()) for name in ("a", "b", "a", "a")]
    receipts = await ledger.store.record(arrivals)
    assert [receipt.duplicate for receipt in receipts] == [False, False, True, True]
    assert receipts[2].ledger_id == receipts[0].ledger_id
    assert (await ledger.store.event("a"))["duplicates"] == 2


async def test_p2_duplicates_inside_one_commit(ledger: Ledger):
    """Of equal identities in one commit the one posted first is the first, also when it is an event
    that a run emits.
    """
    run = await ledger.running()
    emitted = ledger.arrival("a", ledger.run())
    late = ledger.arrival("a", ledger.run())
    early = ledger.arrival("b", ledger.run())
    too_late = ledger.arrival("b", ledger.run())
    first, appended, second = await ledger.together(
        RecordEvents([early]),
        Append(run.id, run.token, [value()], [emitted, too_late]),
        RecordEvents([late]),
    )
    found = [*first, *appended.receipts, *second]
    assert [receipt.ledger_id for receipt in found] == [early.id, emitted.id, early.id, emitted.id]
    assert [receipt.duplicate for receipt in found] == [False, False, True, True]


async def test_p7_what_a_stale_claim_emits_is_not_recorded(ledger: Ledger):
    """An append that is refused records none of its events, alone or among others in its commit: an
    equal one posted behind it is the first.
    """
    run = await ledger.running()
    stale = Append(run.id, run.token - 1, [value()], [ledger.arrival("a", ledger.run())])
    (refused,) = await ledger.together(stale)
    assert isinstance(refused, Fenced)
    arrival = ledger.arrival("a", ledger.run())
    before, refused, recorded = await ledger.together(
        RecordEvents([ledger.arrival("b")]), stale, RecordEvents([arrival])
    )
    assert isinstance(refused, Fenced) and not before[0].duplicate
    assert recorded == [Receipt(arrival.id, "a", matched=1)]
    assert (await ledger.store.counts())["events"] == 3


async def test_an_entry_recorded_before_keeps_out_what_comes_with_it(ledger: Ledger):
    """An append whose entry is in the journal already records none of its events."""
    run = await ledger.running()
    await ledger.append(run, value())
    reply = await ledger.append(run, value(), arrivals=[ledger.arrival("a", ledger.run())])
    assert isinstance(reply, Fenced)
    assert (await ledger.store.counts())["events"] == 1


async def test_an_arrival_posted_twice_is_refused(ledger: Ledger):
    """The same ledger id twice is no duplicate but an error of the caller; the others of its commit
    are recorded.
    """
    twice = ledger.arrival("a", suppressed=1)
    good, refused = await ledger.together(
        RecordEvents([ledger.arrival("b")]), RecordEvents([twice, twice])
    )
    assert len(good) == 1 and isinstance(refused, StoreError)
    assert (await ledger.store.counts())["events"] == 1


async def test_the_same_identity_with_other_content_is_a_conflict(ledger: Ledger):
    """The first is kept; the second is counted as a conflict, names both digests, and nothing of it
    is recorded.
    """
    first = ledger.arrival("a", ledger.run(), body=b"1")
    second = ledger.arrival("a", ledger.run(), body=b"2")
    await ledger.store.record([first])
    (receipt,) = await ledger.store.record([second])
    assert receipt.conflict and not receipt.duplicate
    assert receipt.digests == (first.digest.hex(), second.digest.hex())
    event = await ledger.store.event("a")
    assert (event["body"], event["conflicts"], event["duplicates"], event["last_duplicate_at"]) == (
        b"1",
        1,
        0,
        None,
    )


async def test_the_same_id_of_another_trigger_is_another_event(ledger: Ledger):
    """Identity is trigger, source and id together."""
    receipts = await ledger.store.record([ledger.arrival("a"), ledger.arrival("a", trigger="u")])
    assert not any(receipt.duplicate for receipt in receipts)


async def test_p2_cursors_commit_with_their_events(ledger: Ledger, reopen: Reopen):
    """Values are upserted by key, None deletes; a record that fails moves no cursor."""
    await ledger.store.record([], trigger="t", cursor={"0": 5, "1": {"deep": [1, None]}, "2": "x"})
    await ledger.store.record([], trigger="t", cursor={"0": 6, "2": None})
    await ledger.store.record([], trigger="u", cursor={"0": "other"})
    with pytest.raises(StoreError):
        await ledger.store.record(
            [ledger.arrival("a", ledger.run(flow=None))],  # type: ignore[arg-type]
            trigger="t",
            cursor={"0": 7},
        )
    ledger = reopen()
    assert await ledger.store.cursor("t") == {"0": 6, "1": {"deep": [1, None]}}
    assert await ledger.store.cursor("u") == {"0": "other"}
    assert await ledger.store.cursor("unknown") == {}


async def test_many_cursors_in_one_call(ledger: Ledger):
    """A trigger may move a cursor for each of thousands of files at once."""
    await ledger.store.record([], trigger="t", cursor={f"file-{n}": n for n in range(5000)})
    await ledger.store.record([], trigger="t", cursor={f"file-{n}": None for n in range(4999)})
    assert await ledger.store.cursor("t") == {"file-4999": 4999}


@pytest.mark.parametrize("size", [1, 2, 3, 100, 257, 1000])
async def test_batches_of_any_size(ledger: Ledger, size: int):
    """Rows go in by groups of a few sizes; none is lost and none is added."""
    arrivals = [ledger.arrival(f"e{n}", ledger.run(), ledger.run("g")) for n in range(size)]
    await ledger.store.record(arrivals)
    counts = await ledger.store.counts()
    assert (counts["events"], counts["runs"], counts["pending"]) == (size, 2 * size, 2 * size)


async def test_p9_the_sum_counts_deliveries(ledger: Ledger):
    """Each subscription's delivery is counted once: pending, dead or suppressed, and accepted is
    their sum.
    """
    await ledger.store.record([
        ledger.arrival("a", ledger.run(), ledger.run()),
        ledger.arrival("b", ledger.run(), dead=[("s", "cannot bind")]),
        ledger.arrival("c", suppressed=1),
    ])  # fmt: skip
    counts = await ledger.store.counts()
    assert {name: n for name, n in counts.items() if n} == {
        "accepted": 5, "pending": 3, "dead": 1, "suppressed": 1, "events": 3, "runs": 3,
    }  # fmt: skip


async def test_p8_the_backlog_is_bounded_by_number_and_bytes(path: str, ledger: Ledger):
    """`capacity` refuses at `max_pending` deliveries and at `max_pending_bytes`, and accepts
    again when runs are settled.
    """
    bounded = ledger.store
    bounded._limits = _Limits(2, 1 << 30)
    assert bounded.capacity() is None
    await ledger.recorded(ledger.run(), ledger.run())
    full = bounded.capacity()
    assert full is not None and "2" in str(full) and full.retry_after > 0 and not full.disk
    bounded._limits = _Limits(1000, 10)
    assert bounded.capacity() is not None
    for run in await ledger.claimed():
        await ledger.settle(run)
    assert bounded.capacity() is None


async def test_strange_text_is_kept_as_it_is(ledger: Ledger):
    """Zero bytes, quotes, emoji and line separators in names come back equal."""
    name = "a\x00b'\"\u2028é😀\n"
    run = ledger.run(name, ordering_key=name)
    await ledger.store.record(
        [ledger.arrival(name, run, trigger=name, type=name)], trigger=name, cursor={name: name}
    )
    (claimed,) = await ledger.claimed()
    assert (claimed.flow, claimed.ordering_key) == (name, name)
    assert (await ledger.store.event(name))["type"] == name
    assert await ledger.store.cursor(name) == {name: name}


async def test_what_cannot_be_stored_fails_alone(ledger: Ledger):
    """A call with content SQLite refuses gets a StoreError; the calls that shared its transaction
    are recorded.
    """
    bad = ledger.arrival("bad", ledger.run())
    bad.body = object()  # type: ignore[assignment]
    good: list[Arrival] = [
        ledger.arrival("good", ledger.run()),
        ledger.arrival("also", ledger.run()),
    ]
    first, failed, last = await ledger.together(
        RecordEvents([good[0]]), RecordEvents([bad]), RecordEvents([good[1]])
    )
    assert isinstance(failed, StoreError) and ledger.store.failed is None
    assert (first[0].ledger_id, last[0].ledger_id) == (good[0].id, good[1].id)
    assert (await ledger.store.counts())["events"] == 2
