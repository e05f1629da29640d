"""The demo itself: what is sent, when the server dies, and in which order it is told. The acts read
top to bottom.

`demo` plays them, then asks proof.py whether everything held. The server is a process of its own;
so are its two lives.
"""

import os
import shutil
import signal
import sys
import threading
from typing import Any

import click

from eventflow.core.clock import SECOND, Clock, SystemClock
from eventflow.demo.environment import SHOP, DemoEnvironment, DemoFailed, ServerProcess
from eventflow.demo.report import Report, statuses_text
from eventflow.demo.verification import KillRecord, Verification, parse_instant

FIRST_ORDERS, RUSH_ORDERS = 8, 12
"""Orders before the rush, and in it."""

MONDAY_PRICES, TUESDAY_PRICES = [float(n) for n in range(1, 61)], [5.0, 10.0, 15.0]
"""The prices in the list that the kill interrupts, and in the one that lands while nothing runs."""


@click.command("demo")
@click.option("--serve", is_flag=True, help="Keep the server running afterwards, until Ctrl-C.")
@click.option(
    "--port",
    default=0,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Bind this port; 0 picks a free one.",
)
def demo(serve: bool, port: int) -> int:
    """Run a demonstration with real parts, including a kill -9.

    A shop receives webhooks, files and a drift alert, is killed, and recovers; then the ledger is
    checked. The exit code is 1 when a check fails.
    """
    clock = SystemClock()
    environment, report = DemoEnvironment(clock), Report(sys.stdout, clock)
    passed = False
    try:
        passed = run_scenario(environment, report, clock, serve, port)
    except DemoFailed as error:
        report.check(False, str(error))
    finally:
        if not passed:
            report.heading(f"The last lines of {environment.log}")
            report.indented(environment.log_tail())
        environment.close(keep=not passed)
    return 0 if passed else 1


def run_scenario(
    environment: DemoEnvironment, report: Report, clock: Clock, serve: bool, port: int
) -> bool:
    """The acts, the proof, and the end. Whether all of it held."""
    scenario = Scenario(environment, report, clock)
    server = scenario.run(port)
    verification = Verification(environment, report, scenario.kill_record, server.pid)
    verification.print_totals()
    report.heading("$ eventflow explain msg-3")
    report.indented(environment.run_command("explain", "msg-3"))
    report.heading("Checked")
    verification.check_all(
        orders=FIRST_ORDERS + RUSH_ORDERS + 1, price_lists=[MONDAY_PRICES, TUESDAY_PRICES]
    )
    if serve and not report.failed_checks:
        stay_up(environment, report, server)
    code = server.stop()
    report.check(
        code == 0, "SIGTERM: the server drained and ended with exit code 0", f"exit code {code}"
    )
    report.heading(
        f"{f'{report.failed_checks} of it did not hold' if report.failed_checks else 'all of it held'}; {report.seconds:.1f} s"
    )
    report.write(f"The app is {SHOP}; to play with it: {program_name()} demo --serve")
    return not report.failed_checks


