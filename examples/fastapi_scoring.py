"""A FastAPI service that scores durably: eventflow lives inside it, the model is loaded once, every
answer is remembered.

    uvicorn examples.fastapi_scoring:api --port 8000
    curl localhost:8000/score -H 'content-type: application/json' -d '{"id": "o-1", "total": 99.5}'

Watch: the same order again answers with the same run and score, for its id is the idempotency key;
other figures under a known id are a 409. `predict` is plain code: it runs in a thread, holding up
nobody. Kill the service in the middle of a `POST /batch` and start it again: the batch goes on
unasked, and `GET /runs/ID` has its result.
"""

import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from eventflow import App, EventflowError, current_run, flow, task


class Order(BaseModel):
    id: str
    total: float


@asynccontextmanager
async def load_model() -> AsyncIterator[Callable[[float], float]]:
    print("model loaded", flush=True)
    yield lambda total: 1 / (1 + math.exp(3 - 0.02 * total))


@task(timeout=5)
def predict(order: Order) -> float:
    return round(current_run().state(order.total), 4)


@flow
async def score_all(orders: list[Order]) -> list[float]:
    return await predict.map(orders)


flows = App("scoring", lifespan=load_model)
flows.add(score_all)


@asynccontextmanager
async def opened(_: FastAPI) -> AsyncIterator[None]:
    async with flows:
        yield


api = FastAPI(lifespan=opened)


@api.post("/score")
async def score(order: Order) -> dict[str, Any]:
    """The run is durable before it starts, so a client that timed out may ask again."""
    run = await flows.start(score_all, idempotency_key=order.id, orders=[order])
    return {"run": run.id, "score": (await run.result())[0], "known": run.duplicate}


@api.post("/batch", status_code=202)
async def batch(orders: list[Order]) -> dict[str, Any]:
    return {"run": (await flows.start(score_all, orders=orders)).id}


@api.get("/runs/{ident}")
async def result(ident: str) -> Any:
    return await (await flows.run_handle(ident)).result()


@api.exception_handler(EventflowError)
async def refused(_: Request, error: EventflowError) -> JSONResponse:
    """Known id, other figures; no such run; another worker has the app; or an error of ours."""
    status = {2: 409, 5: 404, 75: 503}.get(error.exit_code, 500)
    return JSONResponse({"detail": str(error)}, status)
