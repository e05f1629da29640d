"""The parts of the files trigger without I/O: names, the settling machine, known files."""

import asyncio
import tracemalloc
import unicodedata
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventflow.events.event import Json
from tests.conftest import eventually
from triggers._files.events import SAMPLE_WHOLE_BYTES, Disposition, FileClassifier
from triggers._files.names import IGNORED, NameFilter, from_key, printable, to_key
from triggers._files.notifications import FsNotifications
from triggers._files.settling import (
    MAX_PENDING_FILES,
    FileStat,
    KnownFiles,
    SettledFile,
    SettlingFiles,
    is_removal_pending,
    is_same_version,
    pack_mark,
)
from triggers._files.tree import Tree, Walk
from triggers._s3.key_filter import KeyFilter

# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "glob,taken,left",
    [
        ("**/*", ["a", "a/b", "a/b/c"], []),
        ("*.csv", ["a.csv", "d/a.csv", "d/e/a.csv", ".csv"], ["a.csv.gz", "a.CSV", "csv"]),
        ("/*.csv", ["a.csv"], ["d/a.csv"]),
        ("in/*.csv", ["in/a.csv"], ["a.csv", "x/in/a.csv", "in/d/a.csv"]),
        ("in/**", ["in/a", "in/d/a"], ["in", "inn/a"]),
        ("**/in/*", ["in/a", "d/in/a", "d/e/in/a"], ["din/a"]),
        ("a?c", ["abc", "a\nc", "aéc"], ["a/c", "ac", "abbc"]),
        ("[a-c]x", ["ax", "cx"], ["dx", "-x"]),
        ("[!a-c]x", ["dx", "-x"], ["ax"]),
        ("a[*]b", ["a*b"], ["axb"]),
        ("a[x", ["a[x"], ["ax"]),
        ("(a|b)+.$^", ["(a|b)+.$^"], ["a", "b"]),
    ],
)
def test_globs(glob: str, taken: list[str], left: list[str]):
    """A glob matches its names and nothing else; characters other than `* ? [ ]` match
    themselves.
    """
    names = NameFilter(glob, (), None)
    assert [name for name in taken + left if names.matches(name.encode())] == taken


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("given", ["NFC", "NFD"])
def test_names_in_either_normal_form(form: Literal["NFC", "NFD"], given: Literal["NFC", "NFD"]):
    """Globs, ignored names and markers select a name in either normal form of Unicode, whichever
    the option is written in.
    """
    name = unicodedata.normalize(form, "été/données-é.csv")

    def option(text: str) -> str:
        return unicodedata.normalize(given, text)

    assert NameFilter(option("été/données-?.csv"), (), None).matches_path(name.encode())
    assert NameFilter(option("*é.csv"), (), None).matches_path(name.encode())
    assert not NameFilter("**/*", (option("données*"),), None).matches_path(name.encode())
    assert not NameFilter("**/*", (option("été"),), None).matches_path(name.encode())
    marked = NameFilter("*.csv", (), option("{stem}.prêt"))
    forms: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
    for marker_form in forms:
        file_name = unicodedata.normalize(marker_form, "données-é.prêt")
        marker = f"{name.rpartition('/')[0]}/{file_name}".encode()
        assert marker in marked.markers(name.encode())
        assert not marked.matches_path(marker)
    assert KeyFilter("in/", option("é.csv"), option("été/*.csv"), None).matches("in/" + name)
    assert ("in/" + name).startswith(KeyFilter("in/", "", option("été/*"), None).list_prefix)


def test_ignored_by_default():
    """Incomplete files and dotfiles are left alone, and dot directories not entered, by default."""
    names = NameFilter("**/*", IGNORED, None)
    assert not any(
        map(
            names.matches,
            [b".x", b"a.tmp", b"d/a.part", b"a.crdownload", b"~$a.xlsx", b".nfs0001", b"a.swp"],
        )
    )
    assert all(map(names.matches, [b"a", b"a.tmp.csv", b"part", b"d/a~"]))
    assert not names.enters(b".git") and names.enters(b"git")
    assert (
        not names.matches_path(b".git/a")
        and not names.matches_path(b"a.tmp/b")
        and names.matches_path(b"git/a")
    )


@given(st.binary(min_size=1).filter(lambda name: b"\0" not in name and not name.startswith(b"/")))
def test_keys_come_back(name: bytes):
    """Any file name survives as a cursor key, and is printable as JSON."""
    assert from_key(to_key(name)) == name
    to_key(name).encode()
    printable(name).encode()


