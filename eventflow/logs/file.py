"""The file with the log lines of runs: its rows, its quota and retention, and recovery from damage.

Only the writer thread of store.py uses `LogFile`, one transaction per call. `read_lines` reads the
file from any process, with or without a writer. A damaged file is renamed and a new one created.
"""

import os
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import orjson

from eventflow.core.clock import Clock
from eventflow.logs.log import LogLine, format_timestamp, get_logger, level_name

LOG_EVENTS = {
    "log.reset": (
        "The log store file was damaged: it was renamed and a new one created. No journal is "
        "affected."
    ),
}

T = TypeVar("T")

SCHEMA: Final = """
    PRAGMA auto_vacuum = INCREMENTAL;
    PRAGMA journal_mode = WAL;
    PRAGMA user_version = 1;
    CREATE TABLE IF NOT EXISTS lines (
        run INTEGER NOT NULL, seq INTEGER NOT NULL, at INTEGER NOT NULL, level INTEGER NOT NULL,
        logger TEXT NOT NULL, event TEXT NOT NULL, fields TEXT, task TEXT NOT NULL,
        attempt INTEGER NOT NULL, PRIMARY KEY (run, seq)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS last (seq INTEGER NOT NULL);
    INSERT INTO last SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM last);
"""
"""`seq` increases over all runs. The primary key keeps the lines of a run together, and those of
the oldest run first, since run ids increase.
"""

INSERT: Final = f"""
    INSERT INTO lines SELECT {", ".join(f"json_extract(value, '$[{n}]')" for n in range(9))}
    FROM json_each(?)
"""
"""One statement per batch: row by row, the writer would compete with the event loop for the GIL."""

SELECT: Final = """
    SELECT seq, at, level, logger, event, fields, task, attempt FROM lines
    WHERE run = ? AND seq > ? ORDER BY seq LIMIT ?
"""

DELETE_OLDEST: Final = """
    DELETE FROM lines
    WHERE (run, seq) IN (SELECT run, seq FROM lines WHERE run < ? ORDER BY run, seq LIMIT ?)
"""

MAX_LENGTH: Final = 16_384
"""Characters of a message, and bytes of the fields of a line, that are stored. Longer ones are cut
and say so.
"""

LINES_PER_DELETE: Final = 2_000
"""Lines that one transaction removes: a few milliseconds."""

RETENTION_INTERVAL_SECONDS: Final = 60.0
"""Between two searches for lines past their retention."""

_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})


