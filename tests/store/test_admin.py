"""The verbs a person asks for, and what they may look at: cancel and retry are in test_arrows.py,
the rest is here.
"""

import asyncio
import os
import sqlite3
from pathlib import Path

import pytest

from eventflow.core.errors import NotFound, StoreCorrupt, StoreError, UsageError
from eventflow.runs.run import Cancelled, Completed, Failed, State, Suspended, format_id
from eventflow.store.sqlite import SqliteStore
from tests.store.ledger import SECOND, Ledger, ManualClock, Reopen, value

pytestmark = pytest.mark.anyio

DAY = 86_400 * SECOND


# --------------------------------------------------------------------------- dead letters


async def dead_letter(ledger: Ledger, name: str = "bad", body: bytes = b"\xff raw") -> int:
    await ledger.store.record([ledger.arrival(name, body=body, dead=[("s", "cannot decode")])])
    (row, *_) = await ledger.store.dead_letters()
    return row["id"]


async def test_p9_a_dead_letter_keeps_its_bytes_and_its_reason(ledger: Ledger):
    """What cannot be a run is listed with where it came from, why it died, and its bytes."""
    number = await dead_letter(ledger)
    (row,) = await ledger.store.dead_letters()
    assert (row["subscription"], row["reason"], row["event_id"]) == ("s", "cannot decode", "bad")
    assert (await ledger.store.dead_letter(number))["body"] == b"\xff raw"
    with pytest.raises(NotFound):
        await ledger.store.dead_letter(number + 1)


async def test_p9_a_dead_letter_is_redriven_once(ledger: Ledger, reopen: Reopen):
    """Its runs start on its event with the mended body, it leaves the list, dead becomes pending; a
    second time is refused.
    """
    number = await dead_letter(ledger)
    event = (await ledger.store.event("bad"))["id"]
    mended = ledger.arrival("bad", ledger.run(), body=b'{"mended":1}')
    mended.verdicts = b'[["s","run","x"]]'
    receipt = await ledger.store.redrive(number, mended)
    assert (receipt.ledger_id, receipt.event_id, receipt.matched) == (event, "bad", 1)
    counts = await ledger.store.counts()
    assert (counts["accepted"], counts["dead"], counts["pending"], counts["events"]) == (1, 0, 1, 1)
    assert await ledger.store.dead_letters() == []
    assert (await ledger.store.dead_letter(number))["body"] == b"\xff raw"
    with pytest.raises(UsageError, match="redriven already"):
        await ledger.store.redrive(number, ledger.arrival("bad", ledger.run()))
    ledger = reopen()
    (run,) = await ledger.claimed()
    assert (run.event, run.payload) == (event, b'{"mended":1}')
    assert (await ledger.store.event(event))["verdicts"] == [["s", "run", "x"]]


async def test_a_redrive_that_fails_again_is_a_new_dead_letter(ledger: Ledger):
    """The delivery is counted once, in whatever state."""
    number = await dead_letter(ledger)
    await ledger.store.redrive(number, ledger.arrival("bad", dead=[("s", "still not")]))
    (row,) = await ledger.store.dead_letters()
    assert row["id"] != number and row["reason"] == "still not"
    counts = await ledger.store.counts()
    assert (counts["accepted"], counts["dead"]) == (1, 1)


async def test_redrive_of_nothing(ledger: Ledger):
    """An unknown dead letter is NotFound and records nothing."""
    with pytest.raises(NotFound):
        await ledger.store.redrive(7, ledger.arrival("bad", ledger.run()))
    assert (await ledger.store.counts())["runs"] == 0


# --------------------------------------------------------------------------- replay, hold


async def test_replay_adds_runs_to_an_event(ledger: Ledger):
    """New runs, verdicts and deliveries on the event that is there; its identity and body stay the
    first one's.
    """
    first = ledger.arrival("a", ledger.run(), body=b'{"first":1}')
    first.verdicts = b'[["a","filtered","one"]]'
    await ledger.store.record([first])
    again = ledger.arrival("a", ledger.run("g"), body=b"ignored")
    again.verdicts = b'[["b","filtered","two"]]'
    receipt = await ledger.store.replay(first.id, again)
    assert (receipt.ledger_id, receipt.matched) == (first.id, 1)
    event = await ledger.store.event(first.id)
    assert (event["matched"], event["body"], event["verdicts"]) == (
        2,
        b'{"first":1}',
        [["a", "filtered", "one"], ["b", "filtered", "two"]],
    )
    assert {run.payload for run in await ledger.claimed()} == {b'{"first":1}'}
    counts = await ledger.store.counts()
    assert (counts["accepted"], counts["pending"], counts["events"]) == (2, 2, 1)
    with pytest.raises(NotFound):
        await ledger.store.replay(1, again)


