"""The recorded objects of a bucket: the trigger's cursor.

It is read when the trigger starts, and changed only after `accept` has returned.

One mark per key: the version recorded last, by either way, so that the scan of a listing and the
notifications of a queue start one run per version between them. A version that a scan found first
has a *pending* notification for a while: when that notification arrives, it becomes the same event,
and counts as a duplicate. listing.py and queue.py ask; nothing here waits.
"""

from collections.abc import Iterator, Mapping

import msgspec

from eventflow.core.clock import SECOND, to_us
from eventflow.events.event import Json
from triggers._s3.notifications import ListedObject, Notification, is_older, listed_event_id

MAX_PENDING_PER_KEY = 64
"""Versions of a key found by scans first whose notifications are tracked; the oldest are dropped
first.
"""

PENDING_EXPIRY_US = 14 * 24 * 3600 * SECOND
"""A notification is expected for so long: SQS keeps a message for at most 14 days."""

MAX_CLOCK_SKEW_US = 60 * SECOND
"""Between the clocks of the store and of this machine, when a notification is compared with a scan.
"""

REMOVED_VERSION = ("", -1)
"""ETag and size of a key that was removed."""

_OBJECT_KEY_PREFIX = "o:"
"""Cursor keys of objects."""

FIRST_SCAN_DONE_KEY = "began"
"""Cursor key: when the first scan was over."""

FIRST_SCAN_STARTED_KEY = "opened"
"""Cursor key until then: when the first scan began, in microseconds of the store's clock. Older
objects existed before.
"""


class PendingNotification(msgspec.Struct, frozen=True, array_like=True):
    """A version that a scan recorded first. `sequencer`: of its notification, once that has
    arrived. Stored as an array.
    """

    etag: str
    size: int
    event_id: str
    recorded_at: int  # microseconds
    sequencer: str | None = None


class ObjectMark(msgspec.Struct, frozen=True, array_like=True):
    """The last recorded version of a key. Stored as an array. Removed: etag "", size -1."""

    etag: str
    size: int
    modified: int | None = None  # microseconds, as listed; None: not listed yet
    sequencer: str | None = None
    pending: tuple[PendingNotification, ...] = ()


class KnownObjects:
    """The marks of all keys, and the keys with a notification since a page was requested."""

    def __init__(self, bucket: str, cursor: Mapping[str, Json], *, touch: bool) -> None:
        self.bucket: str = bucket
        self._touch: bool = touch
        self.first_scan_done: bool = FIRST_SCAN_DONE_KEY in cursor
        started_at = cursor.get(FIRST_SCAN_STARTED_KEY)
        self.first_scan_started_at: int | None = started_at if isinstance(started_at, int) else None
        self._marks: dict[str, ObjectMark] = {
            key.removeprefix(_OBJECT_KEY_PREFIX): msgspec.convert(value, ObjectMark)
            for key, value in cursor.items()
            if key.startswith(_OBJECT_KEY_PREFIX)
        }
        self._notified: set[str] = set()

    def __len__(self) -> int:
        return len(self._marks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._marks)

    def mark(self, key: str) -> ObjectMark | None:
        return self._marks.get(key)

    def update(self, marks: Mapping[str, ObjectMark | None]) -> None:
        """Takes over marks that `accept` has made durable; None removes one."""
        for key, mark in marks.items():
            if mark is None:
                self._marks.pop(key, None)
            else:
                self._marks[key] = mark

    # ------------------------------------------------------------------------- for a scan

    def start_page(self) -> None:
        """A page is requested: it may be older than the notifications that arrive from now on."""
        self._notified.clear()

    def is_new(self, found: ListedObject, *, touch: bool = False) -> bool:
        """Whether a listed version is not recorded. A key with a notification since `start_page`
        waits for the next scan.
        """
        mark = self._marks.get(found.key)
        if found.key in self._notified:
            return False
        if mark is None or mark.etag != found.etag or mark.size != found.size:
            return True
        return (touch or self._touch or not found.etag) and mark.modified not in (
            None,
            found.modified,
        )

    def lacks_modified(self, found: ListedObject) -> bool:
        """Whether the mark of a known version has no, or another, modification time."""
        mark = self._marks.get(found.key)
        return (
            mark is not None and mark.modified != found.modified and found.key not in self._notified
        )

    def mark_listed(
        self, found: ListedObject, *, now: int, expect_notification: bool
    ) -> ObjectMark:
        """The mark of a version that a scan records now. `expect_notification`: the queue will
        report it too.
        """
        mark = self._marks.get(found.key)
        pending = (
            tuple(each for each in mark.pending if each.recorded_at > now - PENDING_EXPIRY_US)
            if mark
            else ()
        )
        if expect_notification:
            pending = (
                *pending,
                PendingNotification(
                    found.etag, found.size, listed_event_id(self.bucket, found), now
                ),
            )[-MAX_PENDING_PER_KEY:]
        return ObjectMark(found.etag, found.size, found.modified, None, pending)

    def mark_removed(
        self, key: str, event_id: str, *, now: int, expect_notification: bool
    ) -> ObjectMark:
        """The mark of a key whose removal a scan records as event `event_id`."""
        mark = self._marks[key]
        pending = (
            (*mark.pending, PendingNotification(*REMOVED_VERSION, event_id, now))[
                -MAX_PENDING_PER_KEY:
            ]
            if expect_notification
            else mark.pending
        )
        return ObjectMark(*REMOVED_VERSION, None, mark.sequencer, pending)

    def with_modified(self, found: ListedObject) -> ObjectMark:
        """The mark of a known version with its listed modification time."""
        return msgspec.structs.replace(self._marks[found.key], modified=found.modified)

    def can_forget(self, key: str, mark: ObjectMark, now: int) -> bool:
        """Whether a removed key with this mark has no pending notification any more."""
        return key not in self._notified and all(
            each.recorded_at <= now - PENDING_EXPIRY_US for each in mark.pending
        )

    def update_notified(self, marks: Mapping[str, ObjectMark | None]) -> None:
        """Takes over marks from notifications that are durable."""
        self._notified.update(marks)
        self.update(marks)


