"""What the doors over HTTP ask of an open App: its rooms, and the two ways in.

`App` (app.py) is the one that answers; it stands a floor above, so that these protocols are what web/, server.py and the way in
through them are written against. Everything here may be called on the loop of the way in.
"""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from eventflow.core.clock import Clock
from eventflow.events.event import Event, Receipt, Trigger
from eventflow.logs.log import Sink
from eventflow.routing.router import Router
from eventflow.routing.subscriptions import Subscription
from eventflow.sdk.flow import Flow
from eventflow.serialization.blobs import Blobs
from eventflow.store.protocol import Arrival
from eventflow.store.sqlite import SqliteStore

T = TypeVar("T")


class Intake(Protocol):
    """The reactor, as the doors see it."""

    draining: bool

    @property
    def health(self) -> Mapping[str, msgspec.Struct]: ...

    def pause(self, trigger: str, paused: bool) -> None: ...

    async def record(self, arrivals: Sequence[Arrival], trigger: str = "") -> list[Receipt]: ...


class WayOut(Protocol):
    """The relay, as the doors see it."""

    @property
    def health(self) -> Mapping[str, msgspec.Struct]: ...


class Way(Protocol):
    """The worker, as the doors see it."""

    held_back: str
    """Why it begins no runs for now; empty: it does."""

    @property
    def load(self) -> dict[str, int]: ...

    def hold_back(self, reason: str) -> None: ...


class Rooms(Protocol):
    """What runs while an App is open."""

    @property
    def router(self) -> Router: ...
    @property
    def reactor(self) -> Intake: ...
    @property
    def worker(self) -> Way: ...
    @property
    def relay(self) -> WayOut: ...
    @property
    def sink(self) -> Sink | None: ...
    @property
    def flow_loop(self) -> tuple[asyncio.AbstractEventLoop, int]:
        """The loop that flows run on, and the ident of its thread."""
        ...

    async def on_flow_loop(self, work: Coroutine[Any, Any, T]) -> T: ...


class Started(Protocol):
    """A run that was asked for."""

    @property
    def id(self) -> str: ...
    @property
    def duplicate(self) -> bool: ...


class Served(Protocol):
    """An App that a server serves."""

    name: str
    clock: Clock
    flows: dict[str, Flow[..., Any]]
    triggers: list[Trigger]

    @property
    def subscriptions(self) -> Sequence[Subscription]: ...
    @property
    def url(self) -> str: ...
    @property
    def is_open(self) -> bool: ...
    @property
    def house(self) -> Rooms: ...
    @property
    def store(self) -> SqliteStore: ...
    @property
    def blobs(self) -> Blobs: ...

    async def open(
        self, *, store: str | None = None, own_loop: bool = False, sink: Sink | None = None,
        listen: bool = True, passive: bool = False,
    ) -> None: ...  # fmt: skip

    async def close(self, grace: float = 20.0) -> None: ...

    async def accept(self, *events: Event) -> Any: ...

    async def start_with(
        self, flow: Flow[..., Any], params: bytes, idempotency_key: str | None = None
    ) -> Started: ...

    def flow(self, flow: Flow[..., Any] | str) -> Flow[..., Any]: ...
