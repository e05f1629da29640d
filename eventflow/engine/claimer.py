"""Claims due runs from the store, while there may be some and there is capacity for them.

`Worker` calls `claim_due` when something may have become due and `claim` when capacity was freed.
One claim is under way at a time. On the worker's loop.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from eventflow.core.clock import Timer, timer_at
from eventflow.core.errors import StoreError
from eventflow.engine.limits import CLAIM_BATCH_SIZE
from eventflow.engine.worker_services import WorkerServices
from eventflow.runs.run import Run
from eventflow.sdk.flow import Flow
from eventflow.store.protocol import Claim, Claimed


class Claimer:
    """`receive` gets the claimed runs, also when there are none."""

    def __init__(
        self,
        services: WorkerServices,
        flows: Mapping[str, Flow[..., object]],
        receive: Callable[[Sequence[Run]], None],
    ) -> None:
        self._services = services
        self._flows = flows
        self._receive = receive
        self.has_backlog = True
        """The store may hold due runs that are not in memory."""
        self.is_claiming = False
        self._claim_again = False  # asked for while a claim was under way
        self._due_timers: tuple[Timer, ...] = ()

    def claim_due(self) -> None:
        """Something may be due in the store."""
        self.has_backlog = True
        self.claim()

    def claim(self) -> None:
        self._claim_again = self.is_claiming
        services = self._services
        if self.is_claiming or services.draining or not self.has_backlog:
            return
        capacity = services.limits.capacity
        limit = min(capacity.free, CLAIM_BATCH_SIZE)
        if limit < CLAIM_BATCH_SIZE // 4 or not capacity.reserve(limit):
            return
        self.is_claiming = True
        slots = services.limits.flow_slots
        caps = {
            name: slots.free(name, flow.options.concurrency) for name, flow in self._flows.items()
        }
        slots.begin_claim(caps)
        services.store.post(Claim(limit, caps), partial(self._on_claimed, limit), services.loop)

    def _on_claimed(self, limit: int, reply: Claimed | StoreError) -> None:
        self.is_claiming = False
        slots = self._services.limits.flow_slots
        if isinstance(reply, StoreError):
            slots.end_claim(self._limit)
            return
        self._services.limits.capacity.release(limit - len(reply.runs))
        self.has_backlog = reply.has_more
        self._set_due_timers(reply)
        again = bool(reply.runs) or self._claim_again
        self._receive(reply.runs)
        slots.end_claim(self._limit)
        if again:  # a run that settled meanwhile may have freed a slot below its flow's cap
            self.claim()

    def _limit(self, flow: str) -> int | None:
        return self._flows[flow].options.concurrency

    def _set_due_timers(self, reply: Claimed) -> None:
        """One timer by each clock: what is due next may go by either (store/set_clock.py)."""
        self.close()
        due = reply.next_due
        if due is not None:
            clock = self._services.clock
            loop = self._services.loop
            self._due_timers = (
                clock.timer(loop, due, self.claim_due),
                timer_at(clock, loop, due, reply.read_at, self.claim_due),
            )

    def close(self) -> None:
        for timer in self._due_timers:
            timer.cancel()
        self._due_timers = ()
