"""Makes the kept store. It runs on the old commit only: later versions do not have its names.

    git worktree add OLD 30f7f6b
    PYTHONPATH=OLD python tests/store/kept/make_kept.py FOLDER

Each life of the app is a process of its own with a clock that stands still; eight of them are
killed by a task, two by the script. At the end the WAL is copied home with sqlite3, `expected.json`
is written from the rows, and all is packed.
"""

import asyncio
import gzip
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import types
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

# ruff: noqa: I001
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# The names of the old commit: they are unknown here.
from eventflow.capture import configure
from eventflow.clock import to_us
from eventflow.event import Event, Undecodable
from eventflow.journal import Kind
from eventflow.run import State, show_id
from eventflow.store.logs import LogStore
from eventflow.testing import VirtualClock
from eventflow.web import verbs

HERE = Path(__file__).parent
COMMIT = "30f7f6b"
EARLY = datetime(2030, 1, 1, 5, tzinfo=UTC)
BEGIN = EARLY + timedelta(days=60)
END = BEGIN + timedelta(minutes=41)
DAY = 86_400_000_000
POLL_SECONDS = 0.01
START_SECONDS = 0.3
"""For the start of an app, of which that version gives no sign."""


def load_app() -> Any:
    """The module `kept_app`, compiled under a bare name: tracebacks have no path of a machine."""
    module = types.ModuleType("kept_app")
    sys.modules["kept_app"] = module
    exec(compile((HERE / "kept_app.py").read_text(), "kept_app.py", "exec"), module.__dict__)
    return module


kept_app = load_app()
stage = kept_app.stage


class Life:
    """One life of the app, and short words for what happens in it."""

    def __init__(self, folder: Path, clock: VirtualClock) -> None:
        self.clock = clock
        self.kept = kept_app.Kept(clock)
        self.app = self.kept.app
        self.notes = folder / "notes.json"
        self.runs: dict[str, int] = (
            json.loads(self.notes.read_text()) if self.notes.exists() else {}
        )

    async def start(self, flow: str, note: str = "", **params: Any) -> int:
        """A run started by the program; its id is noted under a name for later lives."""
        handle = await self.app.start(flow, **params)
        self.runs[note or flow] = handle.number
        self.notes.write_text(json.dumps(self.runs))
        return handle.number

    async def order(self, type: str, id: str, data: Any, trigger: str = "orders") -> Any:
        (receipt,) = await getattr(self.kept, trigger).send(
            type=type, id=id, data=data, cursor={"last": id}
        )
        return receipt

    async def rest(self, seconds: float = 0) -> None:
        await self.clock.advance(seconds)

    async def until(self, ready: Callable[[], Awaitable[Any]], what: str) -> None:
        for _ in range(1000):
            if await ready():
                return
            await asyncio.sleep(POLL_SECONDS)
        raise AssertionError(f"in vain: {what}")

    async def state(self, note: str) -> str:
        return (await self.app.store.run(self.runs[note]))["state"]


# --------------------------------------------------------------------------- lives


async def early(life: Life) -> None:
    """What retention forgets later: runs and events."""
    await life.start("shows", "early", kind="json")
    await life.start("failing", "early failed")
    await life.app.store.cancel(await life.start("sleeper", "early cancelled"), "too early")
    await life.app.emit("kept.nobody", {"n": 1}, id="early")
    await life.rest(1)


async def older(life: Life) -> None:
    """What retention forgets in part: the runs and the bodies, not the identities."""
    await life.start("shows", "older", kind="json")
    await life.app.emit("kept.nobody", {"n": 1}, id="older")
    await life.rest(1)


async def begin(life: Life) -> None:
    """Runs of every kind, windows and patterns; the first code."""
    app, now = life.app, to_us(BEGIN)
    while await app.store.prune(bodies_before=now - 30 * DAY, identities_before=now - 50 * DAY):
        pass
    for flow in (
        "sleeper",
        "codecs",
        "parent",
        "failing_parent",
        "retrying",
        "mapped",
        "catcher",
        "timers",
        "counted",
        "walled",
        "timed_out",
        "failing",
        "stuck",
        "guardian",
        "grouped",
        "shows_point",
    ):
        await life.start(flow)
    await life.start("afresh", n=2)
    for kind in ("json", "tagged", "bytes", "large", "none"):
        await life.start("shows", f"shows {kind}", kind=kind)
    for again in ("forgiven", "fresh"):
        await life.start("failing", again, message=again)
    await life.start("failing_parent", "parent again")
    await life.start("sleeper", "cancelled waiting", hours=3.0)
    await life.app.start("work", idempotency_key="known", n=3)
    await life.app.start("work", idempotency_key="known", n=3)
    await events(life)
    await patterns(life)
    await life.rest(200)
    kids = await app.store.runs(parent=life.runs["parent"], limit=10)
    (asleep,) = [row for row in kids if row["flow"] == "kid_sleeps"]
    await app.store.cancel(asleep["id"], "a person cancels the child")
    await app.store.cancel(life.runs["cancelled waiting"], "a person cancels")
    for note in ("forgiven", "parent again"):
        await app.store.retry(life.runs[note])
    await app.store.retry(life.runs["fresh"], fresh=True)
    await life.rest(100)
    for flow in ("changed", "diverged", "unreadable", "gone", "shrunk"):
        await life.start(flow)
    for n in range(2):
        await app.emit("p.gone", {"n": n}, id=f"gone-{n}")
    await life.rest(1)


