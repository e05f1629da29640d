"""The kill loop of the S3 trigger: a real server and a real queue, objects put all the time, `kill
-9` again and again.

    python -m tests.crash.s3_loop --cycles 500 --seed 1              from a queue
    python -m tests.crash.s3_loop --cycles 100 --way both            a queue, and sweeps beside it
    python -m tests.crash.s3_loop --cycles 100 --way sweep           sweeps only

Two writers put objects, overwrite some of them, and send a tenth of what the queue tells a second
time. Each cycle starts `eventflow serve` behind a proxy that makes every answer of the queue a
little late, so that kills fall between receive, record and delete; it lives for a random moment and
is killed. After every kill no message may be gone whose event is not in the ledger; at the end
everything comes to rest, and each object version has exactly one run.
"""

import argparse
import hashlib
import json
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.aws import Aws, Bucket, Queue, serving
from tests.crash.verdict import a_seed, verdict
from tests.crash.victim import HERE, Server
from tests.faults import Proxy, proxied

PAUSE = 0.03
"""Seconds between two puts of a writer, at most."""
KEYS = 40
"""Keys that are put again and again; the others are new each time."""
BACKLOG = 200
"""Messages left above which the writers rest, looked at after each kill."""
LATE = 0.03
POLL_SECONDS = 0.1
"""Seconds that the queue's answers are late."""


class Writers:
    """What was put: `sent` holds every version as `key@etag`. `lock` is held meanwhile, so that
    counts can be compared.
    """

    def __init__(self, bucket: Bucket, queue: Queue | None, seed: int) -> None:
        self.bucket = bucket
        self.queue = queue
        self.seed = seed
        self.sent: set[str] = set()
        self.again = 0
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.quiet = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=(n,), daemon=True) for n in range(2)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join()

    def _write(self, number: int) -> None:
        draw, n = random.Random(self.seed * 10 + number), 0
        while not self.over.wait(draw.random() * PAUSE):
            if self.quiet.is_set():
                continue
            n += 1
            key = (
                f"in/{draw.randrange(KEYS)} +é"
                if self.queue and draw.random() < 0.5
                else f"in/new {number}-{n}"
            )
            body = f"{self.seed}-{number}-{n}".encode()
            with self.lock:
                self.bucket.put(key, body)
                self.sent.add(f"{key}@{hashlib.md5(body, usedforsecurity=False).hexdigest()}")
            if self.queue and draw.random() < 0.1:
                self._send_again()

    def _send_again(self) -> None:
        """One message more for a notice that waits, as a queue that delivers at least once may give
        out.
        """
        assert self.queue is not None
        asked = {
            "QueueUrl": self.queue.url,
            "MaxNumberOfMessages": 1,
            "WaitTimeSeconds": 0,
            "VisibilityTimeout": 1,
        }
        for message in self.bucket.aws.sqs.receive_message(**asked).get("Messages", []):
            if "TestEvent" not in message["Body"]:
                self.queue.send(message["Body"])
                self.again += 1


