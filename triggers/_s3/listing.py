"""Compares the listing of a bucket with the known objects: new versions become events.

    list_objects_v2 ─► KeyFilter ─► KnownObjects.is_new ─► settle, markers ─► LedgerIntake.accept

`S3.listen` runs one `ListingScan`: every `poll` seconds when there is no queue, every `reconcile`
seconds with one. A scan looks at every key, so late keys are found; no time and no key is a
watermark. A page that fails is requested again. A key that two whole scans do not list counts as
removed; a scan that did not reach the last page (pages.py) says nothing about removals, and another
one starts soon.
"""

from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

from eventflow.core.clock import to_datetime, to_us
from eventflow.core.retry import Backoff
from eventflow.events.event import Event, Gauge, Json
from triggers._s3.clients import ClientError, RetryingCaller, is_bad_request
from triggers._s3.intake import LedgerIntake, S3Options
from triggers._s3.known_objects import (
    FIRST_SCAN_DONE_KEY,
    FIRST_SCAN_STARTED_KEY,
    REMOVED_VERSION,
    KnownObjects,
    ObjectMark,
    to_cursor,
)
from triggers._s3.notifications import (
    ListedObject,
    Notification,
    listed_event_id,
    stable_id,
    to_event,
    to_listed_object,
)
from triggers._s3.pages import ListingPosition, ListingUnfinished
from triggers._s3.prefixes import FolderEvents

LOG_EVENTS = {
    "bucket.scan_unfinished": (
        "A listing ended before its last page; no object counts as removed, and another scan "
        "starts in `retry_in` seconds."
    ),
    "bucket.entries_unreadable": (
        "A listing has `entries` without a key, or with a size that is none; they are no events. "
        "Logged again when other entries are concerned."
    ),
    "bucket.initial_scan_completed": (
        "The first listing of a bucket is complete; `known` counts its objects."
    ),
}

EVENTS_PER_ACCEPT = 500
"""Bounds one transaction, so that a flood streams and never fills the commit queue (4,096 events).
"""

MAX_RESTART_DELAY_SECONDS = 30.0
"""Before another scan, when one did not reach its last page."""


