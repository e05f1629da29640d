"""Redaction of registered values, of fields named like secrets, and of URLs; other text stays
unchanged.
"""

import base64
import json
from urllib.parse import quote

import orjson
import pytest

from eventflow.core.secrets import MASK
from eventflow.logs.redaction import (
    SECRETS,
    Redactor,
    escape_controls,
    escape_controls_by_line,
    escape_json_controls,
)

SECRET = 'p@ss/wörd+"quoted\\'


@pytest.fixture
def redactor() -> Redactor:
    made = Redactor()
    assert made.register(SECRET)
    return made


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        f"before{SECRET}after",
        json.dumps(SECRET),
        orjson.dumps({"a": [SECRET]}).decode(),
        repr(SECRET),
        quote(SECRET, safe=""),
        quote(SECRET, safe="").lower(),
        base64.b64encode(SECRET.encode()).decode(),
        base64.urlsafe_b64encode(SECRET.encode()).decode().rstrip("="),
        SECRET.encode().hex(),
        f"{SECRET.encode()!r}",
    ],
)
def test_a_registered_value_is_hidden_in_every_encoding(redactor: Redactor, text: str):
    """A value is removed if it is plain, escaped, URL-encoded, in base64 or in hexadecimal."""
    hidden = redactor.redact_text(text)
    assert MASK in hidden
    for part in (
        "wörd",
        "w\\u00f6rd",
        "w%C3%B6rd",
        "w%c3%b6rd",
        "quoted",
        SECRET.encode().hex()[8:20],
    ):
        assert part not in hidden


@pytest.mark.parametrize("before", ["", "u", "us", "user:", "some.longer@user.example:"])
def test_a_value_inside_a_longer_base64_text_is_hidden(redactor: Redactor, before: str):
    """Basic credentials are `user:secret` in base64: the secret's part goes, whatever
    precedes it.
    """
    encoded = base64.b64encode(f"{before}{SECRET}".encode()).decode()
    assert MASK in redactor.redact_text(encoded)
    assert len(redactor.redact_text(encoded).replace(MASK, "")) <= len(before) * 4 / 3 + 6


@pytest.mark.parametrize("secret", ["", " ", "\n", "abc", "12345", "     1", b"", b"short"])
def test_short_and_empty_values_are_not_registered(secret: str | bytes):
    """Values under six characters would remove ordinary text: they are refused, and nothing
    changes.
    """
    redactor = Redactor()
    assert not redactor.register(secret)
    assert (
        redactor.redact_text("an ordinary text, 12345 abc short")
        == "an ordinary text, 12345 abc short"
    )


def test_each_line_of_a_long_key_is_hidden():
    """A key of several lines is hidden line by line, as a program prints it; its BEGIN and END
    lines are ordinary text.
    """
    body = [base64.b64encode(bytes([n]) * 48).decode() for n in range(3)]
    redactor = Redactor()
    redactor.register(
        "\n".join(["-----BEGIN PRIVATE KEY-----", *body, "-----END PRIVATE KEY-----"])
    )
    assert redactor.redact_text(f"found {body[1]} here") == f"found {MASK} here"
    assert redactor.redact_text("-----BEGIN PRIVATE KEY-----") == "-----BEGIN PRIVATE KEY-----"


def test_many_values_at_once():
    """Values that share beginnings, or contain one another, are each hidden whole."""
    redactor = Redactor()
    values = [f"whsec_{'a' * n}{n:02d}" for n in range(40)] + ["whsec_aaaa"]
    for value in values:
        redactor.register(value)
    for value in values:
        assert redactor.redact_text(f"<{value}>") == f"<{MASK}>"


@pytest.mark.parametrize(
    "key",
    """
    password db_password DB-Passwd clientSecret secret_key access_token idToken X-Auth-Token token
    Authorization proxy-authorization api_key X-Api-Key apikey Cookie set-cookie credentials
    private_key aws_secret_access_key passphrase pwd auth
    """.split(),
)
def test_values_in_fields_named_like_secrets_are_hidden(key: str):
    """A field named like a secret shows no value, at any depth and of any type."""
    found = Redactor().redact_data(
        {key: "v4lue", "deep": [{key: {"a": "v4lue"}}, {key: ["v4lue"]}]}
    )
    assert "v4lue" not in json.dumps(found)
    assert found[key] == MASK


