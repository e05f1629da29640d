"""DriftMonitor over real sources and the real store: the cases D2 to D15, crashes in mid-window, sources of every kind."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from eventflow import App, flow
from eventflow.core.errors import StoreFailed, UsageError
from eventflow.events.event import Event, Json, Receipt, Undecodable
from eventflow.testing import MemoryTrigger, VirtualClock, drain, running
from eventflow.testing.trigger_contract import CONTRACT, ContractLedger, Promise, listening
from tests.conftest import eventually
from tests.triggers.hooks import HttpHarness
from tests.world import image
from triggers import Categorical, Directory, Drift, DriftMonitor, Numeric, Webhook, file_rows

HOUR = timedelta(hours=1)
Row = dict[str, Any]


def normal(rng: np.random.Generator, count: int, mean: float = 0.0) -> list[Row]:
    return [{"x": value} for value in rng.normal(mean, 1.0, count).tolist()]


def reference(seed: int = 1, count: int = 5000) -> dict[str, list[float]]:
    return {"x": np.random.default_rng(seed).normal(size=count).tolist()}


@flow
async def note(drift: Drift) -> str:
    return drift.status


class Watching:
    """A monitor on a trigger fed by hand, in an app on a real store."""

    def __init__(self, app: App, source: MemoryTrigger, monitor: DriftMonitor) -> None:
        self.app = app
        self.source = source
        self.monitor = monitor
        self._sent = 0

    async def send(
        self, rows: Sequence[Row], *, time: datetime | None = None, id: str | None = None
    ) -> list[Receipt]:
        self._sent += 1
        event = Event(
            id=id or f"e{self._sent}", source="/rows", type="rows", data=list(rows), time=time
        )
        return await self.source.send(event)

    @property
    def clock(self) -> VirtualClock:
        assert isinstance(self.app.clock, VirtualClock)
        return self.app.clock

    async def told(self) -> list[Drift]:
        return [msgspec.convert(event.data, Drift) for event in await self.events()]

    async def events(self) -> list[Event]:
        rows = await self.app.store.events(trigger=self.monitor.name, limit=1000)
        bodies = [(await self.app.store.event(row["id"]))["body"] for row in reversed(rows)]
        return [Event.from_json(body) for body in bodies]

    def gauge(self, name: str, **labels: str) -> float:
        (found,) = [
            each.value
            for each in self.monitor.gauges()
            if each.name == name and labels.items() <= each.labels.items()
        ]
        return found


@asynccontextmanager
async def watching(store: Path | None = None, **options: Any) -> AsyncIterator[Watching]:
    source = MemoryTrigger("rows")
    options = {
        "features": ["x"],
        "reference": reference(),
        "window": 1000,
        "model": "prices",
    } | options
    monitor = DriftMonitor(source, **options)
    app = App("drift")
    app.on(monitor, note)
    async with running(app, store=store):
        yield Watching(app, source, monitor)


def run(test: Any, **options: Any) -> None:
    async def main() -> None:
        async with watching(**options) as seen:
            await test(seen)

    asyncio.run(main())


# --------------------------------------------------------------------------- episodes


def test_d2_d3_a_shift_is_told_once_and_resolved_once():
    """A shift of 0.5 sigma from window 10 on is detected by window 12, once while it lasts, and resolved after 3 clean ones."""

    async def test(seen: Watching) -> None:
        rng = np.random.default_rng(2)
        when: dict[str, int] = {}
        for window in range(30):
            await seen.send(normal(rng, 1000, 0.5 if 10 <= window < 20 else 0.0))
            for drift in await seen.told():
                when.setdefault(drift.status, window)
        first, *middle, last = await seen.told()
        assert (first.status, last.status) == ("detected", "resolved") and {
            each.status for each in middle
        } <= {"escalated"}
        assert when["detected"] == 11 and when["resolved"] == 22
        assert (
            first.fingerprint == last.fingerprint
            and first.feature == last.feature == "x"
            and first.model == "prices"
        )
        assert (first.metric, first.severity) == ("psi", "alert") and (
            first.statistic or 0
        ) > 0.2 == first.threshold
        assert first.baseline is not None and first.current is not None
        assert first.baseline.samples == 5000 and first.current.samples == 1000
        bars = (
            [(bar.label, bar.count) for bar in first.baseline.histogram],
            [bar.label for bar in first.current.histogram],
        )
        assert [label for label, _ in bars[0]] == bars[1] and sum(
            count for _, count in bars[0]
        ) == 5000
        await drain(seen.app)
        assert len(await seen.app.store.runs(flow="note")) == 1

    run(test)


def test_d5_a_small_window_decides_nothing():
    """A window of 80 rows is too small to judge: no event, whatever is in it, and it is counted as such."""

    async def test(seen: Watching) -> None:
        for _ in range(4):
            await seen.send(normal(np.random.default_rng(5), 80, 9.0))
        assert await seen.told() == []
        assert (seen.gauge("drift_windows_too_small"), seen.gauge("drift_windows_judged")) == (4, 0)

    run(test, window="batch")


@pytest.mark.parametrize("metric", ["psi", "js", "ks", "wasserstein", "missing"])
def test_d8_missing_values_are_drift(metric: Any):
    """A null rate of 1 % that becomes 30 % is told, also by a metric that is blind to it; the values are the same."""
    rng = np.random.default_rng(8)

    def holed(rate: float, count: int) -> list[Row]:
        return [row if rng.random() >= rate else {"x": None} for row in normal(rng, count)]

    async def test(seen: Watching) -> None:
        for _ in range(3):
            await seen.send(holed(0.01, 1000))
        assert await seen.told() == []
        for _ in range(2):
            await seen.send(holed(0.30, 1000))
        (drift,) = await seen.told()
        assert drift.metric == ("missing" if metric in ("ks", "wasserstein", "missing") else metric)
        assert drift.current is not None and drift.current.histogram[-1].label == "missing"
        assert drift.current.histogram[-1].share == pytest.approx(0.3, abs=0.05)

    before = {"x": [row["x"] for row in holed(0.01, 5000)]}
    run(test, features={"x": Numeric(metric=metric)}, reference=before)


@pytest.mark.parametrize("metric", ["psi", "js", "tv", "chi2"])
def test_d9_an_unseen_category_is_named(metric: Any):
    """A category that the reference has not, in 10 % of the rows, is told with its name, cut to size and escaped."""
    draw = random.Random(9)
    odd = "new\n\u202e" + "n" * 100

    async def test(seen: Watching) -> None:
        for _ in range(2):
            rows = [odd if draw.random() < 0.1 else draw.choice("aab") for _ in range(1000)]
            await seen.send([{"c": each} for each in rows])
        (drift,) = await seen.told()
        assert drift.current is not None and drift.metric == metric
        (bar,) = [bar for bar in drift.current.histogram if bar.label.startswith("new")]
        assert bar.share == pytest.approx(0.1, abs=0.03)
        assert (
            bar.label.startswith("new\\n\\u202en")
            and len(bar.label) < 80
            and bar.label.isprintable()
        )

    run(
        test,
        features={"c": Categorical(metric=metric)},
        reference={"c": [draw.choice("aab") for _ in range(4000)]},
    )


def test_d14_silence_is_no_data_and_not_resolved():
    """Three windows of time without a row, in the middle of an episode, are `nodata`; the next row ends the silence."""

    async def test(seen: Watching) -> None:
        rng = np.random.default_rng(14)
        for _ in range(4):
            await seen.send(
                normal(rng, 1000, 1.0), time=datetime.fromtimestamp(seen.clock.now() / 1e6, UTC)
            )
            await seen.clock.advance(HOUR)
        assert [drift.status for drift in await seen.told()] == ["detected"]
        await seen.clock.advance(4 * HOUR)
        await eventually(seen.told, "silence is told")
        detected, silent = await seen.told()
        assert (silent.status, silent.metric) == (
            "nodata",
            "nodata",
        ) and silent.fingerprint != detected.fingerprint
        assert seen.monitor.condition == "no data arrives"
        await seen.clock.advance(20 * HOUR)
        await seen.send(normal(rng, 10, 1.0))
        assert [drift.status for drift in await seen.told()] == ["detected", "nodata", "resolved"]
        assert (await seen.told())[
            -1
        ].fingerprint == silent.fingerprint and seen.monitor.condition is None

    run(test, window=HOUR)


def test_d15_escalation_passes_the_cool_down():
    """An alert after a warning is told at once, what is told already is not; a new episode waits for the cool-down."""

    async def test(seen: Watching) -> None:
        rng = np.random.default_rng(15)

        async def windows(count: int, mean: float) -> None:
            for _ in range(count):
                await seen.send(normal(rng, 1000, mean))

        await windows(4, 0.36)
        assert [(drift.status, drift.severity) for drift in await seen.told()] == [
            ("detected", "warning")
        ]
        await windows(5, 1.0)
        assert [(drift.status, drift.severity) for drift in await seen.told()][1:] == [
            ("escalated", "alert")
        ]
        await windows(3, 0.0)
        await windows(5, 1.0)
        assert [drift.status for drift in await seen.told()] == [
            "detected",
            "escalated",
            "resolved",
        ]
        await seen.clock.advance(2 * HOUR)
        await windows(1, 1.0)
        assert [drift.status for drift in await seen.told()][3:] == ["detected"]
        assert len({event.id for event in await seen.events()}) == 4

    run(test)


def test_a_statistic_round_its_threshold_is_one_episode():
    """1,000 windows whose statistic swings round the warning threshold, over and under it, start one run."""

    async def test(seen: Watching) -> None:
        rng = np.random.default_rng(16)
        over = 0
        for _ in range(1000):
            await seen.send(normal(rng, 200, 0.36 + 0.03 * float(rng.normal())))
            over += seen.gauge("drift_statistic", feature="x") >= 0.15
        assert 200 < over < 800
        statuses = [drift.status for drift in await seen.told()]
        assert statuses.count("detected") == 1 and set(statuses) <= {"detected", "resolved"}
        await drain(seen.app)
        assert len(await seen.app.store.runs(flow="note")) == 1

    run(test, window=200, features={"x": Numeric(warn=0.15, alert=9)}, clear=4)


def test_each_feature_by_itself():
    """With `per="feature"` each has its episode and events; otherwise the worst stands for all, and all are named."""

    def rows(rng: np.random.Generator) -> list[Row]:
        return [
            {"a": a, "b": b, "c": c} for a, b, c in rng.normal([0.6, 1.2, 0], 1, (1000, 3)).tolist()
        ]

    before = {name: np.random.default_rng(7).normal(size=5000) for name in "abc"}
    for per, expected in (
        ("feature", [("a", ["a"]), ("b", ["b"])]),
        ("monitor", [("b", ["b", "a"])]),
    ):

        async def test(seen: Watching, expected: Any = expected) -> None:
            rng = np.random.default_rng(17)
            for _ in range(2):
                await seen.send(rows(rng))
            told = await seen.told()
            assert [(drift.feature, drift.features) for drift in told] == expected
            assert told[-1].share == pytest.approx(1 if len(told) > 1 else 2 / 3, abs=0.7)
            assert [finding.feature for drift in told for finding in drift.findings] == [
                each for _, names in expected for each in names
            ]

        run(test, features=["a", "b", "c"], reference=before, per=per)


@pytest.mark.parametrize("metric", ["adwin", "page-hinkley"])
def test_a_streaming_detector_tells_in_the_middle_of_a_window(metric: Any):
    """ADWIN and Page-Hinkley tell a shift of one sigma within 300 rows, long before the window is over, and its end too."""

    async def test(seen: Watching) -> None:
        rng = np.random.default_rng(18)
        for _ in range(0, 5000, 100):
            await seen.send(normal(rng, 100))
        assert await seen.told() == []
        for _ in range(0, 300, 10):
            await seen.send(normal(rng, 10, 1.0))
        (drift,) = await seen.told()
        assert (drift.metric, drift.feature) == (metric, "x")
        for place in range(0, 60_000, 1000):
            await seen.send(normal(rng, 1000, 1.0 if place < 10_000 else 0.0))
        assert [each.status for each in await seen.told() if each.status != "escalated"] == [
            "detected",
            "resolved",
        ]

    run(test, features={"x": Numeric(metric=metric)}, window=10_000, clear=2)


# --------------------------------------------------------------------------- windows, references


def test_windows_of_time_wait_for_the_late_and_count_what_is_too_late():
    """Rows belong to the window of their event's time; within `lateness` they still do, later they are only counted."""
    start = datetime(2026, 11, 22, 10, tzinfo=UTC)

    async def test(seen: Watching) -> None:
        await seen.clock.advance(
            datetime(2026, 11, 23, tzinfo=UTC) - datetime.fromtimestamp(seen.clock.now() / 1e6, UTC)
        )
        rng = np.random.default_rng(20)
        await seen.send(normal(rng, 400, 1.0), time=start)
        await seen.send(normal(rng, 400, 1.0), time=start + 1.2 * HOUR)
        await seen.send(normal(rng, 400, 1.0), time=start + 0.9 * HOUR)  # late, in time
        assert seen.gauge("drift_windows_judged") == 0
        await seen.send(normal(rng, 400, 1.0), time=start + 1.6 * HOUR)
        assert seen.gauge("drift_windows_judged") == 1
        await seen.send(normal(rng, 400, 1.0), time=start)  # too late
        assert seen.gauge("drift_rows_late") == 400
        await seen.send([], time=start)
        await seen.send(normal(rng, 1, 1.0), time=start + 5 * HOUR)
        assert [drift.status for drift in await seen.told()] == ["detected"]
        (drift,) = await seen.told()
        assert drift.current is not None and drift.current.samples == 800

    run(test, window=HOUR, lateness=HOUR / 2, nodata=9 * HOUR)


