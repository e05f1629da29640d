"""DriftMonitor over real sources and the real store: the cases D2 to D15, crashes in mid-window,
sources of every kind.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from eventflow import App, flow
from eventflow.core.errors import UsageError
from eventflow.events.event import Event, Receipt, Undecodable
from eventflow.testing import MemoryTrigger, VirtualClock, drain, running
from eventflow.testing.trigger_contract import CONTRACT, ContractLedger, Promise, listening
from tests.conftest import eventually
from tests.triggers.hooks import HttpHarness
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


class MonitoredApp:
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

    async def reported(self) -> list[Drift]:
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
async def monitored_app(store: Path | None = None, **options: Any) -> AsyncIterator[MonitoredApp]:
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
        yield MonitoredApp(app, source, monitor)


def run(test: Any, **options: Any) -> None:
    async def main() -> None:
        async with monitored_app(**options) as seen:
            await test(seen)

    asyncio.run(main())


# --------------------------------------------------------------------------- episodes


def test_d2_d3_a_shift_is_reported_once_and_resolved_once():
    """A shift of 0.5 sigma from window 10 on is detected by window 12, once while it lasts, and
    resolved after 3 clean ones.
    """

    async def test(seen: MonitoredApp) -> None:
        rng = np.random.default_rng(2)
        when: dict[str, int] = {}
        for window in range(30):
            await seen.send(normal(rng, 1000, 0.5 if 10 <= window < 20 else 0.0))
            for drift in await seen.reported():
                when.setdefault(drift.status, window)
        first, *middle, last = await seen.reported()
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
    """A window of 80 rows is too small to evaluate: no event, whatever is in it, and it is counted
    as such.
    """

    async def test(seen: MonitoredApp) -> None:
        for _ in range(4):
            await seen.send(normal(np.random.default_rng(5), 80, 9.0))
        assert await seen.reported() == []
        assert (seen.gauge("drift_windows_too_small"), seen.gauge("drift_windows_judged")) == (4, 0)

    run(test, window="batch")


@pytest.mark.parametrize("metric", ["psi", "js", "ks", "wasserstein", "missing"])
def test_d8_missing_values_are_drift(metric: Any):
    """A null rate of 1 % that becomes 30 % is reported, also by a metric that is blind to it; the
    values are the same.
    """
    rng = np.random.default_rng(8)

    def holed(rate: float, count: int) -> list[Row]:
        return [row if rng.random() >= rate else {"x": None} for row in normal(rng, count)]

    async def test(seen: MonitoredApp) -> None:
        for _ in range(3):
            await seen.send(holed(0.01, 1000))
        assert await seen.reported() == []
        for _ in range(2):
            await seen.send(holed(0.30, 1000))
        (drift,) = await seen.reported()
        assert drift.metric == ("missing" if metric in ("ks", "wasserstein", "missing") else metric)
        assert drift.current is not None and drift.current.histogram[-1].label == "missing"
        assert drift.current.histogram[-1].share == pytest.approx(0.3, abs=0.05)

    before = {"x": [row["x"] for row in holed(0.01, 5000)]}
    run(test, features={"x": Numeric(metric=metric)}, reference=before)


@pytest.mark.parametrize("metric", ["psi", "js", "tv", "chi2"])
def test_d9_an_unseen_category_is_named(metric: Any):
    """A category that the reference has not, in 10 % of the rows, is reported with its name, cut to
    size and escaped.
    """
    draw = random.Random(9)
    odd = "new\n\u202e" + "n" * 100

    async def test(seen: MonitoredApp) -> None:
        for _ in range(2):
            rows = [odd if draw.random() < 0.1 else draw.choice("aab") for _ in range(1000)]
            await seen.send([{"c": each} for each in rows])
        (drift,) = await seen.reported()
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


def test_d14_no_samples_are_nodata_and_not_resolved():
    """Three windows of time without a row, in the middle of an episode, are `nodata`; the next row
    ends it.
    """

    async def test(seen: MonitoredApp) -> None:
        rng = np.random.default_rng(14)
        for _ in range(4):
            await seen.send(
                normal(rng, 1000, 1.0), time=datetime.fromtimestamp(seen.clock.now() / 1e6, UTC)
            )
            await seen.clock.advance(HOUR)
        assert [drift.status for drift in await seen.reported()] == ["detected"]
        await seen.clock.advance(4 * HOUR)
        await eventually(seen.reported, "drift.nodata is reported")
        detected, nodata = await seen.reported()
        assert (nodata.status, nodata.metric) == (
            "nodata",
            "nodata",
        ) and nodata.fingerprint != detected.fingerprint
        assert seen.monitor.condition == "no data arrives"
        await seen.clock.advance(20 * HOUR)
        await seen.send(normal(rng, 10, 1.0))
        assert [drift.status for drift in await seen.reported()] == [
            "detected",
            "nodata",
            "resolved",
        ]
        assert (await seen.reported())[
            -1
        ].fingerprint == nodata.fingerprint and seen.monitor.condition is None

    run(test, window=HOUR)


def test_d15_escalation_passes_the_cool_down():
    """An alert after a warning is reported at once, what is reported already is not; a new episode
    waits for the cool-down.
    """

    async def test(seen: MonitoredApp) -> None:
        rng = np.random.default_rng(15)

        async def windows(count: int, mean: float) -> None:
            for _ in range(count):
                await seen.send(normal(rng, 1000, mean))

        await windows(4, 0.36)
        assert [(drift.status, drift.severity) for drift in await seen.reported()] == [
            ("detected", "warning")
        ]
        await windows(5, 1.0)
        assert [(drift.status, drift.severity) for drift in await seen.reported()][1:] == [
            ("escalated", "alert")
        ]
        await windows(3, 0.0)
        await windows(5, 1.0)
        assert [drift.status for drift in await seen.reported()] == [
            "detected",
            "escalated",
            "resolved",
        ]
        await seen.clock.advance(2 * HOUR)
        await windows(1, 1.0)
        assert [drift.status for drift in await seen.reported()][3:] == ["detected"]
        assert len({event.id for event in await seen.events()}) == 4

    run(test)


def test_a_statistic_round_its_threshold_is_one_episode():
    """1,000 windows whose statistic swings round the warning threshold, over and under it, start
    one run.
    """

    async def test(seen: MonitoredApp) -> None:
        rng = np.random.default_rng(16)
        over = 0
        for _ in range(1000):
            await seen.send(normal(rng, 200, 0.36 + 0.03 * float(rng.normal())))
            over += seen.gauge("drift_statistic", feature="x") >= 0.15
        assert 200 < over < 800
        statuses = [drift.status for drift in await seen.reported()]
        assert statuses.count("detected") == 1 and set(statuses) <= {"detected", "resolved"}
        await drain(seen.app)
        assert len(await seen.app.store.runs(flow="note")) == 1

    run(test, window=200, features={"x": Numeric(warn=0.15, alert=9)}, clear=4)


def test_each_feature_by_itself():
    """With `per="feature"` each has its episode and events; otherwise the worst represents all, and
    all are named.
    """

    def rows(rng: np.random.Generator) -> list[Row]:
        return [
            {"a": a, "b": b, "c": c} for a, b, c in rng.normal([0.6, 1.2, 0], 1, (1000, 3)).tolist()
        ]

    before = {name: np.random.default_rng(7).normal(size=5000) for name in "abc"}
    for per, expected in (
        ("feature", [("a", ["a"]), ("b", ["b"])]),
        ("monitor", [("b", ["b", "a"])]),
    ):

        async def test(seen: MonitoredApp, expected: Any = expected) -> None:
            rng = np.random.default_rng(17)
            for _ in range(2):
                await seen.send(rows(rng))
            reported = await seen.reported()
            assert [(drift.feature, drift.features) for drift in reported] == expected
            assert reported[-1].share == pytest.approx(1 if len(reported) > 1 else 2 / 3, abs=0.7)
            assert [finding.feature for drift in reported for finding in drift.findings] == [
                each for _, names in expected for each in names
            ]

        run(test, features=["a", "b", "c"], reference=before, per=per)


@pytest.mark.parametrize("metric", ["adwin", "page-hinkley"])
def test_a_streaming_detector_reports_in_the_middle_of_a_window(metric: Any):
    """ADWIN and Page-Hinkley detect a shift of one sigma within 300 rows, long before the window is
    over, and its end too.
    """

    async def test(seen: MonitoredApp) -> None:
        rng = np.random.default_rng(18)
        for _ in range(0, 5000, 100):
            await seen.send(normal(rng, 100))
        assert await seen.reported() == []
        for _ in range(0, 300, 10):
            await seen.send(normal(rng, 10, 1.0))
        (drift,) = await seen.reported()
        assert (drift.metric, drift.feature) == (metric, "x")
        for place in range(0, 60_000, 1000):
            await seen.send(normal(rng, 1000, 1.0 if place < 10_000 else 0.0))
        assert [each.status for each in await seen.reported() if each.status != "escalated"] == [
            "detected",
            "resolved",
        ]

    run(test, features={"x": Numeric(metric=metric)}, window=10_000, clear=2)


# --------------------------------------------------------------------------- windows, references


def test_windows_of_time_wait_for_the_late_and_count_what_is_too_late():
    """Rows belong to the window of their event's time; within `lateness` they still do, later they
    are only counted.
    """
    start = datetime(2026, 11, 22, 10, tzinfo=UTC)

    async def test(seen: MonitoredApp) -> None:
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
        assert [drift.status for drift in await seen.reported()] == ["detected"]
        (drift,) = await seen.reported()
        assert drift.current is not None and drift.current.samples == 800

    run(test, window=HOUR, lateness=HOUR / 2, nodata=9 * HOUR)


def test_a_clock_ahead_makes_no_row_late():
    """A row from the future counts as one of now: it does not end the windows of all others."""

    async def test(seen: MonitoredApp) -> None:
        rng = np.random.default_rng(21)
        await seen.send(normal(rng, 10), time=datetime(2099, 1, 1, tzinfo=UTC))
        await seen.send(normal(rng, 10))
        assert seen.gauge("drift_rows_late") == 0

    run(test, window=HOUR)


def test_the_first_rows_are_the_reference_and_a_new_one_can_be_learned():
    """Without a reference the first N rows are it; after `relearn` the next N are, durably, and
    episodes start over.
    """

    async def test(seen: MonitoredApp) -> None:
        rng = np.random.default_rng(22)
        await seen.send(normal(rng, 1500))
        assert seen.gauge("drift_rows_learning") == 1500
        await seen.send(normal(rng, 2500))
        assert (seen.gauge("drift_rows_learning"), seen.gauge("drift_windows_judged")) == (0, 2)
        for _ in range(2):
            await seen.send(normal(rng, 1000, 2.0))
        assert [drift.labels["reference"] for drift in await seen.reported()] == ["1"]
        await seen.monitor.relearn()
        await seen.send(normal(rng, 5000, 2.0))
        assert len(await seen.reported()) == 1 and seen.gauge("drift_level") == 0
        await seen.clock.advance(2 * HOUR)
        for _ in range(2):
            await seen.send(normal(rng, 1000, 0.0))
        assert [drift.labels["reference"] for drift in await seen.reported()] == ["1", "2"]

    run(test, reference=2000)


def test_a_new_reference_outlives_a_restart_and_the_given_one(tmp_path: Path):
    """After `relearn` the reference that the app gives no longer counts, also after restarts while
    the new one is learned.
    """

    async def main() -> None:
        rng = np.random.default_rng(31)
        async with monitored_app(tmp_path / "a.db") as seen:
            await seen.monitor.relearn()
            await seen.send(normal(rng, 800, 5.0), id="a")
        async with monitored_app(tmp_path / "a.db") as seen:
            assert seen.gauge("drift_rows_learning") == 800
            await seen.send(normal(rng, 1200, 5.0), id="b")
        async with monitored_app(tmp_path / "a.db") as seen:
            await seen.send(normal(rng, 3000, 5.0), id="c")
            assert (seen.gauge("drift_windows_judged"), await seen.reported()) == (3, [])
            await seen.send(normal(rng, 2000, 0.0), id="d")
            assert [drift.labels["reference"] for drift in await seen.reported()] == ["2"]

    asyncio.run(main())


def test_other_features_start_over(tmp_path: Path):
    """When features or reference are others after a restart, what was counted is void and the
    reference's number rises.
    """

    async def main() -> None:
        rng = np.random.default_rng(23)
        async with monitored_app(tmp_path / "a.db") as seen:
            await seen.send(normal(rng, 1500, 3.0))
        async with monitored_app(tmp_path / "a.db", reference=reference(99)) as seen:
            await seen.send(normal(rng, 999, 3.0), id="b1")
            assert seen.gauge("drift_windows_judged") == 0
            await seen.send(normal(rng, 1001, 3.0), id="b2")
            (drift,) = await seen.reported()
            assert drift.labels["reference"] == "2"
            cursors = await seen.source.cursor()
            assert cursors == {}

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_references_and_batches_are_read_from_files(kind: str, tmp_path: Path):
    """A reference file and the files of a landing directory, each a window: the drifted ones are
    reported, a broken one is dead.
    """
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
            await eventually(lambda: len(ledger.recorded) == 2, "the drifted file is reported")
        dead, event = ledger.recorded.values()
        assert isinstance(dead, Undecodable) and "rows:" in dead.error
        assert isinstance(event, Event) and event.data["features"] == ["x"]

    asyncio.run(main())


def test_invalid_options_are_rejected_when_the_monitor_is_made(tmp_path: Path):
    """A reference without a feature, a file that is none, a small window, a metric of the other
    kind: UsageError names it.
    """
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
    """A monitor is known by its source, serves its routes and shows whether its senders are
    verified.
    """
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
    """What the source cannot read, and what is no row, is a dead letter with the reason; the rest
    of the batch counts.
    """

    async def test(seen: MonitoredApp) -> None:
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
