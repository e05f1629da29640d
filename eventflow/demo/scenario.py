"""The demo's steps, from top to bottom: what is sent, when the server is killed, what is awaited.

`demo` is the command. It runs a `Scenario` and then the checks of verification.py. Both servers are
processes of their own.
"""

import os
import shutil
import signal
import sys
import threading
from typing import Any

import click

from eventflow.core.clock import SECOND, Clock, SystemClock
from eventflow.demo.environment import SHOP, DemoEnvironment, DemoFailed, DemoServer
from eventflow.demo.report import Report, statuses_text
from eventflow.demo.verification import KillRecord, Verification, parse_instant

FIRST_ORDERS = 8
RUSH_ORDERS = 12
"""Orders posted at once, just before the kill."""

MONDAY_PRICES = [float(n) for n in range(1, 61)]
"""The price list whose run the kill interrupts."""
TUESDAY_PRICES = [5.0, 10.0, 15.0]
"""The price list that arrives while no server runs."""


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
    environment = DemoEnvironment(clock)
    report = Report(sys.stdout, clock)
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
    """Run the scenario, the checks and the shutdown. Whether every check passed."""
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
    failed = report.failed_checks
    result = f"{failed} checks failed" if failed else "all checks passed"
    report.heading(f"{result}; {report.seconds:.1f} s")
    report.write(f"The app is {SHOP}; to play with it: {program_name()} demo --serve")
    return not report.failed_checks