def test_a_clock_ahead_makes_nobody_late():
    """A row from the future counts as one of now: it does not end the windows of all others."""

    async def test(seen: Watching) -> None:
        rng = np.random.default_rng(21)
        await seen.send(normal(rng, 10), time=datetime(2099, 1, 1, tzinfo=UTC))
        await seen.send(normal(rng, 10))
        assert seen.gauge("drift_rows_late") == 0

    run(test, window=HOUR)


def test_the_first_rows_are_the_reference_and_a_new_one_can_be_learned():
    """Without a reference the first N rows are it; after `relearn` the next N are, durably, and episodes begin anew."""

    async def test(seen: Watching) -> None:
        rng = np.random.default_rng(22)
        await seen.send(normal(rng, 1500))
        assert seen.gauge("drift_rows_learning") == 1500
        await seen.send(normal(rng, 2500))
        assert (seen.gauge("drift_rows_learning"), seen.gauge("drift_windows_judged")) == (0, 2)
        for _ in range(2):
            await seen.send(normal(rng, 1000, 2.0))
        assert [drift.labels["reference"] for drift in await seen.told()] == ["1"]
        await seen.monitor.relearn()
        await seen.send(normal(rng, 5000, 2.0))
        assert len(await seen.told()) == 1 and seen.gauge("drift_level") == 0
        await seen.clock.advance(2 * HOUR)
        for _ in range(2):
            await seen.send(normal(rng, 1000, 0.0))
        assert [drift.labels["reference"] for drift in await seen.told()] == ["1", "2"]

    run(test, reference=2000)


