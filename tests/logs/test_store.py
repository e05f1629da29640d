"""The log store: posted lines are read, dropped ones are counted, damage costs old lines only."""

import asyncio
import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from eventflow.core.clock import SystemClock
from eventflow.logs import store as log_store
from eventflow.logs.file import LogFile, as_stream_line, read_lines
from eventflow.logs.log import LogContext, LogLine, get_logger, log_context
from eventflow.logs.store import LogStore
from eventflow.runs.run import Ids
from tests.conftest import eventually, wait_until

CLOCK = SystemClock()
IDS = Ids()

Open = Callable[..., LogStore]


def new_run() -> int:
    return IDS.next(CLOCK.now())


def line(
    run: int, event: str = "hello", *, level: int = 20, fields: bytes | None = None
) -> LogLine:
    return LogLine(run, CLOCK.now(), level, "shop", event, fields, "score", 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shop.db.logs.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Open]:
    stores: list[LogStore] = []

    def make(**options: Any) -> LogStore:
        store = LogStore(path, clock=CLOCK, **options)
        store.open()
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.close()


def read(store: LogStore, run: int, **options: Any) -> list[dict[str, Any]]:
    return asyncio.run(store.read(run, **options))


# --------------------------------------------------------------------------- kept and read


def test_what_is_posted_is_read(opened: Open):
    """A line is read with all its fields right after it was posted, in order, without lines of
    other runs.
    """
    store, run, other = opened(), new_run(), new_run()
    store.post(line(run, "one", fields=b'{"n":1,"deep":{"a":[1,null]}}'))
    store.post(line(other, "theirs"))
    store.post(LogLine(run, 7, 40, "lib", "two"))
    one, two = read(store, run)
    assert (
        one.items()
        >= {
            "level": "info",
            "logger": "shop",
            "event": "one",
            "task": "score",
            "attempt": 1,
        }.items()
    )
    assert one["fields"] == {"n": 1, "deep": {"a": [1, None]}}
    assert two == {
        "seq": two["seq"],
        "at": 7,
        "level": "error",
        "logger": "lib",
        "event": "two",
        "fields": {},
        "task": None,
        "attempt": None,
    }
    assert one["seq"] < two["seq"]


def test_reading_goes_on_where_it_stopped(opened: Open):
    """`after` and `limit` page through a run's lines without gap or repeat."""
    store, run, seen, after = opened(), new_run(), [], 0
    for n in range(25):
        store.post(line(run, str(n)))
        store.post(line(new_run()))
    while page := read(store, run, after=after, limit=10):
        after = page[-1]["seq"]
        seen += [row["event"] for row in page]
        assert len(page) <= 10
    assert seen == [str(n) for n in range(25)]


def test_lines_survive_a_restart(opened: Open, path: Path):
    """Lines are there for the next process, before a store is opened too, and what follows comes
    after them.
    """
    store, run = opened(), new_run()
    store.post(line(run, "before"))
    store.close()
    assert [row["event"] for row in read_lines(path, run)] == ["before"]
    store = opened()
    store.post(line(run, "after"))
    rows = read(store, run)
    assert [row["event"] for row in rows] == ["before", "after"] and rows[0]["seq"] < rows[1]["seq"]


def test_no_file_no_lines(opened: Open, path: Path):
    """A store in which nothing was logged makes no file; reading it gives nothing."""
    store = opened()
    assert read(store, new_run()) == [] == read_lines(path, new_run())
    store.close()
    assert not path.exists()


def test_the_file_is_private(opened: Open, path: Path):
    """Logs may hold customers' data: the file and its companions are readable by their
    owner only.
    """
    store = opened()
    store.post(line(new_run()))
    assert store.flush()
    modes = [stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()]
    assert modes and set(modes) == {0o600}


def test_odd_texts_are_kept(opened: Open):
    """Emoji, quotes, line breaks, controls and a NUL in the middle come back; the NUL as a
    replacement sign.
    """
    store, run = opened(), new_run()
    text = 'a"b\\c\n\x1b[31m🎉\x00z'
    store.post(line(run, text, fields=json.dumps({"t": text}).encode()))
    [row] = read(store, run)
    assert row["event"] == text.replace("\x00", "\ufffd") and row["fields"] == {"t": text}


