"""Equal values have equal bytes in every process, whatever its hash seed (PYTHONHASHSEED)."""

import itertools
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import orjson
import pytest

from eventflow import App
from eventflow.core.hashing import digest_text
from eventflow.serialization.codecs import (
    fingerprint,
    fingerprint_diff,
    is_recorded_unsorted,
    mark_sets,
)
from eventflow.store.rows import event_crc
from eventflow.testing import MemoryTrigger, running
from tests.serialization import identities

ROOT = Path(__file__).parents[2]


def in_process(hash_seed: int, *args: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "tests.serialization.identities", *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def processes() -> list[Any]:
    return [in_process(seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize("name", identities.values())
def test_p5_equal_values_have_equal_bytes_in_every_process(processes: list[Any], name: str):
    """Arguments, parameters of child flows, names of asyncio tasks, digests of events and ordering
    keys of one value are the same in three processes with three hash seeds.
    """
    first, *others = (found[name] for found in processes)
    for other in others:
        assert other == first
    assert first["arguments"] is not None


MODEL = identities.Model(
    tags={"a", "b", "c"},
    inner=[identities.Inner(names=frozenset("de"))],
    **cast(Any, {"other-name": {"x"}}),
)


def earlier_prints() -> list[bytes]:
    """The fingerprints that version 0.1.0 made of `f(MODEL, [2, 1])` in processes of different hash
    seeds: as they are here, with the sets in any order.
    """
    found: list[bytes] = []
    for tags in itertools.permutations("abc"):
        for names in itertools.permutations("de"):
            form = {
                "tags": tags,
                "inner": [{"names": names}],
                "by_name": {},
                "other-name": ["x"],
                "upper": [tag.upper() for tag in tags],
            }
            found.append(orjson.dumps({"model": form, "n": [2, 1]}, option=orjson.OPT_SORT_KEYS))
    return found


def test_a_fingerprint_of_an_earlier_version_matches_in_any_order_of_its_sets():
    """A fingerprint that was recorded with unsorted sets is one of the same arguments; another
    member, or another order of a list, is not.
    """
    bound = {"model": MODEL, "n": [2, 1]}
    mine = fingerprint((), (), bound, {})
    for recorded in earlier_prints():
        assert is_recorded_unsorted(recorded, mark_sets(bound))
        assert not is_recorded_unsorted(recorded.replace(b'"e"', b'"f"'), mark_sets(bound))
        assert not is_recorded_unsorted(recorded.replace(b"[2,1]", b"[1,2]"), mark_sets(bound))
    assert mine is not None and mine in earlier_prints()


def test_a_hash_of_an_earlier_version_is_compared_where_it_can_be():
    """A long argument that was hashed before sets were sorted passes if it has a set in a record,
    and is compared if it has none.
    """
    old_hash = b'"#%s"' % (b"0" * 32)
    long = identities.values()["long"]
    for value, passes in (
        (long, True),
        (["x" * 2000], False),
        ({"a", *map(str, range(500))}, False),
    ):
        mine = fingerprint(("x",), (value,), {}, {})
        recorded = b'{"x":%s}' % old_hash
        assert fingerprint_diff(recorded, mine)
        assert is_recorded_unsorted(recorded, mark_sets({"x": value})) is passes
        same = (mine or b"").replace(b"##", b"#")
        assert same != mine and not fingerprint_diff(same, mine)
        new = recorded.replace(b"#", b"##")
        assert not is_recorded_unsorted(new, mark_sets({"x": value}))


@pytest.mark.parametrize("name", identities.RESULTS)
def test_p4_a_result_is_read_in_a_process_with_another_hash_seed(tmp_path: Path, name: str):
    """What one process stored by each codec, another one reads as a deeply equal value."""
    records = tmp_path / "records.json"
    records.write_text(json.dumps(in_process(1, "encode", name)))
    assert in_process(2, "decode", name, str(records)) == {"equal": True}


@pytest.mark.anyio
async def test_p2_an_event_that_an_earlier_version_recorded_is_known_again(tmp_path: Path):
    """The digest of an earlier version, made of the keys in their written order, is that of the
    same event; other data is a conflict.
    """
    orders = MemoryTrigger("orders")
    app = App("shop")
    app.on(orders, identities.takes_anything)
    data = {"b": 1, "a": {"d": 2, "c": 3}}
    path = tmp_path / "x.db"
    async with running(app, store=path):
        await orders.send(type="t", id="e", data=data)
    earlier = digest_text(("t",), orjson.dumps(data), size=8)
    with sqlite3.connect(path) as store:
        key, trigger, event_id, verdicts, headers, body, number = store.execute(
            "SELECT key, trigger, event_id, verdicts, headers, body, id FROM events"
            " WHERE event_id = 'e'"
        ).fetchone()
        crc = event_crc(number, key, earlier, trigger, event_id, verdicts, headers, body)
        changed = "UPDATE events SET digest = ?, crc = ? WHERE event_id = 'e'"
        assert store.execute(changed, (earlier, crc)).rowcount == 1
    store.close()
    async with running(app, store=path):
        (receipt,) = await orders.send(type="t", id="e", data=data)
        assert receipt.duplicate
        (receipt,) = await orders.send(type="t", id="e", data=data | {"b": 2})
        assert receipt.conflict


@pytest.mark.anyio
async def test_an_idempotency_key_knows_equal_parameters(tmp_path: Path):
    """Parameters with keys in another order, and equal sets in models, are the same parameters."""
    app = App("shop")
    app.add(identities.takes_model)
    model = identities.Model(tags={"x", "y", "z"}, **cast(Any, {"other-name": set()}))
    async with running(app, store=tmp_path / "x.db"):
        first = await app.start(
            identities.takes_model, idempotency_key="k", value=model, more={"a": 1, "b": 2}
        )
        again = await app.start(
            identities.takes_model, idempotency_key="k", more={"b": 2, "a": 1}, value=model
        )
        assert again.duplicate and again.id == first.id