@given(st.binary(), st.binary())
def test_keys_differ(one: bytes, other: bytes):
    """Two names never share a key."""
    assert (
        (to_key(one) == to_key(other)) == (one == other)
        or one.startswith(b"/")
        or other.startswith(b"/")
    )


# ------------------------------------------------------------------ settling

STILL = FileStat(10, 1, 7)
OTHER = FileStat(11, 2, 7)


def stat_at(
    settling: SettlingFiles, at: float, stat: FileStat | None, path: bytes = b"x"
) -> list[bytes]:
    """One stat that takes no time; the settled paths after it."""
    settling.observe(path, stat, before=at, after=at, now_us=int(at * 1e6))
    return [each.path for each in settling.settled([path])]


def settling(known: KnownFiles | None = None) -> SettlingFiles:
    return SettlingFiles(known or KnownFiles(), settle=2.0, zero_byte_grace=30.0)


def test_settled_after_two_stats_settle_apart():
    """A file settles when a stat at least `settle` after the first one is the same; never by time
    alone.
    """
    it = settling()
    assert stat_at(it, 0, STILL) == [] and it.next_due() == 2.0
    assert it.due(1.9) == [] and it.due(2.0) == [b"x"]
    assert it.settled([b"x"]) == []
    assert stat_at(it, 1.9, STILL) == []
    assert stat_at(it, 2.0, STILL) == [b"x"]


def test_any_change_restarts_the_wait():
    """Another size, mtime or inode, or a moment's absence, restarts the wait."""
    for change in (FileStat(11, 1, 7), FileStat(10, 2, 7), FileStat(10, 1, 8)):
        it = settling()
        stat_at(it, 0, STILL)
        assert (
            stat_at(it, 2, change) == []
            and stat_at(it, 3.9, change) == []
            and stat_at(it, 4, change) == [b"x"]
        )
    it = settling()
    stat_at(it, 0, STILL)
    assert (
        stat_at(it, 1, None) == []
        and len(it) == 0
        and stat_at(it, 2, STILL) == []
        and stat_at(it, 4, STILL) == [b"x"]
    )


def test_slow_stats_shorten_no_wait():
    """The wait counts from the end of the first stat to the beginning of the last one."""
    it = settling()
    it.observe(b"x", STILL, before=0, after=5, now_us=0)
    it.observe(b"x", STILL, before=6, after=9, now_us=0)
    assert it.settled([b"x"]) == []
    it.observe(b"x", STILL, before=7, after=9, now_us=0)
    assert it.settled([b"x"])


def test_a_known_file_that_is_missing_settles_as_missing():
    """A known file missing at two stats `settle` apart settles as missing; one that returns
    unchanged does not.
    """
    known = KnownFiles()
    known.add(b"x", pack_mark(STILL, 1))
    it = settling(known)
    assert stat_at(it, 0, STILL) == [] and len(it) == 0
    stat_at(it, 1, None)
    stat_at(it, 2, STILL)
    assert len(it) == 0
    stat_at(it, 3, None)
    assert stat_at(it, 5, None) == [b"x"] and it.settled([b"x"])[0].stat is None


def test_known_marks():
    """A mark knows its own version, its own content, and whether a removal is pending, through the
    cursor and back.
    """
    known = KnownFiles()
    cursor: dict[str, Json] = {
        "/began": "now",
        "d/x": [10, 1, 7, 99, 1],
        "//" + "/w==": [0, 0, 0, None, 0],
    }
    known.load(cursor)
    assert (
        len(known) == 2 and b"d/x" in known and b"\xff" in known and known.removal_pending(b"d/x")
    )
    assert (
        known.is_unchanged(b"d/x", STILL)
        and not known.is_unchanged(b"d/x", OTHER)
        and not known.is_unchanged(b"x", STILL)
    )
    assert known.is_only_touched(b"d/x", FileStat(10, 5, 7), 99)
    for stat, sample in (
        (FileStat(10, 5, 7), 98),
        (FileStat(10, 5, 8), 99),
        (FileStat(11, 5, 7), 99),
        (FileStat(10, 5, 7), None),
    ):
        assert not known.is_only_touched(b"d/x", stat, sample)
    known.forget(b"d/x")
    assert b"d/x" not in known and known.within(b"d") == {}


@given(st.tuples(*[st.integers(0, 1 << 63)] * 3), st.integers(0, 1 << 48), st.booleans())
def test_marks_hold_their_halves(version: tuple[int, int, int], sample: int, removal_pending: bool):
    """Packing a mark into one integer loses neither the version nor the pending removal."""
    value = pack_mark(FileStat(*version), sample, removal_pending)
    assert (
        is_same_version(value, FileStat(*version)) and is_removal_pending(value) is removal_pending
    )


