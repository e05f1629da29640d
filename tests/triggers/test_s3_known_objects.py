"""The mark of a key after each notification and each listing, in every possible order."""

from datetime import UTC, datetime

from eventflow.core.clock import to_us
from triggers._s3.known_objects import (
    KnownObjects,
    ObjectMark,
    find_pending,
    mark_notified,
    to_cursor,
)
from triggers._s3.notifications import ListedObject, Notification

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def notification(etag: str, sequencer: str | None = None, minute: int = 0) -> Notification:
    time = NOON.replace(minute=minute)
    return Notification(
        action="created", bucket="b", key="k", size=4, etag=etag, sequencer=sequencer, time=time
    )


def listed(etag: str, minute: int = 0) -> ListedObject:
    return ListedObject("k", 4, etag, to_us(NOON.replace(minute=minute)))


def seen(mark: ObjectMark | None, *, touch: bool = False) -> KnownObjects:
    return KnownObjects("b", to_cursor({"k": mark}) if mark else {}, touch=touch)


def test_an_older_notification_does_not_move_the_mark():
    """By its sequencer, or by the store's clock when a scan made the mark: a superseded
    notification keeps the later version.
    """
    by_notification = mark_notified(None, notification("new", "02"), None)
    assert mark_notified(by_notification, notification("old", "01"), None) == by_notification
    by_scan = seen(None).mark_listed(listed("new", 5), now=to_us(NOON), expect_notification=False)
    assert mark_notified(by_scan, notification("old", "01", 4), None) == by_scan
    assert mark_notified(by_scan, notification("newer", "03", 6), None).etag == "newer"


def test_a_listed_version_matches_its_notification_and_copies_of_it():
    """A version that a scan found first is matched by its notification and every copy; a later one
    of equal content is not.
    """
    mark = seen(None).mark_listed(
        listed("e"), now=to_us(NOON.replace(minute=1)), expect_notification=True
    )
    first = find_pending(mark, notification("e", "07"))
    assert first is not None and find_pending(mark, notification("other", "07")) is None
    mark = mark_notified(mark, notification("e", "07"), first)
    assert (
        find_pending(mark, notification("e", "07")) is not None
        and find_pending(mark, notification("e", "08")) is None
    )
    assert mark.sequencer == "07" and mark.etag == "e"


def test_a_notification_of_what_happened_after_the_scan_is_its_own():
    """Equal content put again long after a scan is another version."""
    mark = seen(None).mark_listed(listed("e"), now=to_us(NOON), expect_notification=True)
    assert find_pending(mark, notification("e", "07", minute=0)) is not None
    assert find_pending(mark, notification("e", "07", minute=30)) is None


def test_the_same_content_with_another_time_is_new_only_when_asked():
    """A known version listed with another time is no event; with touch it is, but not the first
    time a listing shows it.
    """
    known = seen(None).mark_listed(listed("e"), now=0, expect_notification=False)
    assert not seen(known).is_new(listed("e", 9)) and seen(known, touch=True).is_new(listed("e", 9))
    notified = mark_notified(None, notification("e", "01"), None)
    assert not seen(notified, touch=True).is_new(listed("e", 9)) and seen(notified).lacks_modified(
        listed("e", 9)
    )
    assert seen(known).is_new(listed("f")) and seen(None).is_new(listed("e"))


def test_without_etag_size_and_time_decide():
    """A store that lists no ETags: another time is another version."""
    known = seen(None).mark_listed(listed(""), now=0, expect_notification=False)
    assert not seen(known).is_new(listed("")) and seen(known).is_new(listed("", 1))


def test_a_removed_key_that_is_listed_again_is_new():
    """After a removal the same content is a new version."""
    mark = mark_notified(
        mark_notified(None, notification("e", "01"), None),
        Notification(action="removed", bucket="b", key="k", sequencer="02"),
        None,
    )
    assert seen(mark).is_new(listed("e"))


def test_the_cursor_gives_back_what_was_marked():
    """A mark with all it may hold comes back from the cursor's JSON as it was."""
    mark = seen(None).mark_listed(listed("e"), now=1, expect_notification=True)
    assert seen(mark).mark("k") == mark and len(seen(mark)) == 1
