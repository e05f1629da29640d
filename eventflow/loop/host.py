"""What a run's FlowLoop needs of the executor (lineage.py), and the host of a run that has left memory.

A Host may be asked from inside a step of the flow; what it says there must be the same in a replay.
"""

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from eventflow.loop.flow_loop import FlowTimer


class Host(Protocol):
    """What a FlowLoop needs of the executor."""

    def read_now(self) -> int:
        """Time of the last delivery, microseconds."""
        ...

    def parked(self) -> bool:
        """Nothing is ready. True: something was delivered, go on stepping."""
        ...

    def spinning(self) -> None:
        """The flow does not park: deliver and start all the same, or it would wait for ever. Not deterministic, hence last."""
        ...

    def arm(self, timer: "FlowTimer") -> None:
        """Flow code waits for `timer.due`; the host calls `timer.fire()` when that is recorded."""
        ...

    def disarm(self, timer: "FlowTimer") -> None:
        """Flow code does not wait for it any more."""
        ...

    def complain(self, context: dict[str, Any]) -> None:
        """A callback raised, or a task's exception was never retrieved."""
        ...

    def wake(self) -> None:
        """Something became ready from outside a pump: pump soon. Safe from the host's loop only."""
        ...


class Gone:
    """The host of a run that has left memory: nothing happens any more, and nobody needs to hear of it."""

    def read_now(self) -> int:
        return 0

    def parked(self) -> bool:
        return False

    def spinning(self) -> None:
        pass

    def arm(self, timer: "FlowTimer") -> None:
        pass

    def disarm(self, timer: "FlowTimer") -> None:
        pass

    def complain(self, context: dict[str, Any]) -> None:
        pass

    def wake(self) -> None:
        pass


GONE = Gone()
