"""The file that keeps what runs logged: its rows, its quota, what becomes of it when it is damaged.

The writer thread of logs.py alone uses `LogFile`, one transaction per call. `read_lines` reads the file for anybody, in this
process or another, with or without a writer. A damaged file is set aside and a new one begun.
"""

import os
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import orjson

from eventflow.logs.log import Line, get_logger, level_word, timestamp

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
        run INTEGER NOT NULL, seq INTEGER NOT NULL, at INTEGER NOT NULL, level INTEGER NOT NULL, logger TEXT NOT NULL,
        event TEXT NOT NULL, fields TEXT, task TEXT NOT NULL, attempt INTEGER NOT NULL, PRIMARY KEY (run, seq)
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS last (seq INTEGER NOT NULL);
    INSERT INTO last SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM last);
"""
"""`seq` only grows, over all runs; the primary key keeps a run's lines together, and the oldest run's (ids grow) in front."""

INSERT: Final = """
    INSERT INTO lines SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'), json_extract(value, '$[2]'),
    json_extract(value, '$[3]'), json_extract(value, '$[4]'), json_extract(value, '$[5]'), json_extract(value, '$[6]'),
    json_extract(value, '$[7]'), json_extract(value, '$[8]') FROM json_each(?)
"""
"""One statement per batch: row by row the writer would fight the event loop for the interpreter at every line."""

SELECT: Final = """
    SELECT seq, at, level, logger, event, fields, task, attempt FROM lines WHERE run = ? AND seq > ? ORDER BY seq LIMIT ?
"""

OLDEST: Final = "DELETE FROM lines WHERE (run, seq) IN (SELECT run, seq FROM lines WHERE run < ? ORDER BY run, seq LIMIT ?)"

LONGEST: Final = 16_384
"""Characters of a message, and bytes of a line's fields, that are kept; what is over is cut, and says so."""

STEP: Final = 2_000
"""Lines one transaction removes: a few milliseconds."""

_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})


