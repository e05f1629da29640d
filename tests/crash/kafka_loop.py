"""The kill loop of the Kafka trigger: `kill -9` between poll, record and commit, again and again on
one store and one group.

    python -m tests.crash.kafka_loop --cycles 500 [--seed 1] [--broker noida | tansu] [--damage]

A producer writes all the time. Each cycle starts kafka_victim.py, which dies at a chosen seam or at
a random moment; then the group's offset of each partition is held against the ledger's cursor,
which it may never lead. At the end everything comes to rest: the ledger has each offset exactly
once, with one completed run, and the store's own checks hold. test_kafka.py runs a short one.

`--damage`: some records of partition 0 cannot be read. In the first half of the cycles they stop
their partition, which must then stay before the first of them; after that they are skipped. Each is
one dead letter in the end, and no other record suffers.
"""

import argparse
import asyncio
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from eventflow.core.clock import SystemClock
from eventflow.store.sqlite import SqliteStore
from tests.brokers import Broker, noida, tansu
from tests.conftest import comes_true
from tests.crash.kafka_victim import GROUP, SEAMS
from tests.crash.verdict import verdict
from tests.crash.victim import ROOT

PARTITIONS = 3
PAUSE = 0.004
"""Seconds between two records of the producer: some 200 a second."""
DAMAGED = 0.1
"""Of the records of partition 0."""
REST = 900.0
"""Seconds for the last life: the runs that short lives left undone are many."""
LIFE = 8.0
"""Seconds after which a victim that did not meet its seam is killed."""


def look(folder: Path, sent: Sequence[int], damaged: Collection[int] = ()) -> tuple[list[str], int]:
    """What does not hold of a store at rest, one sentence each: each offset once, with one
    completed run, and what the store says of itself. And how many events came more than once.

    `damaged`: offsets of partition 0 that cannot be read; each has one dead letter and no run.
    """
    store = SqliteStore(folder / "store.db", clock=SystemClock(), ballast=0, free_floor=0)
    store.open()
    try:
        wrong, counts = asyncio.run(store.check()), asyncio.run(store.counts())
    finally:
        store.close()
    rows = sqlite3.connect(f"file:{folder}/store.db?mode=ro", uri=True)
    found = Counter(
        ident.rpartition(":")[0] for (ident,) in rows.execute("SELECT event_id FROM events")
    )
    runs = rows.execute(
        "SELECT count(*), count(DISTINCT event), total(state = 4) FROM runs"
    ).fetchone()
    rows.close()
    letters = {f"gap:0:{offset}:{offset + 1}" for offset in damaged}
    good = {
        f"{partition}:{offset}"
        for partition, n in enumerate(sent)
        for offset in range(n)
        if partition or offset not in damaged
    }
    expected = good | letters
    wrong += [f"offset {each} is not in the ledger" for each in sorted(expected - found.keys())]
    wrong += [
        f"offset {each} is in the ledger {n} times"
        for each, n in found.items()
        if n > 1 or each not in expected
    ]
    if runs != (len(good), len(good), len(good)):
        wrong.append(f"{len(good)} events have (runs, of different events, completed) {runs}")
    return wrong, counts["duplicates"]


class Producer:
    """Writes all the time, until it is told to stop. `sent` counts the records of each
    partition; `damaged` holds the offsets of partition 0 that cannot be read.
    """

    def __init__(
        self, broker: Broker, topic: str, draw: random.Random, *, damage: bool = False
    ) -> None:
        self.broker = broker
        self.topic = topic
        self.draw = draw
        self.damage = damage
        self.sent = [0] * PARTITIONS
        self.damaged: list[int] = []
        self.over = asyncio.Event()

    async def run(self) -> None:
        async with self.broker.producer(acks="all") as producer:
            while not self.over.is_set():
                partition = self.draw.randrange(PARTITIONS)
                if self.damage and not partition and self.draw.random() < DAMAGED:
                    await self._send_damaged(self.draw.randrange(3))
                    continue
                value = json.dumps({"n": sum(self.sent)}).encode()
                sent = await producer.send_and_wait(self.topic, value, partition=partition)
                assert sent.offset == self.sent[partition]
                self.sent[partition] += 1
                await asyncio.sleep(PAUSE)

    async def _send_damaged(self, kind: int) -> None:
        """A record that cannot be read: without its codec; by its header; by that of the record
        behind which, in one batch, two good ones lie.
        """
        value = {"n": sum(self.sent)}
        self.damaged.append(self.sent[0])
        self.sent[0] += 1
        if kind == 0:
            (offset,) = await self.broker.send(self.topic, value, compression_type="snappy")
            assert offset == self.damaged[-1]
        else:
            behind = [(value, b"name")] * (2 if kind == 2 else 0)
            await self.broker.send_batch(self.topic, (value, b"\xc3\x28"), *behind)
            self.sent[0] += len(behind)