def test_a_new_reference_outlives_a_restart_and_the_given_one(tmp_path: Path):
    """After `relearn` the reference that the app gives no longer counts, also after restarts while the new one is learned."""

    async def main() -> None:
        rng = np.random.default_rng(31)
        async with watching(tmp_path / "a.db") as seen:
            await seen.monitor.relearn()
            await seen.send(normal(rng, 800, 5.0), id="a")
        async with watching(tmp_path / "a.db") as seen:
            assert seen.gauge("drift_rows_learning") == 800
            await seen.send(normal(rng, 1200, 5.0), id="b")
        async with watching(tmp_path / "a.db") as seen:
            await seen.send(normal(rng, 3000, 5.0), id="c")
            assert (seen.gauge("drift_windows_judged"), await seen.told()) == (3, [])
            await seen.send(normal(rng, 2000, 0.0), id="d")
            assert [drift.labels["reference"] for drift in await seen.told()] == ["2"]

    asyncio.run(main())


def test_other_features_begin_anew(tmp_path: Path):
    """When features or reference are others after a restart, what was counted is void and the reference's number rises."""

    async def main() -> None:
        rng = np.random.default_rng(23)
        async with watching(tmp_path / "a.db") as seen:
            await seen.send(normal(rng, 1500, 3.0))
        async with watching(tmp_path / "a.db", reference=reference(99)) as seen:
            await seen.send(normal(rng, 999, 3.0), id="b1")
            assert seen.gauge("drift_windows_judged") == 0
            await seen.send(normal(rng, 1001, 3.0), id="b2")
            (drift,) = await seen.told()
            assert drift.labels["reference"] == "2"
            cursors = await seen.source.cursor()
            assert cursors == {}

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_references_and_batches_are_read_from_files(kind: str, tmp_path: Path):
    """A reference file and the files of a landing directory, each a window: the drifted ones are told, a broken one is dead."""
    if kind == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    (inbox := tmp_path / "in").mkdir()
    rng = np.random.default_rng(24)

    def write(path: Path, mean: float) -> None:
        rows = [
            {"x": x, "c": c}
            for x, c in zip(
                rng.normal(mean, 1, 1000).tolist(), rng.choice(["a", "b"], 1000), strict=True
            )
        ]
        part = path.with_suffix(".part")
        match kind:
            case "csv":
                part.write_text("x,c\n" + "".join(f"{row['x']},{row['c']}\n" for row in rows))
            case "jsonl":
                part.write_text(
                    "".join(json.dumps({**row, "c": str(row["c"])}) + "\n" for row in rows)
                )
            case "json":
                part.write_text(json.dumps([{**row, "c": str(row["c"])} for row in rows]))
            case _:
                import pyarrow as pa  # pyright: ignore[reportMissingImports]
                import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]

                pq.write_table(pa.Table.from_pylist(rows), part)
        part.rename(path)

    async def main() -> None:
        write(tmp_path / f"reference.{kind}", 0.0)
        source = Directory(inbox, settle=0.05, rescan=0.2, pattern=f"*.{kind}")
        monitor = DriftMonitor(
            source,
            features=["x", "c"],
            reference=tmp_path / f"reference.{kind}",
            window="batch",
            rows=file_rows,
            confirm=1,
        )
        ledger = ContractLedger()
        async with listening(monitor, ledger):
            write(inbox / f"a.{kind}", 0.0)
            (inbox / f"b.{kind}").write_bytes(b"\xff\xfe broken")
            await eventually(lambda: len(ledger.recorded) == 1, "the broken file is a dead letter")
            write(inbox / f"c.{kind}", 1.0)
            await eventually(lambda: len(ledger.recorded) == 2, "the drifted file is told")
        dead, event = ledger.recorded.values()
        assert isinstance(dead, Undecodable) and "rows:" in dead.error
        assert isinstance(event, Event) and event.data["features"] == ["x"]

    asyncio.run(main())


