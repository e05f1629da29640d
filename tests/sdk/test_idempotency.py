"""Idempotency keys: given to `app.start`, and handed to task bodies."""

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from eventflow import App, IdempotencyConflict, UsageError, current_task, flow, task
from eventflow.core.errors import NotFound
from eventflow.sdk.task import TaskContext
from eventflow.testing import VirtualClock, result_of, running

pytestmark = pytest.mark.anyio


@flow
async def work(n: int = 0) -> int:
    return n


@pytest.mark.parametrize("key", ["", " ", "\n"])
async def test_an_empty_key_is_refused(key: str) -> None:
    """An empty key is no key: it starts nothing, instead of a run for each call."""
    async with running(App("keys")) as app:
        with pytest.raises(UsageError, match="not empty"):
            await app.start(work, idempotency_key=key)
        with pytest.raises(UsageError, match="not empty"):
            await app.emit("order.paid", id=key)
        assert (await app.store.counts())["accepted"] == 0


async def test_other_parameters_are_a_conflict_of_its_own_class() -> None:
    """A known key with other parameters raises IdempotencyConflict, which names the key."""
    async with running(App("conflict")) as app:
        await app.start(work, idempotency_key="order-1", n=1)
        with pytest.raises(IdempotencyConflict, match="order-1") as caught:
            await app.start(work, idempotency_key="order-1", n=2)
        assert caught.value.key == "order-1"


async def test_a_key_whose_run_retention_removed_starts_nothing() -> None:
    """A known key stays known after its run is gone: same id, duplicate, and no second run."""
    clock = VirtualClock()
    app = App("old", retention=timedelta(days=1), identities=timedelta(days=90), clock=clock)
    async with running(app) as app:
        first = await app.start(work, idempotency_key="order-1", n=1)
        assert await first.result() == 1
        now = clock.now() + 1
        while await app.store.prune(payloads_before=now, identities_before=0):
            pass
        with pytest.raises(NotFound):
            await app.run_handle(first.id)
        again = await app.start(work, idempotency_key="order-1", n=1)
        assert (again.id, again.duplicate) == (first.id, True)
        with pytest.raises(NotFound):
            await again.result()
        assert await app.store.runs() == []


def _long_key(x: Any) -> str:
    return f"line\r\nX-Evil: 1/../{'ä' * 400}{x}"


@task(key=_long_key, retries=[0])
async def hand_out(x: int) -> tuple[str, str]:
    context = current_task()
    if context.attempt == 1:
        raise ValueError("again")
    return context.idempotency_key, context.idempotency_digest


@task
async def hand_out_plain() -> tuple[str, str]:
    return current_task().idempotency_key, current_task().idempotency_digest


@flow
async def hands_out() -> Any:
    return [await hand_out(1), await hand_out(2), await hand_out_plain()]


async def test_the_digest_is_safe_for_headers_and_file_names(tmp_path: Path) -> None:
    """`idempotency_digest` is 32 hexadecimal digits, different for each call; the key itself
    is unchanged.
    """
    async with running(App("digest")) as app:
        run = await app.start(hands_out)
        found = await result_of(app, hands_out)
        await run.cancel()
    keys = [key for key, _ in found]
    digests = [digest for _, digest in found]
    assert len({*digests}) == 3
    for digest in digests:
        assert re.fullmatch(r"[0-9a-f]{32}", digest)
        (tmp_path / digest).touch()
    assert keys[2].endswith("/hand_out_plain#0")
    assert keys[0].endswith(f"/hand_out[{_long_key(1)}]")


def test_the_digest_is_pinned() -> None:
    """The digest of a key never changes: a store of an earlier version may hold calls in flight."""

    context = TaskContext("1q3dcbd00krvt", "charge", 1, "1q3dcbd00krvt/charge#0")
    assert context.idempotency_digest == "bc5def7659e731d390dc3c1aab87d7e6"
    assert TaskContext("", "charge", 1, "").idempotency_digest == ""
