"""What an App declares, before it is opened: flows, triggers, subscriptions, options.

app.py fills an `AppConfig` and opens a `Runtime` with it (runtime.py). Nothing here imports the
engine or the store, so that a program which only declares flows need not load them.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal, TypedDict, cast

import msgspec

from eventflow.core.clock import Clock
from eventflow.core.errors import UsageError
from eventflow.events.event import Trigger
from eventflow.routing.delivery import Delivery
from eventflow.routing.patterns import Pattern, compile_pattern
from eventflow.routing.subscriptions import SinkSubscription, Subscription, subscribe_pattern
from eventflow.sdk.flow import Flow, check_task_names
from eventflow.sdk.task import Task

Lifespan = Callable[[], AbstractAsyncContextManager[Any]]


class StoreOptions(TypedDict, total=False):
    """The options of a SqliteStore that `App(...)` passes on; defaults and units are there."""

    synchronous: Literal["FULL", "NORMAL"]
    max_pending: int
    max_pending_bytes: int
    free_floor: int | None
    ballast: int
    accept_loss: bool


class AppConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an App declares. Durations in microseconds; the collections grow until the App opens.

    `concurrency`: runs that work at once. `threads`: plain `def` tasks at once. `retention`: of
    bodies, journals and settled runs; `identities`: of event ids. `results`: `s3://bucket/prefix`
    for large results, None for files beside the store.
    """

    name: str
    clock: Clock
    lifespan: Lifespan | None = None
    concurrency: int = 1000
    threads: int = 32
    strict: bool = False
    retention: int
    identities: int
    results: str | None = None
    store_options: Mapping[str, Any] = {}
    flows: dict[str, Flow[..., Any]] = {}
    triggers: list[Trigger] = []
    subscriptions: list[Subscription] = []
    sink_subscriptions: list[SinkSubscription] = []

    def add_flow(self, flow: Flow[..., Any]) -> None:
        """UsageError for another object, or another flow of the same name."""
        if not isinstance(flow, Flow):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise no_flow(flow)
        if self.flows.setdefault(flow.name, flow) is not flow:
            raise UsageError(f"two flows are named {flow.name!r}; give one of them @flow(name=...)")
        check_task_names(flow)

    def add_trigger(self, trigger: Trigger) -> None:
        """UsageError for another object, or another trigger of the same name."""
        if any(trigger is known for known in self.triggers):
            return
        if not isinstance(trigger, Trigger):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UsageError(f"expected a trigger (with a name and listen()), found {trigger!r}")
        for known in self.triggers:
            if shared := served_paths(known) & served_paths(trigger):
                path = min(shared)
                raise UsageError(
                    f"two triggers take requests to {path}: {known!r} and {trigger!r}; make one "
                    "trigger and pass it to app.on for each flow"
                )
        if any(trigger.name == known.name for known in self.triggers):
            raise UsageError(f"two triggers are named {trigger.name!r}; give one of them name=...")
        self.triggers.append(trigger)

    def add_pattern(
        self,
        pattern: Pattern,
        flow: Flow[..., Any],
        priority: int | None,
        deliver: Delivery | None,
        name: str | None,
    ) -> None:
        """Subscribes a flow to a pattern, whose triggers are added too."""
        for trigger in pattern.triggers:
            self.add_trigger(trigger)
        self.add_flow(flow)
        self.subscriptions.append(
            subscribe_pattern(
                compile_pattern(pattern),
                flow,
                priority=priority,
                deliver=deliver,
                name=name,
                used_names=self.subscription_names(),
                late=pattern.late,
            )
        )

    def check_secrets(self) -> None:
        """Raises EmptySecret for a secret that a trigger or sink takes from the environment."""
        for each in (*self.triggers, *(every.sink for every in self.sink_subscriptions)):
            if (check := getattr(each, "check_secrets", None)) is not None:
                check()

    def subscription_names(self) -> set[str]:
        """Of subscriptions of flows and of sinks: they share one namespace."""
        return {each.name for each in (*self.subscriptions, *self.sink_subscriptions)}


def served_paths(trigger: Trigger) -> set[str]:
    """The HTTP paths that the app mounts for a trigger."""
    routes: Sequence[Any] = getattr(trigger, "routes", ())
    return {route.path for route in routes if hasattr(route, "path")}


def no_flow(found: object) -> UsageError:
    """The error for something else in the place of a flow."""
    if inspect.iscoroutine(found):
        name = found.__name__
        found.close()
        return UsageError(f"expected a flow, found a call of {name!r}; write {name}, not {name}()")
    if isinstance(found, Task):
        name = cast("Task[..., Any]", found).name
        return UsageError(
            f"expected a flow, found the task {name!r}; only flows have runs: call the task in "
            f"one, `@flow async def …: await {name}(…)`"
        )
    if inspect.isfunction(found):
        return UsageError(
            f"expected a flow, found the function {found.__name__!r}; decorate it with @flow"
        )
    return UsageError(
        f"expected a flow, found {found!r}; a flow is an `async def` function below @flow"
    )
