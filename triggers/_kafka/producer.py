"""The part of aiokafka's producer that `KafkaSink` uses, with types; like client.py."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from eventflow.core.errors import MissingExtra
from triggers._kafka.shutdown import close_connections, finish_bootstrap_despite_cancel

try:
    from aiokafka import AIOKafkaProducer
    from aiokafka.errors import KafkaError, MessageSizeTooLargeError
except ImportError as error:
    raise MissingExtra("triggers.KafkaSink", "aiokafka", "kafka") from error

__all__ = [
    "KafkaError",
    "MessageSizeTooLargeError",
    "Producer",
    "close",
    "make_producer",
    "option_names",
]


class Producer(Protocol):
    """AIOKafkaProducer."""

    async def start(self) -> None: ...
    async def send(
        self,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        *,
        timestamp_ms: int | None,
        headers: Sequence[tuple[str, bytes]],
    ) -> asyncio.Future[Any]:
        """Queues a record; the future is done when the brokers have it. Raises
        MessageSizeTooLargeError without queueing.
        """
        ...


def make_producer(options: Mapping[str, Any]) -> Producer:
    """A producer, not started, on the running loop. TypeError or ValueError for options that it
    refuses.
    """
    producer: Any = AIOKafkaProducer(**options)
    finish_bootstrap_despite_cancel(producer.client)
    return cast(Producer, producer)


async def close(producer: Producer) -> None:
    """Flushes, then closes all connections.

    A cancel (when no broker answers the flush) fails the futures of the queued records, and no task
    stays behind.
    """
    raw = cast(Any, producer)
    try:
        await raw.stop()
    except asyncio.CancelledError:  # the flush may never end
        raw._message_accumulator.fail_all(KafkaError("closed before it was sent"))
        if raw._sender is not None and raw._sender.sender_task is not None:
            raw._sender.sender_task.cancel()
        raise
    finally:
        close_connections(raw.client)


def option_names() -> list[str]:
    """The options of the installed version's producer."""
    parameters = inspect.signature(cast(Any, AIOKafkaProducer).__init__).parameters
    return [name for name in parameters if name not in ("self", "loop", "api_version")]
