"""Partners drop CSV files of sales in a bucket; each becomes a report in it. Bad files fail.

    docker compose up -d minio
    export S3_ENDPOINT_URL=http://127.0.0.1:9000 AWS_ACCESS_KEY_ID=eventflow
    export AWS_SECRET_ACCESS_KEY=eventflow-local; alias s3="aws --endpoint-url $S3_ENDPOINT_URL s3"
    s3 mb s3://sales && eventflow serve examples/landing_s3.py
    printf 'region,amount\\nnorth,10\\nsouth,x\\nnorth,5.5\\n' | s3 cp - s3://sales/in/monday.csv

Watch: after a poll (at once with an SQS queue, $SALES_QUEUE) reports/monday.csv.json is in the
bucket. A file without an `amount` column makes a failed run; a corrected version is a new event.
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
ENDPOINT = os.environ.get("S3_ENDPOINT_URL")
REGION = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")


@task(retries=Retry(attempts=5, give_up_on=(UnicodeDecodeError,)))
async def validate(key: str, etag: str) -> tuple[list[tuple[str, float]], int]:
    """Read the version of the event: its sales, and the number of bad rows."""
    s3 = current_run().state
    try:
        found = await s3.get_object(Bucket=BUCKET, Key=key, IfMatch=etag)
    except s3.exceptions.ClientError as error:
        if error.response["Error"]["Code"] in ("NoSuchKey", "PreconditionFailed"):
            raise Permanent(f"{key}: this version is gone; a newer one has its run") from error
        raise
    reader = csv.DictReader(io.StringIO((await found["Body"].read()).decode()))
    if missing := {"region", "amount"} - set(reader.fieldnames or ()):
        raise Permanent(f"{key}: missing {' and '.join(sorted(missing))}")
    sales, bad = [], 0
    for row in reader:
        try:
            sales.append((row["region"], float(row["amount"])))
        except ValueError:
            bad += 1
    return sales, bad


@task(retries=Retry(attempts=5))
async def report(key: str, totals: dict[str, float], bad: int) -> str:
    """A put is atomic and idempotent, as a body that may run again needs it."""
    name = f"reports/{key.removeprefix('in/')}.json"
    body = json.dumps({"totals": totals, "rejected_rows": bad}).encode()
    await current_run().state.put_object(Bucket=BUCKET, Key=name, Body=body)
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
    async with AioSession().create_client("s3", REGION, endpoint_url=ENDPOINT) as s3:
        yield s3


app = App("landing-s3", lifespan=client)
sales = S3(BUCKET, prefix="in/", suffix=".csv", queue=QUEUE, endpoint_url=ENDPOINT, region=REGION)
app.on(sales, land)