# --------------------------------------------------------------------------- for a notification


def find_pending(mark: ObjectMark | None, notification: Notification) -> PendingNotification | None:
    """The version or removal that a scan recorded first, if this is its notification or a copy of
    it.
    """
    version = (
        REMOVED_VERSION
        if notification.action == "removed"
        else (notification.etag, notification.size)
    )
    for each in mark.pending if mark else ():
        if (each.etag, each.size) == version and _is_notification_of(each, notification):
            return each
    return None


def mark_notified(
    mark: ObjectMark | None, notification: Notification, pending: PendingNotification | None
) -> ObjectMark:
    """The mark after a notification; `pending` is the result of `find_pending`."""
    if mark is not None and pending is not None:
        arrived = msgspec.structs.replace(pending, sequencer=notification.sequencer)
        all_pending = tuple(arrived if each is pending else each for each in mark.pending)
        is_latest = mark.etag == pending.etag and mark.sequencer is None
        return msgspec.structs.replace(
            mark,
            pending=all_pending,
            sequencer=notification.sequencer if is_latest else mark.sequencer,
        )
    if mark is not None and (
        is_older(notification.sequencer, mark.sequencer) or _happened_before(notification, mark)
    ):
        return mark
    pending_before = mark.pending if mark is not None else ()
    if notification.action == "removed":
        return ObjectMark(*REMOVED_VERSION, None, notification.sequencer, pending_before)
    return ObjectMark(
        notification.etag or "",
        notification.size or 0,
        None,
        notification.sequencer,
        pending_before,
    )


def _is_notification_of(pending: PendingNotification, notification: Notification) -> bool:
    """A notification belongs to a version that was listed after it happened; its copies have the
    same sequencer.
    """
    if pending.sequencer is not None:
        return pending.sequencer == notification.sequencer
    return (
        notification.time is None
        or to_us(notification.time) <= pending.recorded_at + MAX_CLOCK_SKEW_US
    )


def _happened_before(notification: Notification, mark: ObjectMark) -> bool:
    """Whether the marked version, if it has no sequencer, is later by the store's own clock."""
    listed = mark.modified if mark.sequencer is None else None
    return (
        listed is not None and notification.time is not None and to_us(notification.time) < listed
    )


def to_cursor(marks: Mapping[str, ObjectMark | None]) -> dict[str, Json]:
    return {
        _OBJECT_KEY_PREFIX + key: None if mark is None else msgspec.to_builtins(mark)
        for key, mark in marks.items()
    }
