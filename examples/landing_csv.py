"""Partners drop CSV files of sales; each becomes a report of totals per region. Bad rows are set
aside, bad files fail.

    mkdir -p landing && eventflow serve examples/landing_csv.py
    printf 'region,amount\nnorth,10\nsouth,x\nnorth,5.5\n' > landing/monday.csv

Watch: two seconds after its last change the file moves to landing/done/, and reports/monday.json
appears, with one row in rejects/monday.csv. A file without an `amount` column makes a failed run,
with the reason in `eventflow ls runs`; corrected and dropped again, it is a new event. Files that
arrive while no server runs are found at the next start.
"""

import csv
import json
from pathlib import Path

import msgspec

from eventflow import App, Permanent, Retry, flow, task
from triggers import Directory, move

REPORTS = Path("reports")
REJECTS = Path("rejects")


class Sale(msgspec.Struct):
    region: str
    amount: float


@task(retries=Retry(attempts=3, delay=1, give_up_on=(UnicodeDecodeError,)))
def validate(path: str) -> tuple[list[Sale], list[tuple[int, str]]]:
    """The sales in the file, and line number and reason of each bad row."""
    sales: list[Sale] = []
    bad: list[tuple[int, str]] = []
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := {"region", "amount"} - set(reader.fieldnames or ()):
            raise Permanent(f"{Path(path).name}: missing {' and '.join(sorted(missing))}")
        for row in reader:
            try:
                sales.append(msgspec.convert(row, Sale, strict=False))
            except msgspec.ValidationError as error:
                bad.append((reader.line_num, str(error)))
    return sales, bad


@task
def set_aside(name: str, bad: list[tuple[int, str]]) -> None:
    rows = [f'{line},"{reason}"' for line, reason in bad]
    write(REJECTS / f"{name}.csv", "\n".join(["line,reason", *rows, ""]))


@task
def report(name: str, totals: dict[str, float], bad: int) -> None:
    write(REPORTS / f"{name}.json", json.dumps({"totals": totals, "rejected_rows": bad}))


def write(path: Path, text: str) -> None:
    """Atomic, and idempotent: a task body may run again after a crash."""
    path.parent.mkdir(exist_ok=True)
    (part := path.with_suffix(".part")).write_text(text)
    part.replace(path)


@flow
async def land(path: str, name: str) -> dict[str, float]:
    sales, bad = await validate(path)
    totals: dict[str, float] = {}
    for sale in sales:
        totals[sale.region] = round(totals.get(sale.region, 0.0) + sale.amount, 2)
    if bad:
        await set_aside(Path(name).stem, bad)
    await report(Path(name).stem, totals, len(bad))
    return totals


app = App("landing")
app.on(Directory("landing", pattern="/*.csv", after=move("done")), land)