class Loop:
    """Starts, kills, and looks. `wrong` is what does not hold, one sentence each."""

    def __init__(self, folder: Path, aws: Aws, proxy: Proxy, way: str, seed: int) -> None:
        self.folder = folder
        self.aws = aws
        self.proxy = proxy
        self.way = way
        self.seed = seed
        self.draw = random.Random(seed)
        self.bucket = Bucket(aws)
        self.queue = None if way == "sweep" else self.bucket.queue()
        self.writers = Writers(self.bucket, self.queue, seed)
        self.wrong: list[str] = []
        self.ways: Counter[str] = Counter()
        self.counts: dict[str, int] = {}
        self._boot = 0
        proxy.fail(lambda method, path, headers: "x-amz-target" in headers, delay=LATE, after=LATE)

    def run(self, cycles: int) -> list[str]:
        self.writers.start()
        try:
            for _ in range(cycles):
                self._cycle()
                if self.wrong:
                    break
            self.writers.quiet.set()
            self._rest()
        finally:
            self.writers.stop()
        return self.wrong

    def _start(self) -> Server:
        self._boot += 1
        env = {
            **self.aws.env,
            "AWS_ENDPOINT_URL": self.proxy.url,
            "CRASH_BUCKET": self.bucket.name,
            "CRASH_QUEUE": "",
            "CRASH_RECONCILE": "0.3" if self.way == "both" else "",
        }
        if self.queue is not None:
            env["CRASH_QUEUE"] = self.queue.url
        return Server(HERE / "s3_app.py", self.folder, self._boot, env=env)

    def _cycle(self) -> None:
        server = self._start()
        way = self.draw.choices(("ready", "in start", "in drain"), (80, 10, 10))[0]
        self.ways[way] += 1
        try:
            if way == "in start":
                time.sleep(self.draw.random() * 0.8)  # not a wait: the moment to die at
                return
            if not server.wait_ready(30):
                self.wrong.append(f"boot {self._boot} did not become ready: {server.log_tail}")
                return
            time.sleep(0.1 + self.draw.random() * 0.7)
            if way == "in drain":
                server.signal(signal.SIGTERM)
                time.sleep(self.draw.random() * 0.5)
        finally:
            server.kill()
            self._no_message_is_gone()

    def _no_message_is_gone(self) -> None:
        """Whatever is not in the queue any more is in the ledger (copies only make the queue's side
        larger).
        """
        if self.queue is None:
            return
        with self.writers.lock:
            sent, left = len(self.writers.sent), self.queue.remaining
            there = {result for result, _ in self._recorded()}
        if left > BACKLOG:  # killed so often, a server takes in less than is put: let it catch up
            self.writers.quiet.set()
        else:
            self.writers.quiet.clear()
        if sent - left > len(there):
            self.wrong.append(
                f"after boot {self._boot}: {sent} versions put, {left} messages left, {len(there)} "
                "in the ledger"
            )

    def _recorded(self) -> list[tuple[str, int]]:
        """(version, runs) of each event in the ledger; nobody else has the store open."""
        path = self.folder / "store.db"
        if not path.exists():
            return []
        rows = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            asked = "SELECT e.body, count(r.id) FROM events e LEFT JOIN runs r ON r.event = e.id"
            asked += " WHERE e.trigger = 'landing' GROUP BY e.id"
            return [
                (f"{(data := json.loads(body)['data'])['key']}@{data['etag']}", runs)
                for body, runs in rows.execute(asked)
            ]
        except sqlite3.OperationalError:
            return []  # killed before the schema was there
        finally:
            rows.close()

    def _rest(self) -> None:
        """Lets the last server take in and run everything, stops it in good order, and looks."""
        server = self._start()
        if not server.wait_ready(30):
            self.wrong.append(f"the last boot did not become ready: {server.log_tail}")
            return
        deadline = time.monotonic() + 180
        while not self._at_rest(server):
            if time.monotonic() > deadline:
                left = self.queue.remaining if self.queue else "?"
                self.wrong.append(
                    f"not at rest after 180 s: {left} messages left, {server.get('/api/counts')}"
                )
                break
            time.sleep(POLL_SECONDS)
        self.counts = server.get("/api/counts")
        if (code := server.stop()) != 0:
            self.wrong.append(f"exit code {code} after SIGTERM, expected 0")
        self._one_run_each()

    def _at_rest(self, server: Server) -> bool:
        counts: dict[str, Any] = server.get("/api/counts")
        if counts["pending"] or counts["events"] < len(self.writers.sent):
            return False
        return self.queue is None or self.queue.remaining == 0

    def _one_run_each(self) -> None:
        found: Counter[str] = Counter()
        for version, runs in self._recorded():
            found[version] += runs
        self.wrong += [
            f"{version} has no run: it is lost"
            for version in sorted(self.writers.sent - found.keys())
        ]
        self.wrong += [
            f"{version} has {runs} runs, expected one"
            for version, runs in found.items()
            if runs != 1
        ]
        self.wrong += [
            f"{version} was never put" for version in sorted(found.keys() - self.writers.sent)
        ]

    def report(self, cycles: int) -> str:
        ways = ", ".join(f"{n} {way}" for way, n in self.ways.most_common())
        return (
            f"{cycles} cycles by {self.way} (killed: {ways}), seed {self.seed}\n"
            f"  {len(self.writers.sent)} versions put, {self.writers.again} messages sent again, "
            f"{self.counts.get('events')} events, {self.counts.get('duplicates')} duplicates, "
            f"{self.counts.get('runs')} runs"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash.s3_loop", description="kill -9 between receive, record, delete"
    )
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, printed")
    parser.add_argument("--way", choices=("queue", "both", "sweep"), default="queue")
    options = parser.parse_args()
    seed = a_seed(options.seed)
    folder = Path(tempfile.mkdtemp(prefix=f"eventflow-s3-crash-{seed}-"))
    print(f"seed {seed}, store in {folder}", flush=True)
    began = time.monotonic()
    with ExitStack() as stack:
        aws = stack.enter_context(serving("ministack", folder))
        loop = Loop(folder, aws, stack.enter_context(proxied(aws.url)), options.way, seed)
        wrong = loop.run(options.cycles)
    print(f"{loop.report(sum(loop.ways.values()))}\n  {time.monotonic() - began:.0f} s")
    return verdict(
        wrong,
        folder,
        f"tests.crash.s3_loop --cycles {options.cycles} --way {options.way} --seed {seed}",
    )


if __name__ == "__main__":
    sys.exit(main())
