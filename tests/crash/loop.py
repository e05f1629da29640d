"""The kill loop: a real server under webhook load, killed again and again at random moments on the
same store.

    python -m tests.crash.loop --cycles 1000 --seed 1

Five senders on keep-alive connections behave as real ones do: 20 % of what they send they send
twice (at once, later, or from two connections at the same time), and what got no answer they send
again until it has one. Each cycle starts the server, lets it live for a random moment and kills it:
`kill -9` some time after it is ready, at once, or in its start and recovery; or SIGTERM, and -9 in
the drain. Every hundred cycles and at the end everything comes to rest and invariants.py looks.
test_crash.py runs a short one. The seed fixes every choice made here; when a kill lands is the
machine's.
"""

import argparse
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from tests.crash.invariants import CheckCounts, SenderLog, check
from tests.crash.verdict import a_seed, verdict
from tests.crash.victim import HERE, Client, NoAnswer, Server

SENDERS = 5
MAX_PAUSE_SECONDS = 0.08
"""Seconds between two events of a sender, at most: some 120 events a second in all."""
RESEND_SHARE = 0.2
"""The part of events that is sent twice."""
MAX_READY_SECONDS = 2.0
RECONNECT_SECONDS = 0.005
SENDER_BACKOFF = 0.02
POLL_SECONDS = 0.05
"""Seconds in which a restart is to be ready."""


class World:
    """What senders share: where the server is now, what was sent, what was acknowledged, what went
    wrong.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.url = ""
        self.quiet = threading.Event()
        self.over = threading.Event()
        self.sent: dict[str, int] = {}
        self.acked: dict[str, str] = {}
        self.wrong: list[str] = []
        self.answer_counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def fresh(self) -> str:
        with self._lock:
            n = len(self.sent)
            ident = f"{self.seed}-{n}"
            self.sent[ident] = n
        return ident

    def answered(self, ident: str, known: bool, status: int, body: dict[str, object]) -> None:
        """Holds one answer against what was told before. `known`: this id had been acknowledged
        before it was sent again.
        """
        with self._lock:
            ledger_id = str(body.get("id"))
            first = self.acked.setdefault(ident, ledger_id)
            self.answer_counts["duplicates" if body.get("duplicate") else "accepted"] += 1
            if first != ledger_id:
                self.wrong.append(f"event {ident} was acknowledged as {first}, then as {ledger_id}")
            if known and not body.get("duplicate"):
                self.wrong.append(
                    f"event {ident} was acknowledged, and then taken for new: {status} {body}"
                )


class Sender(threading.Thread):
    """One keep-alive connection. It sends until the world is over, and rests while it is quiet."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(name=f"sender-{number}", daemon=True)
        self.world = world
        self.draw = random.Random(world.seed * 100 + number)
        self.client = Client()
        self.at_rest = threading.Event()

    def run(self) -> None:
        while not self.world.over.is_set():
            if self.world.quiet.is_set():
                self.at_rest.set()
                self.world.over.wait(0.01)
                continue
            self.at_rest.clear()
            self._one()
            self.world.over.wait(self.draw.random() * MAX_PAUSE_SECONDS)
        self.client.close()

    def _one(self) -> None:
        """A new event, sent once or twice; or after it an earlier one again."""
        ident, dice = self.world.fresh(), self.draw.random()
        if dice < RESEND_SHARE / 4:
            self._deliver_at_once(ident)
            return
        self._deliver(ident, self.client)
        if dice < RESEND_SHARE:
            earlier = f"{self.world.seed}-{self.draw.randrange(len(self.world.sent))}"
            self._deliver(
                earlier if earlier in self.world.acked and dice < RESEND_SHARE * 5 / 8 else ident,
                self.client,
            )

    def _deliver_at_once(self, ident: str) -> None:
        """From two connections at the same time."""
        other = Client()
        twin = threading.Thread(target=self._deliver, args=(ident, other))
        twin.start()
        self._deliver(ident, self.client)
        twin.join()
        other.close()

    def _deliver(self, ident: str, client: Client) -> None:
        """Until it is acknowledged, as every sender of webhooks does."""
        world = self.world
        known = ident in world.acked
        while not world.over.is_set():
            url = world.url
            try:
                if not url:
                    raise NoAnswer("no server")
                status, body, _ = client.post(
                    url, "/hooks/orders", {"n": world.sent[ident]}, {"webhook-id": ident}
                )
            except NoAnswer:
                world.answer_counts["lost"] += bool(url)
                time.sleep(RECONNECT_SECONDS)
                continue
            if status in (200, 202):
                world.answered(ident, known, status, body)
                return
            world.answer_counts[str(status)] += 1
            if status != 503:
                world.wrong.append(f"event {ident} was answered {status} {body}")
                return
            time.sleep(SENDER_BACKOFF)  # shorter than it was asked for


