"""Blobs: on disk before a row references them, and verified when they are read."""

import hashlib
import os
import stat

import pytest

from eventflow.core.errors import StoreCorrupt, StoreFailed
from eventflow.serialization.blobs import OFFLOAD_BYTES, Blobs
from tests.durable import SyncedFiles


@pytest.fixture
def blobs(tmp_path):
    return Blobs(tmp_path / "blobs")


def path_of(blobs, ref):
    return blobs._directory / ref[:2] / ref[2:4] / ref


def test_a_blob_comes_back(blobs):
    """`get` returns what was put, under the SHA-256 of its content."""
    ref = blobs.put(b"abc")
    assert ref == hashlib.sha256(b"abc").hexdigest()
    assert blobs.get(ref) == b"abc"


def test_a_blob_is_private_and_whole(blobs):
    """Blobs are readable by their owner only, and no temporary file is left."""
    ref = blobs.put(b"abc")
    path = path_of(blobs, ref)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [ref]


def test_a_blob_is_durable_when_put_returns(tmp_path, monkeypatch):
    """Its content and every name on the way to it have been synced, also in new directories."""
    synced = SyncedFiles(monkeypatch)
    Blobs(tmp_path / "blobs").put(b"abc")
    assert synced.missing(tmp_path / "blobs") == []


def test_the_same_content_is_written_once(blobs):
    """Putting known content again writes nothing."""
    ref = blobs.put(b"abc")
    before = path_of(blobs, ref).stat().st_ino
    assert blobs.put(b"abc") == ref
    assert path_of(blobs, ref).stat().st_ino == before


def test_a_torn_blob_is_written_again(blobs):
    """A file that a power cut left empty is replaced by the next put of its content."""
    ref = blobs.put(b"abc")
    path_of(blobs, ref).write_bytes(b"")
    assert blobs.get(blobs.put(b"abc")) == b"abc"


def test_an_altered_blob_is_refused(blobs):
    """A flipped byte, or a missing file, is StoreCorrupt and never another value."""
    ref = blobs.put(b"abc")
    path_of(blobs, ref).write_bytes(b"abd")
    with pytest.raises(StoreCorrupt, match="does not match its name"):
        blobs.get(ref)
    path_of(blobs, ref).unlink()
    with pytest.raises(StoreCorrupt, match="is missing"):
        blobs.get(ref)


@pytest.mark.parametrize(
    "ref", ["", "../../etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n", "a" * 62 + "/."]
)
def test_a_reference_never_leads_out(blobs, ref):
    """Only 64 lower-case hex digits are a reference (S16)."""
    with pytest.raises(StoreCorrupt, match="expected a blob reference"):
        blobs.get(ref)


def test_only_large_values_are_offloaded(blobs):
    """Up to OFFLOAD_BYTES stay in the row; more become a reference, marked in the codec, and come
    back through `fetch`.
    """
    small, large = b"x" * OFFLOAD_BYTES, b"x" * (OFFLOAD_BYTES + 1)
    assert blobs.offload("json", small) == ("json", small)
    codec, ref = blobs.offload("json", large)
    assert codec == "json@blob"
    assert len(ref) == 64
    assert blobs.fetch(codec, ref) == ("json", large)
    assert blobs.fetch("json", small) == ("json", small)


def test_prune_leaves_what_is_named_or_young(blobs):
    """Prune removes old blobs that no row names, and nothing else; putting content again makes it
    young.
    """
    kept, old, again = blobs.put(b"kept"), blobs.put(b"old"), blobs.put(b"again")
    for ref in (kept, old, again):
        os.utime(path_of(blobs, ref), (1, 1))
    young = blobs.put(b"young")
    blobs.put(b"again")
    assert blobs.prune({kept}, before=2_000_000) == 1
    assert [blobs.get(ref) for ref in (kept, young, again)] == [b"kept", b"young", b"again"]
    assert not path_of(blobs, old).exists()


def test_a_disk_that_refuses_is_a_failed_store(tmp_path):
    """An operating system error while writing is StoreFailed, which says where."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreFailed, match="cannot write the blob"):
        Blobs(tmp_path / "file").put(b"abc")
