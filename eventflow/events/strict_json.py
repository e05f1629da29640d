"""Strict JSON: the one decoder of JSON from outside.

Webhooks, the API, Kafka values, the command line and files of rows read with `read_json`. It
accepts what real writers write (a byte order mark before the text) and refuses what two parsers may
read differently: a repeated key, NaN, a number that Python's `int` and `float` of 64 bits cannot
hold digit by digit. `read_report` is for measurements of other tools, where one unusable number
must not cost the rest.

The common text is parsed once, by orjson, and written again: if that gives the same text, blanks
aside, no key was repeated and no digit lost. Where it does not, counting and a few scans in C
decide whether the slow, exact parser has to read it, too.
"""

import codecs
import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import orjson

MAX_JSON_DEPTH = 64
MAX_JSON_KEYS = 10_000
"""Keys of one object. The sum of all objects is bounded by the size of the text."""

MAX_EXACT_DIGITS = 15
"""Significant digits that every float of 64 bits holds."""

MAX_QUOTED_CHARACTERS = 40
"""Of a number in an error message."""


def read_json(
    text: bytes,
    *,
    max_keys: int = MAX_JSON_KEYS,
    max_depth: int = MAX_JSON_DEPTH,
    rounds: bool = False,
) -> Any:
    """The value of a JSON text: UTF-8, or UTF-16 and UTF-32 with a byte order mark.

    Raises ValueError for anything else, and for a key twice in one object, NaN, a lone surrogate,
    more than `max_depth` levels, more than `max_keys` keys in one object, an integer beyond 64
    bits, and a fraction with digits that a float cannot hold. `rounds`: such numbers are rounded
    instead, as `int` and `float` read them.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        if (utf8 := _to_utf8(text)) is text:
            raise
        text = utf8
        value = orjson.loads(text)
    has_few_keys = len(text) <= max_keys or text.count(b":") <= max_keys
    is_small = has_few_keys and text.count(b"{") + text.count(b"[") <= max_depth
    keys = 0 if is_small else _count_keys(value, max_keys, max_depth)
    written = orjson.dumps(value)
    if written == text or _has_same_tokens(written, text):
        return value
    if is_small:
        keys = _count_keys(value, max_keys, max_depth)
    if not _has_distinct_keys(text, keys) or _may_lose_digits(text):
        numbers = (int, float) if rounds else (_exact_int, _exact_float)
        return _parse_slowly(text, *numbers)
    return value


def read_report(text: bytes, *, max_keys: int = MAX_JSON_KEYS) -> Any:
    """As `read_json`, but what is no finite number (NaN, Infinity, 1e999) is None, integers have
    any number of digits, and fractions are rounded to the nearest float: they are measurements,
    and never identify an event.
    """
    try:
        return read_json(text, max_keys=max_keys, rounds=True)
    except orjson.JSONDecodeError:
        utf8 = _to_utf8(text)
        is_number = b"NaN" in utf8 or b"Infinity" in utf8 or _is_too_large(utf8)
        if not is_number:
            raise
    value = _parse_slowly(utf8, _measured_int, _measured_float, parse_constant=lambda _: None)
    _count_keys(value, max_keys, MAX_JSON_DEPTH)
    return value


def _has_same_tokens(written: bytes, text: bytes) -> bool:
    """Whether `written`, the JSON of the value of `text`, has the same keys and digits.

    Without blanks both texts are still the same sequence of tokens, except that strings have lost
    theirs, too. Equal sequences have the same numbers, and as many keys in each object: a repeated
    key, of which the value has one, would be missing in `written`.
    """
    return written.translate(None, _BLANKS) == text.translate(None, _BLANKS)


def _has_distinct_keys(text: bytes, keys: int) -> bool:
    """Whether counting proves that no key is repeated; else the slow parser decides.

    The text has a colon per key, the parsed value one key per *distinct* key: if both numbers are
    equal, no key is repeated. The same holds for quoted colons (`":`), unless a blank precedes one.
    """
    if text.count(b":") == keys:
        return True
    if text.count(b'":') != keys:
        return False  # a key is repeated, or a string has a quoted colon
    return not (b" :" in text or b"\t:" in text or b"\n:" in text or b"\r:" in text)


def _parse_slowly(
    text: bytes,
    parse_int: Callable[[str], Any],
    parse_float: Callable[[str], Any],
    parse_constant: Callable[[str], Any] | None = None,
) -> Any:
    """The value by the standard library's parser, which shows each key and the digits of each
    number. ValueError for a repeated key, and as `parse_int` and `parse_float` raise.
    """
    return json.loads(
        text.decode(),
        object_pairs_hook=_without_duplicates,
        parse_int=parse_int,
        parse_float=parse_float,
        parse_constant=parse_constant,
    )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name}: expected each key once per object, found it twice")
            seen.add(name)
    return found


# --------------------------------------------------------------------------- limits


def _count_keys(value: Any, max_keys: int, max_depth: int) -> int:
    """The number of keys in a parsed value. ValueError above the limits."""
    if value.__class__ is dict and not _CONTAINERS.intersection(map(type, value.values())):
        level: list[Any] = []
        keys = len(value)
    else:
        level = [value]
        keys = 0
    if keys > max_keys:
        raise ValueError(f"body: expected at most {max_keys} keys in one object, found {keys}")
    depth = 0
    while level:
        depth += 1
        below: list[Any] = []
        for node in level:
            kind = node.__class__
            if kind is dict:
                if len(node) > max_keys:
                    raise ValueError(
                        f"body: expected at most {max_keys} keys in one object, found {len(node)}"
                    )
                keys += len(node)
                below += [child for child in node.values() if child.__class__ in _CONTAINERS]
            elif kind is list:
                below += [child for child in node if child.__class__ in _CONTAINERS]
        if depth > max_depth:
            raise ValueError(f"body: expected at most {max_depth} levels, found more")
        level = below
    return keys


_CONTAINERS = frozenset((dict, list))

# --------------------------------------------------------------------------- encodings

_ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, which begins alike
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode_text(text: bytes) -> str:
    """The characters of a text file: UTF-8, or what its byte order mark says, without the mark.

    ValueError for other bytes.
    """
    for mark, encoding in _ENCODINGS:
        if text.startswith(mark):
            return text[len(mark) :].decode(encoding)
    return text.decode()


def in_utf8(text: bytes, charset: str) -> bytes:
    """A text whose sender names `charset`, in UTF-8; `text` itself if it is UTF-8, has a byte
    order mark, or has no charset.

    Senders that name another charset often write UTF-8 all the same, and a text in another one is
    hardly ever valid UTF-8 without zero bytes. Raises ValueError for an unknown charset, and for
    bytes that are not in it.
    """
    if charset in ("", "utf-8") or any(text.startswith(mark) for mark, _ in _ENCODINGS):
        return text
    if b"\0" not in text and is_utf8(text):
        return text
    return text.decode(codec_of(charset)).encode()


def is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


_CODECS = (
    r"utf-(16|32)(-[lb]e)?|iso8859-\d+|cp\d+|koi8-[rtu]|gbk?|gb\w+|big5\w*|euc_\w+|shift_jis\w*"
)
"""Codecs of text that senders use; Python has others, such as punycode. A pattern, which `re`
compiles at its first use.
"""


def codec_of(charset: str) -> str:
    """Python's codec for a charset. Raises ValueError for one that is not of text."""
    try:
        name = codecs.lookup(charset).name
    except (LookupError, ValueError):
        name = ""
    if not re.fullmatch(_CODECS, name):
        raise ValueError(f"Content-Type: expected charset=utf-8, found {charset[:40]!r}")
    return name


