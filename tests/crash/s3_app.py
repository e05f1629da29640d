"""The app that `s3_loop.py` kills: each object version becomes one run, whose result names it.

Served by `eventflow serve`. The way in comes from the environment: $CRASH_BUCKET, $CRASH_QUEUE
(empty: sweeps only) and $CRASH_RECONCILE (seconds between sweeps beside the queue; empty: none).
"""

import os
from typing import Any

from eventflow import App, flow, task
from triggers import S3


@task
async def look(key: str, etag: str) -> str:
    return f"{key}@{etag}"


@flow
async def land(key: str, etag: str) -> str:
    return await look(key, etag)


def way_in() -> S3:
    queue, reconcile = os.environ.get("CRASH_QUEUE"), os.environ.get("CRASH_RECONCILE")
    options: dict[str, Any] = (
        {"queue": queue, "reconcile": float(reconcile) if reconcile else None}
        if queue
        else {"poll": 0.1}
    )
    return S3(
        os.environ.get("CRASH_BUCKET", "crash"), wait=1, visibility=3, name="landing", **options
    )


app = App("crash-s3", ballast=0, free_floor=0)
app.on(way_in(), land)
