"""Runs in memory that wait for a slot, one queue per flow; flows take turns."""

from collections import Counter, deque

from eventflow.runs.run import Run


class RunQueues:
    """`in_memory` counts the runs of each flow, queued or executing; `Worker` subtracts those that
    leave.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[Run]] = {}
        self.turns: deque[str] = deque()
        """The flows that have queued runs, in the order of their turns."""
        self.in_memory: Counter[str] = Counter()

    def add(self, run: Run) -> None:
        queue = self._queues.get(run.flow)
        if queue is None:
            queue = self._queues[run.flow] = deque()
        if not queue:
            self.turns.append(run.flow)
        queue.append(run)
        self.in_memory[run.flow] += 1

    def pop(self) -> Run | None:
        """The oldest run of the flow whose turn it is."""
        if not self.turns:
            return None
        flow = self.turns.popleft()
        queue = self._queues[flow]
        run = queue.popleft()
        if queue:
            self.turns.append(flow)
        return run

    def clear(self) -> list[Run]:
        """Removes all queued runs and returns them."""
        runs = [run for queue in self._queues.values() for run in queue]
        self._queues.clear()
        self.turns.clear()
        return runs

    def find(self, ident: int) -> Run | None:
        for queue in self._queues.values():
            for run in queue:
                if run.id == ident:
                    return run
        return None

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())