def test_what_does_not_fit_is_said_when_the_monitor_is_made(tmp_path: Path):
    """A reference without a feature, a file that is none, a small window, a metric of the other kind: UsageError names it."""
    source = MemoryTrigger("rows")
    with pytest.raises(UsageError, match="'y'"):
        DriftMonitor(source, features=["x", "y"], reference=reference())
    with pytest.raises(UsageError, match=r"gone\.csv"):
        DriftMonitor(source, features=["x"], reference=tmp_path / "gone.csv")
    with pytest.raises(UsageError, match=r"\.xlsx"):
        DriftMonitor(source, features=["x"], reference="table.xlsx")
    with pytest.raises(UsageError, match="window"):
        DriftMonitor(source, features=["x"], window=5)
    with pytest.raises(UsageError, match="chi2"):
        DriftMonitor(source, features={"x": Numeric(metric="chi2")})  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="trigger"):
        DriftMonitor("rows", features=["x"])  # pyright: ignore[reportArgumentType]


# --------------------------------------------------------------------------- one transaction


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
            raise StoreFailed("written, and nobody knows")
        return receipts

    async def cursor(self) -> Mapping[str, Json]:
        return msgspec.json.decode(msgspec.json.encode(await self.inner.cursor()))


class Log:
    """A source with a position, as a partition has: it reads on from its cursor, ten rows at a time, some sent twice."""

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


