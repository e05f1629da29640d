"""Each morning a report of the day before, and every minute the totals of today; days that were
missed are made up for.

    mkdir -p data && echo at,region,amount > data/sales.csv
    for day in 01 02 03; do echo "2026-05-${day}T23:30:00+02:00,north,$day"; done >> data/sales.csv
    eventflow serve examples/daily_report.py
    eventflow backfill report --trigger daily-report --from 2026-05-01 --to 2026-05-05

Watch: `backfill` says that there are four mornings, asks, and reports/2026-05-01.json to 03 appear;
the first morning is that of a day without sales, which fails for good and is listed. Given again it
starts nothing. Add a sale of today to the file, and within a minute reports/today.json has it. Stop
the server over a morning: the next start reports at once, and the event says `catchup`. Where
clocks change, a day is what Berlin's clocks call one: 23 or 25 hours.
"""

import csv
import json
import os
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from eventflow import App, Permanent, Retry, current_run, flow, task
from triggers import Cron, Every

SALES, REPORTS = Path("data/sales.csv"), Path("reports")
ZONE = "Europe/Berlin"


@task(retries=Retry(attempts=5, delay=60))
def total(day: date) -> dict[str, float]:
    """Sums per region of one day. The file may be missing for a while: then this is tried again."""
    sums: dict[str, float] = {}
    with SALES.open(newline="") as file:
        for row in csv.DictReader(file):
            if datetime.fromisoformat(row["at"]).date() == day:
                sums[row["region"]] = round(sums.get(row["region"], 0.0) + float(row["amount"]), 2)
    return sums


@task
def write(name: str, sums: dict[str, float], at: str) -> str:
    """Whole or not at all, and the same when written twice: a task body may run again after a
    crash.
    """
    REPORTS.mkdir(exist_ok=True)
    path = REPORTS / f"{name}.json"
    (part := path.with_suffix(".part")).write_text(json.dumps({"totals": sums, "as_of": at}) + "\n")
    part.replace(path)
    return str(path)


@flow
async def report(local_time: datetime) -> str:
    """Of the day before the nominal time, not before now: a report that is late, or backfilled, is
    of the right day.
    """
    day = local_time.date() - timedelta(days=1)
    sums = await total(day)
    if not sums:
        raise Permanent(f"no sales on {day}: did the export run?")
    return await write(day.isoformat(), sums, local_time.isoformat())


@flow
async def today() -> str:
    """`current_run().now` stays what it was when the run is replayed after a crash;
    `datetime.now()` would not.
    """
    now = current_run().now.astimezone()
    return await write("today", await total(now.date()), now.astimezone(UTC).isoformat())


app = App("daily_report")
app.on(Cron("0 6 * * *", tz=ZONE, name="daily-report", misfire="all", limit=31), report)
app.on(Every(seconds=float(os.environ.get("EVERY", "60")), name="totals", misfire="skip"), today)
