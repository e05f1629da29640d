"""`Posts`: what the worker's loop posts to the store, in at most two pieces for each turn."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from eventflow.core.errors import StoreError
from eventflow.engine.worker_services import Posts
from eventflow.store.protocol import MarkStarted, OpList, Store


class Queue:
    """A store that keeps what is posted."""

    def __init__(self) -> None:
        self.posted: list[tuple[Any, Callable[[Any], None]]] = []

    def post(self, op: Any, reply: Callable[[Any], None], _loop: object) -> None:
        self.posted.append((op, reply))


@pytest.fixture
def queue() -> Queue:
    return Queue()


@pytest.fixture
def posts(queue: Queue) -> Iterator[Posts]:
    loop = asyncio.new_event_loop()
    yield Posts(cast(Store, queue), loop)
    loop.close()


FIRST = MarkStarted(1, 1)
SECOND = MarkStarted(2, 1)
THIRD = MarkStarted(3, 1)
FOURTH = MarkStarted(4, 1)


def operations(queue: Queue) -> list[Any]:
    return [op for op, _ in queue.posted]


@pytest.mark.anyio
async def test_what_follows_in_one_turn_is_one_piece(queue: Queue) -> None:
    """While an operation is under way, the first one of a turn is queued at once; those that follow
    in that turn are queued in the next one, in one piece and in order; each caller gets its own
    reply.
    """
    loop = asyncio.get_running_loop()
    posts = Posts(cast(Store, queue), loop)
    replies: list[tuple[str, Any]] = []
    posts.post(FIRST, print)
    loop.call_soon(posts.post, SECOND, lambda reply: replies.append(("second", reply)))
    loop.call_soon(posts.post, THIRD, lambda reply: replies.append(("third", reply)))
    loop.call_soon(posts.post, FOURTH, lambda reply: replies.append(("fourth", reply)))
    await asyncio.sleep(0)
    assert operations(queue) == [FIRST, SECOND]
    await asyncio.sleep(0)
    assert operations(queue) == [FIRST, SECOND, OpList([THIRD, FOURTH])]
    for (_, reply), answer in zip(queue.posted, ("one", "two", ["three", "four"]), strict=True):
        reply(answer)
    assert replies == [("second", "two"), ("third", "three"), ("fourth", "four")]


@pytest.mark.anyio
async def test_each_turn_posts_its_own_operations(queue: Queue) -> None:
    """The first operation of the next turn is queued at once again."""
    posts = Posts(cast(Store, queue), asyncio.get_running_loop())
    for op in (FIRST, SECOND, THIRD):
        posts.post(op, print)
        assert queue.posted[-1][0] == op
        await asyncio.sleep(0)
    assert len(queue.posted) == 3


def test_a_run_that_is_alone_posts_at_once(posts: Posts, queue: Queue) -> None:
    """An operation that follows the answer of the one before it does not wait for a turn."""
    for op in (FIRST, SECOND, THIRD):
        posts.post(op, print)
        queue.posted[-1][1]("answer")
    assert operations(queue) == [FIRST, SECOND, THIRD]


def test_flush_queues_what_was_posted(posts: Posts, queue: Queue) -> None:
    """After `flush` no operation waits for a turn of the loop that may not come."""
    for op in (FIRST, SECOND, THIRD):
        posts.post(op, print)
    posts.flush()
    posts.flush()
    assert operations(queue) == [FIRST, SECOND, THIRD]


def test_a_failed_store_answers_every_operation(posts: Posts, queue: Queue) -> None:
    """When storage failed, each caller of a batch gets the failure."""
    replies: list[Any] = []
    for op in (FIRST, SECOND, THIRD, FOURTH):
        posts.post(op, replies.append)
    posts.flush()
    failed = StoreError("the disk is gone")
    for _, reply in queue.posted:
        reply(failed)
    assert replies == [failed] * 4
