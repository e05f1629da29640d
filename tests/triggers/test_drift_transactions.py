"""A monitor's counts and the source's position commit in one transaction: unknown outcomes,
restarts, duplicates and concurrent calls change neither counts nor events.
"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from eventflow.core.errors import StoreFailed
from eventflow.events.event import Event, Json, Receipt
from eventflow.testing import MemoryTrigger
from eventflow.testing.trigger_contract import ContractLedger, listening
from tests.conftest import eventually
from tests.triggers.test_drift_monitor import (
    MonitoredApp,
    Row,
    monitored_app,
    normal,
    reference,
    run,
)
from tests.world import image
from triggers import Drift, DriftMonitor, Numeric
from triggers._drift.episodes import Episode
from triggers._drift.evaluator import MonitorState

SLOW_COMMIT = 0.01
"""Seconds."""


class Flaky:
    """A ledger of unknown outcomes: at random it raises before or after a commit.

    Cursors are stored as JSON, as on disk.
    """

    def __init__(self, inner: ContractLedger, rng: random.Random, share: float = 0.3) -> None:
        self.inner = inner
        self.rng = rng
        self.share = share
        self.log = inner.log
        self.failures = 0

    async def accept(
        self,
        *items: Any,
        cursor: Mapping[str, Json] | None = None,
        max_wait: float | None = None,
    ) -> list[Receipt]:
        drawn = self.rng.random() if cursor else 1.0
        if drawn < self.share / 2:
            self.failures += 1
            raise StoreFailed("not written")
        stored = msgspec.json.decode(msgspec.json.encode(cursor))
        receipts = await self.inner.accept(*items, cursor=stored, max_wait=max_wait)
        if drawn < self.share:
            self.failures += 1
            raise StoreFailed("written, but unknown")
        return receipts

    async def cursor(self) -> Mapping[str, Json]:
        return msgspec.json.decode(msgspec.json.encode(await self.inner.cursor()))


class Log:
    """A source with a position, as a partition has: it reads on from its cursor, ten rows at a
    time, some sent twice.
    """

    name = "log"

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.until = len(rows)

    async def listen(self, intake: Any) -> None:
        position = (await intake.cursor()).get("position", 0)
        while position < self.until:
            batch = [
                self.event(number - number % 5 // 4)
                for number in range(position, min(position + 10, self.until))
            ]
            position += len(batch)
            await intake.accept(*batch, cursor={"position": position})
        await asyncio.get_running_loop().create_future()

    def event(self, number: int) -> Event:
        time = datetime(2026, 11, 22, tzinfo=UTC) + timedelta(seconds=number)
        return Event(id=f"r{number}", source="log", type="row", data=self.rows[number], time=time)


def stream() -> list[Row]:
    rng = np.random.default_rng(11)
    blocks = [normal(rng, 400), normal(rng, 600, 0.8), normal(rng, 800, 0.0)]
    return [row for block in blocks for row in block]


def reported(ledger: ContractLedger) -> list[tuple[str, Any]]:
    """The drifts without their times."""
    return [
        (item.id, {key: value for key, value in item.data.items() if key != "starts_at"})
        for item in ledger.recorded.values()
        if isinstance(item, Event)
    ]


def log_monitor(**options: Any) -> DriftMonitor:
    options = {
        "features": {"x": Numeric(metric="ks", warn=0.2, alert=9)},
        "cooldown": 0,
        "window": 100,
        "reference": 200,
    } | options
    return DriftMonitor(Log(stream()), **options)


async def to_the_end(monitor: DriftMonitor, ledger: Any, until: int, kept: ContractLedger) -> None:
    """Opened again and again, as the reactor does, until the source has come so far."""
    while True:
        try:
            async with listening(monitor, ledger) as task:
                await eventually(
                    lambda: kept.cursors.get("source:position", 0) == until or task.done(),
                    "all is read",
                )
                if not task.done():
                    return
                task.result()
        except (StoreFailed, AssertionError):
            continue


def uninterrupted(**options: Any) -> ContractLedger:
    ledger = ContractLedger()
    asyncio.run(
        to_the_end(
            log_monitor(**options), Flaky(ledger, random.Random(0), 0.0), len(stream()), ledger
        )
    )
    return ledger


@pytest.mark.parametrize("metric", ["ks", "psi", "adwin"])
def test_d11_unknown_outcomes_and_restarts_change_nothing(metric: Any):
    """Failing commits, written or not, and a source that begins again at its position: the same
    counts, the same events.
    """
    options: dict[str, Any] = {"features": {"x": Numeric(metric=metric, warn=0.2, alert=9)}}
    expected = uninterrupted(**options)
    assert [data["status"] for _, data in reported(expected)] == ["detected", "resolved"]
    for seed in range(3):
        ledger, draw = ContractLedger(), random.Random(seed)
        flaky = Flaky(ledger, draw)
        asyncio.run(to_the_end(log_monitor(**options), flaky, len(stream()), ledger))
        assert flaky.failures > 10
        assert reported(ledger) == reported(expected)
        assert without_times(ledger.cursors) == without_times(expected.cursors)


def without_times(cursors: Mapping[str, Any]) -> dict[str, Any]:
    """The parts without the times in windows and state."""
    kept = dict(cursors)
    kept["drift:meta"] = {
        key: [{**each, "since": 0, "told_at": 0} for each in value] if key == "episodes" else value
        for key, value in kept["drift:meta"].items()
        if key not in ("last_at", "watermark")
    }
    for key, value in kept.items():
        if key.startswith(("drift:w/", "drift:h/")):
            kept[key] = (
                [value[0], *value[3:]] if key.startswith("drift:w/") else [value[0], *value[2:]]
            )
    return kept


def test_d11_a_process_that_dies_in_mid_window_goes_on_there(tmp_path: Path):
    """The store's files as a `kill -9` leaves them, in the middle of a window: another process ends
    as the first would have.
    """
    rng = np.random.default_rng(25)
    batches = [normal(rng, 70, 0.0 if number < 10 else 1.0) for number in range(20)]

    async def feed(seen: MonitoredApp, first: int, after: Path | None = None) -> list[Drift]:
        for number, batch in enumerate(batches[first:], first):
            await seen.send(batch, id=f"b{number}")
            if after is not None:
                image(tmp_path / "a.db", after / f"{number}.db")
        return await seen.reported()

    async def main() -> None:
        async with monitored_app(tmp_path / "a.db", window=300, reference=200) as seen:
            (tmp_path / "images").mkdir()
            expected = await feed(seen, 0, tmp_path / "images")
            windows = seen.gauge("drift_windows_judged")
        assert [drift.status for drift in expected] == ["detected", "escalated"] or len(
            expected
        ) == 1
        for number in (0, 3, 7, 13, 18):
            async with monitored_app(
                tmp_path / "images" / f"{number}.db", window=300, reference=200
            ) as seen:
                found = await feed(seen, max(0, number - 1))  # the last two come again
                assert [drift.fingerprint for drift in found] == [
                    drift.fingerprint for drift in expected
                ]
                assert [drift.statistic for drift in found] == [
                    drift.statistic for drift in expected
                ]
                assert seen.gauge("drift_windows_judged") == windows

    asyncio.run(main())


def test_d12_what_comes_twice_counts_once():
    """An event delivered again, in the same call or later or after a restart, is a duplicate and
    not a row more.
    """

    async def test(seen: MonitoredApp) -> None:
        rows = normal(np.random.default_rng(26), 300)
        first = Event(id="same", source="/rows", type="rows", data=rows)
        receipts = await seen.source.send(first, first)
        assert [receipt.duplicate for receipt in receipts] == [False, True]
        for _ in range(5):
            (receipt,) = await seen.source.send(first)
            assert receipt.duplicate
        assert seen.gauge("drift_windows_judged") == 0
        await seen.send(normal(np.random.default_rng(27), 700))
        assert seen.gauge("drift_windows_judged") == 1

    run(test)


def test_concurrent_callers_share_a_commit():
    """A hundred rows posted at once are all counted, in far fewer transactions than there
    are rows.
    """

    async def main() -> None:
        ledger = ContractLedger()
        source = MemoryTrigger("rows")
        monitor = DriftMonitor(source, features=["x"], reference=reference(), window=100)
        writes = 0
        accept = ledger.accept

        async def counting(
            *items: Any,
            cursor: Mapping[str, Json] | None = None,
            max_wait: float | None = None,
        ) -> list[Receipt]:
            nonlocal writes
            writes += bool(cursor)
            await asyncio.sleep(SLOW_COMMIT)
            return await accept(*items, cursor=cursor, max_wait=max_wait)

        ledger.accept = counting  # pyright: ignore[reportAttributeAccessIssue]
        async with listening(monitor, ledger):
            rows = normal(np.random.default_rng(28), 100)
            await asyncio.gather(*(source.send(data=row) for row in rows))
        assert writes <= 5 and ledger.cursors["drift:meta"]["judged"] == 1  # pyright: ignore

    asyncio.run(main())


def test_the_state_is_bounded_and_a_row_rewrites_little():
    """20 features by KS: at most 64 KiB each are kept however long the stream is, and one row more
    writes under 24 KiB.
    """

    async def main() -> None:
        names = [f"f{number}" for number in range(20)]
        source, ledger, rng = MemoryTrigger("rows"), ContractLedger(), np.random.default_rng(29)
        monitor = DriftMonitor(
            source,
            features={name: Numeric(metric="ks") for name in names},
            reference=2000,
            window=20_000,
            remember=5000,
        )

        def rows(count: int) -> list[Row]:
            return [
                dict(zip(names, row, strict=True)) for row in rng.normal(size=(count, 20)).tolist()
            ]

        async with listening(monitor, ledger):
            most = 0
            for number in range(30):
                await source.send(data=rows(1000), id=f"e{number}")
                most = max(
                    most, sum(len(msgspec.json.encode(value)) for value in ledger.cursors.values())
                )
            assert most < 20 * 64 * 1024 * 1.05
            before = {key: msgspec.json.encode(value) for key, value in ledger.cursors.items()}
            sizes = list[int]()
            for row in rows(40):
                await source.send(data=row)
                after = {key: msgspec.json.encode(value) for key, value in ledger.cursors.items()}
                sizes.append(
                    sum(len(value) for key, value in after.items() if before.get(key) != value)
                )
                before = after
            assert max(sizes) < 24 * 1024, sizes

    asyncio.run(main())


def test_the_keys_of_the_stored_state_are_those_of_the_first_version():
    """Attributes of the state may be renamed, its keys in the store may not: an old
    cursor is read.
    """
    state = msgspec.to_builtins(MonitorState("hash", episodes=[Episode()]))
    (episode,) = state["episodes"]
    assert list(state) == (
        "digest version learned own opened windows watermark last_at silent late insufficient "
        "judged episodes".split()
    )
    assert list(episode) == "number level told bad worse clean told_at since features".split()
    old = {"digest": "hash", "own": True, "opened": 3, "silent": 5, "late": 1, "insufficient": 2}
    read = msgspec.convert(old, MonitorState)
    assert (read.learns, read.first_open, read.nodata_since) == (True, 3, 5)
    assert (read.late_rows, read.too_small) == (1, 2)
