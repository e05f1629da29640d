"""A bucket's listing held against what the ledger has: whatever is new becomes an event, each page in transactions of its own.

    list_objects_v2 (a page) ─► selection.py ─► seen.py (known?) ─► settle, markers ─► Desk.offer with the cursor ─► seen.py

`S3.listen` runs one `Sweep`: every `poll` seconds when it is the only way in, every `reconcile` seconds beside a queue. Late
keys are found because every sweep looks at every key; no time and no key is a watermark. A page that fails is asked for again
where the listing stood. What no page shows in two whole sweeps is gone.
"""

from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

from eventflow.core.clock import to_datetime, to_us
from eventflow.events.event import Event, Gauge, Json
from triggers._s3.clients import Caller
from triggers._s3.intake import Desk, Options
from triggers._s3.known_objects import BEGAN, GONE, OPENED, Mark, Seen, to_cursor
from triggers._s3.notifications import Listed, Notice, digest, listed_identity, to_event, to_listed
from triggers._s3.prefixes import Folders

BATCH = 500
"""Events in one `accept`, so that a flood streams and never fills the commit queue (4,096)."""


class Sweep:
    """The sweeps of one opened bucket."""

    def __init__(
        self,
        client: Any,
        bucket: str,
        options: Options,
        desk: Desk,
        caller: Caller,
        seen: Seen,
        folders: Folders,
    ) -> None:
        self._client, self._bucket, self._options = client, bucket, options
        self._desk, self._caller, self._seen, self._folders = desk, caller, seen, folders
        self._clock, self._selection = options.clock, options.selection
        self._beside_queue = options.queue is not None
        self._unsettled: dict[str, tuple[Listed, float]] = {}
        self._unmarked: dict[str, Listed] = {}
        self._markers: set[str] = set()
        self._absent: set[str] = set()
        self._told = False
        self.took, self.count = 0.0, 0

    async def run(self) -> None:
        """Sweeps until cancelled. A long sweep leaves the store alone for at least as long as it took."""
        every = self._options.every
        assert every is not None
        while not self._caller.stopping:
            began = self._clock.monotonic()
            await self.once()
            self.took = self._clock.monotonic() - began
            pause = max(every - self.took, min(self.took, every))
            await self._caller.rest(min(pause, self._settled_in()) if self._unsettled else pause)

    async def once(self) -> None:
        """One whole sweep."""
        unsighted = set(self._seen)
        self._unmarked, self._markers = {}, set()
        place: dict[str, Any] = {}
        while True:
            self._seen.page_asked()
            page = await self._page(place)
            if page is None:
                return
            found = [to_listed(entry) for entry in page.get("Contents") or ()]
            unsighted.difference_update(each.key for each in found)
            async with self._desk.lock:
                if not await self._take(found, page):
                    return
            if not page.get("IsTruncated") or not found:
                break
            token = page.get("NextContinuationToken")
            place = {"ContinuationToken": token} if token else {"StartAfter": found[-1].key}
        async with self._desk.lock:
            await self._end(unsighted)
        self.count += 1

    async def _page(self, place: Mapping[str, Any]) -> dict[str, Any] | None:
        """Asked for until it comes; beside a queue no error may stop the queue. None: the listener is stopping."""
        prefix = self._selection.listed
        return await self._caller.ask(
            f"listing s3://{self._bucket}/{prefix}",
            lambda: self._client.list_objects_v2(
                Bucket=self._bucket, Prefix=prefix, MaxKeys=self._options.page, **place
            ),
            patient=self._beside_queue,
        )

    # ------------------------------------------------------------------------- one page

    async def _take(self, found: Sequence[Listed], page: Mapping[str, Any]) -> bool:
        """Whether everything new on the page is durable."""
        if self._options.skip_existing and not self._seen.began and self._seen.opened is None:
            await self._note_opening(page)
        now = self._clock.now()
        known: dict[str, Mark | None] = {}
        ready: list[Listed] = []
        for each in self._new(found, known):
            if self._was_there(each):
                known[each.key] = self._seen.listed(each, now=now, owes=False)
            elif self._is_settled(each):
                ready.append(each)
        if self._selection.per_object:
            ready = self._complete(ready)
        if known and not await self._offer([], known):
            return False
        return await self._land(ready, now)

    def _new(self, found: Sequence[Listed], known: dict[str, Mark | None]) -> Iterator[Listed]:
        """What is to be an event. Of known versions, `known` learns the time."""
        selection = self._selection
        for each in found:
            if not selection.wants(each.key):
                if selection.per_object:
                    self._markers.add(each.key)
            elif self._seen.is_new(each, touch=selection.per_folder):
                yield each
            elif self._seen.is_stale(each):
                known[each.key] = self._seen.adopted(each)

    def _was_there(self, found: Listed) -> bool:
        """Whether it is older than the very first start, and such are to be skipped."""
        opened = self._seen.opened
        return (
            not self._seen.began
            and opened is not None
            and found.modified < opened
            and self._options.skip_existing
        )

    def _is_settled(self, found: Listed) -> bool:
        """Whether it was the same for `settle` seconds of looking."""
        if not self._options.settle:
            return True
        now = self._clock.monotonic()
        before, since = self._unsettled.get(found.key, (None, now))
        if before != found:
            before, since = found, now
        if now - since < self._options.settle:
            self._unsettled[found.key] = found, since
            return False
        return True

    def _settled_in(self) -> float:
        now = self._clock.monotonic()
        return max(
            0.05, min(since + self._options.settle - now for _, since in self._unsettled.values())
        )

    def _complete(self, fresh: Sequence[Listed]) -> list[Listed]:
        """Those, of this sweep, whose marker was listed too. Markers may come before or after what they complete."""
        self._unmarked |= {each.key: each for each in fresh}
        ready = [
            each
            for each in self._unmarked.values()
            if self._selection.marker_of(each.key) in self._markers
        ]
        for each in ready:
            del self._unmarked[each.key]
        return ready

    async def _land(self, ready: Sequence[Listed], now: int) -> bool:
        for start in range(0, len(ready), BATCH):
            batch = ready[start : start + BATCH]
            events = [await self._folders.complete(self._to_event(each)) for each in batch]
            marks = {
                each.key: self._seen.listed(each, now=now, owes=self._beside_queue)
                for each in batch
            }
            if not await self._offer(events, marks):
                return False
            for each in batch:
                self._unsettled.pop(each.key, None)
        return True

    def _to_event(self, found: Listed) -> Event:
        notice = Notice(
            action="created", bucket=self._bucket, key=found.key, size=found.size, etag=found.etag or None,
            time=to_datetime(found.modified), reason="Listed",
        )  # fmt: skip
        return to_event(notice, ident=listed_identity(self._bucket, found))

    async def _offer(
        self,
        events: Sequence[Event],
        marks: Mapping[str, Mark | None],
        notes: Mapping[str, Json] | None = None,
    ) -> bool:
        recorded = await self._desk.offer(events, {**to_cursor(marks), **(notes or {})})
        if recorded:
            self._seen.remember(marks)
        return recorded

    # ------------------------------------------------------------------------- the first sweep, and the end of each

    async def _note_opening(self, page: Mapping[str, Any]) -> None:
        """When, by the store's clock, the very first sweep began: durable at once, so that a restart skips no more."""
        told = page.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        try:
            opened = to_us(parsedate_to_datetime(told))
        except (TypeError, ValueError):
            opened = self._clock.now()
        if await self._offer([], {}, {OPENED: opened}):
            self._seen.opened = opened

    async def _end(self, unsighted: set[str]) -> None:
        """What two whole sweeps did not show is gone: one listing may be late, or miss what is there."""
        self._unsettled = {
            key: value for key, value in self._unsettled.items() if key not in unsighted
        }
        gone = [key for key in unsighted & self._absent if self._seen.mark(key) is not None]
        self._absent = unsighted.difference(gone)
        for start in range(0, len(gone), BATCH):
            await self._forget(gone[start : start + BATCH])
        if not self._seen.began:
            notes: dict[str, Json] = {
                BEGAN: to_datetime(self._clock.now()).isoformat(),
                OPENED: None,
            }
            self._seen.began = await self._offer([], {}, notes)
        if not self._told:
            self._told = True
            self._desk.log.info("bucket.swept", bucket=self._bucket, prefix=self._selection.listed, known=len(self._seen),
                                unsettled=len(self._unsettled))  # fmt: skip

    async def _forget(self, gone: Sequence[str]) -> None:
        marks: dict[str, Mark | None] = {}
        events: list[Event] = []
        for key in gone:
            mark = self._seen.mark(key)
            assert mark is not None
            if (mark.etag, mark.size) != GONE:
                removed = self._removed(key, mark)
                if self._options.deleted:
                    events.append(removed)
                owes = self._options.deleted and self._beside_queue
                mark = marks[key] = self._seen.gone(
                    key, removed.id, now=self._clock.now(), owes=owes
                )
            if self._seen.is_done(key, mark, self._clock.now()):
                marks[key] = None
        if marks:
            await self._offer(events, marks)

    def _removed(self, key: str, mark: Mark) -> Event:
        notice = Notice(
            action="removed",
            bucket=self._bucket,
            key=key,
            time=to_datetime(self._clock.now()),
            reason="Listed",
        )
        ident = digest(
            self._bucket, key, "gone", mark.etag, mark.size, mark.modified, mark.sequencer
        )
        return to_event(notice, ident=ident)

    def gauges(self) -> list[Gauge]:
        return [
            Gauge("known_objects", len(self._seen)),
            Gauge("whole_sweeps", self.count),
            Gauge("sweep_seconds", self.took, total="max"),
        ]
