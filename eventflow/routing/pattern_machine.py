"""The state machine of a pattern: what is open, what matches, what expires, when it is due again.

    result = machine.advance(state, now, part, item)    # changes `state` in place
    stored = machine.encode(state)

Pure: no store, no event loop, no clock. `patterns.py` compiles a pattern to a `Machine`, a tree of
nodes; `pattern_runner.py` advances it in the store's transaction. A node accepts items (events, or
matches of the node below it) and emits matches to its parent, so patterns nest. An advance first
does everything that was due by `now`, each at its own instant, so a late timer or a restart does
not change what matches. An event ends in exactly one match, or expires with a reason.

The nodes that wait for time to pass are in pattern_time.py. docs/guides/patterns.md defines the
patterns.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Final

import msgspec

NEVER: Final = (1 << 63) - 1
"""The due time of what is not due: the largest 64-bit integer."""

MAX_OPEN_ITEMS: Final = 10_000
"""Open items per node, key and part; one more makes the oldest expire."""


class PatternItem(msgspec.Struct, array_like=True, order=True, frozen=True, gc=False):
    """An event, or a match of an inner pattern.

    `time` is when it happened, `at` when the machine received it, both in microseconds. `events`
    are the ids of its events, `size` their bytes. `paused_event` is the id of one that came while
    its trigger was paused, or 0. `depth` is the largest emit depth among them.
    """

    time: int
    at: int
    events: tuple[int, ...]
    size: int = 0
    paused_event: int = 0
    depth: int = 0


class DelayedItem(msgspec.Struct, array_like=True, order=True, frozen=True, gc=False):
    """An item that is processed at instant `at`: until then an earlier one may still arrive."""

    at: int
    item: PatternItem
    role: int


class NodeState(msgspec.Struct, array_like=True):
    """The state of one node for one key. Stored by position, so fields keep their order.

    `pools`: open items, one list per part. `waiting`: items to process later, sorted. `marks`:
    integers whose meaning each node class defines.
    """

    pools: list[list[PatternItem]]
    waiting: list[DelayedItem] = []
    marks: list[int] = []


class PatternState(msgspec.Struct, array_like=True):
    """The state of a pattern for one key: one `NodeState` per node.

    `fingerprint` identifies the pattern's definition; a state of another definition is discarded.
    """

    fingerprint: str
    nodes: list[NodeState]


class AdvanceResult(msgspec.Struct, array_like=True):
    """What one advance produced.

    `matches` in order. `expired`: events that end without a match, each with its reason;
    `freed_bytes`: their size in all.
    """

    matches: list[PatternItem] = []
    expired: list[tuple[int, str]] = []
    freed_bytes: int = 0


class Node:
    """One pattern of the tree.

    Its matches go to `parent`, as items of part `role`; without a parent they are the machine's.
    `labels` name its parts in reasons. `lateness` and all instants are in microseconds.
    """

    pool_count = 1
    is_time_driven = False

    def __init__(self, labels: Sequence[str], lateness: int) -> None:
        self.labels: Sequence[str] = labels
        self.lateness: int = lateness
        self.index: int = 0  # position in Machine's list of nodes
        self.parent: Node | None = None
        self.role: int = 0

    def initial_state(self, now: int) -> NodeState:
        return NodeState([[] for _ in range(self.pool_count)])

    def due(self, state: NodeState) -> int:
        """When `run_due` must be called even if no item arrives."""
        return NEVER

    def run_due(self, advance: "Advance", now: int) -> None:
        """Do everything that is due by `now`."""

    def skip_missed(self, state: NodeState, now: int) -> None:
        """Skip matches of a time in which the machine was not advanced."""

    def accept(self, advance: "Advance", role: int, item: PatternItem) -> None:
        """Process an item of part `role`; now is `item.at`."""
        raise NotImplementedError

    def is_open(self, state: NodeState) -> bool:
        return any(state.pools) or bool(state.waiting)

    def own_state(self, advance: "Advance") -> NodeState:
        return advance.state.nodes[self.index]

    def emit(self, advance: "Advance", item: PatternItem) -> None:
        if self.parent is None:
            advance.result.matches.append(item)
        else:
            self.parent.accept(advance, self.role, item)


class Advance(msgspec.Struct):
    """One call of `Machine.advance` in progress."""

    state: PatternState
    result: AdvanceResult

    def expire(self, item: PatternItem, reason: str) -> None:
        self.result.expired += [(event, reason) for event in item.events]
        self.result.freed_bytes += item.size


def merge_items(items: Sequence[PatternItem], time: int, at: int) -> PatternItem:
    """The match of these items, which happened at `time` and is found at `at`."""
    events = tuple(sorted(event for item in items for event in item.events))
    size = sum(item.size for item in items)
    held = max(item.paused_event for item in items)
    return PatternItem(time, at, events, size, held, max(item.depth for item in items))


class AnyOfNode(Node):
    """any_of: each item of any part is a match."""

    pool_count = 0

    def accept(self, advance: Advance, role: int, item: PatternItem) -> None:
        self.emit(advance, item)


class PooledNode(Node):
    """Base of all_of and count: open items wait, in any order, for others within `within` of them.

    Pools are sorted by time. An item expires `within + lateness` after it was received. `marks[0]`:
    the smallest `at` of all open items; `marks[1]`: 1 if it may be another item's than the first of
    a pool, since items arrived out of order.
    """

    def __init__(self, labels: Sequence[str], lateness: int, within: int) -> None:
        super().__init__(labels, lateness)
        self.within: int = within
        self.lifetime: int = within + lateness + 1

    def initial_state(self, now: int) -> NodeState:
        return NodeState([[] for _ in range(self.pool_count)], marks=[NEVER, 0])

    def due(self, state: NodeState) -> int:
        first = state.marks[0]
        return first if first == NEVER else first + self.lifetime

    def run_due(self, advance: Advance, now: int) -> None:
        state = self.own_state(advance)
        if state.marks[0] > now - self.lifetime:
            return
        old = now - self.lifetime
        gone: list[PatternItem] = []
        for pool in state.pools:
            kept = len(pool)
            if state.marks[1]:
                gone += [item for item in pool if item.at <= old]
                pool[:] = [item for item in pool if item.at > old]
            else:
                kept = next((n for n, item in enumerate(pool) if item.at > old), kept)
                gone += pool[:kept]
                del pool[:kept]
        for item in sorted(gone):
            advance.expire(item, self.expiry_reason())
        self._update_first(state)

    def _update_first(self, state: NodeState) -> None:
        if state.marks[1]:
            state.marks[0] = min((item.at for pool in state.pools for item in pool), default=NEVER)
        else:
            state.marks[0] = min((pool[0].at for pool in state.pools if pool), default=NEVER)
        if state.marks[0] == NEVER:
            state.marks[1] = 0

    def accept(self, advance: Advance, role: int, item: PatternItem) -> None:
        self.run_due(advance, item.at)
        state = self.own_state(advance)
        chosen = self.choose(state.pools, role, item)
        if chosen is None:
            self._store(advance, state, state.pools[role], item)
            return
        for part, other in chosen:
            pool = state.pools[part]
            del pool[bisect_left(pool, other)]
        self._update_first(state)
        used = [other for _, other in chosen]
        used.append(item)
        self.emit(advance, merge_items(used, max(each.time for each in used), item.at))

    def _store(
        self, advance: Advance, state: NodeState, pool: list[PatternItem], item: PatternItem
    ) -> None:
        if len(pool) >= MAX_OPEN_ITEMS:
            advance.expire(pool.pop(0), f"{self.labels[0]}: more than {MAX_OPEN_ITEMS:,} wait")
            self._update_first(state)
        if not pool or item >= pool[-1]:
            pool.append(item)
        else:
            insort(pool, item)
            state.marks[1] = 1
        if item.at < state.marks[0]:
            state.marks[0] = item.at

    def choose(
        self, pools: list[list[PatternItem]], role: int, item: PatternItem
    ) -> "list[tuple[int, PatternItem]] | None":
        """The earliest open items that make a match with `item`, with their parts; or None."""
        raise NotImplementedError

    def expiry_reason(self) -> str:
        """Why an item of this node expires."""
        raise NotImplementedError


class AllOfNode(PooledNode):
    """all_of: one item of each part, all within `within` of each other."""

    def __init__(self, labels: Sequence[str], lateness: int, within: int) -> None:
        super().__init__(labels, lateness, within)
        self.pool_count = len(labels)

    def choose(
        self, pools: list[list[PatternItem]], role: int, item: PatternItem
    ) -> "list[tuple[int, PatternItem]] | None":
        others = [part for part in range(len(pools)) if part != role]
        if not all(pools[part] for part in others):
            return None
        earliest = item.time - self.within
        starts = [
            first
            for part in others
            for first in pools[part]
            if earliest <= first.time and first <= item
        ]
        for start in (*sorted(starts), item):
            found = [
                (part, other)
                for part in others
                if (other := self._next(pools[part], start)) is not None
            ]
            if len(found) == len(others):
                return found
        return None

    def _next(self, pool: list[PatternItem], start: PatternItem) -> PatternItem | None:
        at = bisect_left(pool, start)
        return pool[at] if at < len(pool) and pool[at].time - start.time <= self.within else None

    def expiry_reason(self) -> str:
        return f"all_of: not each of {', '.join(self.labels)} within {self.within / 1e6:g} s"


class CountNode(PooledNode):
    """count: `n` items within `within`."""

    def __init__(self, labels: Sequence[str], lateness: int, within: int, n: int) -> None:
        super().__init__(labels, lateness, within)
        self.n = n

    def choose(
        self, pools: list[list[PatternItem]], role: int, item: PatternItem
    ) -> "list[tuple[int, PatternItem]] | None":
        pool = pools[0]
        others = self.n - 1
        if len(pool) < others:
            return None
        position = len(pool) if not others or item >= pool[-1] else bisect_left(pool, item)
        for first in range(max(0, position - others), min(position, len(pool) - others) + 1):
            if not others:
                return []
            low = min(pool[first].time, item.time)
            high = max(pool[first + others - 1].time, item.time)
            if high - low <= self.within:
                return [(0, other) for other in pool[first : first + others]]
        return None

    def expiry_reason(self) -> str:
        return f"count: fewer than {self.n} {self.labels[0]} within {self.within / 1e6:g} s"


class Machine:
    """A compiled pattern.

    `nodes`: the tree, parents before children. `parts`: for each part of the pattern, the node that
    accepts its events and the role they have there. `fingerprint` identifies the definition.
    """

    def __init__(
        self, nodes: Sequence[Node], parts: Sequence[tuple[Node, int]], fingerprint: str
    ) -> None:
        self._nodes: Sequence[Node] = nodes
        self._parts: Sequence[tuple[Node, int]] = parts
        self.fingerprint: str = fingerprint
        for index, node in enumerate(nodes):
            node.index = index
        self.is_time_driven: bool = any(node.is_time_driven for node in nodes)
        """Whether it may match before any event came: it must be advanced once at the start."""
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(PatternState).decode

    def initial_state(self, now: int) -> PatternState:
        return PatternState(self.fingerprint, [node.initial_state(now) for node in self._nodes])

    def advance(
        self,
        state: PatternState,
        now: int,
        part: int | None = None,
        item: PatternItem | None = None,
    ) -> AdvanceResult:
        """Do what is due by `now`, then accept `item`, received now, as an event of part `part`.

        Changes `state` in place.
        """
        advance = Advance(state, AdvanceResult())
        states = state.nodes
        if self.is_time_driven:
            for node in self._nodes:
                node.skip_missed(states[node.index], now)
        if len(states) > 1:
            while True:  # by due time, then from the root down
                due, index = min((node.due(states[at]), at) for at, node in enumerate(self._nodes))
                if due > now:
                    break
                self._nodes[index].run_due(advance, due)
        else:
            while (due := self._nodes[0].due(states[0])) <= now:
                self._nodes[0].run_due(advance, due)
        if part is not None and item is not None:
            node, role = self._parts[part]
            node.accept(advance, role, item)
        return advance.result

    def due(self, state: PatternState) -> int:
        """When to advance it if no event comes before; NEVER: not at all."""
        return min(
            node.due(node_state) for node, node_state in zip(self._nodes, state.nodes, strict=True)
        )

    def is_open(self, state: PatternState) -> bool:
        """Whether there is anything to store."""
        return any(
            node.is_open(node_state)
            for node, node_state in zip(self._nodes, state.nodes, strict=True)
        )

    def events(self, state: PatternState) -> list[int]:
        """The ids of its open events, sorted."""
        items = [item for node_state in state.nodes for pool in node_state.pools for item in pool]
        items += [due.item for node_state in state.nodes for due in node_state.waiting]
        return sorted(event for item in items for event in item.events)

    def encode(self, state: PatternState) -> bytes:
        return self._encode(state)

    def decode(self, kept: bytes) -> PatternState:
        return self._decode(kept)
