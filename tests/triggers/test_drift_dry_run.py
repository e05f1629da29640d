"""Dry runs of a monitor: the events of a past time with other thresholds, compared with one that
ran with these at that time.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from eventflow import App, Singleflight, count, flow
from eventflow.dry_run.replay import DryRunQuery, dry_run
from eventflow.events.event import Event, Simulatable
from eventflow.logs.log import format_timestamp
from eventflow.testing import MemoryTrigger, VirtualClock, running
from triggers import Drift, DriftMonitor, Numeric

Row = dict[str, Any]
START = datetime(2026, 1, 5, tzinfo=UTC)


@flow
async def retrain(drift: Drift) -> str:
    return drift.status


@flow
async def archive(event: Event) -> None: ...


def rows(seed: int = 3) -> list[list[Row]]:
    """Sixty batches of 200: two features that drift little, then much, then not, one after the
    other, with a hole in one.
    """
    rng, found = np.random.default_rng(seed), list[list[Row]]()
    for number in range(60):
        x = 0.3 if 8 <= number < 16 else 1.0 if 24 <= number < 34 else 0.0
        y = 0.45 if 30 <= number < 44 else 0.0
        columns = rng.normal(x, 1, 200).tolist(), rng.normal(y, 1.0, 200).tolist()
        found.append(
            [
                {"x": one if number != 50 or one > 0 else None, "y": other}
                for one, other in zip(*columns, strict=True)
            ]
        )
    return found


def reference() -> dict[str, list[float]]:
    rng = np.random.default_rng(1)
    return {"x": rng.normal(size=4000).tolist(), "y": rng.normal(size=4000).tolist()}


def app_of(**options: Any) -> App:
    """An app with a monitor on `x` and `y`; `metric`, `warn` and `alert` are those of both."""
    thresholds = {
        name: options.pop(name) for name in ("metric", "warn", "alert") if name in options
    }
    features = {name: Numeric(**thresholds) for name in ("x", "y")}
    given: dict[str, Any] = {
        "features": features,
        "reference": reference(),
        "window": 200,
        "cooldown": 3600,
        "model": "prices",
    }
    app = App("drift")
    app.on(DriftMonitor(MemoryTrigger("rows"), **given | options), retrain, types=["drift.*"])
    return app


@asynccontextmanager
async def fed(app: App, store: Path | None = None) -> AsyncIterator[App]:
    """The app, after all batches, one every ten minutes."""
    (monitor,) = app.triggers
    assert isinstance(monitor, DriftMonitor) and isinstance(monitor._source, MemoryTrigger)
    clock = VirtualClock(START)
    async with running(app, clock=clock, store=store):
        for number, batch in enumerate(rows()):
            await monitor._source.send(
                Event(id=f"b{number}", source="/rows", type="rows", data=batch)
            )
            await clock.advance(600)
        yield app


async def on_record(app: App) -> list[tuple[Any, ...]]:
    """The monitor's events in the ledger, oldest first."""
    found = await app.store.events(trigger="drift:rows", limit=1000)
    events = [
        (row["received_at"], Event.from_recorded((await app.store.event(row["id"]))["body"]))
        for row in reversed(found)
    ]
    return [
        essence(format_timestamp(at), event.to_json())
        for at, event in events
        if event.type != "rows"
    ]


def essence(at: str, body: bytes) -> tuple[Any, ...]:
    data = Event.from_json(body).data
    names = (
        "status",
        "severity",
        "feature",
        "features",
        "metric",
        "statistic",
        "threshold",
        "p_value",
        "starts_at",
        "ends_at",
    )
    return (
        at,
        Event.from_json(body).id,
        *(data[name] if data[name] is None else str(data[name]) for name in names),
    )


async def simulated(
    app: App, by: App | None = None, **question: Any
) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
    """What another app's monitor would have reported, over this one's ledger; and the
    whole answer.
    """
    other, until = by or app, question.pop("until", app.clock.now() + 1)
    reported = await dry_run(
        app.store, other.subscriptions, other.triggers, DryRunQuery(until=until, **question)
    )
    return [
        essence(each["at"], orjson.dumps(each["event"])) for each in reported["simulated"]
    ], reported


CHANGES: list[dict[str, Any]] = [
    {"warn": 0.05, "alert": 0.15},
    {"warn": 0.3, "alert": 0.5},
    {"confirm": 1},
    {"confirm": 4},
    {"clear": 1},
    {"cooldown": 0},
    {"cooldown": timedelta(hours=3)},
    {"min_severity": "alert"},
    {"alpha": 0.2},
    {"per": "feature", "confirm": 1},
    {},
]


