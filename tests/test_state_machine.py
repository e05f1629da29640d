"""Any interleaving of events, failures, waits, cancels, retries, restarts and crashes keeps the
promises.

Hypothesis picks what happens to a real App on a real store with a clock that stands still; after
every step the ledger is read past eventflow and held against what was acknowledged, what bodies
ran, and what was recorded before. EVENTFLOW_MACHINE sets how many such stories are told.
"""

import asyncio
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import orjson
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from eventflow import Undecodable
from eventflow.core.errors import UsageError
from eventflow.events.event import Event
from eventflow.runs.journal import RETRY_NOTE, Entry, Kind
from eventflow.runs.run import Completed, Failed, State, Suspended
from eventflow.store.admin import MAX_CRASHES, RETRYABLE
from eventflow.store.protocol import Append, Fenced, MarkStarted, Settle
from eventflow.testing import drain
from eventflow.web import actions
from tests.world import Ledger, StepPlan, World, expected

T = TypeVar("T")

STORIES = int(os.environ.get("EVENTFLOW_MACHINE", "20"))

seconds = st.sampled_from([1, 59, 60, 61, 3600, 100_000])
leaf = st.one_of(
    st.builds(lambda x: ["value", x], st.integers(0, 9)),
    st.builds(
        lambda times, delay: ["flaky", times, delay], st.integers(1, 3), st.sampled_from([0, 1, 90])
    ),
    st.builds(lambda s: ["sleep", s], seconds),
    st.builds(lambda s: ["race", s], seconds),
    st.builds(lambda s: ["timeout", s], seconds),
    st.sampled_from([["gate"], ["gate"], ["boom"], ["emit"]]),
)
steps = st.recursive(
    leaf,
    lambda inner: st.one_of(
        st.builds(
            lambda how, plan: [how, plan],
            st.sampled_from(["child", "retried"]),
            st.lists(inner, min_size=1, max_size=2),
        ),
        st.builds(lambda a, b: ["both", a, b], inner, inner),
    ),
    max_leaves=4,
)
plans = st.lists(steps, min_size=1, max_size=3)
some = st.integers(0, 1000)
moments = st.integers(0, 15)
"""When a crash falls, in steps of a third of a millisecond: from before the first commit to after
the last.
"""


def overdue(ledger: Ledger, now: int) -> list[int]:
    """The runs that wait past their due time."""
    waits = (State.PENDING, State.WAITING)
    return [
        ident
        for ident, row in ledger.runs.items()
        if row["state"] in waits and row["due_at"] <= now
    ]


def undecodable(ident: str) -> Undecodable:
    return Undecodable(id=ident, source="/s", body=b"\xff\x00", error="no JSON")