async def events(life: Life) -> None:
    """Events with every verdict of single deliveries, lanes, windows that close."""
    app, orders = life.app, life.kept.orders
    await life.order("order", "small", {"n": 1})
    await life.order("order", "large", {"n": 2, "pad": "p" * 100_000})
    await life.order("order", "small", {"n": 1})
    await life.order("order", "small", {"n": 99})
    await life.order("order", "filtered", {"n": -1})
    for n in range(3):
        await life.order("order", f"invalid-{n}", {"n": n + 0.5})
        torn = Undecodable(
            id=f"torn-{n}",
            source="/orders",
            body=b"\xff{",
            error="no JSON",
            headers={"x-try": str(n)},
        )
        await orders.send(torn)
    full = Event(
        id="full",
        source="/orders",
        type="order",
        data={"n": 7},
        subject="a subject",
        time=BEGIN - timedelta(hours=1),
        datacontenttype="application/json",
        dataschema="https://example.org/order",
        extensions={"partitionkey": "k"},
    )
    await orders.send(full, Event(id="binary", source="/orders", type="order", data=b"\x00\x01"))
    await life.order("nobody", "unheard", {})
    await app.emit("kept.nobody", {"n": 1}, id="nobody")
    await app.emit("kept.chain", {"n": 0}, id="chain")
    for id, data in {
        "o1": {"k": "sleep", "how": "sleep"},
        "o2": {"k": "sleep"},
        "o3": {"k": "sleep"},
        "o4": {"k": "stuck", "how": "stuck"},
        "o5": {"k": "stuck"},
        "o6": {"k": "free"},
        "o7": {"k": "free"},
    }.items():
        await life.order("ordered", id, data)
    for n in range(3):
        await life.order("batch", f"closed-{n}", {"n": n})
    for id, data in {"single-1": {"how": "sleep"}, "single-2": {}, "single-3": {}}.items():
        await life.order("single", id, data)
        await life.rest(1)
    for n in range(8):
        rows = [{"amount": float(n // 6 * 90 + i)} for i in range(20)]
        await life.kept.scores.send(type="scores", id=f"scores-{n}", data=rows, cursor={"last": n})
    for n, type in enumerate(("kept.good", "kept.bad", "kept.bad", "kept.picky", "kept.odd")):
        await app.emit(type, {"n": n * 5}, id=f"out-{n}")


async def patterns(life: Life) -> None:
    """What is open of each pattern, what matched and what lapsed."""
    sent: list[tuple[str, Any]] = [
        ("p.a", {}),
        ("p.a", {}),
        ("p.b", {}),
        ("p.c", {}),
        ("p.any", {}),
        ("p.s1", {"k": 1}),
        ("p.s1", {"k": 2}),
        ("p.s2", {"k": 2}),
        ("p.s1", {"k": 3}),
        ("p.s3", {"k": 3}),
        ("p.s1", {}),
        ("p.l1", {}),
        ("p.n", {}),
        ("p.n", {}),
        ("p.n", {}),
        ("p.n", {}),
        ("p.n", {}),
        ("p.m", {"k": 1}),
        ("p.m", {"k": 1}),
        ("p.m", {"k": 2}),
        ("p.y", {"k": 1}),
        ("p.y", {"k": 2}),
        ("p.x", {"k": 2}),
        ("p.z", {}),
        ("p.z", {}),
        ("p.daily", {}),
        ("p.changed", {}),
        ("p.changed", {}),
    ]
    for n, (type, data) in enumerate(sent):
        await life.app.emit(type, data, id=f"{type}-{n}")
        await life.rest(0.001)


async def changed(life: Life) -> None:
    """The new code: runs are held. Then a trigger is paused, and what a person does to events."""
    app = life.app
    await life.rest(1)
    await app.emit("p.changed", {}, id="p.changed-anew")
    await verbs.pause(app, "paused", True, by="maker")
    for n in range(3):
        await life.order("order", f"paused-{n}", {"n": n}, "paused")
        await life.order("ordered", f"paused-lane-{n}", {"k": "paused"}, "paused")
        await life.order("batch", f"paused-batch-{n}", {"n": n}, "paused")
    for k in (1, 2):
        await life.order("part", f"paused-part-{k}", {"k": k, "pattern": True}, "paused")
    await app.emit("p.q", {"k": 1}, id="paused-matched")
    rows = {row["event_id"]: row["id"] for row in await app.store.events(limit=1000)}
    (one,) = await app.store.runs(event=rows["paused-2"])
    await app.store.cancel(one["id"], "cancelled while paused")
    letters = {row["event_id"]: row["id"] for row in await app.store.dead(limit=100)}
    await verbs.redrive(
        app, str(letters["torn-0"]), {"data": {"n": 5}, "type": "order"}, by="maker"
    )
    await verbs.redrive(app, str(letters["invalid-0"]), {"data": {"n": 6}}, by="maker")
    await verbs.redrive(app, str(letters["invalid-1"]), {}, by="maker")
    await verbs.replay(app, show_id(rows["small"]), None, dry=False, by="maker")
    await verbs.replay(app, show_id(rows["p.c-3"]), None, dry=False, by="maker")
    await app.store.cancel(await life.start("stuck", "cancelled held"), "before it is held")
    await life.rest(1)


async def kills(life: Life) -> None:
    """The poisoned run kills the process; once it is dead, the one that is a child."""
    if "poison" not in life.runs:
        await life.start("poison")
    elif await life.state("poison") == "dead" and "poisoned" not in life.runs:
        await life.start("poisoned")
    await life.until(lambda: asyncio.sleep(POLL_SECONDS), "the end of the process")


async def first_gate(life: Life) -> None:
    """The poisoned runs are dead. A run is in flight when the process is killed."""
    await life.rest()
    assert (await life.state("poison"), await life.state("poisoned")) == ("dead", "failed")
    await life.start("at_gate", "suspect", name="suspect")
    await life.rest()
    os.kill(os.getpid(), signal.SIGKILL)


async def last_gate(life: Life) -> None:
    """Open windows; runs in flight of every kind when the process is killed."""
    app = life.app
    await life.rest(1)
    for n in range(2):
        await life.order("batch", f"open-batch-{n}", {"n": n})
        await life.order("debounce", f"open-debounce-{n}", {"n": n})
        await life.order("latest", f"latest-{n}", {"n": n})
        await life.start("narrow", f"narrow {n}", n=n)
        await life.rest()
    await life.order("latest", "latest-2", {"n": 2})
    await life.start("at_gate", "in flight", name="in flight")
    cancelling = await life.start("cancelling")
    await life.rest()
    await app.store.cancel(cancelling, "a person asks")
    await life.rest()

    async def marked() -> bool:
        return (await app.store.run(life.runs["suspect"]))["deaths"] == 1

    await life.until(marked, "the suspect's start is on record")
    assert await life.state("cancelling") == "running"
    os.kill(os.getpid(), signal.SIGKILL)


LIVES: dict[str, tuple[datetime, Callable[[Life], Awaitable[None]], bool]] = {
    "early": (EARLY, early, False),
    "older": (EARLY + timedelta(days=20), older, False),
    "begin": (BEGIN, begin, False),
    "changed": (BEGIN + timedelta(minutes=15), changed, False),
    **{f"kills {n}": (BEGIN + timedelta(minutes=20 + n), kills, True) for n in range(8)},
    "first gate": (BEGIN + timedelta(minutes=30), first_gate, True),
    "last gate": (END, last_gate, True),
}
"""By name: when it begins, what happens, and whether it ends by a kill."""


async def live(name: str, folder: Path) -> None:
    began, act, _ = LIVES[name]
    stage.is_new = began > BEGIN
    stage.is_early = began <= BEGIN
    clock = VirtualClock(began)
    life = Life(folder, clock)
    logs = LogStore(f"{folder}/kept.db.logs.db", clock=clock)
    logs.open()
    with configure(stream=None, clock=clock):
        await life.app.open(store=f"sqlite:///{folder}/kept.db", sink=logs)
        clock.attend(life.app)
        await asyncio.sleep(START_SECONDS)
        await act(life)
        await life.app.close(grace=0.1)
    logs.close()


# --------------------------------------------------------------------------- what is in it


def expected(path: Path) -> dict[str, Any]:
    """The facts of the rows, read past eventflow."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    connection.row_factory = sqlite3.Row
    rows = connection.execute("SELECT * FROM runs ORDER BY id").fetchall()
    runs: dict[str, Any] = {}
    for row in rows:
        state = State(row["state"])
        is_paused = state is State.HELD and row["token"] == 0 and row["reason"] is None
        runs[show_id(row["id"])] = {
            "flow": row["flow"],
            "subscription": row["subscription"],
            "state": state.word,
            "after": "paused" if is_paused else "pending" if state is State.RUNNING else state.word,
            "reason": row["reason"],
            "deliveries": row["deliveries"],
            "is_child": row["parent"] is not None,
        }
    recorded: dict[str, list[str]] = {}
    for run, claim in connection.execute(
        "SELECT run, claim FROM journal WHERE kind = 0 ORDER BY run, claim"
    ):
        recorded.setdefault(show_id(run), []).append(claim)
    dead = connection.execute(
        "SELECT d.*, e.event_id FROM dead d JOIN events e ON e.id = d.event ORDER BY d.id"
    ).fetchall()
    totals = dict(connection.execute("SELECT * FROM ledger").fetchone())
    tables = [
        name
        for (name,) in connection.execute(
            "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name"
        )
    ]
    found = {
        "commit": COMMIT,
        "now": END.isoformat(),
        "counts": {
            name: n for name, n in totals.items() if name not in ("one", "batch", "at", "epoch")
        },
        "rows": {
            name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
            for name in tables
            if not name.startswith("sqlite")
        },
        "journal": {
            Kind(kind).name: n
            for kind, n in connection.execute("SELECT kind, count(*) FROM journal GROUP BY kind")
        },
        "dead": [
            {
                "id": row["id"],
                "event": row["event_id"],
                "subscription": row["subscription"],
                "reason": row["reason"],
                "is_redriven": row["redriven_at"] is not None,
            }
            for row in dead
        ],
        "outbox": dict(
            connection.execute("SELECT outlet, count(*) FROM outbox GROUP BY outlet").fetchall()
        ),
        "runs": runs,
        "recorded": recorded,
    }
    connection.close()
    return found


async def verdicts(store: Path) -> dict[str, int]:
    """The verdicts as the old version shows them: one that waits in the rows may have lapsed since.

    It also looks at the counts and audits the store, as `eventflow doctor` does. For a copy only.
    """
    app = kept_app.Kept(VirtualClock(END)).app
    await app.open(store=f"sqlite:///{store}", passive=True)
    rows = await app.store.events(limit=10_000)
    events = [await app.store.event(row["id"]) for row in rows]
    assert await app.store.check() == []
    await app.close()
    return dict(sorted(Counter(each[1] for row in events for each in row["verdicts"]).items()))


def pack(folder: Path, target: Path) -> None:
    """The store and what belongs to it, the same bytes for the same files."""
    parts = [
        "kept.db",
        "kept.db.hwm",
        "kept.db.key",
        "kept.db.logs.db",
        "kept.db.blobs",
        "kept.db.checkpoints",
        "made-by",
    ]
    (folder / "made-by").mkdir()
    for name in ("make_kept.py", "kept_app.py"):
        shutil.copyfile(HERE / name, folder / "made-by" / name)
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for part in parts:
            for path in sorted([folder / part, *(folder / part).rglob("*")]):
                info = archive.gettarinfo(str(path), str(path.relative_to(folder)))
                info.mtime = 0
                info.uid = 0
                info.gid = 0
                info.uname = ""
                info.gname = ""
                with path.open("rb") if path.is_file() else io.BytesIO() as content:
                    archive.addfile(info, content if path.is_file() else None)
    target.write_bytes(gzip.compress(raw.getvalue(), 9, mtime=0))


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, (_, _, is_killed) in LIVES.items():
        ended = subprocess.run([sys.executable, __file__, "--life", name, str(folder)])
        print(name, ended.returncode)
        if ended.returncode != (-signal.SIGKILL if is_killed else 0):
            raise SystemExit(f"the life {name!r} ended with {ended.returncode}")
    for name in ("kept.db", "kept.db.logs.db"):
        connection = sqlite3.connect(folder / name)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.close()
    found = expected(folder / "kept.db")
    shutil.copytree(folder, folder / "copy")
    found["verdicts"] = asyncio.run(verdicts(folder / "copy" / "kept.db"))
    (HERE / "expected.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    pack(folder, HERE / "0.1.0-before-names.tar.gz")


if __name__ == "__main__":
    if sys.argv[1] == "--life":
        asyncio.run(live(sys.argv[2], Path(sys.argv[3])))
    else:
        main(Path(sys.argv[1]).absolute())