def test_known_is_small():
    """A known file takes at most 200 bytes of memory, name included."""
    tracemalloc.start()
    try:
        known = KnownFiles()
        for number in range(100_000):
            known.add(
                b"some/where/data-%08d.csv" % number,
                pack_mark(FileStat(number, number, number), number),
            )
        assert tracemalloc.get_traced_memory()[0] / 100_000 <= 200
    finally:
        tracemalloc.stop()


def test_the_window_is_bounded():
    """At most MAX_PENDING_FILES files are pending, so that a walk over a flood pauses."""
    it = settling()
    for number in range(MAX_PENDING_FILES):
        assert it.capacity == MAX_PENDING_FILES - number
        stat_at(it, 0, STILL, b"%d" % number)
    assert it.capacity == 0


# ------------------------------------------------------------------ sampling and walking


@pytest.mark.parametrize(
    "size",
    [
        0,
        1,
        SAMPLE_WHOLE_BYTES - 1,
        SAMPLE_WHOLE_BYTES,
        SAMPLE_WHOLE_BYTES + 1,
        10 * SAMPLE_WHOLE_BYTES,
    ],
)
def test_samples_of_different_contents_differ(tmp_path: Path, size: int):
    """Equal contents have equal samples; a change at the beginning or the end changes it, whatever
    the size.
    """
    tree = Tree(bytes(tmp_path), NameFilter("**/*", (), None))
    classifier = FileClassifier(tree, KnownFiles(), None, sha256=False, touch=False)
    content = bytes(range(256)) * (size // 256 + 1)
    for name, data in (
        ("a", content[:size]),
        ("b", content[:size]),
        ("c", b"~" + content[1:size]),
        ("d", content[: size - 1] + b"~"),
    ):
        (tmp_path / name).write_bytes(data if size else b"")
    a, b, c, d = classifier.samples([b"a", b"b", b"c", b"d"])
    assert a == b and (size == 0 or len({a, c, d}) == (2 if size == 1 else 3))


def test_a_file_that_changes_during_the_last_stat(tmp_path: Path):
    """A file that is no longer the settled version is no event: it has changed, and stays
    pending.
    """
    tree = Tree(bytes(tmp_path), NameFilter("**/*", (), None))
    classifier = FileClassifier(tree, KnownFiles(), None, sha256=True, touch=False)
    (tmp_path / "a").write_text("now longer")
    (still,) = classifier.classify([SettledFile(b"a", tree.file_stat(b"a"), 0)], 0)
    changed, gone = classifier.classify(
        [SettledFile(b"a", FileStat(3, 1, 1), 0), SettledFile(b"b", FileStat(3, 1, 1), 0)], 0
    )
    assert (still.disposition, changed.disposition, gone.disposition) == (
        Disposition.CREATED,
        Disposition.CHANGED,
        Disposition.CHANGED,
    )


def test_watch_returns_what_was_not_watched_before(tmp_path: Path):
    """`watch` returns the directories that were not watched before, which need another walk; then
    none.
    """

    async def main() -> None:
        notifications = FsNotifications(bytes(tmp_path), lambda: None)
        (tmp_path / "d").mkdir()
        assert await notifications.watch({b"": 1}) == [b""]
        assert await notifications.watch({b"": 1, b"d": 2}) == [b"d"]
        assert await notifications.watch({b"": 1, b"d": 2}) == []
        assert await notifications.watch({b"": 1, b"d": 3}) == [b"d"]
        (tmp_path / "d/a").touch()
        await eventually(
            lambda: bytes(tmp_path / "d/a") in notifications.drain(), "the change is reported"
        )
        await notifications.close()

    asyncio.run(main())


def test_walk_goes_in_steps(tmp_path: Path):
    """A walk over many files comes in bounded steps, sees each file once, and enters what is added
    meanwhile.
    """
    for number in range(5_000):
        (tmp_path / f"{number}").touch()
    (tmp_path / "d/e").mkdir(parents=True)
    walk = Walk(Tree(bytes(tmp_path), NameFilter("**/*", (), None)), KnownFiles(), whole=True)
    seen: list[bytes] = []
    steps = 0
    while True:
        step = walk.step()
        steps += 1
        seen += [path for path, _ in step.observations]
        assert len(step.observations) <= 2_000
        if steps == 1:
            (tmp_path / "d/e/late").touch()
            walk.add_directories([b"d"])
        if step.done:
            break
    assert (
        steps == 3
        and len(seen) == len(set(seen)) == 5_001
        and walk.directories.keys() == {b"", b"d", b"d/e"}
    )
