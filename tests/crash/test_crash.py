"""The kill loop, short enough for every change; and whether the eyes that look after it would see
anything.
"""

import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.conftest import wait_until
from tests.crash.invariants import SenderLog, check
from tests.crash.loop import Loop
from tests.crash.victim import HERE, ROOT, Server

SEED = 20
CYCLES = 25
READY = 15.0
"""Seconds a restart may take here, on a machine that other tests share; docs/reliability.md has
what it takes on its own.
"""


@pytest.mark.timeout(180)
def test_p1_p2_p4_row_1_row_2_kill_9_at_random_moments(tmp_path: Path):
    """A server under load with duplicates, killed at random moments, recoveries and drains
    included: no acknowledged event is lost, each has one run, no recorded task ran again, no
    healthy run was quarantined.
    """
    loop = Loop(tmp_path, SEED, ready_limit=READY)
    wrong = loop.run(CYCLES, check_every=CYCLES)
    print(loop.report(CYCLES))
    assert wrong == [], (
        f"the store is kept in {tmp_path}; again: python -m tests.crash.loop --cycles {CYCLES} "
        f"--seed {SEED}"
    )
    assert (
        loop.check_counts is not None
        and loop.check_counts.repeated > 0
        and loop.world.answer_counts["duplicates"] > 50
    )
    shutil.rmtree(tmp_path)


def test_the_invariants_see_what_is_wrong(tmp_path: Path):
    """A lost event, a wrong result, a body that ran after its value was recorded: each is found and
    named.
    """
    server = Server(HERE / "app.py", tmp_path)
    assert server.wait_ready(), server.log_tail
    sent = {"a": 1, "b": 2}
    acked = {ident: server.send(ident, {"n": n})[1]["id"] for ident, n in sent.items()}
    wait_until(lambda: server.get("/api/counts")["pending"] == 0, "everything is at rest")
    assert server.stop() == 0
    assert check(tmp_path, SenderLog(sent, acked))[0] == []
    assert any(
        "is lost" in found
        for found in check(tmp_path, SenderLog({**sent, "c": 3}, {**acked, "c": "0"}))[0]
    )
    assert any(
        "was acknowledged as 0" in found
        for found in check(tmp_path, SenderLog(sent, acked | {"b": "0"}))[0]
    )
    assert any(
        "of event b: completed" in found
        for found in check(tmp_path, SenderLog(sent | {"b": 3}, acked))[0]
    )
    effects = tmp_path / "effects"
    key, attempt, boot, _ = effects.read_text().splitlines()[0].split()
    with effects.open("a") as file:
        file.write(f"{key} {attempt} {boot} 9999999999999999\n")
    assert any(
        "after it was recorded" in found for found in check(tmp_path, SenderLog(sent, acked))[0]
    )


def test_the_page_names_tests_that_are_there():
    """Every test that docs/reliability.md names exists."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    known = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())} | {
        file.stem for file in files
    }
    named = set(re.findall(r"\btest_\w+\*?", (ROOT / "docs" / "reliability.md").read_text()))
    assert len(named) > 20
    assert [
        name for name in sorted(named) if not any(fnmatchcase(one, name) for one in known)
    ] == []