def test_long_lines_are_cut(opened: Open):
    """A message or field of megabytes is cut and says so; of a traceback both ends stay."""
    store, run = opened(), new_run()
    trace = "Traceback\n" + "x" * 1_000_000 + "\nValueError: the end"
    store.post(line(run, "m" * 1_000_000, fields=json.dumps({"exception": trace, "n": 1}).encode()))
    [row] = read(store, run)
    assert len(row["event"]) < 17_000 and "1000000 characters" in row["event"]
    assert row["fields"]["n"] == 1 and len(row["fields"]["exception"]) < 16_000
    assert row["fields"]["exception"].startswith("Traceback") and row["fields"][
        "exception"
    ].endswith("ValueError: the end")


def test_a_logger_in_a_run_reaches_the_store(opened: Open):
    """The whole way: a logger, the place in a run, the store, and the line in the shape it has on
    the stream.
    """
    store, run = opened(), new_run()
    token = log_context.set(LogContext(run, "handle", logs=store).for_attempt("score", 2))
    get_logger("shop").warning("slow", seconds=3.5, password="x")
    log_context.reset(token)
    [row] = read(store, run)
    stream_line = as_stream_line(row)
    assert stream_line.pop("timestamp").endswith("Z")
    assert stream_line == {
        "level": "warning",
        "event": "slow",
        "logger": "shop",
        "task": "score",
        "attempt": 2,
        "seconds": 3.5,
        "password": "***",
    }


# --------------------------------------------------------------------------- floods


def test_a_flood_is_capped_and_counted(opened: Open):
    """A run that logs faster than its rate keeps the first lines; each lost one is counted, in the
    run's own lines too.
    """
    store, run, calm = opened(per_second=100), new_run(), new_run()
    for n in range(5000):
        store.post(line(run, str(n)))
    store.post(line(calm))

    def counted() -> int:
        rows = read_lines(store.file.path, run, limit=10_000)
        kept = sum(row["event"] != "log.dropped" for row in rows)
        return kept + sum(row["fields"]["lines"] for row in rows if row["event"] == "log.dropped")

    wait_until(lambda: counted() == 5000, "stored and counted lines are all of them")
    rows = read(store, run, limit=10_000)
    assert [row["event"] for row in rows[:100]] == [str(n) for n in range(100)]
    assert (
        store.dropped
        == sum(row["fields"]["lines"] for row in rows if row["event"] == "log.dropped")
        > 4000
    )
    assert [row["event"] for row in read(store, calm)] == ["hello"]


def test_a_run_has_a_size_and_warnings_a_tenth_more(opened: Open):
    """Beyond `per_run` lines only warnings are stored, for a tenth more; a restart does not reset
    the count.
    """
    store, run = opened(per_run=100), new_run()
    for _ in range(2):
        for n in range(150):
            store.post(line(run, f"info {n}"))
        assert store.flush()
        store.close()
        store = opened(per_run=100)
    for _ in range(50):
        store.post(line(run, "warning", level=30))
    store.close()
    levels = [row["event"].split()[0] for row in read_lines(store.file.path, run, limit=1000)]
    assert (levels.count("info"), levels.count("warning")) == (100, 10)


def test_a_run_has_a_size_in_bytes(opened: Open):
    """Few but huge lines are bounded too."""
    store, run = opened(per_run_bytes=100_000), new_run()
    for _ in range(100):
        store.post(line(run, "x" * 10_000))
    assert len([row for row in read(store, run) if row["event"] != "log.dropped"]) == 10


def test_posting_never_waits_for_the_disk(opened: Open, path: Path):
    """While another connection locks the file, lines are still posted; those over the bound of the
    queue are counted.
    """
    store = opened(per_second=10**6)
    store.post(line(new_run()))
    assert store.flush()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    slowest = 0.0
    for _ in range(3 * log_store.MAX_QUEUED_LINES):
        start = time.monotonic()
        store.post(line(1))
        slowest = max(slowest, time.monotonic() - start)
    holder.execute("ROLLBACK")
    holder.close()
    assert slowest < 2.0
    assert store.dropped > 0


