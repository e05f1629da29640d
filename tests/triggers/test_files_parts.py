"""The parts of the files trigger that decide without looking: names, the settling machine, what is known."""

import asyncio
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventflow.events.event import Json
from tests.conftest import eventually
from triggers._files.events import SAMPLED, Desk, Fate
from triggers._files.names import IGNORED, Names, from_key, printable, to_key
from triggers._files.notifications import Hints
from triggers._files.settling import WINDOW, Known, Ripe, Settling, Sight, is_owed, mark, same_file
from triggers._files.tree import Tree, Walk

# --------------------------------------------------------------------------- names


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
    """A glob takes what it says and nothing else; anything but `* ? [ ]` stands for itself."""
    names = Names(glob, (), None)
    assert [name for name in taken + left if names.wants(name.encode())] == taken


def test_ignored_by_default():
    """Incomplete files and dotfiles are left alone, and dot directories not entered, by default."""
    names = Names("**/*", IGNORED, None)
    assert not any(
        map(
            names.wants,
            [b".x", b"a.tmp", b"d/a.part", b"a.crdownload", b"~$a.xlsx", b".nfs0001", b"a.swp"],
        )
    )
    assert all(map(names.wants, [b"a", b"a.tmp.csv", b"part", b"d/a~"]))
    assert not names.enters(b".git") and names.enters(b"git")
    assert not names.admits(b".git/a") and not names.admits(b"a.tmp/b") and names.admits(b"git/a")


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


# --------------------------------------------------------------------------- settling

STILL = Sight(10, 1, 7)
OTHER = Sight(11, 2, 7)


def look(settling: Settling, at: float, sight: Sight | None, path: bytes = b"x") -> list[bytes]:
    """One look that takes no time; what is ripe after it."""
    settling.see(path, sight, before=at, after=at, now_us=int(at * 1e6))
    return [each.path for each in settling.ripe([path])]


def settling(known: Known | None = None) -> Settling:
    return Settling(known or Known(), settle=2.0, zero_byte_grace=30.0)


def test_ripe_after_two_looks_settle_apart():
    """A file is ripe when a look at least `settle` after the first one finds it unchanged; never by the passing of time."""
    it = settling()
    assert look(it, 0, STILL) == [] and it.next_due() == 2.0
    assert it.due(1.9) == [] and it.due(2.0) == [b"x"]
    assert it.ripe([b"x"]) == []
    assert look(it, 1.9, STILL) == []
    assert look(it, 2.0, STILL) == [b"x"]


def test_any_change_begins_the_wait_anew():
    """Another size, mtime or inode, or a moment's absence, begins the wait anew."""
    for change in (Sight(11, 1, 7), Sight(10, 2, 7), Sight(10, 1, 8)):
        it = settling()
        look(it, 0, STILL)
        assert (
            look(it, 2, change) == []
            and look(it, 3.9, change) == []
            and look(it, 4, change) == [b"x"]
        )
    it = settling()
    look(it, 0, STILL)
    assert (
        look(it, 1, None) == []
        and len(it) == 0
        and look(it, 2, STILL) == []
        and look(it, 4, STILL) == [b"x"]
    )


def test_slow_looks_shorten_no_wait():
    """The wait counts from the end of the first look to the beginning of the last one."""
    it = settling()
    it.see(b"x", STILL, before=0, after=5, now_us=0)
    it.see(b"x", STILL, before=6, after=9, now_us=0)
    assert it.ripe([b"x"]) == []
    it.see(b"x", STILL, before=7, after=9, now_us=0)
    assert it.ripe([b"x"])


def test_a_known_file_gone_is_ripe_as_gone():
    """A known file missing at two looks `settle` apart is ripe as gone; one that comes back unchanged is nothing."""
    known = Known()
    known.add(b"x", mark(STILL, 1))
    it = settling(known)
    assert look(it, 0, STILL) == [] and len(it) == 0
    look(it, 1, None)
    look(it, 2, STILL)
    assert len(it) == 0
    look(it, 3, None)
    assert look(it, 5, None) == [b"x"] and it.ripe([b"x"])[0].sight is None


def test_known_marks():
    """A mark knows its own version, its own content, and whether a removal is owed, through the cursor and back."""
    known = Known()
    cursor: dict[str, Json] = {
        "/began": "now",
        "d/x": [10, 1, 7, 99, 1],
        "//" + "/w==": [0, 0, 0, None, 0],
    }
    known.load(cursor)
    assert len(known) == 2 and b"d/x" in known and b"\xff" in known and known.owes(b"d/x")
    assert (
        known.unchanged(b"d/x", STILL)
        and not known.unchanged(b"d/x", OTHER)
        and not known.unchanged(b"x", STILL)
    )
    assert known.only_touched(b"d/x", Sight(10, 5, 7), 99)
    for sight, sample in (
        (Sight(10, 5, 7), 98),
        (Sight(10, 5, 8), 99),
        (Sight(11, 5, 7), 99),
        (Sight(10, 5, 7), None),
    ):
        assert not known.only_touched(b"d/x", sight, sample)
    known.forget(b"d/x")
    assert b"d/x" not in known and known.within(b"d") == {}


