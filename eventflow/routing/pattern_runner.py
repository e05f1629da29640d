"""What the store asks about patterns, in the writer's thread: moves one on, and makes runs of what matches.

The router has a `Weaver` and lends it to the store (store.base.Herald). Nothing here waits or writes: states go out as values
and come back as they were, or as the bytes that `keep` made of them.
"""

from collections.abc import Callable, Iterable, Sequence

import msgspec

from eventflow.core.clock import to_datetime
from eventflow.events.event import Event
from eventflow.routing.pattern_machine import NEVER, PatternItem, PatternState
from eventflow.routing.subscriptions import Subscription
from eventflow.runs.run import Ids, Run
from eventflow.runs.run import State as RunState
from eventflow.store.protocol import Arrival, Fact, Match, Woven

ABSENT_TYPE = "eventflow.absent"
"""The type of the event that stands for what did not come, where a pattern matches with no event of its own."""


REMEMBERED = 4096
"""States that are not read back from their bytes, if these are still what was kept."""


class PatternRunner:
    """The patterns of an app. `tell` makes the arrival of a silence: an event, and the run it starts."""

    def __init__(
        self,
        subscriptions: Iterable[Subscription],
        ids: Ids,
        tell: Callable[[Subscription, Event], Arrival],
    ) -> None:
        self._known = {
            each.name: (each, each.pattern) for each in subscriptions if each.pattern is not None
        }
        self._ids, self._tell = ids, tell
        self._kept: dict[tuple[str, str], tuple[bytes, PatternState]] = {}

    def armed(self) -> Sequence[str]:
        return [name for name, (_, joined) in self._known.items() if joined.machine.is_armed]

    def keep(self, subscription: str, key: str, state: PatternState) -> bytes:
        kept = self._known[subscription][1].machine.encode(state)
        if len(self._kept) >= REMEMBERED:
            del self._kept[next(iter(self._kept))]
        self._kept[subscription, key] = kept, state
        return kept

    def weave(
        self,
        subscription: str,
        key: str,
        state: PatternState | bytes | None,
        now: int,
        fact: Fact | None,
        event: int,
        size: int,
    ) -> Woven | None:
        if subscription not in self._known:
            return None
        owner, joined = self._known[subscription]
        machine, is_anew = joined.machine, False
        kept, last = self._kept.pop(
            (subscription, key), (None, None)
        )  # it is about to change, whatever becomes of the commit
        if isinstance(state, bytes) and state == kept:
            state = last
        elif isinstance(state, bytes):
            try:
                state = machine.decode(state)
            except msgspec.DecodeError:  # an older form of it
                state = None
            if is_anew := state is None or state.print != machine.print:
                state = None
        if state is None:
            state = machine.fresh(now)
        if fact is None:
            step = machine.advance(state, now)
        else:
            item = PatternItem(
                fact.time, now, (event,), size, event if fact.held else 0, fact.depth
            )
            step = machine.advance(state, now, fact.leaf, item)
        is_open = machine.is_open(state)
        return Woven(
            state if is_open else None,
            machine.due(state) if is_open else NEVER,
            [self._match(owner, key, item, now) for item in step.matches if item.events],
            [self._silence(owner, key, item) for item in step.matches if not item.events],
            step.lapsed,
            step.freed,
            is_anew,
        )

    def _match(self, owner: Subscription, key: str, item: PatternItem, now: int) -> Match:
        """With a delivery mode the runs of one key follow one another."""
        gather = owner.batch_policy
        run = Run(
            id=self._ids.next(now), flow=owner.flow.name, created_at=now, due_at=now, event=item.held or item.events[0],
            subscription=owner.name, state=RunState.PAUSED if item.held else RunState.PENDING, priority=owner.priority,
            depth=item.depth, mode="pattern" if gather is None else gather.mode,
            lane=None if gather is None else key or owner.lane,
        )  # fmt: skip
        if gather is not None and gather.size > len(item.events):
            run.due_at += gather.wait
        return Match(run, item.events, item.size, gather)

    def _silence(self, owner: Subscription, key: str, item: PatternItem) -> Arrival:
        due, (_, joined) = to_datetime(item.time), self._known[owner.name]
        data = {
            "pattern": owner.name,
            "due": due.isoformat(),
            "parts": [leaf.label for leaf in joined.leaves],
        }
        ident = f"{owner.name}/{key}/{due.isoformat()}"
        return self._tell(
            owner, Event(id=ident, source="/patterns", type=ABSENT_TYPE, time=due, data=data)
        )
