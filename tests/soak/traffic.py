"""The traffic of the soak: a steady sender for every source of app.py.

What a sender sends it first enters into the account (account.py).
"""

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
from aiokafka import AIOKafkaProducer

from tests.aws import Bucket
from tests.brokers import Broker
from tests.soak.account import Account

PARTITIONS = 2
CANCEL_AFTER = 2.0
"""Seconds from the start of a run to its cancel."""
DELETE_AFTER = 10.0
"""Seconds from the upload of an object to its removal, so that the bucket stays small."""


class Traffic:
    """Sends until `over` is set. `run` returns when the last sender has, and raises what a sender
    raised.

    The number of its connections is the same on a fast and on a slow machine, so that one that the
    server does not close is seen: each route of the server has one, which stays open, and some
    requests have one of their own.
    """

    def __init__(
        self, url: str, token: str, broker: Broker, bucket: Bucket, landing: Path, rate: float
    ) -> None:
        self.broker = broker
        self.bucket = bucket
        self.landing = landing
        self.rate = rate
        self.account = Account()
        self.refusals: list[str] = []
        self.duplicates = 0
        self.over = asyncio.Event()
        self._draw = random.Random(1)
        self._url = url
        self._headers = {"authorization": f"Bearer {token}"}
        self._clients: dict[str, httpx2.AsyncClient] = {}

    async def run(self) -> None:
        senders: dict[Callable[[str, int], Awaitable[None]], float] = {
            self._order: 15,
            self._click: 15,
            self._state: 8,
            self._model: 6,
            self._fail: 1,
            self._object: 2,
            self._file: 2,
            self._alert: 2,
            self._scores: 5,
            self._patterns: 2,
            self._nap: 1,
            self._task_kinds: 3,
        }
        try:
            async with (
                self.broker.producer(linger_ms=5) as producer,
                asyncio.TaskGroup() as group,
            ):
                senders[lambda ident, n: self._record(producer, ident, n)] = 15
                for send, per_second in senders.items():
                    group.create_task(self._steadily(send, per_second * self.rate, len(senders)))
        finally:
            for client in self._clients.values():
                await client.aclose()

    async def _steadily(
        self, send: Callable[[str, int], Awaitable[None]], per_second: float, spread: int
    ) -> None:
        """`send(ident, number)` at a steady rate; what one sending takes is not caught up on."""
        prefix, number = f"{self._draw.getrandbits(32):08x}", 0
        next_at = time.monotonic() + self._draw.random() / per_second
        while not self.over.is_set():
            if (wait := next_at - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            next_at = max(next_at + 1 / per_second, time.monotonic())
            await send(f"{prefix}-{number}", number)
            number += 1

    def _open_client(self) -> httpx2.AsyncClient:
        """With one connection, whose requests wait for one another."""
        return httpx2.AsyncClient(
            base_url=self._url,
            headers=self._headers,
            timeout=30,
            trust_env=False,
            verify=False,
            limits=httpx2.Limits(max_connections=1, keepalive_expiry=None),
        )

    async def _post(self, path: str, body: Any, **headers: str) -> Any:
        """The answer, on the connection of the route."""
        route = path.split("/")[2]
        if route not in self._clients:
            self._clients[route] = self._open_client()
        return await self._post_by(self._clients[route], path, body, headers)

    async def _post_by(
        self,
        client: httpx2.AsyncClient,
        path: str,
        body: Any,
        headers: Mapping[str, str],
        expected: int = 202,
    ) -> Any:
        """The answer. After a 5xx once more, as every sender does; `refusals` has it."""
        answer = await client.post(path, json=body, headers=headers)
        if answer.status_code >= 500:
            self.refusals.append(f"POST {path}: {answer.status_code} {answer.text}")
            answer = await client.post(path, json=body, headers=headers)
        elif answer.status_code != expected:
            raise RuntimeError(f"POST {path}: {answer.status_code} {answer.text}")
        return answer.json()

    # ------------------------------------------------------------------ webhooks

    async def _order(self, ident: str, n: int) -> None:
        """A tenth of them twice: the second is a duplicate, and starts nothing. It comes on a new
        connection, which the server and the sender close in turn.
        """
        self.account.expect(ident, "order", "account")
        body = {"id": ident, "n": n, "customer": n % 50}
        await self._post("/hooks/orders", body)
        if n % 10 == 0:
            self.duplicates += 1
            headers = {"connection": "close"} if n % 20 else {}
            async with self._open_client() as client:
                await self._post_by(client, "/hooks/orders", body, headers, 200)

    async def _click(self, ident: str, n: int) -> None:
        self.account.expect(ident, "batch")
        await self._post("/hooks/clicks", {"id": ident})

    async def _state(self, ident: str, n: int) -> None:
        self.account.expect(ident, "debounce")
        await self._post("/hooks/states", {"id": ident, "key": n // 5 % 10})

    async def _model(self, ident: str, n: int) -> None:
        kind, path = (("singleflight", "models"), ("latest", "prices"))[n % 2]
        self.account.expect(ident, kind)
        await self._post(f"/hooks/{path}", {"id": ident, "key": n % 6})

    async def _fail(self, ident: str, n: int) -> None:
        self.account.expect(ident, "fail")
        await self._post("/hooks/fails", {"id": ident})

    async def _alert(self, ident: str, n: int) -> None:
        """An alert that fires, and the same one resolved."""
        status = ("detected", "resolved")[n % 2]
        fingerprint = f"{ident.partition('-')[0]}-{n // 2}"
        self.account.expect(f"{fingerprint}/{status}", "alert")
        alert = {"model": "prices", "feature": "amount", "status": status}
        alert |= {"fingerprint": fingerprint, "starts_at": "2026-11-01T00:00:00Z"}
        await self._post("/hooks/alerts", alert)

    async def _scores(self, ident: str, n: int) -> None:
        """Rows of which every other ten seconds' worth has drifted, once a reference is learned."""
        shift = 3.0 if n >= 50 and n // 50 % 2 else 0.0
        rows = [{"amount": self._draw.gauss(shift, 1)} for _ in range(20)]
        await self._post("/hooks/scores", {"id": ident, "rows": rows})

    # ------------------------------------------------------------------ other sources

    async def _record(self, producer: AIOKafkaProducer, ident: str, n: int) -> None:
        self.account.expect(ident, "record")
        value = json.dumps({"id": ident}).encode()
        await producer.send_and_wait(
            "records", value, key=b"%d" % (n % 20), partition=n % PARTITIONS
        )

    async def _object(self, ident: str, n: int) -> None:
        key = f"in/{ident}"
        self.account.expect(key, "object")
        await asyncio.to_thread(self.bucket.put, key)
        loop = asyncio.get_running_loop()
        loop.call_later(DELETE_AFTER, lambda: loop.run_in_executor(None, self._delete, key))

    def _delete(self, key: str) -> None:
        with suppress(Exception):  # the server of the bucket may be gone by now
            self.bucket.delete(key)

    async def _file(self, ident: str, n: int) -> None:
        name = f"{ident}-{'bad' if n % 10 == 9 else 'good'}.csv"
        self.account.expect(name, "file")
        draft = self.landing / f"{name}.tmp"
        draft.write_text("a,b\n1,2\n")
        draft.rename(self.landing / name)

    async def _patterns(self, ident: str, n: int) -> None:
        """Events of one key for each pattern: all match, but a fourth of those with an opposite."""
        opposite = n % 4 == 3
        types = ["login", "login", "login", "left", "right", "placed"]
        types += ["withdrawn", "paid", "sold", "shipped"] if opposite else ["paid", "sold"]
        self.account.expect(ident, "login", "left")
        if not opposite:
            self.account.expect(ident, "placed", "sold")
        for number, kind in enumerate(types):
            headers = {"ce-specversion": "1.0", "ce-source": "soak", "ce-type": kind}
            headers["ce-id"] = f"{ident}-{number}"
            await self._post("/api/events", {"key": ident}, **headers)

    # ------------------------------------------------------------------ runs by the API

    async def _start(self, flow: str, ident: str, **params: Any) -> str:
        body = {"flow": flow, "params": {"id": ident, **params}, "idempotency_key": ident}
        return (await self._post("/api/runs", body))["id"]

    async def _nap(self, ident: str, n: int) -> None:
        in_memory = n % 2 == 0
        self.account.expect(ident, "nap")
        run = await self._start("nap", ident, seconds=30 if in_memory else 3600)
        await asyncio.sleep(CANCEL_AFTER)
        await self._post(f"/api/runs/{run}/cancel", {"reason": "the soak cancels it"})
        self.account.cancelled += 1

    async def _task_kinds(self, ident: str, n: int) -> None:
        flow, kind = (
            ("rest", "rest"),
            ("times_out", "timeout"),
            ("overdue", "overdue"),
            ("train", "train"),
            ("again", "again"),
        )[n % 5]
        self.account.expect(ident, kind)
        await self._start(flow, ident, **({"left": 2} if flow == "again" else {}))