class Scenario:
    """The steps. `run` returns the second server; `kill_record` describes the end of the first."""

    kill_record: KillRecord

    def __init__(self, environment: DemoEnvironment, report: Report, clock: Clock) -> None:
        self.environment = environment
        self.timeline = report.timeline
        self.clock = clock
        report.heading("eventflow demo")
        report.write(f"a shop in {environment.folder}: shop.py, its ledger shop.db, and landing/\n")

    def run(self, port: int) -> DemoServer:
        first = self.start(port)
        self.orders_and_an_alert()
        self.await_recovery()
        self.rush()
        self.kill_record = self.kill(first)
        self.send_while_down()
        second = self.start(first.port)  # the URL that its senders know
        self.await_resume(second)
        self.send_again()
        self.await_settled()
        return second

    def start(self, port: int) -> DemoServer:
        self.timeline(
            "start", f"eventflow serve shop.py --port {port}{'' if port else ' (any free one)'}"
        )
        before = self.clock.now()
        server = self.environment.start(port)
        took = (self.clock.now() - before) / SECOND
        self.timeline("ready", f"{server.url}, process {server.pid}, {took:.2f} s after its start")
        return server

    # ----------------------------------------------------------------- the first server

    def orders_and_an_alert(self) -> None:
        order = self.environment.post_order
        sent = [order(f"msg-{n}", make_order(n)) for n in range(1, FIRST_ORDERS + 1)]
        self.timeline(
            "webhook",
            f"{FIRST_ORDERS} signed orders: {statuses_text(sent)}, each recorded before its answer",
        )
        sent = [order(f"msg-{n}", make_order(n)) for n in (1, 2, 3)]
        self.timeline("webhook", f"3 of them again: {statuses_text(sent)}, known")
        sent = [order("msg-forged", make_order(99), forged=True)]
        self.timeline("webhook", f"1 with a forged signature: {statuses_text(sent)}")
        sent = [order("msg-empty", {"id": "order-0", "total": 0}), order("msg-odd", {"total": 5})]
        self.timeline(
            "webhook",
            f"1 with total 0, 1 without an id: {statuses_text(sent)}; both are explained below",
        )
        sent = [
            self.environment.post_alert("prices-july", {"model": "prices", "psi": 0.31})
            for _ in range(2)
        ]
        self.timeline(
            "alert", f"drift.detected as a CloudEvent to /api/events, twice: {statuses_text(sent)}"
        )

    def await_recovery(self) -> None:
        """Wait for the task that fails twice, and for the flow that the alert starts; report both
        with the times in the ledger.
        """
        environment = self.environment
        environment.wait_until(
            lambda: environment.flaky_call()["state"] == "completed", "score(order-3) has recovered"
        )
        environment.wait_until(
            lambda: environment.runs(flow="announce", state="completed"),
            "the new model is announced",
        )
        (announcement,) = environment.runs(flow="announce")
        call = environment.flaky_call()
        retrained = "a model, once; model.promoted, emitted by that flow, started the next"
        lines = [
            (announcement["finished_at"], "retrained", retrained),
            (call["at"], "recovered", f"score(order-3), attempt {call['attempts']}"),
        ]
        for error in call["errors"]:
            kind = error["type"].rpartition(":")[2]
            text = f"score(order-3), attempt {error['attempt']}: {kind}: {error['message']}"
            lines.append((error["at"], "failed", text))
        for at, kind, text in sorted(lines):
            self.timeline(kind, text, parse_instant(at))

    def rush(self) -> None:
        """Start a price list and a dozen orders at once, and wait until they are half done."""
        environment = self.environment
        environment.drop_file("monday.csv", MONDAY_PRICES)
        self.timeline(
            "file",
            f"landing/monday.csv, {len(MONDAY_PRICES)} rows: a task call for each, four at a time",
        )
        environment.wait_until(
            lambda: environment.count_started("convert") >= 15, "the price list is under way"
        )
        packed = environment.count_started("pack")
        sent = [
            environment.post_order(f"rush-{n}", make_order(100 + n))
            for n in range(1, RUSH_ORDERS + 1)
        ]
        self.timeline("webhook", f"{RUSH_ORDERS} more orders: {statuses_text(sent)}")
        environment.wait_until(
            lambda: environment.count_started("pack") >= packed + RUSH_ORDERS - 2,
            "the orders are being packed",
        )

    # ----------------------------------------------------------------- the kill

    def kill(self, server: DemoServer) -> KillRecord:
        in_flight = [run["id"] for run in self.environment.runs(state="running")]
        server.kill()
        self.timeline(
            "kill -9", f"process {server.pid} is gone, {len(in_flight)} runs were in flight"
        )
        return KillRecord(server.pid, self.clock.now(), in_flight)

    def send_while_down(self) -> None:
        answer = self.environment.post_order("late-1", make_order(200))
        self.timeline("webhook", f"1 order: {answer or 'no answer'}; its sender will try again")
        self.environment.drop_file("tuesday.csv", TUESDAY_PRICES)
        self.timeline("file", "landing/tuesday.csv, while nothing runs")

    # ----------------------------------------------------------------- the second server

    def await_resume(self, server: DemoServer) -> None:
        def resumed() -> bool:
            here = {
                body["key"].partition("/")[0]
                for body in self.environment.body_starts()
                if body["process"] == server.pid
            }
            return not here.isdisjoint(self.kill_record.in_flight)

        self.environment.wait_until(resumed, "the interrupted runs continue")
        runs = len(self.kill_record.in_flight)
        self.timeline(
            "resumed",
            f"the {runs} runs continue from their journals, at first a few at a time",
        )

    def send_again(self) -> None:
        """Send the orders again: a sender without an answer cannot know whether they arrived."""
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
            lists = self.environment.runs(flow="price_list")
            pending = self.environment.get("/api/counts")["pending"]
            return len(lists) == self.environment.files and pending == 0

        self.environment.wait_until(settled, "everything is settled")
        self.timeline("settled", "nothing is pending")


def make_order(number: int) -> dict[str, Any]:
    return {"id": f"order-{number}", "total": 10.0 * number}


def program_name() -> str:
    """A command that starts this program from any folder; `eventflow` only if the PATH finds it."""
    called = os.path.abspath(sys.argv[0])
    if not os.access(called, os.X_OK):
        return f"{sys.executable} -m eventflow"
    return "eventflow" if shutil.which("eventflow") == called else called


def stay_up(environment: DemoEnvironment, report: Report, server: DemoServer) -> None:
    """Print commands to try, and wait for Ctrl-C or SIGTERM."""
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
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: stop.set())
    while not stop.wait(0.5):
        if not server.alive:
            raise DemoFailed("the server ended by itself")