def told(ledger: ContractLedger) -> list[tuple[str, Any]]:
    """The drifts without what the clock says."""
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
    """Failing commits, written or not, and a source that begins again at its position: the same counts, the same events."""
    options: dict[str, Any] = {"features": {"x": Numeric(metric=metric, warn=0.2, alert=9)}}
    expected = uninterrupted(**options)
    assert [data["status"] for _, data in told(expected)] == ["detected", "resolved"]
    for seed in range(3):
        ledger, draw = ContractLedger(), random.Random(seed)
        flaky = Flaky(ledger, draw)
        asyncio.run(to_the_end(log_monitor(**options), flaky, len(stream()), ledger))
        assert flaky.failures > 10
        assert told(ledger) == told(expected)
        assert without_times(ledger.cursors) == without_times(expected.cursors)


def without_times(cursors: Mapping[str, Any]) -> dict[str, Any]:
    """The parts, but for when: windows and memory note what the clock said."""
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
    """The store's files as a `kill -9` leaves them, in the middle of a window: another process ends as the first would have."""
    rng = np.random.default_rng(25)
    batches = [normal(rng, 70, 0.0 if number < 10 else 1.0) for number in range(20)]

    async def feed(seen: Watching, first: int, after: Path | None = None) -> list[Drift]:
        for number, batch in enumerate(batches[first:], first):
            await seen.send(batch, id=f"b{number}")
            if after is not None:
                image(tmp_path / "a.db", after / f"{number}.db")
        return await seen.told()

    async def main() -> None:
        async with watching(tmp_path / "a.db", window=300, reference=200) as seen:
            (tmp_path / "images").mkdir()
            expected = await feed(seen, 0, tmp_path / "images")
            windows = seen.gauge("drift_windows_judged")
        assert [drift.status for drift in expected] == ["detected", "escalated"] or len(
            expected
        ) == 1
        for number in (0, 3, 7, 13, 18):
            async with watching(
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
    """An event delivered again, in the same call or later or after a restart, is a duplicate and not a row more."""

    async def test(seen: Watching) -> None:
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
    """A hundred rows posted at once are all counted, in far fewer transactions than there are rows."""

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
            await asyncio.sleep(0.01)
            return await accept(*items, cursor=cursor, max_wait=max_wait)

        ledger.accept = counting  # pyright: ignore[reportAttributeAccessIssue]
        async with listening(monitor, ledger):
            rows = normal(np.random.default_rng(28), 100)
            await asyncio.gather(*(source.send(data=row) for row in rows))
        assert writes <= 5 and ledger.cursors["drift:meta"]["judged"] == 1  # pyright: ignore

    asyncio.run(main())


def test_the_state_is_bounded_and_a_row_rewrites_little():
    """20 features by KS: at most 64 KiB each are kept however long the stream is, and one row more writes under 24 KiB."""

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


# --------------------------------------------------------------------------- over other triggers


class MonitorHarness(HttpHarness):
    """Senders to a webhook under a monitor that also records the events it counts."""

    def trigger(self) -> DriftMonitor:
        self.endpoint = webhook = Webhook("/orders", verify="none")
        return DriftMonitor(webhook, features=["total"], record=True)


@pytest.mark.parametrize("promise", CONTRACT)
def test_contract(promise: Promise):
    """What holds for every trigger holds for one under a monitor."""
    asyncio.run(promise(MonitorHarness()))


def test_name_and_routes_are_the_sources():
    """A monitor is known by its source, serves its routes and says whether its senders are verified."""
    hook = Webhook("/orders", verify="none")
    monitor = DriftMonitor(hook, features=["total"])
    assert (
        monitor.routes == hook.routes
        and monitor.verified is False
        and monitor.name == "drift:webhook-orders"
    )


def test_recorded_rows_reach_flows_that_ask_for_them():
    """With `record=True` the same stream feeds the monitor and the flows that name its types."""

    @flow
    async def score(x: float) -> float:
        return x

    async def main() -> None:
        source, app = MemoryTrigger("rows"), App("both")
        monitor = DriftMonitor(source, features=["x"], reference=reference(), record=True)
        app.on(monitor, note)
        app.on(monitor, score, types=["row.*"])
        async with running(app):
            (receipt,) = await source.send(data={"x": 1.5}, type="row.made")
            assert receipt.matched == 1 and receipt.ledger_id > 0
            await drain(app)
            assert (
                len(await app.store.runs(flow="score")) == 1
                and await app.store.runs(flow="note") == []
            )

    asyncio.run(main())


def test_unreadable_rows_are_dead_letters():
    """What the source cannot read, and what is no row, is a dead letter with the reason; the rest of the batch counts."""

    async def test(seen: Watching) -> None:
        bad = Undecodable(id="u", source="/rows", body=b"{", error="no JSON")
        odd = Event(id="o", source="/rows", type="rows", data="text")
        good = Event(
            id="g", source="/rows", type="rows", data=normal(np.random.default_rng(30), 1000)
        )
        await seen.source.send(bad, odd, good)
        errors = [letter["reason"] for letter in await seen.app.store.dead_letters()]
        assert any("no JSON" in str(error) for error in errors) and any(
            "rows=" in str(error) for error in errors
        )
        assert seen.gauge("drift_windows_judged") == 1

    run(test)