class Loop:
    """The killer. `run` returns what went wrong."""

    def __init__(self, folder: Path, seed: int, *, ready_limit: float = MAX_READY_SECONDS) -> None:
        self.folder = folder
        self.draw = random.Random(seed)
        self.world = World(seed)
        self.senders = [Sender(self.world, n) for n in range(SENDERS)]
        self.ready: list[float] = []
        self.ways: Counter[str] = Counter()
        self.check_counts: CheckCounts | None = None
        self._ready_limit = ready_limit
        self._boot = 0

    def run(self, cycles: int, *, check_every: int = 100) -> list[str]:
        for sender in self.senders:
            sender.start()
        try:
            for cycle in range(1, cycles + 1):
                self._cycle()
                if cycle % check_every == 0 or cycle == cycles:
                    self._check(cycle)
                    print(
                        f"  {cycle} cycles, {len(self.world.acked)} events: {self.check_counts}",
                        flush=True,
                    )
                if self.world.wrong:
                    return [f"cycle {cycle}: {sentence}" for sentence in self.world.wrong]
        finally:
            self.world.over.set()
            for sender in self.senders:
                sender.join()
        return []

    def _start(self) -> Server:
        self._boot += 1
        return Server(HERE / "app.py", self.folder, self._boot, options=("--log-level", "warning"))

    def _cycle(self) -> None:
        server = self._start()
        way = self.draw.choices(("in life", "in start", "at once", "in drain"), (70, 12, 8, 10))[0]
        self.ways[way] += 1
        try:
            if way == "in start":
                self._note_ready(server, self.draw.random() * 0.8)
                return
            if not self._note_ready(server, 30.0):
                self.world.wrong.append(
                    f"boot {self._boot} did not become ready: {server.log_tail}"
                )
                return
            time.sleep(
                self.draw.random() * (0.05 if way == "at once" else 1.5)
            )  # not a wait: the moment to die at
            if way == "in drain":
                server.signal(signal.SIGTERM)
                time.sleep(self.draw.random() * 0.3)
        finally:
            server.kill()
            self.world.url = ""

    def _note_ready(self, server: Server, within: float) -> bool:
        if not server.wait_ready(within):
            return False
        assert server.ready_after is not None
        self.world.url = server.url
        self.ready.append(server.ready_after)
        if server.ready_after > self._ready_limit:
            self.world.wrong.append(f"boot {self._boot} was ready after {server.ready_after:.2f} s")
        return True

    def _check(self, cycle: int) -> None:
        """Lets everything come to rest, stops in good order, and checks."""
        wrong = self.world.wrong
        server = self._start()
        if not self._note_ready(server, 30.0):
            wrong.append(f"the last boot did not become ready: {server.log_tail}")
            return
        self.world.quiet.set()
        for sender in self.senders:
            if not sender.at_rest.wait(60):
                wrong.append(f"{sender.name} was not answered for 60 s")
        if not _rests(server):
            wrong.append(
                f"not at rest after 60 s: {server.get('/api/counts')} "
                f"{server.get('/api/runs?state=held&limit=3')}"
            )
        self.world.url = ""
        if (code := server.stop()) != 0:
            wrong.append(f"exit code {code} after SIGTERM, expected 0")
        found, self.check_counts = check(
            self.folder, SenderLog(dict(self.world.sent), dict(self.world.acked))
        )
        wrong += found
        if not wrong:
            for sender in self.senders:
                sender.at_rest.clear()
            self.world.quiet.clear()

    def report(self, cycles: int) -> str:
        ready, answer_counts = sorted(self.ready), self.world.answer_counts
        ways = ", ".join(f"{n} {way}" for way, n in self.ways.most_common())
        return (
            f"{cycles} cycles (killed: {ways}), seed {self.world.seed}\n"
            f"  {len(self.world.acked)} events acknowledged, {answer_counts['duplicates']} "
            "duplicates answered, "
            f"{answer_counts['lost']} requests without an answer, {answer_counts['503']} "
            "answered 503\n"
            f"  ready after {ready[len(ready) // 2]:.2f} s (median), {ready[-1]:.2f} s (longest of "
            f"{len(ready)}), "
            f"{sum(one > MAX_READY_SECONDS for one in ready)} over {MAX_READY_SECONDS:g} s\n"
            f"  {self.check_counts}"
        )


def _rests(server: Server, within: float = 60.0) -> bool:
    deadline = time.monotonic() + within
    while server.get("/api/counts")["pending"]:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash.loop", description="kill -9 at random moments, under load"
    )
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, printed")
    parser.add_argument("--check-every", type=int, default=100)
    parser.add_argument(
        "--ready-limit",
        type=float,
        default=MAX_READY_SECONDS,
        help="seconds in which a restart must be ready",
    )
    options = parser.parse_args()
    seed = a_seed(options.seed)
    folder = Path(tempfile.mkdtemp(prefix=f"eventflow-crash-{seed}-"))
    print(f"seed {seed}, store in {folder}", flush=True)
    loop = Loop(folder, seed, ready_limit=options.ready_limit)
    began = time.monotonic()
    wrong = loop.run(options.cycles, check_every=options.check_every)
    print(f"{loop.report(sum(loop.ways.values()))}\n  {time.monotonic() - began:.0f} s")
    return verdict(wrong, folder, f"tests.crash.loop --cycles {options.cycles} --seed {seed}")


if __name__ == "__main__":
    sys.exit(main())
