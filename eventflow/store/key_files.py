"""Secrets in files beside the store: the token of the API, the key that signs pickles.

Created at first use from the operating system's random source, mode 0600, fsynced with their
folder. An empty file, as a power cut may leave it, is replaced. Secrets are never in the store, so
a copy of the ledger gives no access.
"""

import os
import secrets
from pathlib import Path

from eventflow.core.errors import StoreUnwritable
from eventflow.store.file_guards import sync_folder


def load_or_create_secret(store_path: str, kind: str) -> str:
    """The secret in the file `STORE.kind`: 43 characters, 256 bits, URL-safe."""
    path = Path(f"{store_path}.{kind}")
    try:
        existing = path.read_text().strip() if path.exists() else ""
        return existing or _create(path)
    except OSError as error:
        raise StoreUnwritable(str(path), error.strerror or str(error)) from error


def _create(path: Path) -> str:
    secret = secrets.token_urlsafe(32)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, f"{secret}\n".encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(temporary, path)
    sync_folder(str(path))
    return secret
