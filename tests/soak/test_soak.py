"""The soak, short enough for every change; and whether its verdicts would see anything grow."""

import os
import shutil
import socket
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest

from tests.soak.__main__ import Soak
from tests.soak.account import Account
from tests.soak.figures import FIGURES, Observed, Sample, changes, descriptors_of, judge

NAMES = [figure.name for figure in FIGURES]


@pytest.mark.timeout(400)
def test_nothing_grows_under_mixed_traffic(tmp_path: Path):
    """Under mixed traffic from every source nothing that the process holds grows, no event is lost,
    and none is handled twice. Pools of threads are full before they are counted.
    """
    soak = Soak(tmp_path, seconds=60)
    soak.run()
    assert soak.wrong == []
    assert soak.growing == [], soak.report()
    found = {each.kind: each.first for each in changes(soak.samples, soak.warm_up, "threads")}
    assert found["eventflow-task"] == 8, soak.report()
    assert found["eventflow-read_N"] == 2, soak.report()
    shutil.rmtree(tmp_path)


@pytest.mark.timeout(300)
def test_each_leak_is_found(tmp_path: Path):
    """A body that leaks what a figure measures makes the verdict on that figure fail, also if only
    every tenth leaks a thread and a socket. The report says which threads and descriptors these
    are.
    """
    every = {"descriptors": "/10", "threads": "/10"}
    soak = Soak(tmp_path, seconds=24, leak=[name + every.get(name, "") for name in NAMES])
    soak.run()
    assert soak.growing == NAMES, soak.report()
    found = {
        name: changes(soak.samples, soak.warm_up, name)[0] for name in ("descriptors", "threads")
    }
    assert found["descriptors"].kind == "socket without an address", soak.report()
    assert found["threads"].kind == "Thread-N (wait)", soak.report()
    shutil.rmtree(tmp_path)


def series(rise_per_second: float = 0.0, *, seconds: int = 300, noise: float = 0.0) -> list[Sample]:
    """A sample per second, in which each figure begins at 100."""
    draw = Random(1)
    return [
        Sample(at, dict.fromkeys(NAMES, 100 + rise_per_second * at + draw.gauss(0, noise)), {})
        for at in range(seconds)
    ]


def flat(samples: list[Sample], name: str) -> bool:
    (found,) = [each for each in judge(samples, warm_up=150) if each.figure.name == name]
    return found.flat


def test_a_verdict_ignores_noise_and_finds_a_slow_leak():
    """Noise and single outliers do not make a figure grow; one descriptor or thread a minute, in
    the noise, does.
    """
    noisy = series(noise=3)
    for at in (160, 200, 299):
        noisy[at] = Sample(at, dict.fromkeys(NAMES, 10_000.0), {})
    assert flat(noisy, "descriptors") and flat(noisy, "threads")
    assert not flat(series(1 / 60, noise=0.5), "descriptors")
    assert not flat(series(1 / 60, noise=0.5), "threads")


def test_a_verdict_ignores_the_warm_up():
    """What a process takes at its start, and a fall, are no growth."""
    settled = [Sample(each.at, dict.fromkeys(NAMES, min(each.at, 140.0)), {}) for each in series()]
    assert all(each.flat for each in judge(settled, warm_up=150))
    assert all(each.flat for each in judge(series(-1.0), warm_up=150))


def test_the_kinds_that_rose_come_first():
    """What a figure counts is listed by kind, at the end and with its change, first what rose most;
    what a single sample has is left out.
    """
    kinds = [{"pipe": 7, "http": 3 + at // 100, "gone": int(at < 200)} for at in range(300)]
    kinds[299] = {**kinds[299], "file": 1}
    samples = [Sample(at, {}, {"descriptors": each}) for at, each in enumerate(kinds)]
    found = [str(each) for each in changes(samples, 150, "descriptors")]
    assert found == ["http 5 (+1)", "pipe 7", "gone 0 (-1)"]
    assert changes(samples, 150, "threads") == []


def test_descriptors_are_named(tmp_path: Path):
    """Each open descriptor counts under the file, the peer or the kind that it refers to, and a
    connection whose peer has closed it under a name of its own.
    """
    (tmp_path / "blobs").mkdir()
    with ExitStack() as stack:
        listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = listening.getsockname()[1]
        server = Observed(os.getpid(), tmp_path / "db", tmp_path / "stats", {port: "test"})
        before = descriptors_of(server)
        for name in ("db", "blobs/1", "blobs/2"):
            stack.enter_context((tmp_path / name).open("w"))
        first = socket.create_connection(("127.0.0.1", port))
        stack.enter_context(listening.accept()[0])
        stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        stack.enter_context(listening.accept()[0])
        stack.enter_context(socket.socket())
        for end in socket.socketpair():
            stack.enter_context(end)
        for end in os.pipe():
            stack.callback(os.close, end)
        first.close()
        assert before["listening socket of test"] == 1
        assert descriptors_of(server) - before == {
            "db": 1,
            "blobs/": 2,
            "connection closed by the peer of test": 1,
            "connection of test": 1,
            "connection to test": 1,
            "socket without an address": 1,
            "unix socket": 2,
            "pipe": 2,
        }


def test_a_verdict_needs_samples():
    """A soak that is too short to be judged says so, and passes nothing."""
    with pytest.raises(ValueError, match=r"expected 10 samples after 150 s, found 5"):
        judge(series(seconds=155), warm_up=150)


def test_the_account_finds_what_is_lost_or_doubled(tmp_path: Path):
    """A note that is missing, written twice, or of something that nobody sent is a finding, and so
    is a hole in a schedule.
    """
    account = Account()
    account.cancelled = 1
    for ident in ("a", "b", "c"):
        account.expect(ident, "order")
    own = "at 1\npools filled\nlate l\ndrift d\nevery 1\nevery 2\ncron 2\ncron 4\n"
    effects = tmp_path / "effects"
    effects.write_text(f"order a\norder b\norder c\n{own}")
    assert account.compare(effects) == []
    account.expect("d", "order", "fail")
    effects.write_text(f"order a\norder b\norder b\norder d\nfail d\nclick e\n{own}{own}every 4\n")
    assert account.compare(effects) == [
        "order b: 2 times, expected 1",
        "order c: 0 times, expected 1",
        "nobody sent click e",
        *(f"{each}: 2 times, expected 1" for each in own.splitlines()),
        "0 notes of failed, expected 1",
        "schedule every: from 2 to 4, expected 1 s",
    ]
