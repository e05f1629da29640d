"""Whole folders: the event of a marker such as `_SUCCESS`, with the objects that lie beside and below it.

queue.py and sweep.py pass every event through `Folders.complete` on its way to the ledger; without a folder marker it is
returned as it is. The list is what is there when the event is made: a file that the writer adds later is not in it, and a
marker written again is an event of its own.
"""

from typing import Any

from eventflow.core.errors import SourceError
from eventflow.events.event import Event
from triggers._s3.clients import Caller
from triggers._s3.key_filter import Selection, folder_of
from triggers._s3.notifications import CREATED, Listed, folder_event, to_listed

OBJECTS = 1000
"""Objects that a folder's event lists at most: one page of a listing, some 150 KiB."""


class Folders:
    """The folders of one opened `S3`."""

    def __init__(self, client: Any, selection: Selection, caller: Caller) -> None:
        self._client, self._selection, self._caller = client, selection, caller

    async def complete(self, event: Event) -> Event:
        """A marker's event as its folder's; any other as it is."""
        if not self._selection.per_folder or event.type != CREATED:
            return event
        bucket, folder = event.data["bucket"], folder_of(event.data["key"])
        answer = await self._caller.ask(
            f"listing s3://{bucket}/{folder}",
            lambda: self._client.list_objects_v2(Bucket=bucket, Prefix=folder, MaxKeys=OBJECTS),
        )
        if (
            answer is None
        ):  # the listener is stopping: its marker is told again, and then with its folder
            raise SourceError(f"s3://{bucket}/{folder} could not be listed before the stop")
        page: dict[str, Any] = answer
        there: list[Listed] = [to_listed(each) for each in page.get("Contents") or ()]
        data = [each for each in there if self._selection.holds(each.key)]
        return folder_event(event, folder, data, bool(page.get("IsTruncated")))
