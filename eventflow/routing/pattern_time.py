"""Pattern nodes that wait for time to pass: sequence, absence, and absence by a time of day.

They process items in the order in which they happened, as far as `lateness` allows, and know when
they are due if no item comes. Called by `Machine` (pattern_machine.py), which runs what is due
before it passes on an item; made by patterns.py.
"""

from bisect import insort
from collections.abc import Callable, Sequence

from eventflow.routing.pattern_machine import (
    MAX_OPEN_ITEMS,
    NEVER,
    Advance,
    DelayedItem,
    Node,
    NodeState,
    PatternItem,
    merge_items,
)

OPEN, CLOSE, END, RENEW = range(4)
"""Roles of a TimedNode's parts; RENEW ends what is open and opens again."""


class TimedNode(Node):
    """sequence and absent: an OPEN item waits `within` for a CLOSE item; an END item cancels it.

    An item is processed `lateness` after it happened, or when it is received if that is later, so
    items are processed in the order in which they happened unless one is later than `lateness`.
    With `absent`, an OPEN item whose time is over matches; without, it expires. `labels` names the
    parts by role. The only pool holds the OPEN items.
    """

    def __init__(self, labels: Sequence[str], lateness: int, within: int, *, absent: bool) -> None:
        super().__init__(labels, lateness)
        self.within: int = within
        self.absent: bool = absent

    def due(self, state: NodeState) -> int:
        deadline = self._deadline(state.pools[0][0]) if state.pools[0] else NEVER
        return min(deadline, state.waiting[0].at) if state.waiting else deadline

    def _processed_at(self, item: PatternItem) -> int:
        return max(item.at, item.time + self.lateness)

    def _deadline(self, item: PatternItem) -> int:
        """When an OPEN item's time is over: just after the last item that may still close it."""
        return self._processed_at(item) + self.within + 1

    def run_due(self, advance: Advance, now: int) -> None:
        state = self.own_state(advance)
        opened = state.pools[0]
        waiting = state.waiting
        while (due := self.due(state)) <= now:
            if opened and self._deadline(opened[0]) == due:
                self._time_out(advance, opened.pop(0), due)
            else:
                first = waiting.pop(0)
                self._process(advance, first.role, first.item, due)

    def accept(self, advance: Advance, role: int, item: PatternItem) -> None:
        self.run_due(advance, item.at)
        process_at = self._processed_at(item)
        if process_at > item.at:
            waiting = self.own_state(advance).waiting
            if len(waiting) >= MAX_OPEN_ITEMS:
                advance.expire(
                    waiting.pop(0).item,
                    f"{self.labels[role]}: more than {MAX_OPEN_ITEMS:,} wait for their turn",
                )
            insort(waiting, DelayedItem(process_at, item, role))
        else:
            self._process(advance, role, item, process_at)

    def _process(self, advance: Advance, role: int, item: PatternItem, now: int) -> None:
        opened = self.own_state(advance).pools[0]
        if role == OPEN:
            self._open(advance, opened, item)
        elif role == CLOSE:
            self._close(advance, opened, item, now)
        elif role == END:
            ended = self._end(advance, opened, item, now)
            advance.expire(
                item,
                f"{self._pattern_name}: {self.labels[END]} ended {ended} that waited"
                if ended
                else f"{self._pattern_name}: nothing waited when {self.labels[END]} came",
            )
        elif any(
            0 <= other.time - item.time <= self.within and other.time > item.time
            for other in opened
        ):
            advance.expire(item, f"{self._pattern_name}: a later {self.labels[0]} came before it")
        else:
            self._end(advance, opened, item, now)
            self._open(advance, opened, item)

    def _open(self, advance: Advance, opened: list[PatternItem], item: PatternItem) -> None:
        if len(opened) >= MAX_OPEN_ITEMS:
            advance.expire(
                opened.pop(0), f"{self._pattern_name}: more than {MAX_OPEN_ITEMS:,} wait"
            )
        opened.append(item)

    def _close(
        self, advance: Advance, opened: list[PatternItem], item: PatternItem, now: int
    ) -> None:
        first = min(
            (other for other in opened if 0 <= item.time - other.time <= self.within), default=None
        )
        if first is None:
            advance.expire(
                item,
                f"{self._pattern_name}: no {self.labels[OPEN]} within {self.within / 1e6:g} s "
                "before it",
            )
            return
        opened.remove(first)
        self.emit(advance, merge_items((first, item), item.time, now))

    def _end(self, advance: Advance, opened: list[PatternItem], item: PatternItem, now: int) -> int:
        """Expire the OPEN items that `item` came in time for; return their number.

        With `absent`, those whose time was over before `item` match.
        """
        left: list[PatternItem] = []
        over: list[PatternItem] = []
        for other in opened:
            passed = item.time - other.time
            if 0 <= passed <= self.within:
                advance.expire(
                    other,
                    f"{self._pattern_name}: {self.labels[END]} came {passed / 1e6:g} s after it",
                )
            else:
                (over if self.absent and passed > 0 else left).append(other)
        ended = len(opened) - len(left) - len(over)
        opened[:] = left
        for other in over:
            self._time_out(advance, other, now)
        return ended

    def _time_out(self, advance: Advance, item: PatternItem, now: int) -> None:
        if self.absent:
            self.emit(advance, merge_items((item,), item.time + self.within, now))
        else:
            advance.expire(
                item,
                f"{self._pattern_name}: no {self.labels[CLOSE]} within {self.within / 1e6:g} s "
                "after it",
            )

    @property
    def _pattern_name(self) -> str:
        return "absent" if self.absent else "sequence"


class DailyNode(Node):
    """absent by a time of day: a match for each deadline with no item since the deadline before.

    `marks[0]` is the next deadline, the rest are those that were met. Of several deadlines that
    passed while the machine was not advanced, only the last is evaluated.
    """

    pool_count = 0
    is_time_driven = True

    def __init__(
        self, labels: Sequence[str], lateness: int, next_deadline: Callable[[int], int]
    ) -> None:
        super().__init__(labels, lateness)
        self._next_deadline = next_deadline

    def initial_state(self, now: int) -> NodeState:
        return NodeState([], marks=[self._next_deadline(now)])

    def due(self, state: NodeState) -> int:
        return state.marks[0] + self.lateness + 1

    def run_due(self, advance: Advance, now: int) -> None:
        state = self.own_state(advance)
        while (due := self.due(state)) <= now:
            deadline, *met = state.marks
            state.marks = [
                self._next_deadline(deadline),
                *(mark for mark in met if mark > deadline),
            ]
            if deadline not in met:
                self.emit(advance, PatternItem(deadline, due, ()))

    def skip_missed(self, state: NodeState, now: int) -> None:
        """Skip all but the last of the deadlines that have passed."""
        while (later := self._next_deadline(state.marks[0])) + self.lateness < now:
            state.marks[0] = later

    def accept(self, advance: Advance, role: int, item: PatternItem) -> None:
        self.run_due(advance, item.at)
        state = self.own_state(advance)
        deadline = self._next_deadline(item.time - 1)
        if deadline < state.marks[0]:
            advance.expire(item, f"absent: {self.labels[0]} came after its time")
            return
        if deadline not in state.marks[1:]:
            state.marks.append(deadline)
        advance.expire(item, f"absent: {self.labels[0]} came in time")

    def is_open(self, state: NodeState) -> bool:
        return True
