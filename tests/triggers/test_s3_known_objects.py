"""What is known of a key after each notice and each look at the listing: pure questions, in every order that may happen."""

from datetime import UTC, datetime

from eventflow.core.clock import to_us
from triggers._s3.known_objects import Mark, Seen, marked_by, owed_to, to_cursor
from triggers._s3.notifications import Listed, Notice

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def notice(etag: str, sequencer: str | None = None, minute: int = 0) -> Notice:
    time = NOON.replace(minute=minute)
    return Notice(
        action="created", bucket="b", key="k", size=4, etag=etag, sequencer=sequencer, time=time
    )


def listed(etag: str, minute: int = 0) -> Listed:
    return Listed("k", 4, etag, to_us(NOON.replace(minute=minute)))


def seen(mark: Mark | None, *, touch: bool = False) -> Seen:
    return Seen("b", to_cursor({"k": mark}) if mark else {}, touch=touch)


def test_an_older_notice_does_not_move_the_mark():
    """By its sequencer, or by the store's clock when a sweep made the mark: an overtaken notice leaves the later version."""
    by_notice = marked_by(None, notice("new", "02"), None)
    assert marked_by(by_notice, notice("old", "01"), None) == by_notice
    by_sweep = seen(None).listed(listed("new", 5), now=to_us(NOON), owes=False)
    assert marked_by(by_sweep, notice("old", "01", 4), None) == by_sweep
    assert marked_by(by_sweep, notice("newer", "03", 6), None).etag == "newer"


def test_a_version_is_owed_its_notice_and_copies_of_it():
    """What a sweep took first is recognised by its notice and every copy; a later notice of equal content is another."""
    mark = seen(None).listed(listed("e"), now=to_us(NOON.replace(minute=1)), owes=True)
    first = owed_to(mark, notice("e", "07"))
    assert first is not None and owed_to(mark, notice("other", "07")) is None
    mark = marked_by(mark, notice("e", "07"), first)
    assert owed_to(mark, notice("e", "07")) is not None and owed_to(mark, notice("e", "08")) is None
    assert mark.sequencer == "07" and mark.etag == "e"


def test_a_notice_of_what_happened_after_the_sweep_is_its_own():
    """Equal content put again long after a sweep looked is not what the sweep took."""
    mark = seen(None).listed(listed("e"), now=to_us(NOON), owes=True)
    assert owed_to(mark, notice("e", "07", minute=0)) is not None
    assert owed_to(mark, notice("e", "07", minute=30)) is None


def test_the_same_content_with_another_time_is_new_only_when_asked():
    """A known version listed with another time is no event; with touch it is, but not the first time a listing shows it."""
    known = seen(None).listed(listed("e"), now=0, owes=False)
    assert not seen(known).is_new(listed("e", 9)) and seen(known, touch=True).is_new(listed("e", 9))
    told = marked_by(None, notice("e", "01"), None)
    assert not seen(told, touch=True).is_new(listed("e", 9)) and seen(told).is_stale(listed("e", 9))
    assert seen(known).is_new(listed("f")) and seen(None).is_new(listed("e"))


def test_without_etag_size_and_time_decide():
    """A store that lists no ETags: another time is another version."""
    known = seen(None).listed(listed(""), now=0, owes=False)
    assert not seen(known).is_new(listed("")) and seen(known).is_new(listed("", 1))


def test_a_removed_key_that_is_listed_again_is_new():
    """After a removal the same content is a new version."""
    mark = marked_by(
        marked_by(None, notice("e", "01"), None),
        Notice(action="removed", bucket="b", key="k", sequencer="02"),
        None,
    )
    assert seen(mark).is_new(listed("e"))


def test_the_cursor_gives_back_what_was_marked():
    """A mark with all it may hold comes back from the cursor's JSON as it was."""
    mark = seen(None).listed(listed("e"), now=1, owes=True)
    assert seen(mark).mark("k") == mark and len(seen(mark)) == 1
