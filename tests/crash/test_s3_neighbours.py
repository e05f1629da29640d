"""kill -9 while one record of a message cannot be read: it costs itself alone, also over a restart
in another process with another hash seed.
"""

import json
from pathlib import Path

import pytest

from tests.aws import Aws, Bucket, Queue, ministack, moto
from tests.conftest import wait_until
from tests.crash.victim import HERE, Server
from tests.faults import action, proxied

__all__ = ["ministack", "moto"]

MALFORMED = {
    "no key": {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": "b"}, "object": {}}},
    "lone surrogate": {"eventName": "ObjectCreated:Put", "s3": "\ud800"},
}


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("seam", ["received", "recorded"])
@pytest.mark.parametrize("server_kind", ["ministack", "moto"])
def test_a_malformed_record_robs_no_other_over_a_kill(
    request: pytest.FixtureRequest, tmp_path: Path, server_kind: str, seam: str, kind: str
):
    """Killed after a message of three records was given out, and after it was recorded but not yet
    deleted: in the end the two good ones have one run each, the malformed one is one dead letter
    with its own bytes, and the queue is empty.
    """
    aws: Aws = request.getfixturevalue(server_kind)
    bucket, queue = Bucket(aws), Queue(aws)
    first, last = (bucket.record("ObjectCreated:Put", f"k{n}", sequencer=f"0{n}") for n in (0, 2))
    env = {**aws.env, "CRASH_BUCKET": bucket.name, "CRASH_QUEUE": queue.url}
    with proxied(aws.url) as proxy:
        if seam == "received":
            proxy.fail(action("ReceiveMessage"), after=30.0)
        else:
            proxy.fail(action("DeleteMessageBatch"), delay=30.0)
        behind = {**env, "AWS_ENDPOINT_URL": proxy.url, "PYTHONHASHSEED": "1"}
        server = Server(HERE / "s3_app.py", tmp_path, env=behind)
        assert server.wait_ready(), server.log_tail
        queue.send({"Records": [first, MALFORMED[kind], last]})
        wait_until(lambda: queue.visible == 0, "the message is given out")
        if seam == "recorded":
            wait_until(lambda: server.get("/api/counts")["completed"] == 2, "both have run")
        server.kill()
    assert queue.remaining == 1
    server = Server(HERE / "s3_app.py", tmp_path, 1, env={**env, "PYTHONHASHSEED": "2"})
    try:
        assert server.wait_ready(), server.log_tail
        wait_until(lambda: queue.remaining == 0, "the queue is empty")
        wait_until(lambda: server.get("/api/counts")["pending"] == 0, "all is at rest")
        counts = server.get("/api/counts")
        assert (counts["events"], counts["completed"], counts["dead"]) == (3, 2, 1)
        assert counts["duplicates"] == (3 if seam == "recorded" else 0)
        (letter,) = server.get("/api/dead")["dead"]
        kept = server.get(f"/api/events/{letter['ledger_id']}")["event"]
        assert (kept if isinstance(kept, dict) else json.loads(kept)) == MALFORMED[kind]
        assert server.stop() == 0
    finally:
        server.kill()
