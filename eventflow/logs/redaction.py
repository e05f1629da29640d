"""What must not stand in a log: secret values, fields named like secrets, passwords in URLs; and what no terminal may see.

`log.py` asks it about every line, `store/logs.py` never sees anything else. A secret is known by its *value*, whoever prints
it and in whatever common spelling (escaped, base64, URL-encoded, hexadecimal); where the value is unknown, a field's *name* or
`name=value` in a text gives it away. A line with nothing to hide costs one or two look-ups; the walk over it is for the others.
"""

import base64
import json
import re
import threading
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast
from urllib.parse import quote, quote_plus

MASK: Final = "***"

SHORTEST: Final = 6
"""Characters of the shortest value hidden: shorter ones (and above all the empty string) would blot out ordinary text."""

_STEMS: Final = re.compile(
    "pass|pwd|secret|token|auth|key|cookie|credential|bearer|://", re.IGNORECASE
)
"""What a text must contain before it is looked at closely."""

_NAMES: Final = (
    "password", "passwd", "passphrase", "secret", "authorization", "apikey", "privatekey", "accesskey", "signingkey",
    "credential", "cookie",
)  # fmt: skip
_ENDINGS: Final = ("token", "pwd")

_PAIR: Final = re.compile(
    r"""((?:password|passwd|passphrase|pwd|secret|token|api[-_]?key|private[-_]?key|access[-_]?key|signing[-_]?key|credential)"""
    r"""[\w-]{0,40}["']?\s*[:=]\s*["']?)(?!\*\*\*)([^\s"',;&<>(){}\[\]]+)""",
    re.IGNORECASE,
)
_HEADER: Final = re.compile(
    r"""((?:authorization|cookie)["']?\s*[:=]\s*["']?)(?!\*\*\*)([^\r\n"']+)""", re.IGNORECASE
)
_SCHEME: Final = re.compile(r"\b((?:bearer|basic)\s+)[A-Za-z0-9+/._~=-]{8,}", re.IGNORECASE)
_USERINFO: Final = re.compile(
    r"""([a-z][a-z0-9+.-]{0,20}://[^\s/@:"'<>]{0,256}:)[^\s/"'<>]{1,1024}@""", re.IGNORECASE
)
_HTTP_USER: Final = re.compile(r"""(https?://)[^\s/@:"'<>]{6,1024}@""", re.IGNORECASE)

_SCALARS: Final = frozenset({bool, int, float, type(None)})
_DIGITS: Final = 20
"""The most that a JSON number of 64 bits has: a longer secret of digits cannot stand in one."""

_REMEMBERED: Final = 8192
"""Harmless short strings kept in mind (flow names, keys of fields): enough for any app, about 1 MB at most."""


