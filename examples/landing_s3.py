"""Partners drop CSV files of sales in a bucket; each becomes a report of totals per region, there too. Bad files fail loudly.

    docker compose up -d minio        # or any S3: then leave S3_ENDPOINT_URL out, and set SALES_QUEUE to its SQS queue
    export S3_ENDPOINT_URL=http://127.0.0.1:9000 AWS_ACCESS_KEY_ID=eventflow AWS_SECRET_ACCESS_KEY=eventflow-local
    alias s3="aws --endpoint-url $S3_ENDPOINT_URL s3" && s3 mb s3://sales && eventflow serve examples/landing_s3.py
    printf 'region,amount\\nnorth,10\\nsouth,x\\nnorth,5.5\\n' | s3 cp - s3://sales/in/monday.csv

Watch: within a poll (or at once, with a queue) reports/monday.csv.json is in the bucket. Drop a file without an `amount`
column: no report, but a failed run, in `eventflow ls runs` with its reason; mend it, drop it again, and that version is an
event of its own. What lands while nothing runs is found at the next start. Needs: pip install 'eventflow-reactor[s3]'.
"""

import csv
import io
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiobotocore.session import AioSession

from eventflow import App, Permanent, Retry, current_run, flow, task
from triggers import S3

BUCKET, QUEUE = os.environ.get("SALES_BUCKET", "sales"), os.environ.get("SALES_QUEUE") or None
PLACE = {
    "endpoint_url": os.environ.get("S3_ENDPOINT_URL"),
    "region": os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
}


@task(retries=Retry(attempts=5, give_up_on=(UnicodeDecodeError,)))
async def validate(key: str, etag: str) -> tuple[list[tuple[str, float]], int]:
    """Reads the version that the event is about: its sales, and how many rows are none. Some files
    are nobody's sales.
    """
    s3 = current_run().state
    try:
        found = await s3.get_object(Bucket=BUCKET, Key=key, IfMatch=etag)
    except s3.exceptions.ClientError as error:
        if error.response["Error"]["Code"] in ("NoSuchKey", "PreconditionFailed"):
            raise Permanent(
                f"{key}: this version is gone; a newer one has a run of its own"
            ) from error
        raise
    reader = csv.DictReader(io.StringIO((await found["Body"].read()).decode()))
    if missing := {"region", "amount"} - set(reader.fieldnames or ()):
        raise Permanent(
            f"{key}: expected columns region and amount, missing {', '.join(sorted(missing))}"
        )
    sales, bad = [], 0
    for row in reader:
        try:
            sales.append((row["region"], float(row["amount"])))
        except ValueError:
            bad += 1
    return sales, bad


@task(retries=Retry(attempts=5))
async def report(key: str, totals: dict[str, float], bad: int) -> str:
    """Whole or not at all, and the same when written twice: a put is both."""
    name = f"reports/{key.removeprefix('in/')}.json"
    body = json.dumps({"totals": totals, "rejected_rows": bad}, indent=2)
    await current_run().state.put_object(Bucket=BUCKET, Key=name, Body=body.encode())
    return f"s3://{BUCKET}/{name}"


@flow
async def land(key: str, etag: str) -> str:
    sales, bad = await validate(key, etag)
    totals: dict[str, float] = {}
    for region, amount in sales:
        totals[region] = round(totals.get(region, 0.0) + amount, 2)
    return await report(key, totals, bad)


@asynccontextmanager
async def client() -> AsyncIterator[Any]:
    """One client for all tasks, on the loop that flows run on."""
    async with AioSession().create_client(
        "s3", PLACE["region"], endpoint_url=PLACE["endpoint_url"]
    ) as s3:
        yield s3


app = App("landing-s3", lifespan=client)
app.on(S3(BUCKET, prefix="in/", suffix=".csv", queue=QUEUE, poll=5, **PLACE), land)