class LogFile:
    """For the writer thread only. A method that raises sqlite3.Error or OSError reopens the file at
    the next call.
    """

    def __init__(
        self, path: Path, clock: Clock, *, quota: int, keep_seconds: float, floor: int
    ) -> None:
        self.path = path
        self.damage_reported = False  # a reader found damage: renamed at the next call
        self._clock = clock
        self._quota = quota  # bytes
        self._keep_seconds = keep_seconds
        self._floor = floor  # bytes of free disk space left to the journal
        self._retention_at = float("-inf")
        self._db: sqlite3.Connection | None = None
        self._last_seq = 0
        self._opened: tuple[int, ...] | None = None

    def _found(self) -> tuple[int, ...] | None:
        """The identities of the files that are at the paths now, None for none."""
        try:
            found = [os.stat(f"{self.path}{end}") for end in ("", "-wal")]
        except FileNotFoundError:
            return None
        return tuple(number for each in found for number in (each.st_dev, each.st_ino))

    def _open(self) -> sqlite3.Connection:
        if self.damage_reported:
            self._set_aside("a reader found a damaged page")
        if self._db is not None and self._found() != self._opened:
            self.close()  # somebody removed it to free space, or put another one in its place
        if self._db is None:
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=5.0)
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA journal_size_limit = 4194304")
            self._db.executescript(SCHEMA)
            self._opened = self._found()
            self._last_seq = self._db.execute("SELECT seq FROM last").fetchone()[0]
        return self._db

    def _set_aside(self, reason: str) -> None:
        """Rename the damaged file to NAME.damaged; only the last one is kept."""
        self.close()
        self.damage_reported = False
        for suffix in ("-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        os.replace(self.path, f"{self.path}.damaged")
        get_logger("eventflow.store.logs").warning("log.reset", path=str(self.path), reason=reason)

    def close(self) -> None:
        if self._db is not None:
            with suppress(sqlite3.Error):  # the file is damaged or gone: nothing is left to close
                self._db.close()
            self._db = None

    def _execute(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` in one transaction; if the file is damaged, once more in a new file."""
        for is_first in (True, False):
            try:
                db = self._open()
                db.execute("BEGIN IMMEDIATE")
                result = work(db)
                db.execute("COMMIT")
                return result
            except sqlite3.Error as error:
                self.close()
                if not (is_first and is_damage(error)):
                    raise
                self._set_aside(str(error))
        raise AssertionError

    def check_free_space(self) -> None:
        """Raises OSError if the free disk space is needed for the journal."""
        disk = os.statvfs(self.path.parent)
        free = disk.f_bavail * disk.f_frsize
        if free < self._floor:
            raise OSError(
                f"{free >> 20} MiB free on disk, less than the {self._floor >> 20} MiB that logs "
                "leave to the rest"
            )

    def write(self, lines: Sequence[LogLine]) -> None:
        """Append lines, in order, in one transaction."""
        self._execute(lambda db: self._insert(db, lines))

    def _insert(self, db: sqlite3.Connection, lines: Sequence[LogLine]) -> None:
        rows = [_row(line, seq) for seq, line in enumerate(lines, self._last_seq + 1)]
        db.execute(INSERT, (orjson.dumps(rows).decode(),))
        db.execute("UPDATE last SET seq = ?", (self._last_seq + len(lines),))
        self._last_seq += len(lines)

    def stored_sizes(self, runs: Iterable[int]) -> dict[int, tuple[int, int]]:
        """How many lines and characters of each of these runs are stored; without those that have
        none.
        """
        query = """
            SELECT run, count(*), sum(length(event) + coalesce(length(fields), 0))
            FROM lines
            WHERE run IN (SELECT value FROM json_each(?)) AND event <> 'log.dropped'
            GROUP BY run
        """
        listed = orjson.dumps(list(runs)).decode()
        rows = self._execute(lambda db: db.execute(query, (listed,)).fetchall())
        return {run: (lines, size) for run, lines, size in rows}

    def tidy(self) -> bool:
        """Remove lines past their retention (once a minute) and over the quota. False: not
        finished.
        """
        now = self._clock.monotonic()
        if now >= self._retention_at:
            # Run ids begin with their milliseconds.
            before = max(0, int(self._clock.now() / 1000 - self._keep_seconds * 1000)) << 20
            if not self.remove(before):
                self._retention_at = now + RETENTION_INTERVAL_SECONDS
        return self.enforce_quota()

    def remove(self, before: int, steps: int = 1) -> int:
        """Remove lines of runs with smaller ids, oldest first, in `steps` transactions. Returns how
        many.
        """
        if self._db is None and not self.path.exists():
            return 0
        return sum(
            self._execute(lambda db: db.execute(DELETE_OLDEST, (before, LINES_PER_DELETE)).rowcount)
            for _ in range(steps)
        )

    def enforce_quota(self) -> bool:
        """Remove lines over the quota, oldest runs first. False: not finished."""
        if self._db is None or self._used_bytes() <= self._quota:
            return True
        target = self._quota * 9 // 10
        for _ in range(10):
            if not self.remove((1 << 63) - 1) or self._used_bytes() <= target:
                self._db.execute("PRAGMA incremental_vacuum(2000)").fetchall()
                return True
        return False

    def _used_bytes(self) -> int:
        db = self._open()
        pages, free, size = (
            db.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size


def is_damage(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def _row(line: LogLine, seq: int) -> tuple[Any, ...]:
    event = line.event
    if len(event) > MAX_LENGTH:
        event = f"{event[:MAX_LENGTH]}… ({len(event)} characters)"
    return (
        line.run,
        seq,
        line.at,
        line.level,
        line.logger,
        event.replace("\0", "\ufffd"),
        _truncate_fields(line.fields).decode() if line.fields else None,
        line.task,
        line.attempt,
    )


def _truncate_fields(fields: bytes) -> bytes:
    """Cut long texts in the middle: the beginning and the end of a traceback matter."""
    if len(fields) <= MAX_LENGTH:
        return fields
    data = cast(dict[str, Any], orjson.loads(fields))
    for key, value in data.items():
        text = value if isinstance(value, str) else orjson.dumps(value).decode()
        if len(text) > MAX_LENGTH // 4:
            begin = text[: MAX_LENGTH // 16]
            end = text[-MAX_LENGTH // 8 :]
            data[key] = f"{begin}… ({len(text)} characters) …{end}"
    shorter = orjson.dumps(data)
    return shorter if len(shorter) <= MAX_LENGTH else orjson.dumps({"cut": len(fields)})


def read_lines(
    path: str | os.PathLike[str], run: int, after: int = 0, limit: int = 1000
) -> list[dict[str, Any]]:
    """The lines that `LogStore.read` returns, from the file alone; none if there is no file.
    Blocking.
    """
    if not Path(path).exists():
        return []
    with closing(
        sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True, timeout=5.0)
    ) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'lines'").fetchone():
            return []
        rows = db.execute(SELECT, (run, after, limit)).fetchall()
    return [
        {
            "seq": seq,
            "at": at,
            "level": level_name(level),
            "logger": logger,
            "event": event,
            "fields": orjson.loads(fields) if fields else {},
            "task": task or None,
            "attempt": attempt or None,
        }
        for seq, at, level, logger, event, fields, task, attempt in rows
    ]


def as_stream_line(line: dict[str, Any]) -> dict[str, Any]:
    """A stored line in the form it had on the stream; `output.format_line` makes it pretty."""
    base = {
        "timestamp": format_timestamp(line["at"]),
        "level": line["level"],
        "event": line["event"],
        "logger": line["logger"],
    }
    ids = {key: line[key] for key in ("task", "attempt") if line[key]}
    return {**base, **ids, **line["fields"]}
