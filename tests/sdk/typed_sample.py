"""What a type checker must infer; `test_typing.py` runs pyright on it. Nothing here is executed."""

from collections.abc import Callable, Coroutine
from typing import Any, assert_type

from eventflow import App, Batch, Retry, current_run, current_task, flow, task
from eventflow.app import RunHandle
from eventflow.testing import result_of


@task
async def score(order: int, *, weight: float = 1.0) -> float:
    return order * weight


@task(retries=3, timeout=5)
def load(path: str) -> bytes:
    return path.encode()


@flow
async def handle(order: int, note: str = "") -> dict[str, float]:
    assert_type(await score(order), float)
    assert_type(await load("x"), bytes)
    assert_type(await score.map([1, 2]), list[float])
    assert_type(await score.map([1, 2], return_exceptions=False), list[float])
    assert_type(await score.map([1, 2], return_exceptions=True), list[float | BaseException])
    assert_type(await score.options_with(retries=Retry(attempts=2))(1), float)
    assert_type(await child(note), str)
    assert_type(current_run().id, str)
    return {"score": 1.0}


@flow(timeout=60)
async def child(note: str) -> str:
    assert_type(current_task().idempotency_digest, str)
    return note


async def program(app: App) -> None:
    assert_type(await app.start(handle, order=1), RunHandle[dict[str, float]])
    assert_type(await (await app.start(handle, order=1)).result(), dict[str, float])
    assert_type(await (await app.start("handle", order=1)).result(), Any)
    assert_type(await app.run_handle("1q3"), RunHandle[Any])
    assert_type(await result_of(app, child, note="x"), str)


async def functions() -> None:
    coroutine: Coroutine[Any, Any, float] = score.fn(1, weight=2.0)
    assert_type(await coroutine, float)
    assert_type(load.fn("x"), bytes)
    assert_type(await handle.fn(1), dict[str, float])
    plain: Callable[[str], bytes] = load.fn
    assert plain


async def mistakes(app: App) -> None:
    await score("1")  # pyright: ignore[reportArgumentType]
    await handle(order=1, nota="x")  # pyright: ignore[reportCallIssue]
    load.fn(1)  # pyright: ignore[reportArgumentType]
    task(retires=3)  # pyright: ignore[reportCallIssue]
    flow(timout=3)  # pyright: ignore[reportCallIssue]
    score.options_with(retrys=3)  # pyright: ignore[reportCallIssue]
    App("shop", max_pendng=3)  # pyright: ignore[reportCallIssue]
    App("shop", max_pending="3")  # pyright: ignore[reportArgumentType]
    app.on("order", handle, wher={})  # pyright: ignore[reportCallIssue]
    Retry(attemps=3)  # pyright: ignore[reportCallIssue]
    Batch(3, witin=3)  # pyright: ignore[reportCallIssue]