@pytest.mark.parametrize("metric", ["psi", "ks"])
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_other_thresholds_give_the_events_they_would_have_made(metric: str, change: dict[str, Any]):
    """From the statistics of past windows: the events of a monitor that ran with these thresholds,
    rules and cool-down.
    """

    async def main() -> None:
        async with fed(app_of(metric=metric, **change)) as other:
            expected = await on_record(other)
        async with fed(app_of(metric=metric)) as app:
            before = await on_record(app)
            reported, answer = await simulated(app, app_of(metric=metric, **change))
            assert reported == expected and len(reported) >= 2
            (trigger,) = answer["triggers"]
            assert (trigger["recorded"], trigger["simulated"]) == (len(before), len(reported))
            assert "60 windows" in trigger["notes"][0]
            assert answer["would_start"] == len(reported) and await on_record(app) == before

    asyncio.run(main())


@pytest.mark.parametrize(
    "change",
    [
        {"window": 500},
        {"metric": "js"},
        {"warn": 0.05, "alert": 0.15},
        {"metric": "adwin", "confirm": 1},
    ],
    ids=str,
)
def test_recorded_rows_are_counted_again(change: dict[str, Any]):
    """With record=True anything may change, windows and metrics too: the events are those of a
    monitor that ran so.
    """

    async def main() -> None:
        async with fed(app_of(record=True, **change)) as other:
            expected = await on_record(other)
        async with fed(app_of(record=True)) as app:
            reported, answer = await simulated(app, app_of(record=True, **change))
            assert reported == expected and len(reported) >= 2
            assert answer["triggers"][0]["notes"] == ["60 recorded events counted again"]

    asyncio.run(main())


def test_windows_of_another_kind_are_not_guessed_at():
    """Statistics of another window length cannot be evaluated: the recorded events stay, with a
    note.
    """

    async def main() -> None:
        async with fed(app_of()) as app:
            _, answer = await simulated(app, app_of(window=500))
            (trigger,) = answer["triggers"]
            assert (trigger["recorded"], trigger["simulated"], answer["simulated"]) == (0, 0, [])
            assert "other features, reference or window" in trigger["notes"][0]
            assert answer["would_start"] == len(await on_record(app))
            _, answer = await simulated(app, app_of(record=True))
            assert "its own events stay" in answer["triggers"][0]["notes"][0]
            assert answer["would_start"] == len(await on_record(app))

    asyncio.run(main())


def test_what_is_known_begins_with_the_history():
    """Only the stored windows are evaluated again; recorded events from before them stay."""

    async def main() -> None:
        async with fed(app_of(history=20)) as app:
            cursor = await app.store.cursor("drift:rows")
            assert sum(key.startswith("drift:h/") for key in cursor) == 20
            recorded = await on_record(app)
            reported, answer = await simulated(app)
            first = START + timedelta(seconds=40 * 600)
            earlier = [each for each in recorded if datetime.fromisoformat(each[0]) < first]
            assert earlier and answer["would_start"] == len(earlier) + len(reported)
            assert f"20 windows from {first:%Y-%m-%d %H:%M:%S}" in answer["triggers"][0]["notes"][0]
            _, none = await simulated(
                app, until=int((START + timedelta(seconds=39 * 600)).timestamp() * 1e6)
            )
            assert none["triggers"][0]["recorded"] == 0 and none["would_start"] == len(earlier)

    asyncio.run(main())


def test_filters_and_patterns_match_simulated_events():
    """Simulated events are treated as any event: through `where`, into a count by model, into the
    window of a delivery mode.
    """

    async def main() -> None:
        async with fed(app_of()) as app:
            changed = app_of(warn=0.05, alert=0.15, cooldown=0, confirm=1, clear=1)
            (monitor,) = changed.triggers
            changed.on(monitor, retrain, where={"severity": ["alert"]}, name="alerts")
            changed.on(
                count((monitor, {"status": ["detected"]}), 3, within=86_400, by="model"),
                retrain,
                name="three",
            )
            changed.on(monitor, retrain, name="once", deliver=Singleflight())
            reported, answer = await simulated(app, changed)
            runs = {each["subscription"]: each["runs"] for each in answer["subscriptions"]}
            detected = [each for each in reported if each[2] == "detected"]
            assert (
                runs["alerts"] == sum(each[3] == "alert" for each in detected)
                and len(detected) >= 3
            )
            assert runs["three"] == len(detected) // 3 and runs["once"] == 1
            (three, *_) = (run for run in answer["runs"] if run["subscription"] == "three")
            assert three["key"] == "prices" and all(
                label.startswith("simulated-") for label in three["events"]
            )

    asyncio.run(main())


