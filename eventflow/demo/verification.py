"""The checks after the demo, each from independent sources.

The sources are the answers that senders got (`DemoEnvironment.answers`), the lines that task bodies
wrote when they started (bodies.jsonl, which survives the kill), and the ledger as the API shows it.
scenario.py calls them, report.py prints the results.
"""

from collections.abc import Sequence
from datetime import datetime

import msgspec

from eventflow.core.clock import to_us
from eventflow.demo.environment import DemoEnvironment
from eventflow.demo.report import Report, statuses_text

DELIVERY_STATES = ("completed", "failed", "dead", "cancelled", "suppressed", "pending")
"""Each accepted delivery is counted in exactly one of these (promise P9)."""

EMITTED_EVENTS = 1
"""Events that the shop emits."""


class KillRecord(msgspec.Struct, frozen=True):
    """The killed process, the time after its end in microseconds, and the runs it was executing."""

    pid: int
    at: int
    in_flight: Sequence[str]


class Verification:
    """The evidence, gathered when everything is settled, and the checks on it.

    `second_pid`: the server after the kill. Task calls are named by their idempotency keys.
    """

    def __init__(
        self, environment: DemoEnvironment, report: Report, kill: KillRecord, second_pid: int
    ) -> None:
        self.environment = environment
        self.report = report
        self.kill_record = kill
        self.counts: dict[str, int] = environment.get("/api/counts")
        self.runs = environment.runs()
        self.body_starts = environment.body_starts()
        self.recorded = set[str]()  # completed before the kill
        self.not_recorded = set[str]()
        for run in kill.in_flight:
            for call in environment.tasks(run):
                known = call["state"] == "completed" and parse_instant(call["at"]) <= kill.at
                (self.recorded if known else self.not_recorded).add(f"{run}/{call['call_key']}")
        self.started_before = {
            body["key"] for body in self.body_starts if body["process"] == kill.pid
        }
        self.started_after = {
            body["key"] for body in self.body_starts if body["process"] == second_pid
        }

    def print_totals(self) -> None:
        row = self.report.row
        counts = self.counts
        answers = self.environment.answers
        repeated = self.not_recorded & self.started_before
        new = self.not_recorded - self.started_before
        self.report.heading(f"The {len(self.kill_record.in_flight)} runs that the kill interrupted")
        row(
            "replayed",
            f"{len(self.recorded):>4} results were recorded: "
            "read back, their bodies did not run again",
        )
        row(
            "repeated",
            f"{len(repeated):>4} bodies were cut short: run again, under the keys they had",
        )
        row("went on", f"{len(new):>4} bodies ran for the first time")
        self.report.heading("The sums")
        row("answered", statuses_text(sorted(answers.elements())))
        row(
            "recorded",
            f"{counts['events']} events: {answers[202]} posted, "
            f"{self.environment.files} files, {EMITTED_EVENTS} emitted",
        )
        row("repeated", f"{counts['duplicates']} duplicates, counted on the first one's row")
        states = " + ".join(f"{counts[name]} {name}" for name in DELIVERY_STATES)
        row("deliveries", f"{counts['accepted']} = {states}")

    def check_all(self, *, orders: int, price_lists: Sequence[Sequence[float]]) -> None:
        self.check_intake()
        self.check_verdicts()
        self.check_recovery()
        self.check_outcomes(orders, price_lists)

    def check_intake(self) -> None:
        check = self.report.check
        counts = self.counts
        answers = self.environment.answers
        known = [
            event["event_id"] for event in self.environment.get("/api/events", limit=1000)["events"]
        ]
        expected = answers[202] + self.environment.files + EMITTED_EVENTS
        found = f"{counts['events']} events, expected {expected}"
        check(
            counts["events"] == expected == len(set(known)),
            "every 202 is one event in the ledger, none is recorded twice",
            found,
        )
        stated = f"{answers[200]} duplicates, before and after the kill, started nothing"
        check(counts["duplicates"] == answers[200], stated, f"{counts['duplicates']} counted")
        check(
            answers[401] == 1 and "msg-forged" not in known,
            "the forged order was refused and not recorded",
        )

    def check_verdicts(self) -> None:
        check = self.report.check
        counts = self.counts
        (empty,) = self.environment.get("/api/events/msg-empty")["verdicts"]
        check(
            empty["outcome"] == "filtered",
            f"the order with total 0 was filtered: {empty.get('reason')}",
            f"{empty}",
        )
        dead_letters = self.environment.get("/api/dead-letters")["dead_letters"]
        why = dead_letters[0]["reason"].rpartition(": ")[2] if dead_letters else "none"
        is_odd = [dead["event_id"] for dead in dead_letters] == ["msg-odd"]
        check(is_odd, f"the order without an id is a dead letter: {why}", f"{dead_letters}")
        total = sum(counts[name] for name in DELIVERY_STATES)
        stated = "the deliveries add up, and none is pending"
        check(
            counts["accepted"] == total and not counts["pending"],
            stated,
            f"{counts['accepted']} and {total}",
        )

    def check_recovery(self) -> None:
        check = self.report.check
        flaky = self.environment.flaky_call()
        check(
            flaky["attempts"] == 3 and len(flaky["errors"]) == 2,
            "one task failed twice and recovered",
            f"{flaky}",
        )
        states = [run["state"] for run in self.runs if run["id"] in self.kill_record.in_flight]
        stated = (
            f"{len(states)} runs were in flight at the kill, and all of them completed after it"
        )
        check(len(states) >= 5 and set(states) == {"completed"}, stated, f"{states}")
        repeated = self.recorded & self.started_after
        stated = (
            f"none of the {len(self.recorded)} results recorded before the kill was computed again"
        )
        check(bool(self.recorded) and not repeated, stated, f"{len(repeated)} that were")
        lost = (self.not_recorded & self.started_before) - self.started_after
        check(
            not lost,
            "every body that was cut short ran again, under the key it had",
            f"{len(lost)} that did not",
        )

    def check_outcomes(self, orders: int, price_lists: Sequence[Sequence[float]]) -> None:
        check = self.report.check
        runs = self.runs
        states = [run["state"] for run in runs if run["flow"] == "handle_order"]
        check(
            states == ["completed"] * orders,
            f"{orders} orders, {orders} runs, all completed",
            f"{states}",
        )
        lists = [run["id"] for run in runs if run["flow"] == "price_list"]
        found = sorted(self.environment.get(f"/api/runs/{run}")["result"] for run in lists)
        wanted = sorted(
            round(sum(round(price * 1.08, 2) for price in prices), 2) for prices in price_lists
        )
        check(
            found == wanted,
            "both price lists are right, also the one that landed while nothing ran",
            f"{found}",
        )
        trained = [body for body in self.body_starts if body["task"] == "train"]
        announced = [run["state"] for run in runs if run["flow"] == "announce"]
        stated = "the alert, sent twice, trained once, and model.promoted reached its flow"
        check(
            len(trained) == 1 and announced == ["completed"],
            stated,
            f"{len(trained)} trainings, {announced}",
        )


def parse_instant(text: str) -> int:
    return to_us(datetime.fromisoformat(text))
