"""The nodes of a pattern that wait for time to pass: sequence and absence. Called by the machine in matching.py.

They take items in the order they happened, as far as `lateness` allows, and know the instant at which they decide if nothing
comes. What is due goes first, whoever asks and when. The next room is patterns.py, which makes them.
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
    merged,
)

OPEN, CLOSE, END, RENEW = range(4)


class TimedNode(Node):
    """From an opening item on: a closing one within `within`, if no ending one comes between; or, for absence, neither.

    Parts are numbered OPEN, CLOSE, END, RENEW, and `labels` names them; one that renews ends what is open and opens anew.

    An item is taken `lateness` after it happened, or when it is known if that is later: so items are taken in the order they
    happened unless one is later than that. `absent`: an opening whose time is up matches, instead of lapsing.
    """

    def __init__(self, labels: Sequence[str], lateness: int, within: int, *, absent: bool) -> None:
        super().__init__(labels, lateness)
        self.within, self.absent = within, absent

    def due(self, cell: NodeState) -> int:
        up = self._up(cell.pools[0][0]) if cell.pools[0] else NEVER
        return min(up, cell.waiting[0].at) if cell.waiting else up

    def _taken(self, item: PatternItem) -> int:
        return max(item.at, item.time + self.lateness)

    def _up(self, item: PatternItem) -> int:
        """When an opening's time is up: just after whatever happened in time, and is not too late, has been taken."""
        return self._taken(item) + self.within + 1

    def run(self, turn: Advance, now: int) -> None:
        cell = self.cell(turn)
        opened, waiting = cell.pools[0], cell.waiting
        while (due := self.due(cell)) <= now:
            if opened and self._up(opened[0]) == due:
                self._time_is_up(turn, opened.pop(0), due)
            else:
                first = waiting.pop(0)
                self._process(turn, first.role, first.item, due)

    def take(self, turn: Advance, role: int, item: PatternItem) -> None:
        self.run(turn, item.at)
        taken = self._taken(item)
        if taken > item.at:
            waiting = self.cell(turn).waiting
            if len(waiting) >= MAX_OPEN_ITEMS:
                turn.lapse(
                    waiting.pop(0).item,
                    f"{self.labels[role]}: more than {MAX_OPEN_ITEMS:,} wait for their turn",
                )
            insort(waiting, DelayedItem(taken, item, role))
        else:
            self._process(turn, role, item, taken)

    def _process(self, turn: Advance, role: int, item: PatternItem, now: int) -> None:
        opened = self.cell(turn).pools[0]
        if role == OPEN:
            self._open(turn, opened, item)
        elif role == CLOSE:
            self._close(turn, opened, item, now)
        elif role == END:
            ended = self._end(turn, opened, item, now)
            turn.lapse(
                item,
                f"{self._word}: {self._label(END)} ended {ended} that waited"
                if ended
                else self._nothing,
            )
        elif any(
            0 <= other.time - item.time <= self.within and other.time > item.time
            for other in opened
        ):
            turn.lapse(item, f"{self._word}: a later {self.labels[0]} came before it")
        else:
            self._end(turn, opened, item, now)
            self._open(turn, opened, item)

    def _open(self, turn: Advance, opened: list[PatternItem], item: PatternItem) -> None:
        if len(opened) >= MAX_OPEN_ITEMS:
            turn.lapse(opened.pop(0), f"{self._word}: more than {MAX_OPEN_ITEMS:,} wait")
        opened.append(item)

    def _close(self, turn: Advance, opened: list[PatternItem], item: PatternItem, now: int) -> None:
        first = min(
            (other for other in opened if 0 <= item.time - other.time <= self.within), default=None
        )
        if first is None:
            turn.lapse(
                item,
                f"{self._word}: no {self._label(OPEN)} within {self.within / 1e6:g} s before it",
            )
            return
        opened.remove(first)
        self.emit(turn, merged((first, item), item.time, now))

    def _end(self, turn: Advance, opened: list[PatternItem], item: PatternItem, now: int) -> int:
        """Ends the openings that this one came after in time; those whose time had been up before it are absences."""
        left: list[PatternItem] = []
        over: list[PatternItem] = []
        for other in opened:
            passed = item.time - other.time
            if 0 <= passed <= self.within:
                turn.lapse(
                    other, f"{self._word}: {self._label(END)} came {passed / 1e6:g} s after it"
                )
            else:
                (over if self.absent and passed > 0 else left).append(other)
        ended = len(opened) - len(left) - len(over)
        opened[:] = left
        for other in over:
            self._time_is_up(turn, other, now)
        return ended

    def _time_is_up(self, turn: Advance, item: PatternItem, now: int) -> None:
        if self.absent:
            self.emit(turn, merged((item,), item.time + self.within, now))
        else:
            turn.lapse(
                item,
                f"{self._word}: no {self._label(CLOSE)} within {self.within / 1e6:g} s after it",
            )

    @property
    def _word(self) -> str:
        return "absent" if self.absent else "sequence"

    @property
    def _nothing(self) -> str:
        return f"{self._word}: nothing waited when {self._label(END)} came"

    def _label(self, role: int) -> str:
        return self.labels[role]


class DailyNode(Node):
    """A match for each deadline before which, since the one before, nothing came. `marks`: the next one, and what is met.

    Of several deadlines that passed while nothing ran only the last is looked at.
    """

    pools = 0
    is_armed = True

    def __init__(
        self, labels: Sequence[str], lateness: int, following: Callable[[int], int]
    ) -> None:
        super().__init__(labels, lateness)
        self._following = following

    def fresh(self, now: int) -> NodeState:
        return NodeState([], marks=[self._following(now)])

    def due(self, cell: NodeState) -> int:
        return cell.marks[0] + self.lateness + 1

    def run(self, turn: Advance, now: int) -> None:
        cell = self.cell(turn)
        while (due := self.due(cell)) <= now:
            deadline, *met = cell.marks
            cell.marks = [self._following(deadline), *(mark for mark in met if mark > deadline)]
            if deadline not in met:
                self.emit(turn, PatternItem(deadline, due, ()))

    def skip(self, cell: NodeState, now: int) -> None:
        """Leaves out the deadlines that passed before the last one that did."""
        while (later := self._following(cell.marks[0])) + self.lateness < now:
            cell.marks[0] = later

    def take(self, turn: Advance, role: int, item: PatternItem) -> None:
        self.run(turn, item.at)
        cell = self.cell(turn)
        deadline = self._following(item.time - 1)
        if deadline < cell.marks[0]:
            turn.lapse(item, f"absent: {self.labels[0]} came after its time")
            return
        if deadline not in cell.marks[1:]:
            cell.marks.append(deadline)
        turn.lapse(item, f"absent: {self.labels[0]} came in time")

    def is_open(self, cell: NodeState) -> bool:
        return True
