"""The machine behind patterns over several events: what is open, what matches, what lapses, and when it must be asked again.

    step = machine.advance(state, now, leaf, item)      state changes in place; `machine.encode(state)` is what a store keeps

Pure: no store, no loop, no clock of its own. `patterns.py` makes a `Machine` of the words a user writes, the router feeds it in
the writer's transaction. An `Item` is an event, or an inner pattern's match: each node takes items and hands on matches, so
patterns nest. Whatever was due by `now` happens first, at its own instant, however late the machine is asked; so neither a slow
timer nor a restart changes what matches. An event ends in one match, or lapses with a reason; none is in two matches.
The nodes in which time matters are in awaiting.py. docs/guides/patterns.md says what each pattern means.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Final

import msgspec

NEVER: Final = (1 << 63) - 1
MAX_OPEN_ITEMS: Final = 10_000
"""Items that one node keeps open per key and part; beyond it the oldest lapses."""


class PatternItem(msgspec.Struct, array_like=True, order=True, frozen=True, gc=False):
    """An event, or a match, on its way: when it happened, when it was known (microseconds), and which events it is of.

    `size` is their bytes; `held` one of them that came while its trigger was paused, or 0; `depth` the most emits that any of
    them is from outside.
    """

    time: int
    at: int
    events: tuple[int, ...]
    size: int = 0
    held: int = 0
    depth: int = 0


class DelayedItem(msgspec.Struct, array_like=True, order=True, frozen=True, gc=False):
    """An item that is taken at an instant, since one from before it may still come."""

    at: int
    item: PatternItem
    role: int


class NodeState(msgspec.Struct, array_like=True):
    """What one node remembers of one key."""

    pools: list[list[PatternItem]]
    waiting: list[DelayedItem] = []
    marks: list[int] = []


class PatternState(msgspec.Struct, array_like=True):
    """What a pattern remembers of one key. `print` tells whether it is of the pattern as it is written today."""

    print: str
    cells: list[NodeState]


class AdvanceResult(msgspec.Struct, array_like=True):
    """What came of one advance. `matches`, in order; `lapsed`: events that end without one, each with its reason, and the
    bytes of all of them."""

    matches: list[PatternItem] = []
    lapsed: list[tuple[int, str]] = []
    freed: int = 0


class Node:
    """One pattern of the tree. `parent`: who takes its matches, and as what; None: they are the whole's."""

    pools = 1
    is_armed = False

    def __init__(self, labels: Sequence[str], lateness: int) -> None:
        self.labels, self.lateness = labels, lateness
        self.index = 0
        self.parent: Node | None = None
        self.role = 0

    def fresh(self, now: int) -> NodeState:
        return NodeState([[] for _ in range(self.pools)])

    def due(self, cell: NodeState) -> int:
        """When it must be run even if nothing comes."""
        return NEVER

    def run(self, turn: "Advance", now: int) -> None:
        """Does what is due by `now`."""

    def skip(self, cell: NodeState, now: int) -> None:
        """Leaves out what would come of a time in which nobody asked."""

    def take(self, turn: "Advance", role: int, item: PatternItem) -> None:
        """An item of part `role`, known now (`item.at`)."""
        raise NotImplementedError

    def is_open(self, cell: NodeState) -> bool:
        return any(cell.pools) or bool(cell.waiting)

    def cell(self, turn: "Advance") -> NodeState:
        return turn.state.cells[self.index]

    def emit(self, turn: "Advance", item: PatternItem) -> None:
        if self.parent is None:
            turn.step.matches.append(item)
        else:
            self.parent.take(turn, self.role, item)


class Advance(msgspec.Struct):
    """One advance under way."""

    state: PatternState
    step: AdvanceResult

    def lapse(self, item: PatternItem, reason: str) -> None:
        self.step.lapsed += [(event, reason) for event in item.events]
        self.step.freed += item.size


def merged(items: Sequence[PatternItem], time: int, at: int) -> PatternItem:
    events = tuple(sorted(event for item in items for event in item.events))
    size, held = sum(item.size for item in items), max(item.held for item in items)
    return PatternItem(time, at, events, size, held, max(item.depth for item in items))


class AnyOfNode(Node):
    """Each item of any part is a match."""

    pools = 0

    def take(self, turn: Advance, role: int, item: PatternItem) -> None:
        self.emit(turn, item)


