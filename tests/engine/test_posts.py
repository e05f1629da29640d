"""`Posts`: what the worker's loop posts to the store, one by one and in batches."""

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


def test_what_is_posted_outside_of_a_batch_is_queued_at_once(posts: Posts, queue: Queue) -> None:
    """A single operation does not wait for others."""
    posts.post(FIRST, print)
    assert queue.posted == [(FIRST, print)]


def test_a_batch_is_one_piece_in_its_order(posts: Posts, queue: Queue) -> None:
    """The operations of a batch are queued at its end, also of an inner one, in one piece; each
    caller gets its own reply.
    """
    replies: list[tuple[str, Any]] = []
    with posts:
        posts.post(FIRST, lambda reply: replies.append(("first", reply)))
        with posts:
            posts.post(SECOND, lambda reply: replies.append(("second", reply)))
        assert not queue.posted
    ((op, reply),) = queue.posted
    assert op == OpList([FIRST, SECOND])
    reply(["one", "two"])
    assert replies == [("first", "one"), ("second", "two")]


def test_a_batch_of_one_is_the_operation_itself(posts: Posts, queue: Queue) -> None:
    """A batch adds nothing to a run that is alone."""
    with posts:
        posts.post(FIRST, print)
    with posts:
        pass
    assert queue.posted == [(FIRST, print)]


def test_a_failed_store_answers_every_operation(posts: Posts, queue: Queue) -> None:
    """When storage failed, each caller of a batch gets the failure."""
    replies: list[Any] = []
    with posts:
        posts.post(FIRST, replies.append)
        posts.post(SECOND, replies.append)
    failed = StoreError("the disk is gone")
    queue.posted[0][1](failed)
    assert replies == [failed, failed]


def test_a_batch_that_raises_is_queued_all_the_same(posts: Posts, queue: Queue) -> None:
    """An exception in a batch loses no operation posted before it."""
    with pytest.raises(ZeroDivisionError), posts:
        posts.post(FIRST, print)
        raise ZeroDivisionError
    assert queue.posted == [(FIRST, print)]