def test_the_quota_removes_the_oldest_runs(opened: Open, path: Path):
    """The file stays at its quota however much is logged; the oldest runs' lines go first, the
    newest stay.
    """
    quota = 4 << 20
    store = opened(quota_bytes=quota, per_second=10**6)
    runs = [new_run() for _ in range(300)]
    for run in runs:
        for _ in range(50):
            store.post(line(run, "x" * 1000))
        assert store.flush(30)

    def used() -> int:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
            names = ("page_count", "freelist_count", "page_size")
            pages, free, size = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
        return (pages - free) * size

    assert store.flush(30)
    wait_until(lambda: used() <= quota, "the quota is met")
    assert used() > quota // 2
    assert len(read(store, runs[-1])) == 50
    assert read(store, runs[0]) == []
    assert path.stat().st_size < 3 * quota


def test_old_lines_go(opened: Open):
    """Lines of runs older than `keep_seconds` are removed."""
    store, young = opened(keep_seconds=3600), new_run()
    old = Ids().next(CLOCK.now() - 7200 * 1_000_000)
    store.post(line(old))
    store.post(line(young))
    wait_until(lambda: read(store, old) == [], "the old run's lines are gone")
    assert len(read(store, young)) == 1


# --------------------------------------------------------------------------- faults


@pytest.mark.parametrize("damage", ["garbage", "empty", "page"])
def test_a_damaged_file_is_set_aside(
    opened: Open, path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    """Damage costs the old lines only: the file is kept aside for inspection, a new one begun, and
    a warning says so.
    """
    store, run = opened(), new_run()
    for _ in range(500):
        store.post(line(run, "x" * 200))
    store.close()
    match damage:
        case "garbage":
            path.write_bytes(os.urandom(20_000))
        case "empty":
            path.write_bytes(b"")
        case _:
            whole = bytearray(path.read_bytes())
            whole[4096 * 2 :] = os.urandom(len(whole) - 4096 * 2)
            path.write_bytes(whole)
    store = opened()
    store.post(line(run, "after"))

    def there() -> bool:
        return [row["event"] for row in read(store, run)] == ["after"]

    if damage == "page":
        for _ in range(3):
            store.post(line(run, "after"))
            read(store, run)
        run = new_run()
        store.post(line(run, "after"))
    wait_until(there, "new lines are kept")
    if damage != "empty":
        assert Path(f"{path}.damaged").exists()
        assert "log.reset" in caplog.text


def test_a_file_that_cannot_be_written_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """With its directory gone the store drops and counts, warns once, and writes again when
    it can.
    """
    folder = tmp_path / "gone"
    store = LogStore(folder / "store.db", clock=CLOCK)
    store.open()
    run = new_run()
    for _ in range(10):
        store.post(line(run))
        assert store.flush()
    assert store.dropped == 10
    assert caplog.text.count("log.failed") == 1
    folder.mkdir()
    store.post(line(run, "again"))
    assert "again" in [row["event"] for row in read(store, run)]
    store.close()
    rows = read_lines(folder / "store.db", run)
    assert sum(row["fields"]["lines"] for row in rows if row["event"] == "log.dropped") == 10


def test_a_short_disk_is_left_to_the_journal(opened: Open):
    """With less free than the floor no line is written; they are counted."""
    store = opened(floor_bytes=1 << 60)
    store.post(line(new_run()))
    assert store.flush()
    assert store.dropped == 1 and not store.file.path.exists()


def _remove_folder_content(path: Path) -> None:
    for each in list(path.parent.iterdir()):
        each.unlink()


def _replace_by_empty_file(path: Path) -> None:
    path.unlink()
    path.touch()


@pytest.mark.parametrize(
    ("harm", "kept"),
    [
        (_remove_folder_content, []),
        (Path.unlink, []),
        (_replace_by_empty_file, []),
        (lambda path: path.rename(path.with_name("moved")), []),
        (lambda path: Path(f"{path}-wal").unlink(), ["before"]),
    ],
    ids=["all removed", "removed", "replaced", "moved", "WAL removed"],
)
def test_a_file_removed_by_hand_is_created_again(
    opened: Open, path: Path, harm: Callable[[Path], object], kept: list[str]
):
    """Someone who makes room by deleting, moving or replacing the log file loses what was in it,
    and nothing that follows.
    """
    store, run = opened(), new_run()
    store.post(line(run, "before"))
    assert store.flush()
    harm(path)
    store.post(line(run, "after"))
    assert [row["event"] for row in read(store, run)] == [*kept, "after"]


def test_kill_9_keeps_what_was_written(path: Path):
    """A killed process leaves a file that opens, with all lines it had flushed, in order."""
    code = (
        "from eventflow.core.clock import SystemClock\nfrom eventflow.logs.log import "
        "LogLine\nfrom eventflow.logs.store import LogStore\n"
        f"clock = SystemClock()\nstore = LogStore({str(path)!r}, clock=clock, per_second=10**6, "
        "per_run=10**6)\nstore.open()\n"
        "for n in range(10**9):\n"
        "    store.post(LogLine(1 << 61, clock.now(), 20, 'x', str(n)))\n"
        "    if n % 100 == 99 and store.flush(): print(n, flush=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdout is not None
    flushed = [int(child.stdout.readline()) for _ in range(5)]
    child.kill()
    child.wait()
    child.stdout.close()
    rows = [row["event"] for row in read_lines(path, 1 << 61, limit=10**6)]
    assert rows[: flushed[-1] + 1] == [str(n) for n in range(flushed[-1] + 1)]
    assert rows == [str(n) for n in range(len(rows))]


def test_many_threads(opened: Open):
    """Threads that post at once lose nothing, and each one's lines keep their order."""
    store, run = opened(per_second=10**6), new_run()

    def post(who: int) -> None:
        for n in range(200):
            store.post(line(run, f"{who} {n}"))

    threads = [threading.Thread(target=post, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = [tuple(map(int, row["event"].split())) for row in read(store, run, limit=10_000)]
    assert [[n for who, n in rows if who == each] for each in range(8)] == [list(range(200))] * 8


def test_after_close_lines_are_counted(opened: Open):
    """Posting to a closed store is harmless, and close may come twice."""
    store = opened()
    store.close()
    store.close()
    store.post(line(new_run()))
    assert store.dropped == 1


def test_memory_is_bounded(opened: Open, monkeypatch: pytest.MonkeyPatch):
    """However many runs log, budgets are kept for the last ones only."""
    monkeypatch.setattr(log_store, "MAX_RUN_QUOTAS", 100)
    store = opened(per_second=1)
    for run in range(1 << 61, (1 << 61) + 1000):
        store.post(line(run))
        store.post(line(run))
    assert store.flush()
    assert store.dropped == 1000
    assert len(store._quotas._quotas) <= 101 and len(store._quotas.dropping) <= 101


# --------------------------------------------------------------------------- follow


def test_follow_gives_each_line_once_until_the_run_is_settled(opened: Open):
    """Lines written before and while one follows come in order, once, soon; and the last ones
    before it ends.
    """
    store, run = opened(), new_run()
    done = False

    async def settled() -> bool:
        return done

    async def main() -> list[str]:
        nonlocal done
        seen: list[str] = []

        async def follow() -> None:
            async for row in store.follow(run, settled=settled):
                seen.append(row["event"])

        store.post(line(run, "0"))
        following = asyncio.create_task(follow())
        for n in range(1, 5):
            await eventually(lambda n=n: len(seen) == n, f"line {n} is seen")
            store.post(line(run, str(n)))
        store.post(line(run, "last"))
        done = True
        await following
        return seen

    assert asyncio.run(main()) == ["0", "1", "2", "3", "4", "last"]


def test_follow_of_a_settled_run_ends(opened: Open):
    """Following what is over gives all its lines and ends, also when they fill many pages."""
    store, run = opened(per_second=10**6), new_run()
    for n in range(2500):
        store.post(line(run, str(n)))

    async def settled() -> bool:
        return True

    async def main() -> list[str]:
        return [row["event"] async for row in store.follow(run, settled=settled)]

    assert asyncio.run(main()) == [str(n) for n in range(2500)]
    assert not store._followers


def test_the_schema_is_todays(path: Path):
    """A file written today opens tomorrow: its table and version are what this test says."""
    file = LogFile(path, SystemClock(), quota=1 << 30, keep_seconds=1e9, floor=0)
    file.write([line(1)])
    file.close()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        columns = [row[1] for row in db.execute("PRAGMA table_info(lines)")]
    db.close()
    assert columns == ["run", "seq", "at", "level", "logger", "event", "fields", "task", "attempt"]