class LogFile:
    """For the writer thread alone. Every method may raise sqlite3.Error or OSError; the next call then opens the file anew."""

    def __init__(self, path: Path, quota: int, floor: int) -> None:
        self.path, self._quota, self._floor = path, quota, floor
        self.suspect = False
        self._db: sqlite3.Connection | None = None
        self._seq = 0

    def _open(self) -> sqlite3.Connection:
        if self.suspect:
            self._set_aside("a reader found a damaged page")
        if self._db is not None and not self.path.exists():  # someone made room by hand
            self.close()
        if self._db is None:
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(self.path, isolation_level=None, timeout=5.0)
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute("PRAGMA journal_size_limit = 4194304")
            self._db.executescript(SCHEMA)
            self._seq = self._db.execute("SELECT seq FROM last").fetchone()[0]
        return self._db

    def _set_aside(self, why: str) -> None:
        """Keeps the damaged file as NAME.damaged (the last one only) for whoever wants to look at it."""
        self.close()
        self.suspect = False
        for ending in ("-wal", "-shm"):
            Path(f"{self.path}{ending}").unlink(missing_ok=True)
        os.replace(self.path, f"{self.path}.damaged")
        get_logger("eventflow.store.logs").warning("log.reset", path=str(self.path), reason=why)

    def close(self) -> None:
        if self._db is not None:
            db, self._db = self._db, None
            with suppress(sqlite3.Error):
                db.close()

    def _execute(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """One transaction. On damage the file is set aside and the work done once more, on a new one."""
        for again in (True, False):
            try:
                db = self._open()
                db.execute("BEGIN IMMEDIATE")
                done = work(db)
                db.execute("COMMIT")
                return done
            except sqlite3.Error as error:
                self.close()
                if not (again and damaged(error)):
                    raise
                self._set_aside(str(error))
        raise AssertionError

    def check_room(self) -> None:
        """Raises OSError when the disk is so full that what is left belongs to the journal."""
        free = shutil.disk_usage(self.path.parent).free
        if free < self._floor:
            raise OSError(
                f"{free >> 20} MiB free on disk, less than the {self._floor >> 20} MiB that logs leave to the rest"
            )

    def write(self, lines: Sequence[Line]) -> None:
        """Adds lines, in order, in one transaction."""
        self._execute(lambda db: self._insert(db, lines))

    def _insert(self, db: sqlite3.Connection, lines: Sequence[Line]) -> None:
        rows = [_row(line, self._seq + place) for place, line in enumerate(lines, 1)]
        db.execute(INSERT, (orjson.dumps(rows).decode(),))
        db.execute("UPDATE last SET seq = ?", (self._seq + len(lines),))
        self._seq += len(lines)

    def weight(self, run: int) -> tuple[int, int]:
        """Lines and characters the file holds of a run."""
        query = "SELECT count(*), coalesce(sum(length(event) + coalesce(length(fields), 0)), 0) FROM lines "
        query += "WHERE run = ? AND event <> 'log.dropped'"
        return self._execute(lambda db: db.execute(query, (run,)).fetchone())

    def remove(self, before: int, steps: int = 1) -> int:
        """Removes lines of runs with smaller ids, the oldest first, in `steps` transactions; how many it removed."""
        if self._db is None and not self.path.exists():
            return 0
        return sum(
            self._execute(lambda db: db.execute(OLDEST, (before, STEP)).rowcount)
            for _ in range(steps)
        )

    def shrink(self) -> bool:
        """Brings the file under its quota, oldest runs first; False when there is more to do."""
        if self._db is None or self._used() <= self._quota:
            return True
        goal = self._quota * 9 // 10
        for _ in range(10):
            if not self.remove((1 << 63) - 1) or self._used() <= goal:
                self._db.execute("PRAGMA incremental_vacuum(2000)").fetchall()
                return True
        return False

    def _used(self) -> int:
        db = self._open()
        pages, free, size = (
            db.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size


def damaged(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def _row(line: Line, seq: int) -> tuple[Any, ...]:
    event = (
        line.event
        if len(line.event) <= LONGEST
        else f"{line.event[:LONGEST]}… ({len(line.event)} characters)"
    )
    fields = _fitting(line.fields).decode() if line.fields else None
    return (
        line.run,
        seq,
        line.at,
        line.level,
        line.logger,
        event.replace("\0", "\ufffd"),
        fields,
        line.task,
        line.attempt,
    )


def _fitting(fields: bytes) -> bytes:
    """Long texts lose their middle: of a traceback, where it began and what it said count."""
    if len(fields) <= LONGEST:
        return fields
    data = cast(dict[str, Any], orjson.loads(fields))
    for key, value in data.items():
        text = value if isinstance(value, str) else orjson.dumps(value).decode()
        if len(text) > LONGEST // 4:
            data[key] = (
                f"{text[: LONGEST // 16]}… ({len(text)} characters) …{text[-LONGEST // 8 :]}"
            )
    shorter = orjson.dumps(data)
    return shorter if len(shorter) <= LONGEST else orjson.dumps({"cut": len(fields)})


def read_lines(
    path: str | os.PathLike[str], run: int, after: int = 0, limit: int = 1000
) -> list[dict[str, Any]]:
    """What `LogStore.read` gives, from the file alone: for a door without a server. No file, no lines. Blocking."""
    if not Path(path).exists():
        return []
    with closing(
        sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True, timeout=5.0)
    ) as db:
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'lines'").fetchone():
            return []
        rows = db.execute(SELECT, (run, after, limit)).fetchall()
    return [
        {"seq": seq, "at": at, "level": level_word(level), "logger": logger, "event": event,
         "fields": orjson.loads(fields) if fields else {}, "task": task or None, "attempt": attempt or None}
        for seq, at, level, logger, event, fields, task, attempt in rows
    ]  # fmt: skip


def flat(line: dict[str, Any]) -> dict[str, Any]:
    """A line that was read, in the shape it had on the stream; `output.show` makes it pretty."""
    ids = {key: line[key] for key in ("task", "attempt") if line[key]}
    base = {
        "timestamp": timestamp(line["at"]),
        "level": line["level"],
        "event": line["event"],
        "logger": line["logger"],
    }
    return {**base, **ids, **line["fields"]}