class Scenario:
    """The acts."""

    def __init__(self, stage: DemoEnvironment, report: Report, clock: Clock) -> None:
        self.environment, self.timeline, self.clock = stage, report.timeline, clock
        report.heading("eventflow demo")
        report.write(f"a shop in {stage.folder}: shop.py, its ledger shop.db, and landing/\n")

    def run(self, port: int) -> ServerProcess:
        first = self.start(port)
        self.orders_and_an_alert()
        self.await_recovery()
        self.rush()
        self.kill_record = self.kill(first)
        self.send_while_down()
        second = self.start(first.port)  # where its senders know it
        self.await_resume(second)
        self.send_again()
        self.await_settled()
        return second

    def start(self, port: int) -> ServerProcess:
        self.timeline(
            "start", f"eventflow serve shop.py --port {port}{'' if port else ' (any free one)'}"
        )
        before = self.clock.now()
        server = self.environment.start(port)
        took = (self.clock.now() - before) / SECOND
        self.timeline("ready", f"{server.url}, process {server.pid}, {took:.2f} s after its start")
        return server

    # ----------------------------------------------------------------- the first life

    def orders_and_an_alert(self) -> None:
        order, happened = self.environment.post_order, self.timeline
        sent = [order(f"msg-{n}", make_order(n)) for n in range(1, FIRST_ORDERS + 1)]
        happened(
            "webhook",
            f"{FIRST_ORDERS} signed orders: {statuses_text(sent)}, each recorded before its answer",
        )
        sent = [order(f"msg-{n}", make_order(n)) for n in (1, 2, 3)]
        happened("webhook", f"3 of them again: {statuses_text(sent)}, known")
        sent = [order("msg-forged", make_order(99), forged=True)]
        happened("webhook", f"1 with a forged signature: {statuses_text(sent)}")
        sent = [order("msg-empty", {"id": "order-0", "total": 0}), order("msg-odd", {"total": 5})]
        happened(
            "webhook",
            f"1 of nothing, 1 without an id: {statuses_text(sent)}; neither is dropped in silence, see below",
        )
        sent = [
            self.environment.post_alert("prices-july", {"model": "prices", "psi": 0.31})
            for _ in range(2)
        ]
        happened(
            "alert", f"drift.detected as a CloudEvent to /api/events, twice: {statuses_text(sent)}"
        )

    def await_recovery(self) -> None:
        """One task fails twice and recovers, the alert's flow trains and emits; told by the
        ledger's own instants.
        """
        stage = self.environment
        stage.wait_until(
            lambda: stage.flaky_call()["state"] == "completed", "score(order-3) has recovered"
        )
        stage.wait_until(
            lambda: stage.runs(flow="announce", state="completed"), "the new model is announced"
        )
        (news,), call = stage.runs(flow="announce"), stage.flaky_call()
        told = [
            (
                news["finished_at"],
                "retrained",
                "a model, once; model.promoted, emitted by that flow, started the next",
            )
        ]
        told += [(call["at"], "recovered", f"score(order-3), attempt {call['attempts']}")]
        for error in call["errors"]:
            kind = error["type"].rpartition(":")[2]
            told += [
                (
                    error["at"],
                    "failed",
                    f"score(order-3), attempt {error['attempt']}: {kind}: {error['message']}",
                )
            ]
        for at, word, text in sorted(told):
            self.timeline(word, text, parse_instant(at))

    def rush(self) -> None:
        """A price list and a dozen orders at once, until they are in the middle of their work."""
        stage = self.environment
        stage.drop_file("monday.csv", MONDAY_PRICES)
        self.timeline(
            "file",
            f"landing/monday.csv, {len(MONDAY_PRICES)} rows: a task call for each, four at a time",
        )
        stage.wait_until(
            lambda: stage.count_started("convert") >= 15, "the price list is under way"
        )
        packed = stage.count_started("pack")
        sent = [
            stage.post_order(f"rush-{n}", make_order(100 + n)) for n in range(1, RUSH_ORDERS + 1)
        ]
        self.timeline("webhook", f"{RUSH_ORDERS} more orders: {statuses_text(sent)}")
        stage.wait_until(
            lambda: stage.count_started("pack") >= packed + RUSH_ORDERS - 2,
            "the orders are being packed",
        )

    # ----------------------------------------------------------------- the kill

    def kill(self, server: ServerProcess) -> KillRecord:
        in_flight = [run["id"] for run in self.environment.runs(state="running")]
        server.kill()
        self.timeline(
            "kill -9", f"process {server.pid} is gone, {len(in_flight)} runs were in flight"
        )
        return KillRecord(server.pid, self.clock.now(), in_flight)

    def send_while_down(self) -> None:
        answer = self.environment.post_order("late-1", make_order(200))
        self.timeline(
            "webhook", f"1 order: {answer or 'nobody answers'}; its sender will try again"
        )
        self.environment.drop_file("tuesday.csv", TUESDAY_PRICES)
        self.timeline("file", "landing/tuesday.csv, while nothing runs")

    # ----------------------------------------------------------------- the second life

    def await_resume(self, server: ServerProcess) -> None:
        def goes_on() -> bool:
            here = {
                body["key"].partition("/")[0]
                for body in self.environment.body_starts()
                if body["process"] == server.pid
            }
            return not here.isdisjoint(self.kill_record.in_flight)

        self.environment.wait_until(goes_on, "the interrupted runs go on")
        runs = len(self.kill_record.in_flight)
        self.timeline(
            "resumed",
            f"the {runs} runs go on from their journals, unasked; at first a few at a time",
        )

    def send_again(self) -> None:
        """A sender that lost its connection cannot know: it sends everything once more."""
        sent = [
            self.environment.post_order(f"rush-{n}", make_order(100 + n))
            for n in range(1, RUSH_ORDERS + 1)
        ]
        sent.append(self.environment.post_order("late-1", make_order(200)))
        self.timeline(
            "webhook", f"its senders repeat all {len(sent)} orders: {statuses_text(sent)}"
        )

    def await_settled(self) -> None:
        def settled() -> bool:
            lists, counts = (
                self.environment.runs(flow="price_list"),
                self.environment.get("/api/counts"),
            )
            return len(lists) == self.environment.files and counts["pending"] == 0

        self.environment.wait_until(settled, "everything is settled")
        self.timeline("settled", "nothing is pending")


def make_order(number: int) -> dict[str, Any]:
    return {"id": f"order-{number}", "total": 10.0 * number}


def program_name() -> str:
    """How this program is called from any folder: a virtual environment that is not active is not
    on the PATH.
    """
    called = os.path.abspath(sys.argv[0])
    if not os.access(called, os.X_OK):
        return f"{sys.executable} -m eventflow"
    return "eventflow" if shutil.which("eventflow") == called else called


def stay_up(environment: DemoEnvironment, report: Report, server: ServerProcess) -> None:
    """Until Ctrl-C or SIGTERM."""
    report.heading(f"The server stays up at {server.url} until Ctrl-C. In another terminal:")
    eventflow = program_name()
    report.indented(
        f"cd {environment.folder} && export EVENTFLOW_STORE=sqlite:///shop.db\n"
        f"{eventflow} ls runs\n"
        f"{eventflow} explain msg-odd\n"
        "printf 'price\\n10\\n20\\n' > landing/mine.csv\n"
        f"""{eventflow} emit drift.detected -d '{{"model": "prices", "psi": 0.4}}'"""
    )
    report.write()
    enough = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: enough.set())
    while not enough.wait(0.5):
        if not server.alive:
            raise DemoFailed("the server ended by itself")