def test_ordinary_fields_stay():
    """Counts of tokens, keys of objects, ordering keys, flags and nulls are not secrets."""
    fields = {
        "max_tokens": 4096, "token": 7, "tokens": [1, 2], "idempotency_key": "order-7",
        "key": "in/a.csv", "author": "me", "secret": None, "password": False, "flow": "tokenize",
        "n": 1.5, "monkey": "see", "empty": {},
    }  # fmt: skip
    assert Redactor().redact_data(fields) == fields


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("password=hunter2 user=me", "password=*** user=me"),
        ("PASSWORD: hunter2", "PASSWORD: ***"),
        ('{"api_key": "abc", "n": 1}', '{"api_key": "***", "n": 1}'),
        ("?access_token=eyJhbGciOi&x=1", "?access_token=***&x=1"),
        ("Authorization: Bearer eyJhbGciOi", "Authorization: ***"),
        ("{'Cookie': 'a=1; b=2', 'Accept': '*/*'}", "{'Cookie': '***', 'Accept': '*/*'}"),
        ("sent Bearer eyJhbGciOi.abc", "sent Bearer ***"),
        ("postgresql://app:pa%40ss@db:5432/x", "postgresql://app:***@db:5432/x"),
        ("redis://:pass:word@cache/0", "redis://:***@cache/0"),
        ("https://ghp_1234567890@github.com/a/b", "https://***@github.com/a/b"),
        ("amqp://u:p@ss@h", "amqp://u:***@h"),
    ],
)
def test_secrets_in_texts_are_hidden(text: str, hidden: str):
    """`name=value`, headers and passwords in URLs are hidden in plain text too."""
    assert Redactor().redact_text(text) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=1500, tokens: 12",
        "ssh://git@host/x",
        "http://host:80/a@b",
        "mail me@example.org",
        "a secret was found",
        "pass",
    ],
)
def test_ordinary_texts_stay(text: str):
    """Text that only resembles a secret is left as it was."""
    assert Redactor().redact_text(text) == text


def test_a_number_that_is_a_secret_is_hidden():
    """A secret of digits is hidden also as a JSON number, and the line is still JSON."""
    redactor = Redactor()
    redactor.register("20458817")
    assert not redactor.is_clean({"pin": 20458817})
    assert redactor.redact_data({"pin": 20458817, "n": 2}) == {"pin": MASK, "n": 2}


def test_a_new_secret_clears_the_cache_of_clean_texts():
    """A text that was clean is checked again after a new value is registered."""
    redactor = Redactor()
    assert redactor.is_clean({"flow": "hunter2-flow"})
    assert redactor.is_clean({"flow": "hunter2-flow"})
    redactor.register("hunter2-flow")
    assert not redactor.is_clean({"flow": "hunter2-flow"})


def test_nested_data_is_never_clean():
    """Nested data, bytes and other objects are always redacted."""
    for value in ({"password": "x"}, ["x"], b"x", object(), ("x",)):
        assert not Redactor().is_clean({"value": value})


def test_controls_do_not_reach_a_terminal():
    """ESC, C1, bidirectional and invisible controls and line breaks become visible text; other
    scripts stay.
    """
    dirty = "a\x1b[31mb\x9b2Jc\u202ed\u2066e\u200bf\x07g\nh\ri\u2028j\U000e0041k\x7fl\tm"
    assert escape_controls(dirty) == (
        "a\\x1b[31mb\\x9b2Jc\\u202ed\\u2066e\\u200bf\\x07g\\nh\\ri\\u2028j\\U000e0041k\\x7fl\tm"
    )
    assert escape_controls("Grüße, мир, 世界, مرحبا 🎉") == "Grüße, мир, 世界, مرحبا 🎉"
    assert escape_controls_by_line("one\n\x1b[2Jtwo") == "one\n\\x1b[2Jtwo"


def test_json_lines_contain_no_controls_and_keep_their_value():
    """Controls that JSON permits are escaped, so that `cat` of a log is safe; the value of the line
    is unchanged.
    """
    value = "a\x1b\x9b\u202e\x7f\u2028é\U000e0041\u200b"
    line = escape_json_controls(orjson.dumps(value))
    assert orjson.loads(line) == value
    assert escape_controls(line.decode()) == line.decode()


def test_the_process_has_one_registry():
    """A secret read at import, before any App exists, is hidden everywhere."""
    SECRETS.register("registered-at-import")
    assert SECRETS.redact_text("x registered-at-import x") == f"x {MASK} x"