async def test_a_pause_is_durable(ledger: Ledger, reopen: Reopen):
    """`hold` is idempotent both ways and survives a restart."""
    for _ in range(2):
        await ledger.store.set_paused("t", True)
    await ledger.store.set_paused("u", True)
    await ledger.store.set_paused("u", False)
    await ledger.store.set_paused("v", False)
    assert await reopen().store.paused_triggers() == {"t"}


# --------------------------------------------------------------------------- retention


async def prune_all(
    ledger: Ledger, *, bodies: int = 30, identities: int = 90, step: int = 500
) -> int:
    total = 0
    now = ledger.clock.now()
    while removed := await ledger.store.prune(
        payloads_before=now - bodies * DAY, identities_before=now - identities * DAY, step=step
    ):
        total += removed
    return total


async def test_retention_forgets_runs_then_bodies_then_identities(ledger: Ledger):
    """After 30 days runs, journals and bodies are gone and the identity still makes duplicates;
    after 90 it is forgotten.
    """
    run = await ledger.running()
    await ledger.append(run, value())
    await ledger.settle(run)
    event = run.event
    assert event is not None and await prune_all(ledger) == 0
    ledger.clock.forward(31 * 86_400)
    assert await prune_all(ledger) == 2
    with pytest.raises(NotFound):
        await ledger.store.run(run.id)
    assert await ledger.store.load(run.id) == []
    row = await ledger.store.event(event)
    assert (row["body"], row["kept"], row["matched"]) == (None, False, 1)
    (receipt,) = await ledger.store.record([ledger.arrival(row["event_id"], ledger.run())])
    assert receipt.duplicate and receipt.matched == 1
    with pytest.raises(UsageError, match="retention"):
        await ledger.store.replay(event, ledger.arrival("x", ledger.run()))
    ledger.clock.forward(60 * 86_400)
    assert await prune_all(ledger) == 1
    (receipt,) = await ledger.store.record([ledger.arrival(row["event_id"], ledger.run())])
    assert not receipt.duplicate
    counts = await ledger.store.counts()
    assert (counts["completed"], counts["pending"], counts["runs"], counts["events"]) == (
        1,
        1,
        2,
        2,
    )


async def test_retention_leaves_what_is_not_done(ledger: Ledger, reopen: Reopen):
    """Live runs, dead runs, open dead letters, children of live parents, and the events under them
    stay, however old.
    """
    waiting = await ledger.running()
    child = ledger.run("child", parent=waiting.id, parent_call_key="c#1")
    await ledger.append(waiting, children=[child])
    (child,) = await ledger.claimed()
    await ledger.settle(child)
    await ledger.settle(waiting, Suspended(None, 10**9))
    dead = await ledger.running()
    for _ in range(3):
        await ledger.mark(dead)
    ledger = reopen()
    await dead_letter(ledger)
    ledger.clock.forward(1000 * 86_400)
    assert await prune_all(ledger) == 0
    assert (await ledger.store.event("bad"))["body"] == b"\xff raw"
    for _ in range(2):  # asked to end, then cancelled at once
        await ledger.store.cancel(waiting.id, "x")
    ledger.clock.forward(31 * 86_400)
    assert await prune_all(ledger) == 4


async def test_retention_goes_in_small_steps(ledger: Ledger):
    """One call removes at most `step` rows."""
    await ledger.recorded(*[ledger.run() for _ in range(25)])
    for run in await ledger.claimed():
        await ledger.settle(run, Failed(b"{}") if run.id % 2 else Cancelled("x"))
    ledger.clock.forward(31 * 86_400)
    before = ledger.clock.now() - 30 * DAY
    steps = [
        await ledger.store.prune(payloads_before=before, identities_before=0, step=10)
        for _ in range(5)
    ]
    assert steps == [10, 10, 6, 0, 0]


async def test_retention_of_a_busy_ledger_reaches_payloads_and_identities(ledger: Ledger):
    """Payloads and identities are removed although each step finds another run that is over."""
    for _ in range(200):
        await ledger.settle(await ledger.running())
        await ledger.store.prune(
            payloads_before=ledger.clock.now(), identities_before=ledger.clock.now(), step=10
        )
        ledger.clock.forward(0.5)
    rows = await ledger.store.events(limit=1000)
    assert len(rows) < 10


# --------------------------------------------------------------------------- backup