def test_a_type_selects_simulated_events_and_not_what_they_are_made_of():
    """With record=True the rows have another type: they are counted all the same, and of what they
    give only the events of the type that was asked for are reported and start runs.
    """

    async def main() -> None:
        async with fed(app_of(record=True)) as app:
            changed = app_of(record=True, warn=0.05, alert=0.15, cooldown=0, confirm=1)
            (monitor,) = changed.triggers
            changed.on(monitor, archive, types=["rows"], name="rows")
            _, answer = await simulated(app, changed)
            types = Counter(each["type"] for each in answer["simulated"])
            assert len(types) >= 2
            for kind, number in types.items():
                _, chosen = await simulated(app, changed, type=kind)
                assert [each["type"] for each in chosen["simulated"]] == [kind] * number
                assert chosen["would_start"] == number
            _, chosen = await simulated(app, changed, type="rows")
            assert (chosen["would_start"], chosen["simulated"]) == (len(rows()), [])

    asyncio.run(main())


def test_a_learned_reference_is_the_one_it_learned():
    """With record=True and other thresholds the reference stays; other features learn from the
    first rows of the time.
    """

    async def main() -> None:
        async with fed(app_of(record=True, reference=1000)) as app:
            since = app.clock.now() - 40 * 600 * 1_000_000
            reported, answer = await simulated(
                app, app_of(record=True, reference=1000, confirm=1), since=since
            )
            assert reported and answer["triggers"][0]["notes"] == [
                "40 recorded events counted again"
            ]
            _, answer = await simulated(app, app_of(record=True, reference=1200), since=since)
            assert "the first 1200 rows" in answer["triggers"][0]["notes"][1]

    asyncio.run(main())


def test_changed_thresholds_keep_what_was_learned(tmp_path: Path):
    """A monitor that comes up with other thresholds has its reference and its windows still; with
    other features it has not.
    """

    async def main() -> None:
        async with fed(app_of(reference=1000, warn=0.5), tmp_path / "a.db"):
            pass
        for options, learned in (({"warn": 0.4}, True), ({"metric": "js"}, False)):
            again = app_of(reference=1000, **options)
            async with running(
                again, store=tmp_path / "a.db", clock=VirtualClock(START + timedelta(days=1))
            ):
                (monitor,) = again.triggers
                assert isinstance(monitor, DriftMonitor)
                await send(monitor, {"x": 0.0, "y": 0.0})
                memory: Any = (await again.store.cursor("drift:rows"))["drift:meta"]
                assert memory["learned"] is learned

    asyncio.run(main())


async def send(monitor: DriftMonitor, *batch: Row) -> None:
    assert isinstance(monitor._source, MemoryTrigger)
    await monitor._source.send(
        Event(id=f"again-{random.random()}", source="/rows", type="rows", data=list(batch))
    )


def test_nodata_is_simulated_from_rows():
    """`nodata` and the end of windows of time happen at their own instants, as a monitor's timer
    would have it.
    """

    def app(**options: Any) -> App:
        return app_of(window=timedelta(hours=1), record=True, min_samples=200, **options)

    async def main() -> None:
        made = app()
        async with fed(made) as old:
            (monitor,) = made.triggers
            assert isinstance(monitor, DriftMonitor) and isinstance(old.clock, VirtualClock)
            await old.clock.advance(timedelta(hours=12))
            await send(monitor, {"x": 0.0, "y": 0.0})
            reported, _ = await simulated(old)
            nodata_events = [each for each in reported if each[6] == "nodata"]
            assert [each[2] for each in nodata_events] == ["nodata", "resolved"]
            assert nodata_events[0][0] == format_timestamp(
                int((START + timedelta(seconds=59 * 600, hours=3)).timestamp() * 1e6)
            )
            patient, _ = await simulated(old, app(nodata=timedelta(days=2)))
            assert [each for each in patient if each[6] == "nodata"] == []

    asyncio.run(main())


def test_changes_of_a_streaming_detector_are_simulated():
    """ADWIN's changes in the middle of windows are stored like windows: the same thresholds give
    the same events.
    """

    async def main() -> None:
        async with fed(app_of(metric="adwin", window=1000)) as app:
            reported, _ = await simulated(app)
            assert reported == await on_record(app) and reported[0][6] == "adwin"

    asyncio.run(main())


def test_only_a_monitor_foresees():
    """`Simulatable` is the protocol that is checked; a plain trigger is not simulated."""
    (monitor,) = app_of().triggers
    plain: Any = MemoryTrigger("rows")
    assert isinstance(monitor, Simulatable) and not isinstance(plain, Simulatable)
