"""The demo itself: what is sent, when the server dies, and in which order it is told. The acts read top to bottom.

`demo` plays them, then asks proof.py whether everything held. The server is a process of its own; so are its two lives.
"""

import os
import shutil
import signal
import sys
import threading
from typing import Any

import click

from eventflow.core.clock import SECOND, Clock, SystemClock
from eventflow.demo.environment import SHOP, DemoFailed, Server, Stage
from eventflow.demo.report import Report, listed
from eventflow.demo.verification import Kill, Proof, instant

EARLY, RUSH = 8, 12
"""Orders before the rush, and in it."""

MONDAY, TUESDAY = [float(n) for n in range(1, 61)], [5.0, 10.0, 15.0]
"""The prices in the list that the kill interrupts, and in the one that lands while nothing runs."""


@click.command("demo")
@click.option("--serve", is_flag=True, help="Leaves the server up afterwards, until Ctrl-C.")
@click.option(
    "--port", default=0, show_default=True, type=click.IntRange(0, 65535), help="0 picks one."
)
def demo(serve: bool, port: int) -> int:
    """Plays the main job on real parts, kill -9 included, and checks itself. Exit code 1 when something does not hold."""
    clock = SystemClock()
    stage, report = Stage(clock), Report(sys.stdout, clock)
    sound = False
    try:
        sound = perform(stage, report, clock, serve, port)
    except DemoFailed as error:
        report.check(False, str(error))
    finally:
        if not sound:
            report.heading(f"The last lines of {stage.log}")
            report.quoted(stage.last_words())
        stage.close(keep=not sound)
    return 0 if sound else 1


def perform(stage: Stage, report: Report, clock: Clock, serve: bool, port: int) -> bool:
    """The acts, the proof, and the end. Whether all of it held."""
    play = Play(stage, report, clock)
    server = play.acts(port)
    proof = Proof(stage, report, play.death, server.pid)
    proof.sums()
    report.heading("$ eventflow explain msg-3")
    report.quoted(stage.command("explain", "msg-3"))
    report.heading("Checked")
    proof.check(orders=EARLY + RUSH + 1, price_lists=[MONDAY, TUESDAY])
    if serve and not report.broken:
        stay_up(stage, report, server)
    code = server.stop()
    report.check(
        code == 0, "SIGTERM: the server drained and ended with exit code 0", f"exit code {code}"
    )
    report.heading(
        f"{f'{report.broken} of it did not hold' if report.broken else 'all of it held'}; {report.seconds:.1f} s"
    )
    report.say(f"The app is {SHOP}; to play with it: {program()} demo --serve")
    return not report.broken