class Redactor:
    """A registry of secret values, and the rules for the rest. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forms: frozenset[str] = frozenset()
        self._values: re.Pattern[str] | None = None
        self._harmless: set[str] = set()
        self._scalars = _SCALARS

    def register(self, secret: str | bytes) -> bool:
        """Hides this value from now on. False (and nothing is hidden) when it is shorter than SHORTEST."""
        if len(secret.strip()) < SHORTEST:
            return False
        forms = {form for form in spellings(secret) if len(form) >= SHORTEST}
        with self._lock:
            if forms - self._forms:
                self._forms |= forms
                self._values = re.compile(_any_of(self._forms))
                self._harmless = set()
                if any(form.isdecimal() and len(form) <= _DIGITS for form in forms):
                    self._scalars = frozenset({bool, type(None)})
        return True

    def harmless(self, fields: Mapping[str, Any]) -> bool:
        """Whether keys and values are plain and call for no closer look. Short strings seen before are answered from memory."""
        seen, scalars = self._harmless, self._scalars
        for key, value in fields.items():
            if key not in seen and self._tells(key):
                return False
            if type(value) is str:
                if value not in seen and self._tells(value):
                    return False
            elif type(value) not in scalars:
                return False
        return True

    def _tells(self, text: str) -> bool:
        seen = self._harmless
        if _STEMS.search(text) or (self._values is not None and self._values.search(text)):
            return True
        if len(text) <= 120:
            if len(seen) >= _REMEMBERED:
                seen = self._harmless = set()
            seen.add(text)
        return False

    def text(self, text: str) -> str:
        """`text` without registered values, `password=…`, authorization headers and passwords in URLs."""
        if self._values is not None:
            text = self._values.sub(MASK, text)
        if _STEMS.search(text) is None:
            return text
        text = _HEADER.sub(rf"\1{MASK}", text)
        text = _SCHEME.sub(rf"\1{MASK}", text)
        text = _PAIR.sub(_hide_pair, text)
        text = _USERINFO.sub(rf"\1{MASK}@", text)
        return _HTTP_USER.sub(rf"\1{MASK}@", text)

    def data(self, value: Any) -> Any:
        """A copy of plain JSON data with every string as `text` leaves it, and every value under a telling name hidden."""
        match value:
            case str():
                return self.text(value)
            case dict():
                fields = cast(dict[str, Any], value)
                return {
                    self.text(key): MASK if _hides(key, held) else self.data(held)
                    for key, held in fields.items()
                }
            case list():
                return [self.data(held) for held in cast(list[Any], value)]
            case None | bool():
                return value
            case _:
                return (
                    MASK if self._values is not None and self._values.search(str(value)) else value
                )


def _hide_pair(found: re.Match[str]) -> str:
    """`tokens=1500` is a count, `token=eyJ…` is not."""
    if found[1][:5].lower() == "token" and found[2].rstrip(".").replace(".", "", 1).isdecimal():
        return found[0]
    return found[1] + MASK


def _hides(key: str, value: object) -> bool:
    """Whether a field's name says that its value is a secret. A number under `…token` is a count; booleans say nothing."""
    if value is None or isinstance(value, bool):
        return False
    name = "".join(letter for letter in key.lower() if letter.isalnum())
    if any(stem in name for stem in _NAMES) or name == "auth":
        return True
    return name.endswith(_ENDINGS) and not isinstance(value, int | float)


def _any_of(forms: Iterable[str], depth: int = 8) -> str:
    """A pattern for any of these texts, the longest first. Common beginnings are folded into a tree: with 50 secrets a search
    then takes 14 µs where plain alternatives take 90."""
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
        re.escape(first) + _any_of(rest, depth - 1) for first, rest in sorted(branches.items())
    ]
    if not alternatives:
        return ""
    return f"(?:{'|'.join(alternatives)})" + ("?" if done else "")


def spellings(secret: str | bytes) -> Iterable[str]:
    """The forms in which a value turns up in a text: as it is, escaped, URL-encoded, in base64 (inside a longer one too), in
    hexadecimal; and line by line, when it has several lines."""
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
    """`raw` in base64, and the part of it that stays the same wherever `raw` stands in a longer value (`user:raw`)."""
    yield base64.b64encode(raw).decode()
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + raw)
        yield encoded[-(-8 * shift // 6) : 8 * (shift + len(raw)) // 6].decode()


# --------------------------------------------------------------------------- what must not reach a terminal

_CONTROLS: Final = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""C0 but tab, DEL, C1, bidirectional and invisible controls, and the separators some viewers break a line at."""

_BEYOND_JSON: Final = re.compile(_CONTROLS.pattern.replace("\x00-\x08\x0a-\x1f", ""))
"""The same, but for what JSON escapes anyway."""


def clean(text: str) -> str:
    r"""`text` as one line that cannot move a cursor, forge a line or turn the reading direction: `\x1b`, `\n`, `\u202e`."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def clean_lines(text: str) -> str:
    """The same for a text that may have several lines, such as a traceback."""
    return "\n".join(map(clean, text.splitlines()))


def escape_json(line: bytes) -> bytes:
    r"""A JSON text in which controls that JSON lets pass are `\uXXXX` too. The value it stands for is the same."""
    if line.isascii() and b"\x7f" not in line:
        return line
    return _BEYOND_JSON.sub(lambda found: json.dumps(found[0])[1:-1], line.decode()).encode()


SECRETS: Final = Redactor()
"""The registry of this process. One, because a secret is secret in all of it, and is often read before any App exists."""
