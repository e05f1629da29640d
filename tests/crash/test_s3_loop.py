"""The S3 trigger's kill loop, short enough for every change; and kills at the two seams that
matter, one by one.
"""

import shutil
from pathlib import Path

import pytest

from tests.aws import Aws, Bucket, ministack
from tests.conftest import wait_until
from tests.crash.s3_loop import Loop
from tests.crash.victim import HERE, Server
from tests.faults import action, proxied

__all__ = ["ministack"]

SEED = 31


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("way", "cycles"), [("queue", 10), ("both", 6), ("sweep", 4)])
def test_p1_p2_kill_9_between_receive_record_and_delete(
    ministack: Aws, tmp_path: Path, way: str, cycles: int
):
    """Killed at random moments while objects are put, overwritten and told twice: each version has
    exactly one run, and no message is gone whose event is not in the ledger.
    """
    with proxied(ministack.url) as proxy:
        loop = Loop(tmp_path, ministack, proxy, way, SEED)
        wrong = loop.run(cycles)
    print(loop.report(cycles))
    assert wrong == [], (
        f"again: python -m tests.crash.s3_loop --cycles {cycles} --way {way} --seed {SEED}"
    )
    assert len(loop.writers.sent) > 50 and (way == "sweep" or loop.counts["duplicates"] > 0)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("seam", ["received", "recorded"])
def test_c2_s12_a_kill_at_either_seam_is_one_run(ministack: Aws, tmp_path: Path, seam: str):
    """Killed after the queue gave a message out, and after its event was recorded but not yet
    deleted: it is visible again after its timeout, and is one run.
    """
    bucket = Bucket(ministack)
    queue = bucket.queue()
    env = {**ministack.env, "CRASH_BUCKET": bucket.name, "CRASH_QUEUE": queue.url}
    with proxied(ministack.url) as proxy:
        if seam == "received":
            proxy.fail(action("ReceiveMessage"), after=30.0)
        else:
            proxy.fail(action("DeleteMessageBatch"), delay=30.0)
        server = Server(HERE / "s3_app.py", tmp_path, env={**env, "AWS_ENDPOINT_URL": proxy.url})
        assert server.wait_ready(), server.log_tail
        bucket.put("in/a")
        wait_until(lambda: queue.visible == 0, "the messages are given out")
        if seam == "recorded":
            wait_until(lambda: server.get("/api/counts")["completed"] == 1, "it has run")
        else:
            assert server.get("/api/counts")["events"] == 0
        server.kill()
    assert queue.remaining >= 1
    server = Server(HERE / "s3_app.py", tmp_path, 1, env=env)
    assert server.wait_ready(), server.log_tail
    wait_until(lambda: queue.remaining == 0, "the queue is empty")
    wait_until(lambda: server.get("/api/counts")["pending"] == 0, "all is at rest")
    counts = server.get("/api/counts")
    assert (counts["events"], counts["runs"], counts["completed"]) == (1, 1, 1)
    assert counts["duplicates"] == (1 if seam == "recorded" else 0)
    assert server.stop() == 0