class Play:
    """The acts."""

    def __init__(self, stage: Stage, report: Report, clock: Clock) -> None:
        self.stage, self.happened, self.clock = stage, report.happened, clock
        report.heading("eventflow demo")
        report.say(f"a shop in {stage.folder}: shop.py, its ledger shop.db, and landing/\n")

    def acts(self, port: int) -> Server:
        first = self.start(port)
        self.orders_and_an_alert()
        self.what_came_of_them()
        self.rush()
        self.death = self.kill(first)
        self.meanwhile()
        second = self.start(first.port)  # where its senders know it
        self.resume(second)
        self.send_again()
        self.settle()
        return second

    def start(self, port: int) -> Server:
        self.happened(
            "start", f"eventflow serve shop.py --port {port}{'' if port else ' (any free one)'}"
        )
        before = self.clock.now()
        server = self.stage.start(port)
        took = (self.clock.now() - before) / SECOND
        self.happened("ready", f"{server.url}, process {server.pid}, {took:.2f} s after its start")
        return server

    # ----------------------------------------------------------------- the first life

    def orders_and_an_alert(self) -> None:
        order, happened = self.stage.order, self.happened
        sent = [order(f"msg-{n}", an_order(n)) for n in range(1, EARLY + 1)]
        happened(
            "webhook", f"{EARLY} signed orders: {listed(sent)}, each recorded before its answer"
        )
        sent = [order(f"msg-{n}", an_order(n)) for n in (1, 2, 3)]
        happened("webhook", f"3 of them again: {listed(sent)}, known")
        sent = [order("msg-forged", an_order(99), forged=True)]
        happened("webhook", f"1 with a forged signature: {listed(sent)}")
        sent = [order("msg-empty", {"id": "order-0", "total": 0}), order("msg-odd", {"total": 5})]
        happened(
            "webhook",
            f"1 of nothing, 1 without an id: {listed(sent)}; neither is dropped in silence, see below",
        )
        sent = [self.stage.alert("prices-july", {"model": "prices", "psi": 0.31}) for _ in range(2)]
        happened("alert", f"drift.detected as a CloudEvent to /api/events, twice: {listed(sent)}")

    def what_came_of_them(self) -> None:
        """One task fails twice and recovers, the alert's flow trains and emits; told by the ledger's own instants."""
        stage = self.stage
        stage.wait_until(
            lambda: stage.flaky()["state"] == "completed", "score(order-3) has recovered"
        )
        stage.wait_until(
            lambda: stage.runs(flow="announce", state="completed"), "the new model is announced"
        )
        (news,), call = stage.runs(flow="announce"), stage.flaky()
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
            self.happened(word, text, instant(at))

    def rush(self) -> None:
        """A price list and a dozen orders at once, until they are in the middle of their work."""
        stage = self.stage
        stage.land("monday.csv", MONDAY)
        self.happened(
            "file", f"landing/monday.csv, {len(MONDAY)} rows: a task call for each, four at a time"
        )
        stage.wait_until(lambda: stage.begun("convert") >= 15, "the price list is under way")
        packed = stage.begun("pack")
        sent = [stage.order(f"rush-{n}", an_order(100 + n)) for n in range(1, RUSH + 1)]
        self.happened("webhook", f"{RUSH} more orders: {listed(sent)}")
        stage.wait_until(
            lambda: stage.begun("pack") >= packed + RUSH - 2, "the orders are being packed"
        )

    # ----------------------------------------------------------------- the kill

    def kill(self, server: Server) -> Kill:
        in_flight = [run["id"] for run in self.stage.runs(state="running")]
        server.kill()
        self.happened(
            "kill -9", f"process {server.pid} is gone, {len(in_flight)} runs were in flight"
        )
        return Kill(server.pid, self.clock.now(), in_flight)

    def meanwhile(self) -> None:
        answer = self.stage.order("late-1", an_order(200))
        self.happened(
            "webhook", f"1 order: {answer or 'nobody answers'}; its sender will try again"
        )
        self.stage.land("tuesday.csv", TUESDAY)
        self.happened("file", "landing/tuesday.csv, while nothing runs")

    # ----------------------------------------------------------------- the second life

    def resume(self, server: Server) -> None:
        def goes_on() -> bool:
            here = {
                body["key"].partition("/")[0]
                for body in self.stage.bodies()
                if body["process"] == server.pid
            }
            return not here.isdisjoint(self.death.in_flight)

        self.stage.wait_until(goes_on, "the interrupted runs go on")
        runs = len(self.death.in_flight)
        self.happened(
            "resumed",
            f"the {runs} runs go on from their journals, unasked; at first a few at a time",
        )

    def send_again(self) -> None:
        """A sender that lost its connection cannot know: it sends everything once more."""
        sent = [self.stage.order(f"rush-{n}", an_order(100 + n)) for n in range(1, RUSH + 1)]
        sent.append(self.stage.order("late-1", an_order(200)))
        self.happened("webhook", f"its senders repeat all {len(sent)} orders: {listed(sent)}")

    def settle(self) -> None:
        def settled() -> bool:
            lists, counts = self.stage.runs(flow="price_list"), self.stage.get("/api/counts")
            return len(lists) == self.stage.files and counts["pending"] == 0

        self.stage.wait_until(settled, "everything is settled")
        self.happened("settled", "nothing is pending")


def an_order(number: int) -> dict[str, Any]:
    return {"id": f"order-{number}", "total": 10.0 * number}


def program() -> str:
    """How this program is called from any folder: a virtual environment that is not active is not on the PATH."""
    called = os.path.abspath(sys.argv[0])
    if not os.access(called, os.X_OK):
        return f"{sys.executable} -m eventflow"
    return "eventflow" if shutil.which("eventflow") == called else called


def stay_up(stage: Stage, report: Report, server: Server) -> None:
    """Until Ctrl-C or SIGTERM."""
    report.heading(f"The server stays up at {server.url} until Ctrl-C. In another terminal:")
    eventflow = program()
    report.quoted(
        f"cd {stage.folder} && export EVENTFLOW_STORE=sqlite:///shop.db\n"
        f"{eventflow} ls runs\n"
        f"{eventflow} explain msg-odd\n"
        "printf 'price\\n10\\n20\\n' > landing/mine.csv\n"
        f"""{eventflow} emit drift.detected -d '{{"model": "prices", "psi": 0.4}}'"""
    )
    report.say()
    enough = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: enough.set())
    while not enough.wait(0.5):
        if not server.alive:
            raise DemoFailed("the server ended by itself")
