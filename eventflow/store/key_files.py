"""Secrets that live in files of their own beside the store: the API's token, the key that signs pickles.

Made at first use from the operating system's randomness, mode 0600, fsynced with their folder. An empty one, as a power cut may
leave it, is made anew. They are never in the store: a copy of the ledger gives nobody access.
"""

import os
import secrets
from pathlib import Path

from eventflow.core.errors import StoreUnwritable


def load_or_create_secret(store_path: str, kind: str) -> str:
    """The 43-letter secret in `STORE.kind` (256 bits, URL-safe), made if there is none."""
    path = Path(f"{store_path}.{kind}")
    try:
        known = path.read_text().strip() if path.exists() else ""
        return known or _make(path)
    except OSError as error:
        raise StoreUnwritable(str(path), error.strerror or str(error)) from error


def _make(path: Path) -> str:
    secret = secrets.token_urlsafe(32)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, f"{secret}\n".encode())
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(fresh, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return secret
