"""The secrets that this process knows, and their removal from what eventflow itself composes.

A secret is recognised by its value in every common encoding (escaped, base64, URL-encoded,
hexadecimal). Whoever keeps a text that may quote one (a recorded error with its traceback, a
reason, a dead letter) passes it through `KNOWN_SECRETS` before it is stored; log lines pass through
logs/redaction.py, which also recognises unknown secrets. Data of users (event bodies, arguments,
results, checkpoints) is stored as it is.
"""

import base64
import json
import re
import threading
from collections.abc import Iterable
from typing import Any, Final, cast
from urllib.parse import quote, quote_plus

from eventflow.core.forks import call_in_forked_children

MASK: Final = "***"

MIN_SECRET_LENGTH: Final = 6
"""Shorter values, the empty string above all, would remove ordinary text."""


class KnownSecrets:
    """A registry of secret values. Thread-safe."""

    def __init__(self) -> None:
        self.forms: frozenset[str] = frozenset()  # of all values, in all encodings
        self.pattern: re.Pattern[str] | None = None  # any of the forms; None without any
        self._longest_form = 0
        self._lock = threading.Lock()
        call_in_forked_children(self._after_fork)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()

    def register(self, secret: str | bytes) -> bool:
        """Hide this value from now on. False, and nothing is hidden, if it is shorter than
        MIN_SECRET_LENGTH.
        """
        if len(secret.strip()) < MIN_SECRET_LENGTH:
            return False
        forms = {form for form in encodings_of(secret) if len(form) >= MIN_SECRET_LENGTH}
        with self._lock:
            if forms - self.forms:
                self.forms |= forms
                self._longest_form = max(map(len, self.forms))
                self.pattern = re.compile(_alternation(self.forms))
        return True

    def remove_from(self, text: str) -> str:
        """`text` with each registered value masked."""
        return text if self.pattern is None else self.pattern.sub(MASK, text)

    def excerpt(self, text: str, length: int) -> str:
        """About the first `length` characters, masked as by `remove_from`; the rest is not read. A
        text that was cut ends with its whole length.
        """
        if len(text) <= length:
            return self.remove_from(text)
        # A value that the cut divides is not recognised: what may be its beginning is dropped.
        over = self._longest_form
        masked = self.remove_from(text[: length + over])
        return f"{masked[: max(0, len(masked) - over)]}… ({len(text)} characters)"

    def remove_from_data(self, data: Any) -> Any:
        """A copy of JSON data whose texts, and integers, are masked. Keys stay."""
        if self.pattern is None:
            return data
        match data:
            case str():
                return self.remove_from(data)
            case dict():
                fields = cast(dict[str, Any], data)
                return {name: self.remove_from_data(item) for name, item in fields.items()}
            case list():
                return [self.remove_from_data(item) for item in cast(list[Any], data)]
            case int() if str(data) in self.forms:
                return MASK
            case _:
                return data


def _alternation(forms: Iterable[str], depth: int = 8) -> str:
    """A pattern for any of these texts, longest first. Common prefixes form a tree: with 50 secrets
    a search takes 14 µs, with plain alternatives 90 µs.
    """
    if depth == 0:
        return (
            "(?:"
            + "|".join(
                re.escape(form) for form in sorted(forms, key=lambda form: (-len(form), form))
            )
            + ")"
        )
    branches: dict[str, list[str]] = {}
    for form in forms:
        branches.setdefault(form[:1], []).append(form[1:])
    done = branches.pop("", None)
    alternatives = [
        re.escape(first) + _alternation(rest, depth - 1) for first, rest in sorted(branches.items())
    ]
    if not alternatives:
        return ""
    return f"(?:{'|'.join(alternatives)})" + ("?" if done else "")


def encodings_of(secret: str | bytes) -> Iterable[str]:
    """The forms of a value in texts: unchanged, escaped, URL-encoded, hexadecimal, in base64 (also
    within a longer value); and each line of a value of several lines.
    """
    raw = secret.encode("utf-8", "surrogatepass") if isinstance(secret, str) else secret
    text = raw.decode("utf-8", "backslashreplace")
    for plain in {
        text,
        text.strip(),
        *(line.strip() for line in text.splitlines() if not line.startswith("-----")),
    }:
        yield from (
            plain,
            json.dumps(plain)[1:-1],
            json.dumps(plain, ensure_ascii=False)[1:-1],
            repr(plain)[1:-1],
        )
        for encoded in (quote(plain, safe=""), quote(plain), quote_plus(plain)):
            yield from (encoded, re.sub("%..", lambda found: found[0].lower(), encoded))
    yield repr(raw)[2:-1]
    yield from (raw.hex(), raw.hex().upper())
    for whole in {raw, raw.strip()}:
        for standard in base64_forms(whole):
            yield from (standard, standard.replace("+", "-").replace("/", "_"))


def base64_forms(raw: bytes) -> Iterable[str]:
    """`raw` in base64, and the part that is the same at each offset of a longer value
    (`user:raw`).
    """
    yield base64.b64encode(raw).decode()
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + raw)
        yield encoded[-(-8 * shift // 6) : 8 * (shift + len(raw)) // 6].decode()


KNOWN_SECRETS: Final = KnownSecrets()
"""The registry of this process: secrets are often read before an App exists."""
