"""Between Kafka clients and a broker, for tests: it counts connections, damages what passes, and
withholds answers.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from tests.brokers import Broker, free_port, tansu
from tests.conftest import POLL_SECONDS


class Proxy:
    """Applies `damage` to everything that passes, and lets `responses_left` responses through.

    `responses_left` None: all. `withheld`: whether a response is held back now.
    `open_connections`: of clients.
    """

    def __init__(self, port: int, target: int) -> None:
        self.port = port
        self._target = target
        self.damage: Callable[[bytes], bytes] | None = None
        self.responses_left: int | None = None
        self.withheld = False
        self.open_connections = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        self.open_connections += 1
        for pump in (self._forward_requests(reader, back), self._forward_responses(there, writer)):
            task = asyncio.create_task(pump)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _forward_requests(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        try:
            while data := await source.read(1 << 20):
                await self._pass(data, sink)
        except OSError:
            pass
        finally:
            self.open_connections -= 1
            await _close(sink)

    async def _forward_responses(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        try:
            while data := await source.read(1 << 20):
                while self.responses_left == 0:
                    self.withheld = True
                    await asyncio.sleep(POLL_SECONDS)
                self.responses_left = (
                    None if self.responses_left is None else self.responses_left - 1
                )
                await self._pass(data, sink)
        except OSError:
            pass
        finally:
            await _close(sink)

    async def _pass(self, data: bytes, sink: asyncio.StreamWriter) -> None:
        sink.write(data if self.damage is None else self.damage(data))
        await sink.drain()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        try:
            yield
        finally:
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)


async def _close(sink: asyncio.StreamWriter) -> None:
    sink.close()
    with suppress(OSError):
        await sink.wait_closed()


@contextmanager
def behind_a_proxy() -> Iterator[tuple[Broker, Proxy]]:
    """A broker that clients reach through a proxy only; the proxy is to be opened on the test's
    loop.
    """
    port = free_port()
    with tansu(advertised=port) as broker:
        proxy = Proxy(port, int(broker.server.rpartition(":")[2]))
        broker.server = f"127.0.0.1:{port}"
        yield broker, proxy
