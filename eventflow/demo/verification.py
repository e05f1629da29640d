"""What must be true after the demo, each sentence proven from witnesses that know nothing of each other.

They are: what senders were answered (`Stage.answers`), what task bodies wrote down as they began (bodies.jsonl, which survives
the kill), and what the ledger says over the API. play.py asks, report.py prints.
"""

from collections.abc import Sequence
from datetime import datetime

import msgspec

from eventflow.core.clock import to_us
from eventflow.demo.environment import Stage
from eventflow.demo.report import Report, listed

FATES = ("completed", "failed", "dead", "cancelled", "suppressed", "pending")
"""The right-hand side of the sum of P9."""

PROMOTED = 1
"""Events that the shop itself emits."""


class Kill(msgspec.Struct, frozen=True):
    """Which process, when it was gone, and the runs that were at work."""

    pid: int
    at: int
    in_flight: Sequence[str]


class Proof:
    """The evidence, gathered once everything is settled. `survivor`: the process that went on."""

    def __init__(self, stage: Stage, report: Report, kill: Kill, survivor: int) -> None:
        self.stage, self.report, self.kill = stage, report, kill
        self.counts: dict[str, int] = stage.get("/api/counts")
        self.runs = stage.runs()
        self.bodies = stage.bodies()
        self.recorded, self.later = set[str](), set[str]()
        for run in kill.in_flight:
            for call in stage.tasks(run):
                known = call["state"] == "completed" and instant(call["at"]) <= kill.at
                (self.recorded if known else self.later).add(f"{run}/{call['claim']}")
        self.before = {body["key"] for body in self.bodies if body["process"] == kill.pid}
        self.after = {body["key"] for body in self.bodies if body["process"] == survivor}

    def sums(self) -> None:
        say, counts, answers = self.report.say, self.counts, self.stage.answers
        self.report.heading(f"The {len(self.kill.in_flight)} runs that the kill interrupted")
        say(
            f"  replayed   {len(self.recorded):>4} results were recorded: read back, their bodies did not run again"
        )
        say(
            f"  repeated   {len(self.later & self.before):>4} bodies were cut short: run again, under the keys they had"
        )
        say(f"  went on    {len(self.later - self.before):>4} bodies ran for the first time")
        self.report.heading("The sums")
        say(f"  answered   {listed(sorted(answers.elements()))}")
        say(
            f"  recorded   {counts['events']} events: {answers[202]} posted, {self.stage.files} files, {PROMOTED} emitted"
        )
        say(f"  repeated   {counts['duplicates']} duplicates, counted on the first one's row")
        say(
            f"  deliveries {counts['accepted']} = {' + '.join(f'{counts[name]} {name}' for name in FATES)}"
        )

    def check(self, *, orders: int, price_lists: Sequence[Sequence[float]]) -> None:
        self.intake()
        self.fates()
        self.recovery()
        self.outcomes(orders, price_lists)

    # ----------------------------------------------------------------- the way in

    def intake(self) -> None:
        check, counts, answers = self.report.check, self.counts, self.stage.answers
        known = [event["event_id"] for event in self.stage.get("/api/events", limit=1000)["events"]]
        expected = answers[202] + self.stage.files + PROMOTED
        found = f"{counts['events']} events, expected {expected}"
        check(
            counts["events"] == expected == len(set(known)),
            "every 202 is one event in the ledger, none is twice",
            found,
        )
        stated = f"{answers[200]} duplicates, before and after the kill, started nothing"
        check(counts["duplicates"] == answers[200], stated, f"{counts['duplicates']} counted")
        check(
            answers[401] == 1 and "msg-forged" not in known,
            "the forged order was refused and not recorded",
        )

    def fates(self) -> None:
        check, counts = self.report.check, self.counts
        (empty,) = self.stage.get("/api/events/msg-empty")["verdicts"]
        check(
            empty["fate"] == "filtered",
            f"the order of nothing was filtered: {empty.get('reason')}",
            f"{empty}",
        )
        letters = self.stage.get("/api/dead")["dead"]
        why = letters[0]["reason"].rpartition(": ")[2] if letters else "none"
        is_odd = [letter["event_id"] for letter in letters] == ["msg-odd"]
        check(is_odd, f"the order without an id is a dead letter: {why}", f"{letters}")
        total = sum(counts[name] for name in FATES)
        stated = "the deliveries add up, and none is pending"
        check(
            counts["accepted"] == total and not counts["pending"],
            stated,
            f"{counts['accepted']} and {total}",
        )

    # ----------------------------------------------------------------- the way through

    def recovery(self) -> None:
        check, flaky = self.report.check, self.stage.flaky()
        check(
            flaky["attempts"] == 3 and len(flaky["errors"]) == 2,
            "one task failed twice and recovered",
            f"{flaky}",
        )
        states = [run["state"] for run in self.runs if run["id"] in self.kill.in_flight]
        stated = (
            f"{len(states)} runs were in flight at the kill, and all of them completed after it"
        )
        check(len(states) >= 5 and set(states) == {"completed"}, stated, f"{states}")
        repeated = self.recorded & self.after
        stated = (
            f"none of the {len(self.recorded)} results recorded before the kill was computed again"
        )
        check(bool(self.recorded) and not repeated, stated, f"{len(repeated)} that were")
        lost = (self.later & self.before) - self.after
        check(
            not lost,
            "every body that was cut short ran again, under the key it had",
            f"{len(lost)} that did not",
        )

    def outcomes(self, orders: int, price_lists: Sequence[Sequence[float]]) -> None:
        check, runs = self.report.check, self.runs
        states = [run["state"] for run in runs if run["flow"] == "handle_order"]
        check(
            states == ["completed"] * orders,
            f"{orders} orders, {orders} runs, all completed",
            f"{states}",
        )
        lists = [run["id"] for run in runs if run["flow"] == "price_list"]
        found = sorted(self.stage.get(f"/api/runs/{run}")["result"] for run in lists)
        wanted = sorted(
            round(sum(round(price * 1.08, 2) for price in prices), 2) for prices in price_lists
        )
        check(
            found == wanted,
            "both price lists are right, also the one that landed while nothing ran",
            f"{found}",
        )
        trained = [body for body in self.bodies if body["task"] == "train"]
        news = [run["state"] for run in runs if run["flow"] == "announce"]
        stated = "the alert, sent twice, trained once, and model.promoted reached its flow"
        check(
            len(trained) == 1 and news == ["completed"], stated, f"{len(trained)} trainings, {news}"
        )


def instant(text: str) -> int:
    return to_us(datetime.fromisoformat(text))
