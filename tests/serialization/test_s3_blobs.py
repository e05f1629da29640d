"""Large results in a bucket of a real server: durable before a row references them, read by a
replay, never lost.
"""

import asyncio
import hashlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from eventflow import App, Retry, flow, task
from eventflow.core.errors import ResultsUnavailable, StoreCorrupt, UsageError
from eventflow.serialization.blobs import OFFLOAD_BYTES, Blobs
from eventflow.serialization.s3_blobs import S3BlobStore as Place
from eventflow.web.responses import error_response
from tests.aws import Aws, Bucket, ministack, moto
from tests.conftest import eventually
from tests.faults import DENIED, HANG_UP, SLOW_DOWN, Proxy, proxied

__all__ = ["ministack", "moto"]

BIG = OFFLOAD_BYTES + 1


@pytest.fixture(params=["ministack", "moto"])
def aws(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Aws:
    """Each of the servers, with its credentials in the environment."""
    found: Aws = request.getfixturevalue(request.param)
    for name, value in found.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    return found


def url(aws: Aws, bucket: Bucket, at: str | None = None) -> str:
    return f"s3://{bucket.name}/results?endpoint_url={at or aws.url}"


def keys(bucket: Bucket) -> list[str]:
    found = bucket.aws.s3.list_objects_v2(Bucket=bucket.name).get("Contents", [])
    return [each["Key"] for each in found]


def putting(method: str, path: str, headers: Any) -> bool:
    return method == "PUT"


def reading(method: str, path: str, headers: Any) -> bool:
    return method == "GET" and "/results/" in path


@task
async def big(letter: str) -> str:
    return letter * BIG


@flow
async def measure(letter: str) -> int:
    text = await big(letter)
    return len(text)


@flow
async def give(letter: str) -> str:
    return letter * BIG


def app_at(folder: Path, results: str) -> App:
    app = App(
        "results", store=f"sqlite:///{folder}/store.db", results=results, ballast=0, free_floor=0
    )
    app.add(measure, give)
    return app


# --------------------------------------------------------------------------- the place


def test_a_blob_is_an_object_named_by_its_content(aws: Aws, tmp_path: Path):
    """What was put is an object under its SHA-256, got again on a machine that has no copy, and put
    again without harm.
    """
    bucket = Bucket(aws)
    ref = Blobs(tmp_path / "one", Place(url(aws, bucket))).put(b"abc")
    assert ref == hashlib.sha256(b"abc").hexdigest() and keys(bucket) == [f"results/{ref}"]
    other = Blobs(tmp_path / "other", Place(url(aws, bucket)))
    assert other.get(ref) == b"abc" and other.put(b"abc") == ref
    assert bucket.read(f"results/{ref}") == b"abc"


def test_what_is_missing_or_altered_is_refused(aws: Aws, tmp_path: Path):
    """An object that is gone, or is not what its name says, is StoreCorrupt and never another
    value.
    """
    bucket = Bucket(aws)
    ref = Blobs(tmp_path / "one", Place(url(aws, bucket))).put(b"abc")
    bucket.put(f"results/{ref}", b"abd")
    with pytest.raises(StoreCorrupt, match="does not match its name"):
        Blobs(tmp_path / "other", Place(url(aws, bucket))).get(ref)
    bucket.delete(f"results/{ref}")
    with pytest.raises(StoreCorrupt, match="is missing"):
        Blobs(tmp_path / "other", Place(url(aws, bucket))).get(ref)


def test_a_torn_copy_is_read_from_the_bucket(aws: Aws, tmp_path: Path):
    """A file beside the store that a power cut emptied is replaced from the bucket."""
    bucket = Bucket(aws)
    blobs = Blobs(tmp_path, Place(url(aws, bucket)))
    ref = blobs.put(b"abc")
    copy = tmp_path / ref[:2] / ref[2:4] / ref
    copy.write_bytes(b"")
    assert blobs.get(ref) == b"abc" and copy.read_bytes() == b"abc"


def test_pruning_moves_local_blobs_to_the_bucket(aws: Aws, tmp_path: Path):
    """Copies go once they are old; what was here before there was a bucket is moved to it first;
    named or not, nothing is deleted there.
    """
    bucket = Bucket(aws)
    before = Blobs(tmp_path).put(b"before the bucket")
    blobs = Blobs(tmp_path, Place(url(aws, bucket)))
    known, loose = blobs.put(b"known"), blobs.put(b"loose")
    assert blobs.prune({before, known}, before=1 << 62) == 3
    assert sorted(keys(bucket)) == sorted(f"results/{ref}" for ref in (before, known, loose))
    assert blobs.get(before) == b"before the bucket" and blobs.get(known) == b"known"


def test_s29_a_store_that_rejects_checksum_headers(ministack: Aws, monkeypatch: pytest.MonkeyPatch):
    """A custom endpoint gets no checksum headers that only AWS understands."""
    for name, value in ministack.env.items():
        monkeypatch.setenv(name, value)
    bucket = Bucket(ministack)
    with proxied(ministack.url) as proxy:
        refused = (
            400,
            "<Error><Code>InvalidArgument</Code><Message>unsupported header</Message></Error>",
        )
        proxy.fail(
            lambda method, path, headers: any(
                "checksum" in name or "trailer" in name for name in headers
            ),
            refused,
        )
        place = Place(url(ministack, bucket, proxy.url))
        place.put("a" * 64, b"abc")
        assert place.get("a" * 64) == b"abc" and place.has("a" * 64) and not place.has("b" * 64)


def test_errors_name_place_and_reason(ministack: Aws, monkeypatch: pytest.MonkeyPatch):
    """A missing bucket, refused access and a missing server are one error with the place and the
    reason.
    """
    for name, value in ministack.env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ResultsUnavailable, match=r"s3://no-such-bucket/.*NoSuchBucket.*is the bucket there"
    ):
        Place(f"s3://no-such-bucket/p?endpoint_url={ministack.url}").put("a" * 64, b"abc")
    with proxied(ministack.url) as proxy:
        proxy.fail(lambda *_: True, DENIED)
        with pytest.raises(ResultsUnavailable, match="AccessDenied"):
            Place(f"s3://bucket/p?endpoint_url={proxy.url}").put("a" * 64, b"abc")
    with pytest.raises(ResultsUnavailable, match="EndpointConnectionError"):
        Place("s3://bucket?endpoint_url=http://127.0.0.1:9").get("a" * 64)


