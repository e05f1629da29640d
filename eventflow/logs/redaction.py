"""Redaction of log lines: secrets by value and by name, passwords in URLs, control characters.

log.py calls it for every rendered line, before a stream or the log store gets it. A registered
secret is recognised by its *value* in every common encoding (escaped, base64, URL-encoded,
hexadecimal), whoever prints it; an unknown one by the *name* of its field, or by `name=value` in a
text. A line without a secret costs one or two look-ups; only the others are walked.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final, cast

from eventflow.core.secrets import KNOWN_SECRETS, MASK, KnownSecrets

_STEMS: Final = re.compile(
    "pass|pwd|secret|token|auth|key|cookie|credential|bearer|://", re.IGNORECASE
)
"""A text that contains none of these needs no pattern."""

_NAMES: Final = (
    "password", "passwd", "passphrase", "secret", "authorization", "apikey", "privatekey",
    "accesskey", "signingkey", "credential", "cookie",
)  # fmt: skip
_ENDINGS: Final = ("token", "pwd")

# The patterns below are text. `re.sub` compiles and caches each at its first use, which most
# processes never reach. To compile all of them takes 1 ms.

_PAIR: Final = (
    r"""(?i)((?:password|passwd|passphrase|pwd|secret|token|api[-_]?key|private[-_]?key|access[-_]?key|signing[-_]?key|credential)"""
    r"""[\w-]{0,40}["']?\s*[:=]\s*["']?)(?!\*\*\*)([^\s"',;&<>(){}\[\]]+)"""
)
_HEADER: Final = r"""(?i)((?:authorization|cookie)["']?\s*[:=]\s*["']?)(?!\*\*\*)([^\r\n"']+)"""
_SCHEME: Final = r"(?i)\b((?:bearer|basic)\s+)[A-Za-z0-9+/._~=-]{8,}"
_USERINFO: Final = r"""(?i)([a-z][a-z0-9+.-]{0,20}://[^\s/@:"'<>]{0,256}:)[^\s/"'<>]{1,1024}@"""
_HTTP_USER: Final = r"""(?i)(https?://)[^\s/@:"'<>]{6,1024}@"""

_SCALARS: Final = frozenset({bool, int, float, type(None)})
_DIGITS: Final = 20
"""Digits of the largest 64-bit JSON number: a longer secret of digits cannot be one."""

_MAX_CACHED_TEXTS: Final = 8192
"""Short texts known to be clean (flow names, field names): enough for any app, at most about 1 MB.
"""


class Redactor:
    """Removes known secrets by their value, and others by rules. Thread-safe."""

    def __init__(self, known: KnownSecrets | None = None) -> None:
        self._known = known or KnownSecrets()
        self._seen: re.Pattern[str] | None = None  # the known secrets that the next two regard
        self._clean_texts: set[str] = set()
        self._scalars = _SCALARS

    def register(self, secret: str | bytes) -> bool:
        """As `KnownSecrets.register`."""
        return self._known.register(secret)

    def _regard_new_secrets(self) -> None:
        self._seen = self._known.pattern
        self._clean_texts = set()
        if any(form.isdecimal() and len(form) <= _DIGITS for form in self._known.forms):
            self._scalars = frozenset({bool, type(None)})

    def is_clean(self, fields: Mapping[str, Any]) -> bool:
        """Whether neither keys nor values can contain a secret. Nested values count as unclean."""
        if self._seen is not self._known.pattern:
            self._regard_new_secrets()
        scalars = self._scalars
        if self._clean_texts.issuperset(fields) and scalars.issuperset(map(type, fields.values())):
            return True  # known names with numbers, as in most lines
        for key, value in fields.items():
            if self._is_suspicious(key):
                return False
            if type(value) is str:
                if self._is_suspicious(value):
                    return False
            elif type(value) not in scalars:
                return False
        return True

    def _is_suspicious(self, text: str) -> bool:
        known = self._clean_texts
        if text in known:
            return False
        if _STEMS.search(text) or (self._seen is not None and self._seen.search(text)):
            return True
        if len(text) <= 120:
            if len(known) >= _MAX_CACHED_TEXTS:
                known = self._clean_texts = set()
            known.add(text)
        return False

    def redact_text(self, text: str) -> str:
        """`text` without registered values, `password=…`, authorization headers and passwords in
        URLs.
        """
        text = self._known.remove_from(text)
        if _STEMS.search(text) is None:
            return text
        text = re.sub(_HEADER, rf"\1{MASK}", text)
        text = re.sub(_SCHEME, rf"\1{MASK}", text)
        text = re.sub(_PAIR, _redact_pair, text)
        if "@" not in text:
            return text
        text = re.sub(_USERINFO, rf"\1{MASK}@", text)
        return re.sub(_HTTP_USER, rf"\1{MASK}@", text)

    def redact_data(self, value: Any) -> Any:
        """A copy of plain JSON data: each text redacted, each value in a field named like a secret
        masked.
        """
        match value:
            case str():
                return self.redact_text(value)
            case dict():
                fields = cast(dict[str, Any], value)
                return {
                    self.redact_text(key): (
                        MASK if _is_secret_field(key, item) else self.redact_data(item)
                    )
                    for key, item in fields.items()
                }
            case list():
                return [self.redact_data(item) for item in cast(list[Any], value)]
            case None | bool():
                return value
            case _:
                pattern = self._known.pattern
                return MASK if pattern is not None and pattern.search(str(value)) else value


def _redact_pair(found: re.Match[str]) -> str:
    """`tokens=1500` is a count, `token=eyJ…` is a secret."""
    if found[1][:5].lower() == "token" and found[2].rstrip(".").replace(".", "", 1).isdecimal():
        return found[0]
    return found[1] + MASK


def _is_secret_field(key: str, value: object) -> bool:
    """Whether the name of a field marks its value as secret. Numbers in `…token` fields are
    counts.
    """
    if value is None or isinstance(value, bool):
        return False
    name = "".join(letter for letter in key.lower() if letter.isalnum())
    if any(stem in name for stem in _NAMES) or name == "auth":
        return True
    return name.endswith(_ENDINGS) and not isinstance(value, int | float)


# --------------------------------------------------------------------------- control characters

_CONTROLS: Final = (
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
"""C0 except tab, DEL, C1, bidirectional and invisible controls, and separators that some viewers
treat as a line break.
"""

_BEYOND_JSON: Final = _CONTROLS.replace("\x00-\x08\x0a-\x1f", "")
"""The same without those that JSON escapes."""


def escape_controls(text: str) -> str:
    r"""`text` as one line without control characters, which could move a cursor or forge a line:
    `\x1b`, `\n`.
    """
    return re.sub(_CONTROLS, lambda found: found[0].encode("unicode_escape").decode(), text)


def escape_controls_by_line(text: str) -> str:
    """The same for a text of several lines, such as a traceback."""
    return "\n".join(map(escape_controls, text.splitlines()))


def escape_json_controls(line: bytes) -> bytes:
    r"""A JSON text with the controls that JSON permits written as `\uXXXX`. Its value does not
    change.
    """
    if line.isascii() and b"\x7f" not in line:
        return line
    return re.sub(_BEYOND_JSON, lambda found: json.dumps(found[0])[1:-1], line.decode()).encode()


SECRETS: Final = Redactor(KNOWN_SECRETS)
"""The redactor of this process."""
