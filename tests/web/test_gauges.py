"""The gauges of a trigger appear in the API, in /metrics and in `ls triggers`."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import httpx2
from click.testing import CliRunner

from eventflow import App, Intake, flow
from eventflow.cli import cli
from eventflow.events.event import Gauge, gauge_totals
from eventflow.web.api import make_asgi

APP = """
from eventflow import App
from tests.web.test_gauges import Well, drawn

app = App("well")
app.on(Well(), drawn)
"""


class Well:
    """A source with two buckets, which nobody fills."""

    name = "well"
    condition = "dry since spring"

    async def listen(self, intake: Intake) -> None:
        await asyncio.Event().wait()

    def gauges(self) -> Sequence[Gauge]:
        return [
            *(Gauge("lag_messages", n, {"bucket": str(n)}) for n in (3, 4)),
            *(Gauge("lag_seconds", n / 2, {"bucket": str(n)}, total="max") for n in (3, 4)),
        ]


@flow
async def drawn() -> None: ...


def test_gauges_are_shown_with_their_labels(tmp_path: Path):
    """The API lists each gauge, the totals and the condition; /metrics has one sample per set of
    labels.
    """

    async def go() -> None:
        app = App("well", store=f"sqlite:///{tmp_path}/well.db")
        app.on(Well(), drawn)
        async with app:
            transport = httpx2.ASGITransport(make_asgi(app, auth=False, manage=False))
            async with httpx2.AsyncClient(
                transport=transport, base_url="http://localhost"
            ) as client:
                (row,) = (await client.get("/api/triggers")).json()["triggers"]
                text = (await client.get("/metrics")).text
        assert row["condition"] == "dry since spring"
        assert row["totals"] == {"lag_messages": 7, "lag_seconds": 2.0}
        assert row["gauges"][0] == {"name": "lag_messages", "value": 3, "bucket": "3"}
        assert 'eventflow_trigger_lag_messages{bucket="4",trigger="well"} 4.0' in text
        assert 'eventflow_trigger_lag_seconds{bucket="3",trigger="well"} 1.5' in text

    asyncio.run(go())


def test_ls_triggers_shows_gauges_and_condition(tmp_path: Path):
    """`ls triggers` shows the totals of the gauges, and the condition."""

    async def make_store() -> None:
        async with App("well", store=f"sqlite:///{tmp_path}/well.db"):
            pass

    asyncio.run(make_store())
    (tmp_path / "app.py").write_text(APP)
    place = ["--store", f"sqlite:///{tmp_path}/well.db", "--app", str(tmp_path / "app.py")]
    done = CliRunner().invoke(cli, ["ls", "triggers", *place])
    assert done.exit_code == 0, done.output
    assert "lag_messages 7, lag_seconds 2" in done.output and "dry since spring" in done.output


def test_totals_are_sums_or_maxima():
    """Lag in messages is summed; lag in seconds is the maximum."""
    assert gauge_totals(Well().gauges()) == {"lag_messages": 7, "lag_seconds": 2.0}
    assert gauge_totals([]) == {}
