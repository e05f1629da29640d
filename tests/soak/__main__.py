"""The soak: a real server under steady mixed traffic; what it holds must not grow, and nothing may
be lost or doubled.

    python -m tests.soak [--minutes 10] [--rate 1]

It starts a Kafka broker, an S3 and SQS server and `eventflow serve` of app.py, sends what
traffic.py describes, and takes a sample of each figure (figures.py) every few seconds. When the
traffic ends, everything comes to rest, and the ledger and the runs' own notes are compared with
what was sent. It prints a table, and exits with 1 when a figure of the second half grows or an
account does not hold. test_soak.py runs a short one.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

from tests import aws, brokers
from tests.crash.verdict import verdict
from tests.server_process import EventflowProcess
from tests.soak.figures import HEAD, Change, Observed, Sample, Verdict, changes, judge, read
from tests.soak.traffic import PARTITIONS, Traffic

APP = Path(__file__).with_name("app.py")
REST_WITHIN = 120.0
"""Seconds for what the last events started, retries and sleeps included."""

POLL = 0.5
"""Seconds between two looks at what is still under way."""


class Soak:
    """One soak in `folder`. `run` leaves `samples`, `verdicts` and `wrong`.

    `seconds`: of traffic; the first half warms up. `rest`: seconds of a durable sleep. `keep`:
    seconds of retention. `slack`: times the allowed rise. `leak`: names of figures that are to
    grow, each with `/N` if only every N-th order leaks.
    """

    def __init__(
        self,
        folder: Path,
        seconds: float,
        *,
        rate: float = 1.0,
        rest: float = 3.0,
        keep: float = 5.0,
        slack: float = 2.0,
        leak: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.seconds = seconds
        self.rate = rate
        self.slack = slack
        self.interval = max(0.5, seconds / 300)
        self.settings = {
            "SOAK_EFFECTS": str(folder / "effects"),
            "SOAK_STATS": str(folder / "stats"),
            "SOAK_LANDING": str(folder / "landing"),
            "SOAK_INTERVAL": str(self.interval),
            "SOAK_REST": str(rest),
            "SOAK_KEEP": str(keep),
            "SOAK_LEAK": ",".join(leak),
        }
        self.samples: list[Sample] = []
        self.verdicts: list[Verdict] = []
        self.wrong: list[str] = []
        self.counts: dict[str, int] = {}
        self._ports: dict[int, str] = {}

    @property
    def warm_up(self) -> float:
        return self.seconds / 2

    def run(self) -> None:
        (self.folder / "landing").mkdir()
        with (
            brokers.noida(self.folder / "broker") as broker,
            aws.serving("ministack", self.folder) as cloud,
        ):
            bucket = aws.Bucket(cloud)
            place = {"SOAK_BUCKET": bucket.name, "SOAK_QUEUE": bucket.queue().url}
            asyncio.run(create_topics(broker))
            self._ports[port_of(f"kafka://{broker.server}")] = "Kafka"
            self._ports[port_of(cloud.url)] = "S3 and SQS"
            with self._server({"SOAK_BROKER": broker.server, **place, **cloud.env}) as server:
                traffic = Traffic(
                    server.url,
                    server.token,
                    broker,
                    bucket,
                    self.folder / "landing",
                    self.rate,
                )
                asyncio.run(self._load(server, traffic))
                if not self.settings["SOAK_LEAK"]:
                    self._settle(server, traffic)
                    self._check_sink(broker, traffic.account.number_of("order"))
                if (code := server.stop()) != 0:
                    self.wrong.append(f"exit code {code} after SIGTERM, expected 0")
        (self.folder / "samples.json").write_text(
            json.dumps([asdict(each) for each in self.samples])
        )
        self.verdicts = judge(self.samples, self.warm_up, self.slack)

    @contextmanager
    def _server(self, env: dict[str, str]) -> Iterator[EventflowProcess]:
        server = EventflowProcess(
            self.folder,
            str(APP),
            *("--store", f"sqlite:///{self.folder}/store.db", "--log", "json"),
            *("--log-level", "warning"),
            env={**self.settings, **env},
        )
        try:
            if not server.wait_ready(60):
                raise RuntimeError(f"the server did not become ready: {server.log_tail}")
            yield server
        finally:
            server.kill()

    async def _load(self, server: EventflowProcess, traffic: Traffic) -> None:
        """Traffic and samples for `seconds`."""
        stats = self.folder / "stats"
        ports = {**self._ports, port_of(server.url): "the server"}
        place = Observed(server.process.pid, self.folder / "store.db", stats, ports)
        async with asyncio.TaskGroup() as group:
            group.create_task(traffic.run())
            began = time.monotonic()
            while (at := time.monotonic() - began) < self.seconds:
                if stats.exists():
                    self.samples.append(await asyncio.to_thread(sample, server, place, at))
                    show_progress(at, self.seconds, self.samples[-1])
                await asyncio.sleep(self.interval)
            traffic.over.set()

    def _settle(self, server: EventflowProcess, traffic: Traffic) -> None:
        """Waits until nothing is pending and every note is there; then the accounts."""
        deadline = time.monotonic() + REST_WITHIN
        effects, account = self.folder / "effects", traffic.account
        while server.get("/api/counts")["pending"] or account.compare(effects):
            if time.monotonic() > deadline:
                self.wrong.append(f"not at rest after {REST_WITHIN:g} s")
                break
            time.sleep(POLL)
        self.wrong += traffic.refusals + account.compare(effects)
        self.wrong += server.get("/api/check")["wrong"]
        self.counts = counts = server.get("/api/counts")
        parts = ("completed", "failed", "dead", "cancelled", "suppressed", "pending")
        if counts["accepted"] != sum(counts[part] for part in parts):
            self.wrong.append(f"the sums do not hold: {counts}")
        if counts["duplicates"] < traffic.duplicates:  # a listing may meet a notification again
            self.wrong.append(f"{counts['duplicates']} duplicates, expected {traffic.duplicates}")
        if counts["cancelled"] != account.cancelled:
            self.wrong.append(f"{counts['cancelled']} cancelled, expected {account.cancelled}")

    def _check_sink(self, broker: brokers.Broker, orders: int) -> None:
        sent = asyncio.run(broker.read("handled", orders))
        if (found := len({dict(record.headers)["ce_id"] for record in sent})) != orders:
            self.wrong.append(f"the sink has {found} of {orders} messages")

    def report(self) -> str:
        """The table, what the threads and descriptors are, and which objects grew if anything
        did.
        """
        lines = [
            f"{self.seconds:g} s, the last {self.seconds - self.warm_up:g} s judged, "
            f"{len(self.samples)} samples: {self.counts.get('events', 0):,} events, "
            f"{self.counts.get('runs', 0):,} runs",
            HEAD,
            *(each.row() for each in self.verdicts),
        ]
        for name in ("descriptors", "threads"):
            lines += listing(name, changes(self.samples, self.warm_up, name))
        if self.growing:
            found = changes(self.samples, self.warm_up, "objects")
            lines += listing("objects", [each for each in found if each.last > each.first][:12])
        return "\n".join(lines)

    @property
    def growing(self) -> list[str]:
        return [each.figure.name for each in self.verdicts if not each.flat]


def sample(server: EventflowProcess, place: Observed, at: float) -> Sample:
    return read(place, at, server.get("/api/counts")["pending"])


def listing(name: str, found: Sequence[Change]) -> list[str]:
    """Lines of the kinds of one figure, at the end, with their changes."""
    text = f"{name}: {'; '.join(map(str, found))}"
    return textwrap.wrap(text, 100, initial_indent="  ", subsequent_indent="    ")


def port_of(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or {"https": 443}.get(parts.scheme, 80)


async def create_topics(broker: brokers.Broker) -> None:
    await broker.create("records", PARTITIONS)
    await broker.create("handled")


def show_progress(at: float, seconds: float, sample: Sample) -> None:
    if sys.stderr.isatty():
        values = ", ".join(f"{name} {value:,.0f}" for name, value in sample.values.items())
        print(f"\r\033[K{at:.0f}/{seconds:.0f} s  {values}"[:200], end="", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description="mixed traffic; nothing may grow or get lost"
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=1.0, help="times the usual traffic")
    parser.add_argument(
        "--leak",
        action="append",
        default=[],
        metavar="FIGURE[/N]",
        help="make a figure grow with each order, or every N-th: the soak must find it",
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="eventflow-soak-"))
    long = options.minutes >= 4
    soak = Soak(
        folder,
        options.minutes * 60,
        rate=options.rate,
        rest=65.0 if long else 3.0,  # from 60 s on a sleeping run leaves memory
        keep=30.0 if long else 5.0,
        slack=1.0 if long else 2.0,
        leak=options.leak,
    )
    soak.run()
    print(f"\n{soak.report()}")
    wrong = soak.wrong + [f"{name} grows" for name in soak.growing]
    return verdict(wrong, folder, f"tests.soak --minutes {options.minutes:g}")


if __name__ == "__main__":
    sys.exit(main())
