"""Two tasks of one name: each has its own limit, and one flow does not call both."""

import asyncio
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from eventflow import App, UsageError, flow, task
from eventflow.testing import result_of, running

pytestmark = pytest.mark.anyio

SOURCE = """
import asyncio
from eventflow import task
running = 0
most = 0

@task(concurrency={limit})
async def load(x):
    global running, most
    running += 1
    most = max(most, running)
    await asyncio.sleep(0.01)
    running -= 1
    return ("{name}", x)

@task
async def {name}_only(x):
    return x
"""


@pytest.fixture
def shops() -> Iterator[tuple[Any, Any]]:
    """Two modules, each with a task `load`; the limits are 1 and 4."""
    made = []
    for name, limit in (("first_shop", 1), ("second_shop", 4)):
        module = ModuleType(name)
        sys.modules[name] = module
        exec(SOURCE.format(name=name, limit=limit), vars(module))
        made.append(module)
    yield made[0], made[1]
    for module in made:
        del sys.modules[module.__name__]


async def test_each_has_the_limit_of_its_own_module(shops: tuple[Any, Any]) -> None:
    """`@task(concurrency=)` of one module does not bound, or widen, the task of another one."""
    first, second = shops

    @flow
    async def uses_first() -> None:
        await asyncio.gather(*(first.load(each) for each in range(6)))

    @flow
    async def uses_second() -> None:
        await asyncio.gather(*(second.load(each) for each in range(6)))

    async with running(App("limits")) as app:
        await asyncio.gather(result_of(app, uses_first), result_of(app, uses_second))
    assert (first.most, second.most) == (1, 4)


async def test_a_flow_that_calls_both_is_refused(shops: tuple[Any, Any]) -> None:
    """A flow that calls two tasks of one name cannot be registered; the message names both."""
    first, second = shops
    first_load, second_load = first.load, second.load

    async def helper() -> None:
        await second_load(1)

    @flow
    async def directly() -> None:
        await first_load(1)
        await second_load(1)

    @flow
    async def by_a_helper() -> None:
        await first_load(1)
        await helper()

    for each in (directly, by_a_helper):
        with pytest.raises(UsageError, match=r"first_shop\.load and second_shop\.load") as caught:
            App("both").add(each)
        assert "@task(name=...)" in str(caught.value)
        assert "test_task_names.py" in str(caught.value)


def test_tasks_in_a_dict_are_not_seen(shops: tuple[Any, Any]) -> None:
    """The check reads the flow's code: it does not look into a dict, a list or an argument."""
    loads = {"first": shops[0].load, "second": [shops[1].load]}

    @flow
    async def by_a_dict() -> None:
        await loads["first"](1)
        await loads["second"][0](1)

    App("unseen").add(by_a_dict)


def test_modules_that_also_have_such_a_task_are_no_conflict(shops: tuple[Any, Any]) -> None:
    """Only what the flow calls counts: the other module may have a task of the same name."""
    first, second = shops

    @flow
    async def uses_one_of_each() -> None:
        await first.load(1)
        await second.second_shop_only(1)

    App("one").add(uses_one_of_each)


def test_the_same_task_with_other_options_is_one_task(shops: tuple[Any, Any]) -> None:
    """`options_with` keeps the identity of a task."""
    load = shops[0].load
    patient = load.options_with(retries=3)

    @flow
    async def uses_variants() -> None:
        await load(1)
        await patient(1)

    App("variants").add(uses_variants)
    assert patient.identity == load.identity
    assert task(name="load")(load.fn).identity == load.identity
