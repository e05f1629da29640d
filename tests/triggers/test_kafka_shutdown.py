"""Clients of Kafka that are cancelled at a bad moment leave no connection and no task behind in the
loop they worked on.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eventflow import Event
from eventflow.events.event import OutboxMessage
from tests.brokers import Broker, OwnBroker, noida
from tests.conftest import eventually
from tests.triggers.kafka_proxy import Proxy, behind_a_proxy
from tests.triggers.kafka_topic import Topic, make_topic
from triggers import KafkaSink

Work = Callable[[Topic, Proxy], Awaitable[None]]


@pytest.fixture(scope="module")
def behind() -> Iterator[tuple[Broker, Proxy]]:
    with behind_a_proxy() as both:
        yield both


def run(behind: tuple[Broker, Proxy], work: Work) -> None:
    """`work`, after which nothing may be left: of its connections none, of its tasks none."""
    broker, proxy = behind
    proxy.responses_left = None

    async def go() -> None:
        async with proxy.listening():
            topic = await make_topic(broker, rebalance_timeout_ms=1_000)
            await eventually(lambda: not proxy.open_connections, "the topic's maker is gone")
            before = asyncio.all_tasks()
            proxy.withheld = False
            await work(topic, proxy)
            await eventually(
                lambda: not proxy.open_connections, "every connection is closed", within=40
            )
            await eventually(
                lambda: not (own_tasks() - before),
                f"every task has ended: {own_tasks() - before}",
                within=40,
            )

    asyncio.run(go())


def own_tasks() -> set[asyncio.Task[Any]]:
    """Without those of the proxy."""
    return {task for task in asyncio.all_tasks() if "Proxy" not in repr(task.get_coro())}


def message(topic: Topic) -> OutboxMessage:
    event = Event(id="a", source="/s", type="order.scored", data={"n": 1})
    return OutboxMessage(number=1, event=event, trigger=topic.name, ledger_id=7)


async def withheld(proxy: Proxy) -> None:
    await eventually(lambda: proxy.withheld, "an answer is withheld")


@pytest.mark.parametrize("client", ["trigger", "sink"])
def test_a_start_that_is_cancelled(behind: tuple[Broker, Proxy], client: str):
    """Cancelled between its first question and the answer, a client closes that connection."""

    async def work(topic: Topic, proxy: Proxy) -> None:
        proxy.responses_left = 1  # which versions there are; not which brokers
        sink = KafkaSink(topic.name, bootstrap_servers=topic.broker.server)
        starts = (
            topic.make().listen(topic.ledger) if client == "trigger" else sink.send(message(topic))
        )
        task = asyncio.ensure_future(starts)
        await withheld(proxy)
        task.cancel()
        asyncio.get_running_loop().call_later(0.2, setattr, proxy, "responses_left", None)
        with pytest.raises(asyncio.CancelledError):
            await task

    run(behind, work)


def test_a_leave_that_is_cancelled(behind: tuple[Broker, Proxy]):
    """A second cancel while a member leaves, with a broker that does not answer, cuts the leaving
    short and not the closing.
    """

    async def work(topic: Topic, proxy: Proxy) -> None:
        with pytest.raises(asyncio.CancelledError):
            async with topic.read() as task:
                await topic.send(1)
                await topic.has(1)
                proxy.responses_left = 0
                proxy.withheld = False
                await withheld(proxy)
                task.cancel()
                for _ in range(3):
                    await asyncio.sleep(0)
                task.cancel()
                await task

    run(behind, work)


def sockets() -> int:
    """How many this process has open."""
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith("socket:") for link in links if link.is_symlink())


def stop(broker: OwnBroker) -> None:
    """It lives, and answers nothing any more."""
    assert broker.process is not None
    broker.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, broker.process.pid, os.WSTOPPED | os.WNOWAIT)


def test_a_sink_that_cannot_flush(tmp_path: Path):
    """A sink whose broker does not answer any more is closed as soon as its time is up, with the
    messages that it still had.
    """

    async def work(broker: OwnBroker, topic: Topic) -> None:
        before, tasks = sockets(), asyncio.all_tasks()
        sink = KafkaSink(topic.name, bootstrap_servers=broker.server)
        await sink.send(message(topic))
        stop(broker)
        sending = asyncio.ensure_future(sink.send(message(topic)))
        await asyncio.wait([sending], timeout=0.5)
        assert not sending.done()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await sink.close()
        await eventually(lambda: sockets() == before, "every connection is closed")
        await eventually(lambda: asyncio.all_tasks() == tasks, "every task has ended")

    async def go(broker: OwnBroker) -> None:
        await work(broker, await make_topic(broker))

    with noida(tmp_path) as broker:
        asyncio.run(go(broker))