async def test_backup_while_writing(ledger: Ledger, tmp_path: Path):
    """The copy is whole and sound, holds all that was acknowledged before it began, and callers are
    served meanwhile.
    """
    first = [ledger.arrival(f"a{n}", ledger.run(), body=b"x" * 4000) for n in range(2000)]
    await ledger.store.record(first)
    target = str(tmp_path / "copy.db")
    later = [ledger.arrival(f"b{n}", ledger.run(), body=b"y" * 4000) for n in range(100)]
    await asyncio.gather(
        ledger.store.backup(target), *[ledger.store.record([arrival]) for arrival in later]
    )
    copy = SqliteStore(target, clock=ledger.clock, ballast=0, free_floor=0)
    copy.open()
    counts = await copy.counts()
    assert await copy.check() == []
    assert 2000 < counts["events"] <= 2100
    copy.close()
    assert os.stat(target).st_mode & 0o777 == 0o600


async def test_row_45_a_restored_backup_dedups_what_comes_again(ledger: Ledger, tmp_path: Path):
    """What a source redelivers after a restore is a duplicate where the backup had it, and recorded
    where it had not.
    """
    await ledger.recorded(ledger.run(), name="before")
    await ledger.store.backup(str(tmp_path / "copy.db"))
    await ledger.recorded(ledger.run(), name="after")
    copy = SqliteStore(tmp_path / "copy.db", clock=ledger.clock, ballast=0, free_floor=0)
    copy.open()
    receipts = await copy.record(
        [ledger.arrival(name, ledger.run()) for name in ("before", "after")]
    )
    assert [receipt.duplicate for receipt in receipts] == [True, False]
    copy.close()


async def test_backup_overwrites_nothing(ledger: Ledger, tmp_path: Path):
    """An existing file is refused and left as it is; a place that cannot be written is an error,
    not a failed store.
    """
    target = tmp_path / "there"
    target.write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        await ledger.store.backup(str(target))
    assert target.read_text() == "mine"
    with pytest.raises(UsageError, match="cannot write the backup"):
        await ledger.store.backup(str(tmp_path / "no" / "such" / "folder"))
    assert ledger.store.failed is None
    assert os.listdir(tmp_path / "..") and not list(tmp_path.glob("*.part"))


# --------------------------------------------------------------------------- looking


async def test_an_event_is_found_by_any_of_its_names(ledger: Ledger):
    """By number, by base 32, by a unique beginning or end of it, by the sender's id; what is not
    there is NotFound.
    """
    arrival = ledger.arrival("order-17", ledger.run())
    await ledger.store.record([arrival])
    shown = format_id(arrival.id)
    for ident in (
        arrival.id,
        str(arrival.id),
        shown,
        shown.upper(),
        shown[:12],
        shown[3:],
        "order-17",
    ):
        assert (await ledger.store.event(ident))["id"] == arrival.id
    for ident in (1, "nothing", "!", "", "9" * 30):
        with pytest.raises(NotFound):
            await ledger.store.event(ident)


async def test_a_run_is_found_by_any_of_its_names(ledger: Ledger):
    """As an event is; letters that several end with are refused with what they match."""
    one, two = await ledger.recorded(ledger.run(), ledger.run())
    for ident in (one.id, str(one.id), format_id(one.id), format_id(one.id)[-4:]):
        assert (await ledger.store.run(ident))["id"] == one.id
    with pytest.raises(UsageError, match=format_id(two.id)):
        await ledger.store.run(format_id(one.id)[:6])
    with pytest.raises(NotFound):
        await ledger.store.run("zzzz")


async def test_lists_are_newest_first_in_pages(ledger: Ledger):
    """`limit` and `after` page through events and runs; each filter narrows."""
    for n in range(6):
        ledger.clock.forward(1)
        await ledger.store.record(
            [
                ledger.arrival(
                    f"e{n}", ledger.run("fg"[n % 2]), trigger="tu"[n % 2], type="xy"[n % 2]
                )
            ]
        )
    first = await ledger.store.events(limit=4)
    rest = await ledger.store.events(limit=4, after=first[-1]["id"])
    assert [row["event_id"] for row in first + rest] == ["e5", "e4", "e3", "e2", "e1", "e0"]
    assert "body" not in first[0]
    now = ledger.clock.now()
    assert [row["event_id"] for row in await ledger.store.events(trigger="u", type="y")] == [
        "e5",
        "e3",
        "e1",
    ]
    assert [
        row["event_id"] for row in await ledger.store.events(since=now - 2 * SECOND, until=now)
    ] == ["e4", "e3"]
    runs = await ledger.store.runs(flow="g", limit=2)
    assert len(runs) == 2 and len(await ledger.store.runs(flow="g", after=runs[-1]["id"])) == 1
    (run, *_) = await ledger.claimed(1)
    await ledger.settle(run, Failed(b"{}"))
    assert [row["id"] for row in await ledger.store.runs(state=State.FAILED)] == [run.id]
    assert len(await ledger.store.runs(state=State.PENDING)) == 5
    assert [row["id"] for row in await ledger.store.runs(event=run.event)] == [run.id]
    assert await ledger.store.runs(event=run.event, state=State.PENDING) == []


