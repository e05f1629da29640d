"""aiokafka's producer, with types, which it does not ship; client.py is the same for the consumer."""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import asyncio
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from eventflow.core.errors import MissingExtra
from triggers._kafka.shutdown import hang_up, with_whole_bootstrap

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
        """Queues a record; the future is done when the brokers have it. MessageSizeTooLargeError before anything is queued."""
        ...  # fmt: skip


def make_producer(options: Mapping[str, Any]) -> Producer:
    """A producer, not started, on the running loop. TypeError or ValueError for options that it refuses."""
    producer: Any = AIOKafkaProducer(**options)
    with_whole_bootstrap(producer.client)
    return cast(Producer, producer)


async def close(producer: Producer) -> None:
    """Flushes, then closes every connection. Cancelled, as when no broker is there to flush to, it lets the records go: their
    futures have an error, and nothing of it goes on."""
    raw = cast(Any, producer)
    try:
        await raw.stop()
    except asyncio.CancelledError:
        raw._message_accumulator.fail_all(KafkaError("closed before it was sent"))
        if raw._sender is not None and raw._sender.sender_task is not None:
            raw._sender.sender_task.cancel()
        raise
    finally:
        hang_up(raw.client)


def option_names() -> list[str]:
    """The options that this version's producer knows."""
    parameters = inspect.signature(cast(Any, AIOKafkaProducer).__init__).parameters
    return [name for name in parameters if name not in ("self", "loop", "api_version")]