class Loop:
    """`run` returns what went wrong, one sentence each."""

    def __init__(
        self, folder: Path, broker: Broker, kind: str, seed: int, *, damage: bool = False
    ) -> None:
        self.folder = folder
        self.damage = damage
        self.on_damage = "stop" if damage else "none"
        self.damaged: list[int] = []
        self.broker = broker
        self.kind = kind
        self.draw = random.Random(seed)
        self.topic = ""
        self.sent = [0] * PARTITIONS
        self.ends: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.duplicates = 0
        self.behind = 0

    async def run(self, cycles: int, progress: bool = False) -> list[str]:
        self.topic = await self.broker.create(partitions=PARTITIONS)
        draw = random.Random(self.draw.random())
        source = Producer(self.broker, self.topic, draw, damage=self.damage)
        self.damaged = source.damaged
        producer = asyncio.create_task(source.run())
        for cycle in range(1, cycles + 1):
            if self.damage and cycle > cycles / 2:
                self.on_damage = "skip"
            await self._cycle()
            if progress and cycle % 25 == 0:
                print(
                    f"{cycle:>5} {sum(source.sent):>7} records, {len(self.wrong)} wrong", flush=True
                )
        source.over.set()
        await producer
        self.sent = source.sent
        await self._rest()
        wrong, self.duplicates = await asyncio.to_thread(look, self.folder, self.sent, self.damaged)
        self.wrong += wrong
        return self.wrong

    def spawn(self, seam: str, count: int) -> "subprocess.Popen[bytes]":
        call = [
            sys.executable,
            "-m",
            "tests.crash.kafka_victim",
            str(self.folder),
            self.broker.server,
        ]
        with (self.folder / "victim.log").open("ab") as log:
            return subprocess.Popen(
                [*call, self.topic, self.kind, seam, str(count), self.on_damage],
                cwd=ROOT,
                env={**os.environ, "PYTHONHASHSEED": str(self.draw.randrange(1, 1_000_000))},
                stdout=log,
                stderr=log,
            )

    async def _cycle(self) -> None:
        """One life, and a look at what the group and the ledger say after it."""
        seam = self.draw.choice([*SEAMS, "never"])
        life = self.draw.uniform(0.3, 2.5) if seam == "never" else LIFE
        victim = self.spawn(seam, 1 if seam == "assigned" else self.draw.randint(1, 12))
        await comes_true(lambda: victim.poll() is not None, within=life)
        self.ends[seam if victim.poll() is not None else "at random"] += 1
        if victim.poll() not in (None, -9):
            self.wrong.append(
                f"a victim ended with {victim.poll()}: "
                f"{(self.folder / 'victim.log').read_text()[-2000:]}"
            )
        victim.kill()
        victim.wait()
        await self._compare()

    async def _compare(self) -> None:
        cursor = await asyncio.to_thread(self._cursor)
        group = await self.broker.committed(GROUP, self.topic, PARTITIONS)
        for partition, offset in enumerate(group):
            recorded = cursor.get(f"{self.topic}/{partition}", 0)
            self.behind += (offset or 0) < recorded
            if (offset or 0) > recorded:
                self.wrong.append(
                    f"the group committed {offset} of partition {partition}, the ledger "
                    f"has {recorded}"
                )
        recorded = cursor.get(f"{self.topic}/0", 0)
        if self.on_damage == "stop" and self.damaged and recorded > self.damaged[0]:
            self.wrong.append(
                f"partition 0 was read past its damaged offset {self.damaged[0]}, to {recorded}"
            )

    def _cursor(self) -> dict[str, int]:
        path = self.folder / "store.db"
        if not path.exists():
            return {}
        rows = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        try:
            listed = rows.execute(
                "SELECT key, value FROM cursors WHERE trigger = 'kafka' AND key LIKE '%/_'"
            ).fetchall()
            return {key: json.loads(value)[0] for key, value in listed}
        except sqlite3.OperationalError:  # killed before the store was made
            return {}
        finally:
            rows.close()

    async def _rest(self) -> None:
        """The last life ends by itself, when everything is recorded and every run is done."""
        victim = self.spawn("rest", sum(self.sent))
        await comes_true(lambda: victim.poll() is not None, within=REST)
        if victim.poll() != 0:
            self.wrong.append(
                f"it did not come to rest: {(self.folder / 'victim.log').read_text()[-2000:]}"
            )
            victim.kill()
            victim.wait()
        await self._compare()

    def report(self) -> str:
        ends_text = ", ".join(f"{n} {seam}" for seam, n in sorted(self.ends.items()))
        return (
            f"{sum(self.ends.values())} kills ({ends_text}); {sum(self.sent)} records, each "
            "recorded once and run once; "
            f"{self.duplicates} offered again; the group was behind the ledger {self.behind} times "
            "and never ahead of it"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.crash.kafka_loop")
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--damage", action="store_true")
    parser.add_argument("--broker", choices=("noida", "tansu"), default="noida")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kafka-kill-"))
    with tansu() if options.broker == "tansu" else noida(folder / "broker") as broker:
        loop = Loop(folder, broker, options.broker, options.seed, damage=options.damage)
        wrong = asyncio.run(loop.run(options.cycles, progress=True))
    print(loop.report())
    again = f"--cycles {options.cycles} --seed {options.seed} --broker {options.broker}"
    again += " --damage" if options.damage else ""
    return verdict(wrong, folder, f"tests.crash.kafka_loop {again}")


if __name__ == "__main__":
    sys.exit(main())
