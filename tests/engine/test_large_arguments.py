"""A large argument of many calls costs the loop of all flows its hash once."""

import asyncio
import sys
from types import FrameType
from typing import Any

import pydantic
import pytest

from eventflow import App, flow, task
from eventflow.core.large_values import LargeValues
from eventflow.testing import result_of, running

pytestmark = pytest.mark.anyio


async def test_200_tasks_that_share_a_large_argument_hash_it_once() -> None:
    """The same large argument of many calls is encoded for the first of them only: the loop of all
    flows is not stopped by the others.
    """
    encoded = 0

    class Table(pydantic.BaseModel):
        cells: dict[str, str]

        @pydantic.model_serializer(mode="wrap")
        def count(self, dump: pydantic.SerializerFunctionWrapHandler) -> Any:
            nonlocal encoded
            encoded += 1
            return dump(self)

    data = Table(cells={str(n): "x" * 80 for n in range(10_000)})  # 0.9 MB of JSON

    @task
    async def call(n: int, data: Table) -> int:
        return n

    async def one(n: int, data: Table) -> int:
        return await call(n, data)

    @flow
    async def fans() -> int:
        results = await asyncio.gather(*(one(n, data) for n in range(200)))
        return len(results)

    app = App("large")
    app.add(fans)
    async with running(app):
        assert await result_of(app, fans) == 200
    assert 1 <= encoded <= 10, encoded  # for the names, the fingerprint and the record; else 400


@pytest.mark.parametrize(
    "data",
    [{str(n): "x" * 80 for n in range(10_000)}, "x" * 900_000],
    ids=["dict", "str"],
)
async def test_200_tasks_that_share_a_large_plain_argument_hash_it_once(data: Any) -> None:
    """The same holds for a dict and a text of 0.9 MB: their hashes are kept for the run, and not
    computed again for the 199 other calls.
    """
    hashed = 0

    def watch(frame: FrameType, event: str, _: object) -> None:
        nonlocal hashed
        if event == "call" and frame.f_code is LargeValues.add.__code__:
            hashed += frame.f_locals["value"] is data

    @task
    async def call(n: int, data: Any) -> int:
        return n

    async def one(n: int, data: Any) -> int:
        return await call(n, data)

    @flow
    async def fans() -> int:
        results = await asyncio.gather(*(one(n, data) for n in range(200)))
        return len(results)

    app = App("plain")
    app.add(fans)
    async with running(app):
        sys.setprofile(watch)
        try:
            assert await result_of(app, fans) == 200
        finally:
            sys.setprofile(None)
    assert 1 <= hashed <= 10, hashed
