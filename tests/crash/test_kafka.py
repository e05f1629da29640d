"""The kill loop and the churn of the Kafka trigger, short enough for every change."""

import asyncio
import json
import shutil
import signal
import sqlite3
from pathlib import Path

import pytest

from tests.brokers import Broker, noida, tansu
from tests.conftest import eventually
from tests.crash.kafka_churn import churn
from tests.crash.kafka_loop import Loop

CYCLES = 10


@pytest.mark.timeout(300)
def test_p1_p2_kafka_kill_9_between_poll_record_and_commit(tmp_path: Path):
    """Killed between poll, record and commit: the ledger has each offset once, and the group's
    offset never leads it (K2).
    """
    with noida(tmp_path / "broker") as broker:
        loop = Loop(tmp_path, broker, "noida", seed=3)
        wrong = asyncio.run(loop.run(CYCLES))
    assert wrong == [], f"again: python -m tests.crash.kafka_loop --cycles {CYCLES} --seed 3"
    assert sum(loop.sent) > 100 and loop.behind > 0
    shutil.rmtree(tmp_path)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", ["noida", "tansu"])
def test_p1_p2_kafka_kill_9_among_unreadable_records(tmp_path: Path, kind: str):
    """Killed at the same seams while some records cannot be read, each life with another hash seed:
    each stops its own partition at its offset, or is one dead letter; every other record, in its
    batch, behind it and in other partitions, is recorded once and runs once.
    """
    with tansu() if kind == "tansu" else noida(tmp_path / "broker") as broker:
        loop = Loop(tmp_path, broker, kind, seed=7, damage=True)
        wrong = asyncio.run(loop.run(CYCLES))
    again = f"python -m tests.crash.kafka_loop --cycles {CYCLES} --seed 7 --broker {kind} --damage"
    assert wrong == [], f"again: {again}"
    assert len(loop.damaged) >= 3 and sum(loop.sent) > 100
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("fresh", [2, 5, 9])
@pytest.mark.parametrize("seam", ["offering", "recorded", "committing"])
@pytest.mark.parametrize("kind", ["noida", "tansu"])
def test_a_topic_made_anew_after_a_kill(tmp_path: Path, kind: str, seam: str, fresh: int):
    """Killed at a seam; then its topic of five records is deleted and made anew with fewer, as many
    or more. The next life records each new one once, whether or not the broker refuses an offset.
    """

    async def work(broker: Broker) -> None:
        loop = Loop(tmp_path, broker, kind, seed=1)
        loop.topic = await broker.create()
        await broker.send(loop.topic, *({"n": n} for n in range(5)))
        victim = loop.spawn(seam, 1)
        await eventually(lambda: victim.poll() is not None, "it died at its seam", within=60)
        assert victim.returncode == -signal.SIGKILL
        await broker.delete(loop.topic)
        await broker.create(loop.topic)
        await broker.send(loop.topic, *({"n": n} for n in range(100, 100 + fresh)))
        victim = loop.spawn("never", 1)
        try:
            await eventually(
                lambda: _fresh_results(tmp_path) == [2 * n for n in range(100, 100 + fresh)],
                "each new record has run once",
                within=60,
            )
        finally:
            victim.kill()
            victim.wait()
        assert len(_fresh_results(tmp_path)) == fresh

    with tansu() if kind == "tansu" else noida(tmp_path / "broker") as broker:
        asyncio.run(work(broker))


def _fresh_results(folder: Path) -> list[int]:
    """The results of the runs of the new topic's records, in order of value."""
    rows = sqlite3.connect(f"file:{folder}/store.db?mode=ro", uri=True)
    try:
        found = rows.execute("SELECT result FROM runs WHERE state = 4").fetchall()
    finally:
        rows.close()
    return sorted(value for (text,) in found if (value := json.loads(text)) >= 200)


@pytest.mark.timeout(300)
def test_row_18_members_that_join_and_leave(tmp_path: Path):
    """Two members that come and go: no duplicate run, no gap (fault 18)."""
    with tansu() as broker:
        wrong, summary = asyncio.run(churn(tmp_path, broker, seconds=12, every=3, seed=3))
    assert wrong == [], summary
    assert int(summary.split()[0]) >= 4