def test_the_api_answers_503_while_results_cannot_be_read():
    """A result that cannot be read now is a temporary error, not an error of the request."""
    answer = error_response(ResultsUnavailable("read", "s3://bucket/x", "SlowDown"))
    assert answer.status_code == 503 and "retry-after" in answer.headers


@pytest.mark.parametrize(
    "wrong", ["file:///x", "s3://", "bucket/prefix", "s3://bucket?secret=x", "s3://bucket/p#x"]
)
def test_other_urls_are_refused(wrong: str):
    """`results=` takes s3:// with endpoint_url and region, nothing else: no secret belongs
    in it.
    """
    with pytest.raises(UsageError, match="s3://bucket/prefix"):
        Place(wrong)


# --------------------------------------------------------------------------- runs


def test_results_of_tasks_and_flows_are_there_before_the_row(aws: Aws, tmp_path: Path):
    """A large result of a task and of a flow is in the bucket; the journal holds its name only, and
    the value comes back.
    """

    async def main() -> None:
        async with app_at(tmp_path, url(aws, bucket)) as app:
            assert await (await app.start(measure, letter="a")).result() == BIG
            assert await (await app.start(give, letter="b")).result() == "b" * BIG

    bucket = Bucket(aws)
    asyncio.run(main())
    rows = sqlite3.connect(tmp_path / "store.db")
    named = {
        bytes(value).decode()
        for (value,) in rows.execute("SELECT value FROM journal WHERE codec LIKE '%@blob'")
    }
    named |= {
        bytes(value).decode()
        for (value,) in rows.execute("SELECT result FROM runs WHERE codec LIKE '%@blob'")
    }
    rows.close()
    assert len(named) == 2 and sorted(keys(bucket)) == sorted(f"results/{ref}" for ref in named)


