"""Partners drop CSV files of sales; each becomes a report of totals per region. Bad rows are set aside, bad files fail loudly.

    mkdir -p landing && eventflow serve examples/landing_csv.py
    printf 'region,amount\nnorth,10\nsouth,x\nnorth,5.5\n' > landing/monday.csv

Watch: two seconds after the file holds still it moves to landing/done/ and reports/monday.json appears, with one row in
rejects/monday.csv and why. Drop a file without an `amount` column: no report, but a failed run, in `eventflow ls runs` with its
reason; mend the file, drop it again, and it is a new event. Files that land while nothing runs are found at the next start.
"""

import csv
import json
from pathlib import Path

import msgspec

from eventflow import App, Permanent, Retry, flow, task
from triggers import Directory, move

LANDING, REPORTS, REJECTS = Path("landing"), Path("reports"), Path("rejects")


class Sale(msgspec.Struct):
    region: str
    amount: float


class Checked(msgspec.Struct):
    sales: list[Sale]
    bad: list[tuple[int, str]]  # line number, reason


@task(retries=Retry(attempts=3, delay=1, give_up_on=(UnicodeDecodeError,)))
def validate(path: str) -> Checked:
    """Reads the file. A row may be wrong; a file without its columns is nobody's sales, and reading
    it again cannot help.
    """
    checked = Checked([], [])
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := {"region", "amount"} - set(reader.fieldnames or ()):
            raise Permanent(
                f"{Path(path).name}: expected columns region and amount, missing {', '.join(sorted(missing))}"
            )
        for row in reader:
            try:
                checked.sales.append(msgspec.convert(row, Sale, strict=False))
            except msgspec.ValidationError as error:
                checked.bad.append((reader.line_num, str(error)))
    return checked


@task
def set_aside(name: str, bad: list[tuple[int, str]]) -> None:
    write(
        REJECTS / f"{name}.csv", "line,reason\n" + "".join(f'{line},"{why}"\n' for line, why in bad)
    )


@task
def report(name: str, totals: dict[str, float], bad: int) -> None:
    write(
        REPORTS / f"{name}.json",
        json.dumps({"totals": totals, "rejected_rows": bad}, indent=2) + "\n",
    )


def write(path: Path, text: str) -> None:
    """Whole or not at all, and the same when written twice: a task body may run again after a
    crash.
    """
    path.parent.mkdir(exist_ok=True)
    (part := path.with_suffix(".part")).write_text(text)
    part.replace(path)


@flow
async def land(path: str, name: str) -> dict[str, float]:
    checked = await validate(path)
    totals: dict[str, float] = {}
    for sale in checked.sales:
        totals[sale.region] = round(totals.get(sale.region, 0.0) + sale.amount, 2)
    if checked.bad:
        await set_aside(Path(name).stem, checked.bad)
    await report(Path(name).stem, totals, len(checked.bad))
    return totals


app = App("landing")
app.on(Directory(LANDING, pattern="/*.csv", after=move("done")), land)