class PooledNode(Node):
    """Items wait for others that happened within `within` of them, whichever comes first, in pools sorted by time.

    An item lapses `within + lateness` after it was known. `marks`: the first `at` in the pools, and 1 if it need not be the
    first item's.
    """

    def __init__(self, labels: Sequence[str], lateness: int, within: int) -> None:
        super().__init__(labels, lateness)
        self.within, self.stay = within, within + lateness + 1

    def fresh(self, now: int) -> NodeState:
        return NodeState([[] for _ in range(self.pools)], marks=[NEVER, 0])

    def due(self, cell: NodeState) -> int:
        first = cell.marks[0]
        return first if first == NEVER else first + self.stay

    def run(self, turn: Advance, now: int) -> None:
        cell = self.cell(turn)
        if cell.marks[0] > now - self.stay:
            return
        old = now - self.stay
        gone: list[PatternItem] = []
        for pool in cell.pools:
            kept = len(pool)
            if cell.marks[1]:
                gone += [item for item in pool if item.at <= old]
                pool[:] = [item for item in pool if item.at > old]
            else:
                kept = next((n for n, item in enumerate(pool) if item.at > old), kept)
                gone += pool[:kept]
                del pool[:kept]
        for item in sorted(gone):
            turn.lapse(item, self.why())
        self._note(cell)

    def _note(self, cell: NodeState) -> None:
        if cell.marks[1]:
            cell.marks[0] = min((item.at for pool in cell.pools for item in pool), default=NEVER)
        else:
            cell.marks[0] = min((pool[0].at for pool in cell.pools if pool), default=NEVER)
        if cell.marks[0] == NEVER:
            cell.marks[1] = 0

    def take(self, turn: Advance, role: int, item: PatternItem) -> None:
        self.run(turn, item.at)
        cell = self.cell(turn)
        chosen = self.choose(cell.pools, role, item)
        if chosen is None:
            self._keep(turn, cell, cell.pools[role], item)
            return
        for part, other in chosen:
            pool = cell.pools[part]
            del pool[bisect_left(pool, other)]
        self._note(cell)
        used = [other for _, other in chosen]
        used.append(item)
        self.emit(turn, merged(used, max(each.time for each in used), item.at))

    def _keep(
        self, turn: Advance, cell: NodeState, pool: list[PatternItem], item: PatternItem
    ) -> None:
        if len(pool) >= MAX_OPEN_ITEMS:
            turn.lapse(pool.pop(0), f"{self.labels[0]}: more than {MAX_OPEN_ITEMS:,} wait")
            self._note(cell)
        if not pool or item >= pool[-1]:
            pool.append(item)
        else:
            insort(pool, item)
            cell.marks[1] = 1
        if item.at < cell.marks[0]:
            cell.marks[0] = item.at

    def choose(
        self, pools: list[list[PatternItem]], role: int, item: PatternItem
    ) -> "list[tuple[int, PatternItem]] | None":
        """The others that make a match with this one: the earliest; None: not yet."""
        raise NotImplementedError

    def why(self) -> str:
        raise NotImplementedError


class AllOfNode(PooledNode):
    """One item of each part, all within `within` of each other."""

    def __init__(self, labels: Sequence[str], lateness: int, within: int) -> None:
        super().__init__(labels, lateness, within)
        self.pools = len(labels)

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

    def why(self) -> str:
        return f"all_of: not each of {', '.join(self.labels)} within {self.within / 1e6:g} s"


class CountNode(PooledNode):
    """`n` items within `within`."""

    def __init__(self, labels: Sequence[str], lateness: int, within: int, n: int) -> None:
        super().__init__(labels, lateness, within)
        self.n = n

    def choose(
        self, pools: list[list[PatternItem]], role: int, item: PatternItem
    ) -> "list[tuple[int, PatternItem]] | None":
        pool, others = pools[0], self.n - 1
        if len(pool) < others:
            return None
        place = len(pool) if not others or item >= pool[-1] else bisect_left(pool, item)
        for first in range(max(0, place - others), min(place, len(pool) - others) + 1):
            if not others:
                return []
            low, high = (
                min(pool[first].time, item.time),
                max(pool[first + others - 1].time, item.time),
            )
            if high - low <= self.within:
                return [(0, other) for other in pool[first : first + others]]
        return None

    def why(self) -> str:
        return f"count: fewer than {self.n} {self.labels[0]} within {self.within / 1e6:g} s"


class Machine:
    """A tree of nodes. `nodes`: parents before children; `leaves`: per leaf the node that takes it, and as what part."""

    def __init__(
        self, nodes: Sequence[Node], leaves: Sequence[tuple[Node, int]], print: str
    ) -> None:
        self._nodes, self._leaves, self.print = nodes, leaves, print
        for index, node in enumerate(nodes):
            node.index = index
        self.is_armed = any(node.is_armed for node in nodes)
        """Whether time alone may make it match: it has to be advanced once before anything came."""
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(PatternState).decode

    def fresh(self, now: int) -> PatternState:
        return PatternState(self.print, [node.fresh(now) for node in self._nodes])

    def advance(
        self,
        state: PatternState,
        now: int,
        leaf: int | None = None,
        item: PatternItem | None = None,
    ) -> AdvanceResult:
        """Does what is due by `now`, then takes an item, known now, of a leaf."""
        turn = Advance(state, AdvanceResult())
        cells = state.cells
        if self.is_armed:
            for node in self._nodes:
                node.skip(cells[node.index], now)
        if len(cells) > 1:
            while True:  # the earliest first; of equals the first of the tree
                due, index = min((node.due(cells[at]), at) for at, node in enumerate(self._nodes))
                if due > now:
                    break
                self._nodes[index].run(turn, due)
        else:
            while (due := self._nodes[0].due(cells[0])) <= now:
                self._nodes[0].run(turn, due)
        if leaf is not None and item is not None:
            node, role = self._leaves[leaf]
            node.take(turn, role, item)
        return turn.step

    def due(self, state: PatternState) -> int:
        """When to advance it if nothing comes before; NEVER: not at all."""
        return min(node.due(cell) for node, cell in zip(self._nodes, state.cells, strict=True))

    def is_open(self, state: PatternState) -> bool:
        """Whether anything must be remembered."""
        return any(node.is_open(cell) for node, cell in zip(self._nodes, state.cells, strict=True))

    def events(self, state: PatternState) -> list[int]:
        """The events that are open in it."""
        items = [item for cell in state.cells for pool in cell.pools for item in pool]
        items += [due.item for cell in state.cells for due in cell.waiting]
        return sorted(event for item in items for event in item.events)

    def encode(self, state: PatternState) -> bytes:
        return self._encode(state)

    def decode(self, kept: bytes) -> PatternState:
        return self._decode(kept)
