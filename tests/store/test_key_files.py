"""The files of secrets beside a store: made once, private, durable before they are used."""

import stat
from pathlib import Path

import pytest

from eventflow.core.errors import StoreUnwritable
from eventflow.store.key_files import load_or_create_secret
from tests.durable import SyncedFiles


def test_a_new_secret_is_durable_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Content and name have been synced when the secret is returned: a pickle signed with it can be
    read after a power cut. Nobody else may read the file, and no other file is left.
    """
    synced = SyncedFiles(monkeypatch)
    secret = load_or_create_secret(f"{tmp_path}/a.db", "key")
    (path,) = tmp_path.iterdir()
    assert path.name == "a.db.key" and path.read_text() == f"{secret}\n"
    assert synced.missing(tmp_path) == []
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_known_secret_is_kept_and_an_empty_file_is_replaced(tmp_path: Path):
    """The second start reads what the first one wrote; a file that a power cut left empty gets a
    new secret.
    """
    store = f"{tmp_path}/a.db"
    first = load_or_create_secret(store, "token")
    assert load_or_create_secret(store, "token") == first
    (tmp_path / "a.db.token").write_text("")
    second = load_or_create_secret(store, "token")
    assert second not in ("", first) and load_or_create_secret(store, "token") == second


def test_a_secret_that_cannot_be_written_names_its_file(tmp_path: Path):
    """StoreUnwritable says which file, rather than a bare OSError."""
    with pytest.raises(StoreUnwritable, match=r"missing/a\.db\.key"):
        load_or_create_secret(f"{tmp_path}/missing/a.db", "key")
