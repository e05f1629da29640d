"""Folder events: the event of a marker such as `_SUCCESS`, with the objects of its folder.

listing.py and queue.py pass every event through `FolderEvents.expand`; without a folder marker it
is returned unchanged. The list shows the objects at the time of the event: a file that the writer
adds later is not in it, and a marker written again is another event.
"""

from collections.abc import Mapping
from typing import Any

from eventflow.core.errors import SourceError
from eventflow.events.event import Event
from triggers._s3.clients import RetryingCaller
from triggers._s3.key_filter import KeyFilter, folder_of
from triggers._s3.notifications import CREATED, ListedObject, folder_event, to_listed_object
from triggers._s3.pages import ListingPosition, ListingUnfinished

MAX_FOLDER_OBJECTS = 1000
"""In a folder's event: about 150 KiB."""


class FolderEvents:
    """Lists the folders of one opened `S3`."""

    def __init__(self, client: Any, key_filter: KeyFilter, caller: RetryingCaller) -> None:
        self._client: Any = client
        self._key_filter: KeyFilter = key_filter
        self._caller: RetryingCaller = caller

    async def expand(self, event: Event) -> Event:
        """The folder's event for a marker's; any other event unchanged. SourceError when the
        listener is stopping.
        """
        if not self._key_filter.marker_per_folder or event.type != CREATED:
            return event
        bucket = event.data["bucket"]
        folder = folder_of(event.data["key"])
        objects, truncated = await self._list(bucket, folder)
        data = [each for each in objects if self._key_filter.is_data(each.key)]
        return folder_event(event, folder, data, truncated)

    async def _list(self, bucket: str, folder: str) -> tuple[list[ListedObject], bool]:
        """The first objects of a folder, and whether there may be more, also in entries that cannot
        be read.
        """
        objects: list[ListedObject] = []
        position = ListingPosition()
        all_read = True
        while len(objects) < MAX_FOLDER_OBJECTS:
            page = await self._list_page(bucket, folder, position.arguments)
            entries = page.get("Contents") or ()
            found = [each for each in map(to_listed_object, entries) if each is not None]
            objects += found
            all_read &= len(found) == len(entries)
            try:
                if not position.advance(page, [entry["Key"] for entry in entries if entry["Key"]]):
                    return objects, not all_read
            except ListingUnfinished:  # the event says that there may be more
                break
        return objects[:MAX_FOLDER_OBJECTS], True

    async def _list_page(
        self, bucket: str, folder: str, position: Mapping[str, str]
    ) -> dict[str, Any]:
        answer: dict[str, Any] | None = await self._caller.call(
            f"listing s3://{bucket}/{folder}",
            lambda: self._client.list_objects_v2(
                Bucket=bucket, Prefix=folder, MaxKeys=MAX_FOLDER_OBJECTS, **position
            ),
        )
        if answer is None:  # stopping: the marker's notification is delivered again
            raise SourceError(f"s3://{bucket}/{folder} could not be listed before the stop")
        return answer
