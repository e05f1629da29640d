"""What every test needs: asyncio as the loop, an environment without the developer's own
settings, and the one way to wait.

`wait_until` and `eventually` are the only permitted waits: they poll a predicate until a deadline
and then fail with a description (`comes_true` returns False instead). `stays` is for what must not
happen. Stores, brokers and servers are real; the fixtures that start them live beside the tests
that use them.
"""

import asyncio
import inspect
import os
import time
from collections.abc import Awaitable, Callable

import pytest

from eventflow.engine import run_parts

DEADLINE = 40.0
"""Seconds a wait may take: generous, because the machine may be slow; a test that passes never
waits this long.
"""

POLL_SECONDS = 0.01
"""Between two looks at a condition."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-parts",
        action="store_true",
        help="runs make all of their parts at their start, as a run that waits does",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--all-parts"):
        run_parts.MAKES_ALL_PARTS = True
        os.environ["ALL_PARTS"] = "1"  # for the processes of the crash tests


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the developer's EVENTFLOW_ settings, or writes a store where she works."""
    for name in os.environ:
        if name.startswith("EVENTFLOW_"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist gives its workers a width


def wait_until(
    predicate: Callable[[], object], description: str, *, within: float = DEADLINE
) -> None:
    """Polls until `predicate()` is true; fails with the description after `within` seconds. For
    tests without a loop.
    """
    deadline = time.monotonic() + within
    while not predicate():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {within:g} s in vain until {description}")
        time.sleep(POLL_SECONDS)


async def eventually(
    predicate: Callable[[], object | Awaitable[object]],
    description: str,
    *,
    within: float = DEADLINE,
    poll: float = POLL_SECONDS,
) -> None:
    """`wait_until` on a running loop; the predicate may be a coroutine function. `poll=0` looks at
    each turn of the loop.
    """
    if not await comes_true(predicate, within=within, poll=poll):
        pytest.fail(f"waited {within:g} s in vain until {description}")


async def comes_true(
    predicate: Callable[[], object | Awaitable[object]],
    *,
    within: float,
    poll: float = POLL_SECONDS,
) -> bool:
    """Like `eventually`, but returns whether the predicate became true within so many seconds."""
    deadline = time.monotonic() + within
    while True:
        answer = predicate()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer:
            return True
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(poll)


async def stays(predicate: Callable[[], object], description: str, *, during: float) -> None:
    """Fails as soon as `predicate()` is false, within `during` seconds. For what must not happen
    and leaves no later sign; where there is one, wait for that.
    """
    deadline = time.monotonic() + during
    while time.monotonic() < deadline:
        if not predicate():
            pytest.fail(f"expected for {during:g} s that {description}")
        await asyncio.sleep(POLL_SECONDS)
