"""What of a bucket is in the ledger already: the trigger's cursor, read at open and changed only after `accept` returned.

One entry per key: the version last recorded, whichever way it came, so that the sweep of a listing and the notices of a queue
start one run per version between them. A version that a sweep found first is *owed* its notice for a while: when the notice
comes, it is taken for the same event and counts as a duplicate. sweep.py and queue.py ask; nothing here waits.
"""

from collections.abc import Iterator, Mapping

import msgspec

from eventflow.core.clock import SECOND, to_us
from eventflow.events.event import Json
from triggers._s3.notifications import Listed, Notice, is_older, listed_identity

OWED = 64
"""Versions of one key, found by sweeps first, whose notices are known or awaited; the oldest are let go first."""

OWED_FOR = 14 * 24 * 3600 * SECOND
"""Microseconds a notice is awaited: the longest that a queue keeps a message."""

SKEW = 60 * SECOND
"""Microseconds that the clocks of the store and of this machine may differ when a notice is held against a sweep."""

GONE = ("", -1)
"""ETag and size of a key that was removed."""

_OBJECT = "o:"
BEGAN = "began"
"""The cursor's note that the first sweep is over."""
OPENED = "opened"
"""Until then: when it first began, in microseconds of the store's clock; what is older was there already."""


class Owed(msgspec.Struct, frozen=True, array_like=True):
    """What a sweep recorded as event `ident` at `at`, and, once its notice came, that notice's sequencer."""

    etag: str
    size: int
    ident: str
    at: int
    sequencer: str | None = None


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """The last recorded version of a key. `modified` is as listed, None until one showed it. Removed: etag "", size -1."""

    etag: str
    size: int
    modified: int | None = None
    sequencer: str | None = None
    owed: tuple[Owed, ...] = ()


class Seen:
    """The marks of all keys, and which keys notices changed since a page was asked for."""

    def __init__(self, bucket: str, cursor: Mapping[str, Json], *, touch: bool) -> None:
        self.bucket, self._touch = bucket, touch
        self.began = BEGAN in cursor
        opened = cursor.get(OPENED)
        self.opened = opened if isinstance(opened, int) else None
        self._marks = {
            key.removeprefix(_OBJECT): msgspec.convert(value, Mark)
            for key, value in cursor.items()
            if key.startswith(_OBJECT)
        }
        self._changed: set[str] = set()

    def __len__(self) -> int:
        return len(self._marks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._marks)

    def mark(self, key: str) -> Mark | None:
        return self._marks.get(key)

    def remember(self, marks: Mapping[str, Mark | None]) -> None:
        """Takes over what `accept` made durable."""
        for key, mark in marks.items():
            if mark is None:
                self._marks.pop(key, None)
            else:
                self._marks[key] = mark

    # ------------------------------------------------------------------------- what a sweep asks

    def page_asked(self) -> None:
        """From here on a notice is news to the page that is on its way."""
        self._changed.clear()

    def is_new(self, found: Listed, *, touch: bool = False) -> bool:
        """Whether a listed version is to be an event. One that a notice overtook is left to the next sweep."""
        mark = self._marks.get(found.key)
        if found.key in self._changed:
            return False
        if mark is None or mark.etag != found.etag or mark.size != found.size:
            return True
        return (touch or self._touch or not found.etag) and mark.modified not in (
            None,
            found.modified,
        )

    def is_stale(self, found: Listed) -> bool:
        """Whether the mark of a known version is to learn when it was modified."""
        mark = self._marks.get(found.key)
        return (
            mark is not None and mark.modified != found.modified and found.key not in self._changed
        )

    def listed(self, found: Listed, *, now: int, owes: bool) -> Mark:
        """The mark of a version that the sweep records now. `owes`: a queue will tell of it too."""
        mark = self._marks.get(found.key)
        owed = tuple(each for each in mark.owed if each.at > now - OWED_FOR) if mark else ()
        if owes:
            owed = (*owed, Owed(found.etag, found.size, listed_identity(self.bucket, found), now))[
                -OWED:
            ]
        return Mark(found.etag, found.size, found.modified, None, owed)

    def gone(self, key: str, ident: str, *, now: int, owes: bool) -> Mark:
        """The mark of a key that the sweep finds removed, as event `ident`."""
        mark = self._marks[key]
        owed = (*mark.owed, Owed(*GONE, ident, now))[-OWED:] if owes else mark.owed
        return Mark(*GONE, None, mark.sequencer, owed)

    def adopted(self, found: Listed) -> Mark:
        """The mark of a known version, now that a listing showed its time."""
        return msgspec.structs.replace(self._marks[found.key], modified=found.modified)

    def is_done(self, key: str, mark: Mark, now: int) -> bool:
        """Whether nothing more is awaited of a key that is gone, now that `mark` is what is known of it."""
        return key not in self._changed and all(each.at <= now - OWED_FOR for each in mark.owed)

    def note(self, marks: Mapping[str, Mark | None]) -> None:
        """Notices changed these keys, and it is durable."""
        self._changed.update(marks)
        self.remember(marks)


# --------------------------------------------------------------------------- what a notice asks


def owed_to(mark: Mark | None, notice: Notice) -> Owed | None:
    """What a sweep recorded before its notice, a version or a removal, when this is that notice or a copy of it."""
    told = GONE if notice.action == "removed" else (notice.etag, notice.size)
    for each in mark.owed if mark else ():
        if (each.etag, each.size) == told and _is_its_notice(each, notice):
            return each
    return None


def marked_by(mark: Mark | None, notice: Notice, owed: Owed | None) -> Mark:
    """The mark after a notice; `owed` is what `owed_to` found."""
    if mark is not None and owed is not None:
        told = msgspec.structs.replace(owed, sequencer=notice.sequencer)
        left = tuple(told if each is owed else each for each in mark.owed)
        latest = mark.etag == owed.etag and mark.sequencer is None
        return msgspec.structs.replace(
            mark, owed=left, sequencer=notice.sequencer if latest else mark.sequencer
        )
    if mark is not None and (
        is_older(notice.sequencer, mark.sequencer) or _was_before(notice, mark)
    ):
        return mark
    kept = mark.owed if mark is not None else ()
    if notice.action == "removed":
        return Mark(*GONE, None, notice.sequencer, kept)
    return Mark(notice.etag or "", notice.size or 0, None, notice.sequencer, kept)


def _is_its_notice(owed: Owed, notice: Notice) -> bool:
    """A notice belongs to a version that was seen after it happened; a copy of it has the same sequencer."""
    if owed.sequencer is not None:
        return owed.sequencer == notice.sequencer
    return notice.time is None or to_us(notice.time) <= owed.at + SKEW


def _was_before(notice: Notice, mark: Mark) -> bool:
    """Whether a listed version, whose sequencer is unknown, is younger by the store's own clock."""
    listed = mark.modified if mark.sequencer is None else None
    return listed is not None and notice.time is not None and to_us(notice.time) < listed


def to_cursor(marks: Mapping[str, Mark | None]) -> dict[str, Json]:
    return {
        _OBJECT + key: None if mark is None else msgspec.to_builtins(mark)
        for key, mark in marks.items()
    }
