"""Webhooks into the real ledger: store, router, reactor and HTTP together, and what a restart
remembers.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import structlog

from eventflow.core.clock import SystemClock
from eventflow.intake.reactor import Reactor
from eventflow.routing.router import Router
from eventflow.runs.run import Ids
from eventflow.store.sqlite import SqliteStore
from tests.conftest import eventually
from tests.triggers.serving import serving
from triggers.signatures import Bearer
from triggers.webhook import Webhook

AUTH = {"authorization": "Bearer s3cret-token", "content-type": "application/json"}


@asynccontextmanager
async def served(path: Path) -> AsyncIterator[tuple[httpx2.AsyncClient, SqliteStore]]:
    """One boot: the store opened, a webhook listening and served."""
    clock, trigger = SystemClock(), Webhook("/orders", verify=Bearer("s3cret-token"))
    store = SqliteStore(path, clock=clock, free_floor=0, ballast=0)
    store.open()
    reactor = Reactor(
        store, Router([], Ids(store.last_id), clock), clock, [trigger], random.Random(1)
    )
    try:
        async with serving(trigger.routes) as port:
            reactor.start(set())
            await eventually(
                lambda: reactor.health[trigger.name].state == "listening", "the webhook listens"
            )
            async with httpx2.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", headers=AUTH
            ) as client:
                yield client, store
            await reactor.stop()
    finally:
        store.close()


def test_p2_one_fate_across_restarts(tmp_path: Path):
    """A 202 is a row in the ledger; the same id is a duplicate of it after a restart too, and
    another body a conflict.
    """

    async def main() -> None:
        async with served(tmp_path / "a.db") as (client, store):
            first = await client.post(
                "/hooks/orders", content=b'{"total": 5}', headers={"idempotency-key": "k1"}
            )
            assert first.status_code == 202
            row = await store.event(first.json()["id"])
            assert (row["event_id"], row["trigger"], row["source"]) == (
                "k1",
                "webhook-orders",
                "/hooks/orders",
            )
        async with served(tmp_path / "a.db") as (client, store):
            again = await client.post(
                "/hooks/orders", content=b'{"total":5}', headers={"idempotency-key": "k1"}
            )
            assert again.status_code == 200 and again.json() == {**first.json(), "duplicate": True}
            with structlog.testing.capture_logs():
                other = await client.post(
                    "/hooks/orders", content=b'{"total": 6}', headers={"idempotency-key": "k1"}
                )
            assert other.status_code == 409
            counts = await store.counts()
            assert (counts["duplicates"], counts["conflicts"], counts["dead"]) == (1, 1, 1)

    asyncio.run(main())


def test_p9_unreadable_is_a_dead_letter_in_the_ledger(tmp_path: Path):
    """A verified body that cannot be read is a dead letter with its bytes; no
    credential is in the file.
    """
    body = b'{"total": 5, "total": 6}'

    async def main() -> None:
        async with served(tmp_path / "a.db") as (client, store):
            refused = await client.post(
                "/hooks/orders",
                content=body,
                headers={"webhook-id": "w1", "cookie": "session=topsecret"},
            )
            assert refused.status_code == 400
            (letter,) = await store.dead_letters()
            whole = await store.dead_letter(letter["id"])
            assert "twice" in str(whole)
        assert not any(
            secret in file.read_bytes()
            for file in tmp_path.iterdir()
            for secret in (b"s3cret-token", b"topsecret")
        )
        assert any(body in file.read_bytes() for file in tmp_path.iterdir())

    asyncio.run(main())