class Promises(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp(prefix="eventflow-machine-"))
        self.world = self.do(self._world())
        self.sent: dict[str, tuple[str, Any]] = {}  # event id → its expected verdict, its data
        self.acked: dict[str, int] = {}  # event id → ledger id it was acknowledged with
        self.asked: dict[str, int] = {}  # idempotency key → run
        self.places: list[str] = []  # the event id sent with each cursor position
        self.cancelled: set[int] = set()
        self.revived: set[int] = set()  # by a retry since the last look
        self.ended: dict[int, tuple[Any, ...]] = {}
        self.counts: Counter[str] = Counter()
        self.started = 0
        self.begun = 0
        self.paused = False

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def is_soon(self, holds: Callable[[Ledger], bool]) -> bool:
        """Whether it holds at rest. An app that is busy for long on a slow machine, as one with a
        closed gate is, counts as being at rest: it gets more time.
        """
        for _ in range(100):
            if holds(self.world.look()):
                return True
            self.do(self.world.rest())
        return False

    async def _world(self) -> World:
        world = World(self.folder)
        await world.open()
        return world

    # ----------------------------------------------------------------- the way in

    def send(self, item: Event | Undecodable, outcome: str) -> None:
        self.do(self._send(item, outcome))
        self.do(self.world.rest())

    async def _send(self, item: Event | Undecodable, outcome: str) -> None:
        self.sent.setdefault(item.id, (outcome, getattr(item, "data", None)))
        self.places.append(item.id)
        (receipt,) = await self.world.source.send(item, cursor={"place": len(self.places)})
        known = self.acked.setdefault(item.id, receipt.ledger_id)
        assert known == receipt.ledger_id, (
            f"event {item.id} was acknowledged as {known} and as {receipt.ledger_id}"
        )

    def event(self, plan: Any, ok: bool = True) -> Event:
        return Event(id=f"e{len(self.sent)}", source="/s", type="t", data={"ok": ok, "plan": plan})

    @rule(plan=plans)
    def send_event(self, plan: StepPlan) -> None:
        self.send(self.event(plan), "paused" if self.paused else "run")

    @rule(plan=plans)
    def send_filtered(self, plan: StepPlan) -> None:
        self.send(self.event(plan, ok=False), "filtered")

    @rule()
    def send_invalid(self) -> None:
        self.send(self.event("no list"), "invalid")

    @rule()
    def send_undecodable(self) -> None:
        self.send(undecodable(f"e{len(self.sent)}"), "dead")

    @precondition(lambda self: self.sent)
    @rule(which=some, differs=st.booleans())
    def send_again(self, which: int, differs: bool) -> None:
        ident = sorted(self.sent)[which % len(self.sent)]
        outcome, data = self.sent[ident]
        if data is None:
            self.send(undecodable(ident), "?")
            return
        if outcome in ("run", "paused") and ident not in self.world.look().events:
            # A crash took it before it was recorded.
            self.sent[ident] = ("paused" if self.paused else "run", data)
        differs = differs and ident in self.acked
        self.send(
            Event(id=ident, source="/s", type="t", data={"other": True} if differs else data), "?"
        )

    @rule(key=st.sampled_from(["k1", "k2", "k3"]), plan=plans)
    def start(self, key: str, plan: StepPlan) -> None:
        work = self.world.app.flow("work")
        try:
            handle = self.do(self.world.app.start(work, idempotency_key=key, plan=plan))
        except UsageError:
            assert key in self.asked and self.world.look().plan(self.asked[key]) != plan
        else:
            assert self.asked.setdefault(key, handle.number) == handle.number
        self.do(self.world.rest())

    @rule(paused=st.booleans())
    def pause(self, paused: bool) -> None:
        self.do(actions.pause(self.world.app, "src", paused, by="machine"))
        self.paused = paused
        self.do(self.world.rest())

    # ----------------------------------------------------------------- the way through

    @rule(opened=st.booleans())
    def turn_gate(self, opened: bool) -> None:
        if opened:
            self.world.gate.set()
        else:
            self.world.gate.clear()
        self.do(self.world.rest())

    @rule(mended=st.booleans())
    def mend(self, mended: bool) -> None:
        self.world.mended = mended

    @rule(seconds=seconds)
    def advance(self, seconds: float) -> None:
        self.do(self.world.clock.advance(seconds))

    @rule()
    def jump(self) -> None:
        self.do(self.world.clock.jump())

    @rule(which=some)
    def cancel(self, which: int) -> None:
        ledger = self.world.look()
        if not ledger.runs:
            return
        run = list(ledger.runs)[which % len(ledger.runs)]
        before = self.do(self.world.app.store.cancel(run, "no longer wanted"))
        if before.is_live:
            self.cancelled |= ledger.family(run)
        if before in (State.PAUSED, State.HELD):
            assert self.world.look().state(run) is State.CANCELLED
        self.do(self.world.rest())
        live = (State.PENDING, State.WAITING, State.RUNNING)
        assert self.is_soon(lambda ledger: ledger.state(run) not in live)

    @rule(which=some)
    def retry(self, which: int) -> None:
        ledger = self.world.look()
        runs = ledger.in_state(*RETRYABLE) or list(ledger.runs)
        if runs:
            self._retry(ledger, runs[which % len(runs)])
            self.do(self.world.rest())

    def _retry(self, ledger: Ledger, run: int) -> None:
        try:
            self.do(self.world.app.store.retry(run))
        except UsageError:
            assert self.world.look().state(run) not in RETRYABLE
        else:
            assert ledger.state(run) in (*RETRYABLE, State.WAITING)  # its next attempt starts now
            self.revived |= ledger.family(run)

    @rule(which=some, plan=plans)
    def redrive(self, which: int, plan: StepPlan) -> None:
        letters = self.world.look().dead
        if not letters:
            return
        letter = letters[which % len(letters)]
        try:
            self.do(
                actions.redrive(
                    self.world.app,
                    str(letter["id"]),
                    {"data": {"ok": True, "plan": plan}},
                    by="machine",
                )
            )
        except UsageError as error:  # a start whose key another run has is kept to be looked at
            is_start = "no subscription accepts eventflow.run.requested" in str(error)
            assert is_start or letter["redriven_at"] is not None
        else:
            assert letter["redriven_at"] is None
        self.do(self.world.rest())

    # ----------------------------------------------------------------- other lives

    @rule()
    def restart(self) -> None:
        self.do(self.world.restart())
        self.do(self.world.rest())

    @rule(after=st.lists(moments, min_size=1, max_size=4))
    def crash(self, after: list[int]) -> None:
        """One or several in a row, each some time into the life before."""
        for moment in after:
            self.do(self._crash(moment))
        self.do(self.world.rest())

    @rule(plans=st.lists(plans, min_size=1, max_size=3), moment=moments)
    def crash_while_events_come(self, plans: list[StepPlan], moment: int) -> None:
        sends: list[Coroutine[Any, Any, None]] = []
        for plan in plans:
            sends.append(
                self._send(event := self.event(plan), outcome := "paused" if self.paused else "run")
            )
            self.sent[event.id] = (outcome, event.data)
        self.do(self._crash(moment, *sends))
        self.do(self.world.rest())

    @rule(seconds=seconds, moment=moments)
    def crash_while_time_passes(self, seconds: float, moment: int) -> None:
        self.do(self._crash(moment, self.world.clock.advance(seconds)))
        self.do(self.world.rest())

    async def _crash(self, moment: int, *meanwhile: Coroutine[Any, Any, None]) -> None:
        tasks = [asyncio.create_task(each) for each in meanwhile]
        if moment:
            await asyncio.sleep(moment / 3000)
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for each in tasks:
            if not each.cancelled() and (error := each.exception()) is not None:
                raise error
        await self.world.crash()

    @rule(which=some, how=st.sampled_from(["append", "mark", "complete", "fail", "suspend"]))
    def write_with_a_stale_token(self, which: int, how: str) -> None:
        before = self.world.look()
        runs = before.in_state(State.RUNNING) or list(before.runs)
        if not runs:
            return
        run = runs[which % len(runs)]
        token = before.runs[run]["token"] - (before.state(run) is State.RUNNING)
        op = {
            "append": Append(
                run, token, [Entry(call_key="zombie#0", kind=Kind.VALUE, value=b"1", codec="json")]
            ),
            "mark": MarkStarted(run, token),
            "complete": Settle(run, token, Completed(b"0")),
            "fail": Settle(run, token, Failed(b"{}")),
            "suspend": Settle(run, token, Suspended(None, 0)),
        }[how]
        assert isinstance(self.do(self._post(op)), Fenced)
        after = self.world.look()
        assert not [entry for entry in after.journal if entry["call_key"] == "zombie#0"]
        assert tuple(after.runs[run]) == tuple(before.runs[run])

    async def _post(self, op: Any) -> Any:
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        self.world.app.store.post(op, reply.set_result, loop)
        return await reply

    # ----------------------------------------------------------------- the promises

    @invariant()
    def promises_hold(self) -> None:
        if not hasattr(self, "world"):
            return
        ledger = self.world.look()
        assert self.do(self.world.app.store.check()) == []
        assert self.world.wrong == []
        self.acknowledged_is_recorded(ledger)
        self.one_event_one_verdict(ledger)
        self.every_delivery_is_counted(ledger)
        self.values_are_never_computed_again(ledger)
        self.nothing_is_early(ledger)
        self.what_ended_stays_ended(ledger)

    def acknowledged_is_recorded(self, ledger: Ledger) -> None:
        """P1: what was acknowledged is there, in every life; a cursor is never ahead of its
        event.
        """
        for ident, number in self.acked.items():
            assert ledger.events[ident]["id"] == number
        place = ledger.cursors.get("place", 0)
        assert place == 0 or self.places[place - 1] in ledger.events
        arrived = [n for n, ident in enumerate(self.places, 1) if ident in self.acked]
        assert place >= max(arrived, default=0) or place + 1 == len(self.places)

    def one_event_one_verdict(self, ledger: Ledger) -> None:
        """P2, P3: one verdict for each subscription, one run for each (subscription, event)."""
        for ident, (outcome, _) in self.sent.items():
            if ident in ledger.events:
                verdicts = orjson.loads(ledger.events[ident]["verdicts"])
                assert [verdict[1] for verdict in verdicts][:1] == [outcome], (ident, verdicts)
        pairs = Counter(
            (row["subscription"], row["event"])
            for row in ledger.runs.values()
            if row["parent"] is None
        )
        assert not [pair for pair, n in pairs.items() if n > 1]
        children = Counter(
            (row["parent"], row["parent_call_key"]) for row in ledger.runs.values() if row["parent"]
        )
        assert not [pair for pair, n in children.items() if n > 1]

    def every_delivery_is_counted(self, ledger: Ledger) -> None:
        """P9: accepted = completed + failed + dead + cancelled + suppressed + pending; here every
        event is one delivery, and so is every conflicting one, which is kept as a dead letter.
        """
        parts = ("completed", "failed", "dead", "cancelled", "suppressed", "pending")
        assert (
            ledger.totals["accepted"]
            == sum(ledger.totals[name] for name in parts)
            == len(ledger.event_rows)
        )

    def values_are_never_computed_again(self, ledger: Ledger) -> None:
        """P4: no body of a recorded value starts again; a recorded value stays what it is, in every
        life.
        """
        world = self.world
        values = {
            ledger.key(entry): entry["value"]
            for entry in ledger.journal
            if entry["kind"] == Kind.VALUE
        }
        for key, known in world.recorded.items():
            assert values.get(key) == known, (
                f"{key} was recorded as {known!r}, is {values.get(key)!r}"
            )
            assert world.bodies[key] == self.counts[key], f"{key} ran again"
        world.recorded = values
        self.counts = world.bodies.copy()

    def nothing_is_early(self, ledger: Ledger) -> None:
        """P6: no attempt starts before the time that was recorded for it, and no run that waits is
        past its due time.
        """
        due = {
            (ledger.key(e), e["attempt"]): e["due_at"]
            for e in ledger.journal
            if e["kind"] == Kind.FAILED
        }
        for key, attempt, at in self.world.started[self.started :]:
            assert at >= (due.get((key, attempt - 1)) or 0), (
                f"attempt {attempt} of {key} began early"
            )
        self.started = len(self.world.started)
        for run, at in self.world.begun[self.begun :]:
            if run not in self.revived | self.cancelled:
                assert not [
                    entry
                    for entry in ledger.journal
                    if entry["run"] == run
                    and entry["call_key"] == RETRY_NOTE
                    and entry["at"] < at < (entry["due_at"] or 0)
                ], f"an attempt of run {run} began early"
        self.begun = len(self.world.begun)
        now = self.world.clock.now()
        assert self.is_soon(lambda ledger: not overdue(ledger, now)), overdue(ledger, now)

    def what_ended_stays_ended(self, ledger: Ledger) -> None:
        """Terminal states change by retry alone, by hand or of a flow above; nothing diverges,
        nothing is refused; only three crashes quarantine.
        """
        for ident, known in self.ended.items():
            is_completed = known[0] == State.COMPLETED
            if ident not in self.revived and (
                is_completed or not ledger.has_above(ident, "patient")
            ):
                assert self._end(ledger, ident) == known
        self.revived.clear()
        self.ended = {
            ident: self._end(ledger, ident)
            for ident in ledger.runs
            if not ledger.state(ident).is_live
        }
        assert not ledger.in_state(State.HELD)
        assert self.world.crashes >= MAX_CRASHES or not ledger.in_state(State.DEAD)

    def _end(self, ledger: Ledger, run: int) -> tuple[Any, ...]:
        row = ledger.runs[run]
        return (row["state"], row["result"], row["error"], row["token"])

    # ----------------------------------------------------------------- the end of every story

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self._finish()
            self.promises_hold()
        finally:
            self.do(self.world.close())
            self.runner.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _finish(self) -> None:
        """With everything mended every run ends, and what does not complete is explained; retried,
        it completes too.
        """
        self.world.gate.set()
        self.world.mended = True
        self.do(actions.pause(self.world.app, "src", False, by="machine"))
        self.do(drain(self.world.app))
        ledger = self.world.look()
        for run, row in ledger.runs.items():
            assert row["state"] == State.COMPLETED or self._explained(ledger, run), (
                run,
                State(row["state"]),
                row["error"],
            )
        self.promises_hold()
        for run in ledger.in_state(*RETRYABLE):
            if ledger.runs[run]["parent"] is None:
                self._retry(self.world.look(), run)
        self.do(drain(self.world.app))
        ledger = self.world.look()
        for run, row in ledger.runs.items():
            if row["parent"] is None:
                assert row["state"] == State.COMPLETED, (
                    run,
                    State(row["state"]),
                    row["reason"],
                    row["error"],
                )
            if row["state"] == State.COMPLETED:
                assert orjson.loads(row["result"]) == expected(ledger.plan(run))

    def _explained(self, ledger: Ledger, run: int) -> bool:
        """Why a run did not complete: something in it broke, it or a child was cancelled or died,
        nobody asks for it.
        """
        broken = "boom" in orjson.dumps(ledger.plan(run)).decode()
        unlucky = ledger.family(run) & self.cancelled.union(ledger.in_state(State.DEAD))
        parent = ledger.runs[run]["parent"]
        return (
            broken
            or bool(unlucky)
            or (parent is not None and ledger.state(parent) is not State.COMPLETED)
        )


class TestPromises(Promises.TestCase):
    """P1 to P9 under any interleaving of what may happen to an app."""

    settings = settings(
        max_examples=STORIES,
        stateful_step_count=25,
        deadline=None,
        print_blob=True,
        suppress_health_check=[
            HealthCheck.too_slow,
            HealthCheck.data_too_large,
            HealthCheck.filter_too_much,
        ],
        phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
    )
