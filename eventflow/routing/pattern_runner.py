"""Advances patterns for the store and makes runs of their matches.

`Router.patterns` is the `PatternRunner` of an app. The store calls it (`PatternAdvancer` in
store/protocol.py) on the writer thread, inside its transaction. Nothing here waits or writes:
states are returned as values; the store gives them back as they were, or as the bytes of
`encode_state`.
"""

from collections.abc import Callable, Iterable, Sequence

import msgspec

from eventflow.core.clock import to_datetime
from eventflow.events.event import Event
from eventflow.routing.pattern_machine import NEVER, PatternItem, PatternState
from eventflow.routing.subscriptions import Subscription
from eventflow.runs.run import Ids, Run
from eventflow.runs.run import State as RunState
from eventflow.store.protocol import Arrival, PatternEvent, PatternMatch, PatternUpdate

ABSENT_TYPE = "eventflow.absent"
"""Type of the event that is recorded when an absence matches that has no event of its own."""

MAX_CACHED_STATES = 4096
"""Decoded states kept in memory; a state is decoded again only if its bytes have changed."""


class PatternRunner:
    """The patterns of an app.

    `make_arrival` returns the arrival of an absence: the event and the run that it starts.
    """

    def __init__(
        self,
        subscriptions: Iterable[Subscription],
        ids: Ids,
        make_arrival: Callable[[Subscription, Event], Arrival],
    ) -> None:
        self._patterns = {
            each.name: (each, each.pattern) for each in subscriptions if each.pattern is not None
        }
        self._ids: Ids = ids
        self._make_arrival: Callable[[Subscription, Event], Arrival] = make_arrival
        # per subscription and join key: the bytes last stored, and the state they encode
        self._cache: dict[tuple[str, str], tuple[bytes, PatternState]] = {}

    def time_driven(self) -> Sequence[str]:
        """The subscriptions whose pattern may match before any event came."""
        return [
            name for name, (_, pattern) in self._patterns.items() if pattern.machine.is_time_driven
        ]

    def encode_state(self, subscription: str, key: str, state: PatternState) -> bytes:
        """The bytes to store for a state."""
        encoded = self._patterns[subscription][1].machine.encode(state)
        if len(self._cache) >= MAX_CACHED_STATES:
            del self._cache[next(iter(self._cache))]
        self._cache[subscription, key] = encoded, state
        return encoded

    def advance(
        self,
        subscription: str,
        key: str,
        state: PatternState | bytes | None,
        now: int,
        pattern_event: PatternEvent | None = None,
        event: int = 0,
        size: int = 0,
    ) -> PatternUpdate | None:
        """Advance a pattern to `now` and pass it `item_event`, event id `event` of `size` bytes.

        `state` as returned before or as stored (bytes); None starts a new one. A state of another
        definition of the pattern is replaced by a new one (`is_reset`). None: no such pattern.
        """
        if subscription not in self._patterns:
            return None
        owner, pattern = self._patterns[subscription]
        machine = pattern.machine
        is_reset = False
        # The state changes in place, so it leaves the cache whether or not the commit succeeds.
        cached_bytes, cached_state = self._cache.pop((subscription, key), (None, None))
        if isinstance(state, bytes) and state == cached_bytes:
            state = cached_state
        elif isinstance(state, bytes):
            try:
                state = machine.decode(state)
            except msgspec.DecodeError:  # written by another version: start again
                state = None
            if is_reset := state is None or state.fingerprint != machine.fingerprint:
                state = None
        if state is None:
            state = machine.initial_state(now)
        if pattern_event is None:
            result = machine.advance(state, now)
        else:
            paused_event = event if pattern_event.is_paused else 0
            item = PatternItem(
                pattern_event.time, now, (event,), size, paused_event, pattern_event.depth
            )
            result = machine.advance(state, now, pattern_event.part, item)
        is_open = machine.is_open(state)
        return PatternUpdate(
            state if is_open else None,
            machine.due(state) if is_open else NEVER,
            [self._match(owner, key, item, now) for item in result.matches if item.events],
            [self._absence(owner, key, item) for item in result.matches if not item.events],
            result.expired,
            result.freed_bytes,
            is_reset,
        )

    def _match(self, owner: Subscription, key: str, item: PatternItem, now: int) -> PatternMatch:
        """The run of a match. With a batch policy, the runs of one join key execute in order."""
        policy = owner.batch_policy
        run = Run(
            id=self._ids.next(now),
            flow=owner.flow.name,
            created_at=now,
            due_at=now,
            event=item.paused_event or item.events[0],
            subscription=owner.name,
            state=RunState.PAUSED if item.paused_event else RunState.PENDING,
            priority=owner.priority,
            depth=item.depth,
            mode="pattern" if policy is None else policy.mode,
            ordering_key=None if policy is None else key or owner.default_ordering_key,
        )
        if policy is not None and policy.size > len(item.events):
            run.due_at += policy.wait
        return PatternMatch(run, item.events, item.size, policy)

    def _absence(self, owner: Subscription, key: str, item: PatternItem) -> Arrival:
        """The arrival of an absence; its id makes a second one a duplicate."""
        due = to_datetime(item.time)
        _, pattern = self._patterns[owner.name]
        data = {
            "pattern": owner.name,
            "due": due.isoformat(),
            "parts": [part.label for part in pattern.parts],
        }
        ident = f"{owner.name}/{key}/{due.isoformat()}"
        return self._make_arrival(
            owner, Event(id=ident, source="/patterns", type=ABSENT_TYPE, time=due, data=data)
        )