@pytest.mark.parametrize("fault", [SLOW_DOWN, HANG_UP], ids=["503", "hang up"])
def test_an_outage_on_put_loses_no_result(
    ministack: Aws, tmp_path: Path, fault: Any, monkeypatch: pytest.MonkeyPatch
):
    """While the bucket does not take a task's result it is put again; then the run completes, and
    the body ran once.
    """
    for name, value in ministack.env.items():
        monkeypatch.setenv(name, value)
    ran: list[str] = []

    @task
    async def work() -> str:
        ran.append("work")
        return "w" * BIG

    @flow
    async def outage() -> str:
        return await work() + "!"

    async def main(proxy: Proxy) -> None:
        rule = proxy.fail(putting, fault, times=4)
        app = app_at(tmp_path, url(ministack, bucket, proxy.url))
        app.add(outage)
        async with app:
            handle = await app.start(outage)
            await eventually(lambda: rule.hits >= 2, "it was tried")
            assert await handle.result() == "w" * BIG + "!"
        assert ran == ["work"] and rule.hits == 4 and len(keys(bucket)) == 2

    bucket = Bucket(ministack)
    with proxied(ministack.url) as proxy:
        asyncio.run(main(proxy))


def test_an_attempt_that_cannot_store_its_result_fails_and_is_retried(
    ministack: Aws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """If the bucket does not answer for all retries, the attempt fails; the next one stores its
    result.
    """
    for name, value in ministack.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("eventflow.serialization.blobs.OFFLOAD_RETRIES", 1)
    ran: list[str] = []

    @task(retries=Retry(attempts=2, delay=0.05))
    async def work() -> str:
        ran.append("work")
        return "w" * BIG

    @flow
    async def retried() -> int:
        return len(await work())

    async def main(proxy: Proxy) -> None:
        proxy.fail(
            putting, DENIED, times=2
        )  # one try of the client each: a refusal is not tried again by it
        app = app_at(tmp_path, url(ministack, bucket, proxy.url))
        app.add(retried)
        async with app:
            assert await (await app.start(retried)).result() == BIG
        assert ran == ["work", "work"]

    bucket = Bucket(ministack)
    with proxied(ministack.url) as proxy:
        asyncio.run(main(proxy))


def test_a_flow_whose_result_cannot_be_stored_is_put_off(
    ministack: Aws, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """If the result of a flow cannot be stored, the run waits and is tried again; it neither fails
    nor is lost.
    """
    for name, value in ministack.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("eventflow.serialization.blobs.OFFLOAD_RETRIES", 1)
    monkeypatch.setattr("eventflow.engine.run_end.RESULT_RETRY_DELAY", 200_000)

    async def main(proxy: Proxy) -> None:
        rule = proxy.fail(putting, DENIED, times=4)
        async with app_at(tmp_path, url(ministack, bucket, proxy.url)) as app:
            handle = await app.start(give, letter="c")
            assert await handle.result() == "c" * BIG
            assert rule.hits == 4

    bucket = Bucket(ministack)
    with proxied(ministack.url) as proxy:
        asyncio.run(main(proxy))


@pytest.mark.parametrize("faults", [0, 2])
def test_a_replay_reads_it_back_on_another_machine(
    ministack: Aws, tmp_path: Path, faults: int, monkeypatch: pytest.MonkeyPatch
):
    """A run continues without a local copy of its large value: it comes from the bucket. One that
    the bucket does not give now puts the run off; it completes when it can be read, and the body
    does not run again.
    """
    for name, value in ministack.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("eventflow.engine.run_end.RESULT_RETRY_DELAY", 200_000)
    gate = asyncio.Event()

    @task
    async def later() -> None:
        await gate.wait()

    @flow
    async def twice(letter: str) -> int:
        text = await big(letter)
        await later()
        return len(text)

    async def main(proxy: Proxy) -> None:
        place = url(ministack, bucket, proxy.url)
        app = app_at(tmp_path, place)
        app.add(twice)
        async with app:
            handle = await app.start(twice, letter="d")
            await eventually(lambda: keys(bucket), "the first result is there")
            await eventually(lambda: _journaled(app, handle.number), "and on record")
            await app.close(grace=0)
        for copy in (tmp_path / "store.db.blobs").glob("??/??/*"):
            copy.unlink()
        gate.set()
        rule = proxy.fail(reading, DENIED, times=faults)
        again = app_at(tmp_path, place)
        again.add(twice)
        async with again:
            assert await (await again.run_handle(handle.id)).result() == BIG
            assert rule.hits == faults

    bucket = Bucket(ministack)
    with proxied(ministack.url) as proxy:
        asyncio.run(main(proxy))


async def _journaled(app: App, run: int) -> bool:
    return len(await app.store.load(run)) >= 1