class ListingScan:
    """The scans of one bucket."""

    def __init__(
        self,
        client: Any,
        options: S3Options,
        ledger: LedgerIntake,
        caller: RetryingCaller,
        known: KnownObjects,
        folders: FolderEvents,
    ) -> None:
        self._client: Any = client
        self._options: S3Options = options
        self._ledger: LedgerIntake = ledger
        self._caller: RetryingCaller = caller
        self._known: KnownObjects = known
        self._folders: FolderEvents = folders
        self._unsettled: dict[str, tuple[ListedObject, float]] = {}  # by key; since (monotonic)
        self._unmarked: dict[str, ListedObject] = {}  # by key: of this scan, without a marker yet
        self._markers: set[str] = set()  # keys of this scan
        self._missing_once: set[str] = set()  # known keys that the last scan did not list
        self._first_scan_logged: bool = False
        self._pages_by_key: bool = False  # since the store's tokens did not work
        self._unreadable: Sequence[dict[str, str]] = ()  # entries of the last scan
        self.last_scan_seconds: float = 0.0
        self.completed_scans: int = 0

    @property
    def _has_queue(self) -> bool:
        return self._options.queue is not None

    async def run(self) -> None:
        """Scans until cancelled. The pause after a scan is at least as long as the scan, up to the
        interval.
        """
        interval = self._options.scan_interval
        assert interval is not None
        restart_delays = Backoff(max_delay=MAX_RESTART_DELAY_SECONDS, jitter=0.75)
        while not self._caller.stopping:
            started_at = self._options.clock.monotonic()
            try:
                await self.scan_once()
            except ListingUnfinished as error:
                self._pages_by_key = True
                retry_in = min(next(restart_delays), interval)
                self._ledger.log.warning(
                    "bucket.scan_unfinished",
                    bucket=self._known.bucket,
                    reason=str(error),
                    retry_in=round(retry_in, 2),
                )
                await self._caller.sleep(retry_in)
                continue
            restart_delays.reset()
            self.last_scan_seconds = self._options.clock.monotonic() - started_at
            pause = max(interval - self.last_scan_seconds, min(self.last_scan_seconds, interval))
            await self._caller.sleep(
                min(pause, self._seconds_until_settled()) if self._unsettled else pause
            )

    async def scan_once(self) -> None:
        """One scan of the whole listing. Raises ListingUnfinished."""
        missing = set(self._known)
        self._unmarked = {}
        self._markers = set()
        unreadable: list[dict[str, str]] = []
        position = ListingPosition(by_key=self._pages_by_key)
        while True:
            self._known.start_page()
            page = await self._list_page(position.arguments)
            if page is None:
                return
            entries = page.get("Contents") or ()
            found = [each for each in map(to_listed_object, entries) if each is not None]
            keys = [entry["Key"] for entry in entries if entry["Key"]]
            missing.difference_update(keys)
            if len(found) < len(entries):
                unreadable += [
                    _named(entry) for entry in entries if to_listed_object(entry) is None
                ]
            async with self._ledger.lock:
                if not await self._process_page(found, page):
                    return
            if not position.advance(page, keys):
                break
        async with self._ledger.lock:
            await self._finish_scan(missing)
        self._log_unreadable(unreadable)
        self.completed_scans += 1

    async def _list_page(self, position: Mapping[str, Any]) -> dict[str, Any] | None:
        """One page, retried until it succeeds. None: the listener is stopping.

        With a queue every error is retried, so that a listing that fails does not stop the queue.
        Raises ListingUnfinished when the store refuses its own token.
        """
        prefix = self._options.key_filter.list_prefix

        async def request() -> dict[str, Any]:
            try:
                return await self._client.list_objects_v2(
                    Bucket=self._known.bucket, Prefix=prefix, MaxKeys=self._options.page, **position
                )
            except ClientError as error:
                if "ContinuationToken" in position and is_bad_request(error):
                    raise ListingUnfinished(f"the next page is refused: {error}") from error
                raise

        return await self._caller.call(
            f"listing s3://{self._known.bucket}/{prefix}", request, retry_all=self._has_queue
        )

    # ------------------------------------------------------------------------- one page

    async def _process_page(self, found: Sequence[ListedObject], page: Mapping[str, Any]) -> bool:
        """Records the new objects of a page; False when the listener is stopping."""
        if (
            self._options.skip_existing
            and not self._known.first_scan_done
            and self._known.first_scan_started_at is None
        ):
            await self._record_scan_start(page)
        now = self._options.clock.now()
        marks: dict[str, ObjectMark | None] = {}
        ready: list[ListedObject] = []
        for each in self._new_objects(found, marks):
            if self._is_preexisting(each):
                marks[each.key] = self._known.mark_listed(each, now=now, expect_notification=False)
            elif self._is_settled(each):
                ready.append(each)
        if self._options.key_filter.marker_per_object:
            ready = self._with_marker(ready)
        if marks and not await self._accept([], marks):
            return False
        return await self._record_objects(ready, now)

    def _new_objects(
        self, found: Sequence[ListedObject], marks: dict[str, ObjectMark | None]
    ) -> Iterator[ListedObject]:
        """The objects that are new. `marks` gets the marks of known versions whose time was not
        known.
        """
        selection = self._options.key_filter
        for each in found:
            if not selection.matches(each.key):
                if selection.marker_per_object:
                    self._markers.add(each.key)
            elif self._known.is_new(each, touch=selection.marker_per_folder):
                yield each
            elif self._known.lacks_modified(each):
                marks[each.key] = self._known.with_modified(each)

    def _is_preexisting(self, found: ListedObject) -> bool:
        """Whether `existing="skip"` leaves it out: it is older than the first scan."""
        started_at = self._known.first_scan_started_at
        return (
            not self._known.first_scan_done
            and started_at is not None
            and found.modified < started_at
            and self._options.skip_existing
        )

    def _is_settled(self, found: ListedObject) -> bool:
        """Whether scans have listed the same version for `settle` seconds."""
        if not self._options.settle:
            return True
        now = self._options.clock.monotonic()
        before, since = self._unsettled.get(found.key, (None, now))
        if before != found:
            before = found
            since = now
        if now - since < self._options.settle:
            self._unsettled[found.key] = found, since
            return False
        return True

    def _seconds_until_settled(self) -> float:
        now = self._options.clock.monotonic()
        return max(
            0.05, min(since + self._options.settle - now for _, since in self._unsettled.values())
        )

    def _with_marker(self, fresh: Sequence[ListedObject]) -> list[ListedObject]:
        """The new objects of this scan whose marker is listed too; a marker may be listed before or
        after them.
        """
        self._unmarked |= {each.key: each for each in fresh}
        ready = [
            each
            for each in self._unmarked.values()
            if self._options.key_filter.marker_for(each.key) in self._markers
        ]
        for each in ready:
            del self._unmarked[each.key]
        return ready

    async def _record_objects(self, ready: Sequence[ListedObject], now: int) -> bool:
        for start in range(0, len(ready), EVENTS_PER_ACCEPT):
            batch = ready[start : start + EVENTS_PER_ACCEPT]
            events = [await self._folders.expand(self._to_event(each)) for each in batch]
            marks = {
                each.key: self._known.mark_listed(
                    each, now=now, expect_notification=self._has_queue
                )
                for each in batch
            }
            if not await self._accept(events, marks):
                return False
            for each in batch:
                self._unsettled.pop(each.key, None)
        return True

    def _to_event(self, found: ListedObject) -> Event:
        notification = Notification(
            action="created",
            bucket=self._known.bucket,
            key=found.key,
            size=found.size,
            etag=found.etag or None,
            time=to_datetime(found.modified) if found.modified else None,
            reason="Listed",
        )
        return to_event(notification, ident=listed_event_id(self._known.bucket, found))

    async def _accept(
        self,
        events: Sequence[Event],
        marks: Mapping[str, ObjectMark | None],
        keys: Mapping[str, Json] | None = None,
    ) -> bool:
        recorded = await self._ledger.accept(events, {**to_cursor(marks), **(keys or {})})
        if recorded:
            self._known.update(marks)
        return recorded

    # ------------------------------------------------------------------ start and end of a scan

    async def _record_scan_start(self, page: Mapping[str, Any]) -> None:
        """Records when the first scan began, by the store's clock, so that a restart does not skip
        later objects.
        """
        date = page.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        try:
            started_at = to_us(parsedate_to_datetime(date))
        except (TypeError, ValueError):  # no such header: this machine's clock will do
            started_at = self._options.clock.now()
        if await self._accept([], {}, {FIRST_SCAN_STARTED_KEY: started_at}):
            self._known.first_scan_started_at = started_at

    async def _finish_scan(self, missing: set[str]) -> None:
        """Handles keys that two whole scans did not list: a single listing may be stale or
        incomplete.
        """
        self._unsettled = {
            key: value for key, value in self._unsettled.items() if key not in missing
        }
        gone = [key for key in missing & self._missing_once if self._known.mark(key) is not None]
        self._missing_once = missing.difference(gone)
        for start in range(0, len(gone), EVENTS_PER_ACCEPT):
            await self._record_removed(gone[start : start + EVENTS_PER_ACCEPT])
        if not self._known.first_scan_done:
            notes: dict[str, Json] = {
                FIRST_SCAN_DONE_KEY: to_datetime(self._options.clock.now()).isoformat(),
                FIRST_SCAN_STARTED_KEY: None,
            }
            self._known.first_scan_done = await self._accept([], {}, notes)
        if not self._first_scan_logged:
            self._first_scan_logged = True
            self._ledger.log.info(
                "bucket.initial_scan_completed",
                bucket=self._known.bucket,
                prefix=self._options.key_filter.list_prefix,
                known=len(self._known),
                unsettled=len(self._unsettled),
            )

    def _log_unreadable(self, entries: Sequence[dict[str, str]]) -> None:
        """One line for the entries of a scan, unless the scan before had the same."""
        if entries and entries != self._unreadable:
            self._ledger.log.warning(
                "bucket.entries_unreadable",
                bucket=self._known.bucket,
                entries=len(entries),
                first=entries[0],
            )
        self._unreadable = entries

    async def _record_removed(self, gone: Sequence[str]) -> None:
        marks: dict[str, ObjectMark | None] = {}
        events: list[Event] = []
        for key in gone:
            mark = self._known.mark(key)
            assert mark is not None
            if (mark.etag, mark.size) != REMOVED_VERSION:
                removed = self._removal_event(key, mark)
                if self._options.deleted:
                    events.append(removed)
                expect = self._options.deleted and self._has_queue
                mark = marks[key] = self._known.mark_removed(
                    key, removed.id, now=self._options.clock.now(), expect_notification=expect
                )
            if self._known.can_forget(key, mark, self._options.clock.now()):
                marks[key] = None
        if marks:
            await self._accept(events, marks)

    def _removal_event(self, key: str, mark: ObjectMark) -> Event:
        notification = Notification(
            action="removed",
            bucket=self._known.bucket,
            key=key,
            time=to_datetime(self._options.clock.now()),
            reason="Listed",
        )
        ident = stable_id(
            self._known.bucket, key, "gone", mark.etag, mark.size, mark.modified, mark.sequencer
        )
        return to_event(notification, ident=ident)

    def gauges(self) -> list[Gauge]:
        return [
            Gauge("known_objects", len(self._known)),
            Gauge("completed_scans", self.completed_scans),
            Gauge("scan_seconds", self.last_scan_seconds, total="max"),
        ]


def _named(entry: Mapping[str, Any]) -> dict[str, str]:
    """Key and size of an entry that cannot be read, as text for a log line."""
    size = entry.get("Size", "")
    return {"key": entry["Key"][:200], "size": size[:200] if isinstance(size, str) else "several"}