@given(st.tuples(*[st.integers(0, 1 << 63)] * 3), st.integers(0, 1 << 48), st.booleans())
def test_marks_hold_their_halves(version: tuple[int, int, int], sample: int, owed: bool):
    """Packing a mark into one integer loses neither the version nor the debt."""
    value = mark(Sight(*version), sample, owed)
    assert same_file(value, Sight(*version)) and is_owed(value) is owed


def test_known_is_small():
    """A known file takes at most 200 bytes of memory, name included."""
    tracemalloc.start()
    try:
        known = Known()
        for number in range(100_000):
            known.add(
                b"some/where/data-%08d.csv" % number, mark(Sight(number, number, number), number)
            )
        assert tracemalloc.get_traced_memory()[0] / 100_000 <= 200
    finally:
        tracemalloc.stop()


def test_the_window_is_bounded():
    """There is no room for more than WINDOW pending files, so that a walk over a flood pauses."""
    it = settling()
    for number in range(WINDOW):
        assert it.room == WINDOW - number
        look(it, 0, STILL, b"%d" % number)
    assert it.room == 0


# --------------------------------------------------------------------------- sampling and walking


@pytest.mark.parametrize("size", [0, 1, SAMPLED - 1, SAMPLED, SAMPLED + 1, 10 * SAMPLED])
def test_samples_tell_contents_apart(tmp_path: Path, size: int):
    """Equal contents have equal samples; a change at the beginning or the end changes it, whatever the size."""
    tree = Tree(bytes(tmp_path), Names("**/*", (), None))
    desk = Desk(tree, Known(), None, sha256=False, touch=False)
    content = bytes(range(256)) * (size // 256 + 1)
    for name, data in (
        ("a", content[:size]),
        ("b", content[:size]),
        ("c", b"~" + content[1:size]),
        ("d", content[: size - 1] + b"~"),
    ):
        (tmp_path / name).write_bytes(data if size else b"")
    a, b, c, d = desk.samples([b"a", b"b", b"c", b"d"])
    assert a == b and (size == 0 or len({a, c, d}) == (2 if size == 1 else 3))


def test_a_file_that_moves_under_the_last_look(tmp_path: Path):
    """What is no longer the version that held still is no event: it has changed, and is looked at again."""
    tree = Tree(bytes(tmp_path), Names("**/*", (), None))
    desk = Desk(tree, Known(), None, sha256=True, touch=False)
    (tmp_path / "a").write_text("now longer")
    (still,) = desk.prepare([Ripe(b"a", tree.look(b"a"), 0)], 0)
    changed, gone = desk.prepare([Ripe(b"a", Sight(3, 1, 1), 0), Ripe(b"b", Sight(3, 1, 1), 0)], 0)
    assert (still.fate, changed.fate, gone.fate) == (Fate.CREATED, Fate.CHANGED, Fate.CHANGED)


def test_hints_say_what_they_did_not_watch_before(tmp_path: Path):
    """`cover` names the directories that were not watched until now, so that they are walked once more; again none."""

    async def main() -> None:
        hints = Hints(bytes(tmp_path), lambda: None)
        (tmp_path / "d").mkdir()
        assert await hints.cover({b"": 1}) == [b""]
        assert await hints.cover({b"": 1, b"d": 2}) == [b"d"]
        assert await hints.cover({b"": 1, b"d": 2}) == []
        assert await hints.cover({b"": 1, b"d": 3}) == [b"d"]
        (tmp_path / "d/a").touch()
        await eventually(lambda: bytes(tmp_path / "d/a") in hints.take(), "the file is hinted")
        await hints.close()

    asyncio.run(main())


def test_walk_goes_in_steps(tmp_path: Path):
    """A walk over many files comes in bounded steps, sees each file once, and enters what is added meanwhile."""
    for number in range(5_000):
        (tmp_path / f"{number}").touch()
    (tmp_path / "d/e").mkdir(parents=True)
    walk = Walk(Tree(bytes(tmp_path), Names("**/*", (), None)), Known(), whole=True)
    seen: list[bytes] = []
    steps = 0
    while True:
        step = walk.step()
        steps += 1
        seen += [path for path, _ in step.seen]
        assert len(step.seen) <= 2_000
        if steps == 1:
            (tmp_path / "d/e/late").touch()
            walk.into([b"d"])
        if step.done:
            break
    assert (
        steps == 3
        and len(seen) == len(set(seen)) == 5_001
        and walk.directories.keys() == {b"", b"d", b"d/e"}
    )