def _to_utf8(text: bytes) -> bytes:
    """The text without its byte order mark, in UTF-8; `text` itself if there is none."""
    if any(text.startswith(mark) for mark, _ in _ENCODINGS):
        return decode_text(text).encode()
    return text


# --------------------------------------------------------------------------- numbers

_DIGITS = bytes.maketrans(b"123456789E", b"000000000e")
_SIGNS = b".+-"
_LONG_RUN = b"0" * (MAX_EXACT_DIGITS + 1)
_BLANKS = b" \t\r\n"
# Patterns as text, like _CODECS above: few processes read numbers that need them.
_LONG_NUMBER = rb"[0-9][0-9.]{%d,}(?:[eE][+-]?[0-9]+)?" % MAX_EXACT_DIGITS


def _may_lose_digits(text: bytes) -> bool:
    """Whether the text may have a number that orjson does not read exactly.

    Such a number has more than 15 digits, or an exponent of three. Most that look like it are
    floats of 16 digits, long ids, and digits in strings: nothing is lost if each of them is exact.
    """
    shape = text.translate(_DIGITS, _SIGNS)
    if b"0e000" in shape:
        return True
    return _LONG_RUN in shape and not all(map(_is_exact, re.findall(_LONG_NUMBER, text)))


def _is_exact(number: bytes) -> bool:
    """Whether a number without its sign is exact with either sign."""
    digits = number.decode()
    try:
        _exact_int("-" + digits) if digits.isdigit() else _exact_float(digits)
    except ValueError:
        return False
    return True


MAX_MEASURED_DIGITS = 4000
"""Of an integer in a report; Python converts no more than 4,300 by default."""

_LARGE = rb"[0-9]{300}|[0-9][eE]\+?0*[1-9][0-9]{2}"


def _is_too_large(text: bytes) -> bool:
    """Whether a text may have a number beyond the largest float, which orjson refuses."""
    return re.search(_LARGE, text) is not None


def _measured_int(digits: str) -> int | None:
    return int(digits) if len(digits) <= MAX_MEASURED_DIGITS else None


def _measured_float(digits: str) -> float | None:
    number = float(digits)
    return number if number - number == 0 else None


def _exact_int(digits: str) -> int:
    if len(digits) <= 20 and -(2**63) <= (number := int(digits)) < 2**64:
        return number
    raise ValueError(
        f"{_quoted(digits)}: expected an integer of at most 64 bits; send a longer one as a string"
    )


def _exact_float(digits: str) -> float:
    """ValueError unless the float is written with these digits: by its shortest form, or by all
    digits that it has.
    """
    number = float(digits)
    mantissa = digits.lower().partition("e")[0].strip("-").replace(".", "").strip("0")
    if len(mantissa) <= MAX_EXACT_DIGITS and (number or not mantissa):
        return _finite(digits)
    exact = Decimal(digits)
    if exact in (Decimal(repr(number)), Decimal(f"{number:.{len(mantissa) - 1}e}")):
        return number
    raise ValueError(
        f"{_quoted(digits)}: expected a number that a float of 64 bits holds, found one that would "
        "be rounded; send it as a string, or with fewer digits"
    )


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{_quoted(digits)}: expected a finite number")
    return number


def _quoted(digits: str) -> str:
    if len(digits) <= MAX_QUOTED_CHARACTERS:
        return digits
    return f"{digits[:MAX_QUOTED_CHARACTERS]}… ({len(digits)} digits)"