async def test_a_damaged_row_is_named_or_left_out(ledger: Ledger):
    """Asked for alone it raises StoreCorrupt with table and id; in a list it is missing; the audit
    finds it.
    """
    run = await ledger.running()
    await ledger.append(run, value())
    await ledger.settle(run, Completed(b"[1,2]"))
    other = await ledger.running()
    connection = ledger.store._connection
    assert connection is not None
    for table, column, where in (
        ("runs", "result", run.id),
        ("events", "body", run.event),
        ("journal", "value", run.id),
    ):
        key = "run" if table == "journal" else "id"
        (good,) = connection.execute(
            f"SELECT {column} FROM {table} WHERE {key} = ?", (where,)
        ).fetchone()
        connection.execute(
            f"UPDATE {table} SET {column} = ? WHERE {key} = ?",
            (bytes([good[0] ^ 1]) + good[1:], where),
        )
        with pytest.raises(StoreCorrupt, match=f"{table} row {format_id(int(where or 0))}"):
            await {
                "runs": ledger.store.run,
                "events": ledger.store.event,
                "journal": ledger.store.load,
            }[table](where)  # type: ignore[arg-type, operator]
        assert any(table in found for found in await ledger.store.check())
        if table == "runs":
            assert [row["id"] for row in await ledger.store.runs()] == [other.id]
        if table == "events":
            assert [row["id"] for row in await ledger.store.events()] == [other.event]
        connection.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = ?", (good, where))


async def test_a_look_gives_up_after_its_budget(ledger: Ledger):
    """A reader that takes too long is interrupted with an error that says what to do; the next
    read works.
    """
    readers = ledger.store._readers
    assert readers is not None
    endless = (
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    )
    with pytest.raises(StoreError, match="took longer"):
        await readers.read(lambda connection: connection.execute(endless).fetchone(), 0.05)
    assert await ledger.store.events() == []


async def test_a_reader_cannot_write(ledger: Ledger):
    """Readers hold read-only connections: one connection writes, there is no second."""
    readers = ledger.store._readers
    assert readers is not None
    with pytest.raises(StoreError, match="readonly"):
        await readers.read(lambda connection: connection.execute("DELETE FROM events"))


async def test_the_audit_sees_what_is_wrong(ledger: Ledger):
    """Each rule of the audit speaks when it is broken: it is no rubber stamp for the other
    tests.
    """
    await ledger.recorded(ledger.run(ordering_key="a"), ledger.run(ordering_key="a"), ledger.run())
    connection = ledger.store._connection
    assert connection is not None
    before = sqlite3.connect(":memory:")
    connection.backup(before)
    for harm, name in (
        ("UPDATE ledger SET accepted = accepted + 1", "accepted"),
        ("UPDATE ledger SET pending = pending + 1, accepted = accepted + 1", "pending"),
        ("UPDATE ledger SET events = 0", "events"),
        ("UPDATE ledger SET runs = 0", "runs"),
        ("UPDATE ledger SET pending_bytes = 0", "pending_bytes"),
        ("UPDATE ledger SET duplicates = 9", "duplicates"),
        ("UPDATE runs SET blocked = 0", "heads"),
        ("UPDATE runs SET flow = 'other'", "checksum"),
        (
            "INSERT INTO journal (run, call_key, attempt, kind, batch, position, at, crc)"
            " VALUES (1, 'a', 1, 0, 1, 1, 1, 1)",
            "no run",
        ),
    ):
        connection.execute("BEGIN")
        connection.execute(harm)
        connection.execute("COMMIT")
        assert any(name in found for found in await ledger.store.check()), harm
        before.backup(connection)
    before.close()


async def test_blob_references(ledger: Ledger, clock: ManualClock):
    """The names of blobs that journals and results hold, for the sweep of the rest."""
    run = await ledger.running()
    entry = value(data=b"ab" * 32)
    entry.codec = "json@blob"
    await ledger.append(run, entry, value("b#1", b"no blob"))
    await ledger.settle(run, Completed(b"cd" * 32, "pickle@blob"))
    assert await ledger.store.blob_references() == {"ab" * 32, "cd" * 32}
