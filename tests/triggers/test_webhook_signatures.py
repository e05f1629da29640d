"""The verification table: each vendor's published form verifies, and whatever else a header holds
is refused, not raised.
"""

import base64
import datetime
import itertools
from typing import Any

import pytest
import standardwebhooks
from hypothesis import given, settings
from hypothesis import strategies as st

from eventflow.core.errors import EmptySecret, UsageError
from eventflow.logs.redaction import SECRETS
from tests.triggers.serving import digest
from triggers.signatures import (
    HMAC,
    NO_VERIFICATION,
    Bearer,
    GitHub,
    GitLab,
    MLflow,
    Secret,
    Shopify,
    Slack,
    StandardWebhooks,
    Stripe,
    Token,
    Verify,
    env,
)

NOW = 1_790_000_000
BODY = b'{"type": "invoice.paid", "total": 5}'
KEY = bytes(range(32))
WHSEC = "whsec_" + base64.b64encode(KEY).decode()
OTHER = "whsec_" + base64.b64encode(bytes(24)).decode()


def ok(
    verify: Verify,
    headers: dict[str, str],
    body: bytes = BODY,
    now: int = NOW,
    repeated: frozenset[str] = frozenset(),
) -> bool:
    return verify.reason_to_refuse(headers, repeated, body, now) is None


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def standard(
    key: bytes = KEY,
    ident: str = "msg_1",
    stamp: object = NOW,
    body: bytes = BODY,
    family: str = "webhook",
) -> dict[str, str]:
    signed = digest(key, f"{ident}.{stamp}.".encode("latin-1"), body)
    return {
        f"{family}-id": ident,
        f"{family}-timestamp": str(stamp),
        f"{family}-signature": "v1," + b64(signed),
    }


def stripe(stamp: object = NOW, key: bytes = b"s3cret") -> dict[str, str]:
    return {
        "stripe-signature": f"t={stamp},v1={digest(key, f'{stamp}.'.encode(), BODY).hex()},v0=abc"
    }


def slack(stamp: object = NOW) -> dict[str, str]:
    signature = "v0=" + digest(b"s3cret", f"v0:{stamp}:".encode(), BODY).hex()
    return {"x-slack-signature": signature, "x-slack-request-timestamp": str(stamp)}


def mlflow(stamp: object = NOW) -> dict[str, str]:
    signature = "v1," + b64(digest(b"s3cret", f"d1.{stamp}.".encode(), BODY))
    return {
        "x-mlflow-signature": signature,
        "x-mlflow-delivery-id": "d1",
        "x-mlflow-timestamp": str(stamp),
    }


TIMED: list[tuple[Verify, Any]] = [
    (StandardWebhooks(WHSEC), lambda stamp: standard(stamp=stamp)),
    (StandardWebhooks(WHSEC), lambda stamp: standard(stamp=stamp, family="svix")),
    (Stripe("s3cret"), stripe),
    (Slack("s3cret"), slack),
    (MLflow("s3cret"), mlflow),
    (
        HMAC("s3cret", header="X-Sig", timestamp_header="X-Ts"),
        lambda stamp: {
            "x-ts": str(stamp),
            "x-sig": digest(b"s3cret", f"{stamp}.".encode(), BODY).hex(),
        },
    ),
]
PLAIN: list[tuple[Verify, dict[str, str]]] = [
    (GitHub("s3cret"), {"x-hub-signature-256": "sha256=" + digest(b"s3cret", BODY).hex()}),
    (GitLab("s3cret"), {"x-gitlab-token": "s3cret"}),
    (Shopify("s3cret"), {"x-shopify-hmac-sha256": b64(digest(b"s3cret", BODY))}),
    (Bearer("s3cret"), {"authorization": "Bearer s3cret"}),
    (Token("s3cret", header="X-Token"), {"x-token": "s3cret"}),
    (HMAC("s3cret", header="X-Sig"), {"x-sig": digest(b"s3cret", BODY).hex()}),
    (
        HMAC("s3cret", header="X-Sig", algorithm="sha512", encoding="base64", prefix="sha512:"),
        {"x-sig": "sha512:" + b64(digest(b"s3cret", BODY, algorithm="sha512"))},
    ),
    (
        HMAC("s3cret", header="X-Sig", signed="v9:{id}:{body}:end", id_header="X-Id"),
        {"x-id": "7", "x-sig": digest(b"s3cret", b"v9:7:", BODY, b":end").hex()},
    ),
]
ALL = [*((verify, make(NOW)) for verify, make in TIMED), *PLAIN]


def named(value: Any) -> str | None:
    return repr(value) if isinstance(value, Verify) else ""


# --------------------------------------------------------------------------- what verifies


@pytest.mark.parametrize(("verify", "headers"), ALL, ids=named)
def test_each_form_verifies_its_own_request_only(verify: Verify, headers: dict[str, str]):
    """A request signed in the vendor's form is real; with another body, another key or a header
    less, it is not.
    """
    assert ok(verify, headers)
    for missing in headers:
        assert not ok(verify, {name: value for name, value in headers.items() if name != missing})
    if not ({"authorization", "x-token", "x-gitlab-token"} & headers.keys()):
        assert not ok(verify, headers, BODY + b" ") and not ok(verify, headers, b"")


@pytest.mark.parametrize(("verify", "headers"), ALL, ids=named)
def test_repeated_headers_are_refused(verify: Verify, headers: dict[str, str]):
    """A proof given twice could be read differently by two readers: refused, whichever of its
    headers it is.
    """
    for name in headers:
        assert not ok(verify, headers, repeated=frozenset({name}))
    assert ok(verify, headers, repeated=frozenset({"accept"}))


@pytest.mark.parametrize(("verify", "make"), TIMED, ids=named)
def test_timestamps_hold_for_300_seconds(verify: Verify, make: Any):
    """300 s early or late is real, 301 s is not; a timestamp is 1 to 12 digits and nothing else,
    however well signed.
    """
    for stamp in (NOW, NOW - 299, NOW + 299, NOW - 300, NOW + 300):
        assert ok(verify, make(stamp))
    for stamp in (NOW - 301, NOW + 301, 0):
        assert not ok(verify, make(stamp))
    for stamp in (
        "nan",
        "1e9",
        "-1",
        "",
        f"+{NOW}",
        f" {NOW}",
        f"{NOW} ",
        f"{NOW}.0",
        "9" * 40,
        f"{NOW:_}",
        "٣" * 10,
        f"0000{NOW}",
    ):
        try:
            headers = make(stamp)
            "".join(headers.values()).encode("latin-1")
        except UnicodeEncodeError:
            continue
        assert not ok(verify, headers), stamp


def test_rotation():
    """With two secrets either signs; with two signatures in the header, one valid one is enough."""
    both = StandardWebhooks([OTHER, WHSEC])
    assert ok(both, standard()) and ok(both, standard(key=bytes(24)))
    assert not ok(StandardWebhooks(OTHER), standard())
    headers = standard()
    wrong = "v1," + b64(bytes(32))
    assert ok(
        StandardWebhooks(WHSEC),
        {**headers, "webhook-signature": f"{wrong} {headers['webhook-signature']}"},
    )
    assert ok(
        StandardWebhooks(WHSEC),
        {**headers, "webhook-signature": f"{headers['webhook-signature']} v1a,xx v2,yy"},
    )
    many = " ".join([wrong] * 20 + [headers["webhook-signature"]])
    assert not ok(StandardWebhooks(WHSEC), {**headers, "webhook-signature": many})
    assert ok(Bearer(["old", "new"]), {"authorization": "Bearer new"})


def test_whsec_means_two_things():
    """The same `whsec_` string is base64 for Standard Webhooks and plain text for Stripe: each
    verifies its own only.
    """
    assert ok(StandardWebhooks(WHSEC), standard(KEY)) and not ok(
        StandardWebhooks(WHSEC), standard(WHSEC.encode())
    )
    assert ok(Stripe(WHSEC), stripe(key=WHSEC.encode())) and not ok(Stripe(WHSEC), stripe(key=KEY))


def test_standard_webhooks_agrees_with_the_reference():
    """What the reference library signs verifies here, with padded and bare secrets; what is signed
    here verifies there.
    """
    stamp = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
    for size, ident in itertools.product((24, 25, 32, 64), ("msg_1", "a.b", "x" * 200)):
        secret = "whsec_" + b64(bytes(range(size)))
        for form in (secret, secret.rstrip("="), secret.removeprefix("whsec_")):
            reference = standardwebhooks.Webhook(form)
            signature = reference.sign(msg_id=ident, timestamp=stamp, data=BODY.decode())
            headers = {
                "webhook-id": ident,
                "webhook-timestamp": str(NOW),
                "webhook-signature": signature,
            }
            assert ok(StandardWebhooks(form), headers)
    current = int(datetime.datetime.now(datetime.UTC).timestamp())
    standardwebhooks.Webhook(WHSEC).verify(BODY.decode(), standard(stamp=current))


def test_gitlab_with_both_needs_both():
    """With a token and a signing token, a request must hold both: neither alone is a way round the
    other.
    """
    verify = GitLab("s3cret", signing=WHSEC)
    assert ok(verify, {**standard(), "x-gitlab-token": "s3cret"})
    assert not ok(verify, standard()) and not ok(verify, {"x-gitlab-token": "s3cret"})
    assert ok(GitLab(signing=WHSEC), standard())
    assert GitLab(signing=WHSEC).signed_id(standard()) == "msg_1"


def test_bearer_scheme_in_any_case():
    """The scheme's case does not matter, the token's does; there is one space and no
    second token.
    """
    verify = Bearer("s3cret")
    assert ok(verify, {"authorization": "bearer s3cret"}) and ok(
        verify, {"authorization": "BEARER s3cret"}
    )
    for wrong in (
        "Bearer S3CRET",
        "Bearer  s3cret",
        "s3cret",
        "Basic s3cret",
        "Bearer",
        "Bearer s3cret ",
        "Bearer s3cret,s3cret",
        "",
    ):
        assert not ok(verify, {"authorization": wrong})


def test_none_refuses_nothing():
    """`verify="none"` checks nothing."""
    assert ok(NO_VERIFICATION, {})


# --------------------------------------------------------------------------- what does not


@pytest.mark.parametrize(
    "value",
    [
        "",
        ",",
        "v1",
        "v1,",
        "v1,,",
        "v1,a,b",
        "v1,!!!!",
        "v1,é",
        "v1 ,x",
        " ",
        "v1," + "A" * 100_000,
        "v1,\x00",
        "sha256=",
        "sha256=zz",
        "sha256=" + "0" * 63,
        "t=,v1=",
        "t=1,t=2,v1=00",
        "v0=",
        "=",
        "t=1790000000",
        "Bearer ",
        "v1=\xff",
    ],
)
@pytest.mark.parametrize(("verify", "headers"), ALL, ids=named)
def test_malformed_signatures_are_refused(verify: Verify, headers: dict[str, str], value: str):
    """No malformed signature header passes, and none raises."""
    for name in headers:
        assert not ok(verify, {**headers, name: value})


LATIN = st.text(st.characters(min_codepoint=0, max_codepoint=255), max_size=60)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(ALL), st.data())
def test_no_header_makes_it_raise(case: tuple[Verify, dict[str, str]], data: st.DataObject):
    """Whatever the headers and the body hold, the answer is a refusal: random text, cut, padded and
    spliced real values.
    """
    verify, headers = case
    changed = dict(headers)
    for name in data.draw(st.lists(st.sampled_from(sorted(headers)), min_size=1, unique=True)):
        real = headers[name]
        at = data.draw(st.integers(0, len(real)))
        changed[name] = data.draw(
            LATIN
            | st.just(real[:at])
            | LATIN.map(lambda text, at=at, real=real: real[:at] + text + real[at:])
        )
    body = data.draw(st.binary(max_size=40) | st.just(BODY))
    accepted = ok(verify, changed, body)
    assert not accepted or (
        body == BODY
        or "x-token" in headers
        or "authorization" in headers
        or "x-gitlab-token" in headers
    )
    if accepted:
        assert all(strict(changed[name], headers[name]) for name in headers)


def strict(offered: str, real: str) -> bool:
    """What may differ in an accepted request: the case of hex digits and of a scheme, further
    signatures, a dropped v0.
    """
    return (
        offered.lower() == real.lower()
        or real.split(" ", maxsplit=1)[0] in offered
        or real.split(",v0", maxsplit=1)[0] in offered
    )


def test_hex_is_read_strictly():
    """Blanks inside a hex digest, or a digest of another length, are refused; its case is not."""
    signature = digest(b"s3cret", BODY).hex()
    verify = GitHub("s3cret")
    assert ok(verify, {"x-hub-signature-256": "sha256=" + signature.upper()})
    for wrong in (
        signature[:2] + " " + signature[2:],
        signature + "00",
        signature[:-2],
        signature + "\n",
        "0x" + signature,
    ):
        assert not ok(verify, {"x-hub-signature-256": "sha256=" + wrong})


def test_base64_is_read_strictly():
    """Url-safe letters, blanks, missing and surplus padding are refused."""
    signature = b64(digest(b"s3cret", BODY))
    verify = Shopify("s3cret")
    for wrong in (
        signature.rstrip("="),
        signature + "=",
        signature[:4] + " " + signature[4:],
        signature + "\n",
        "-" + signature[1:],
    ):
        assert not ok(verify, {"x-shopify-hmac-sha256": wrong})


def test_token_may_be_any_bytes():
    """A secret with letters beyond ASCII matches the bytes its sender puts in the header."""
    assert ok(
        Token("schlüssel", header="X-Token"), {"x-token": "schlüssel".encode().decode("latin-1")}
    )


# --------------------------------------------------------------------------- secrets

PRESETS: list[Any] = [StandardWebhooks, GitHub, Stripe, Slack, GitLab, Shopify, MLflow, Bearer]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
@pytest.mark.parametrize("empty", ["", " ", b"", [], ["", WHSEC], [WHSEC, ""], None, Secret("")])
def test_empty_secrets_are_refused(preset: Any, empty: Any):
    """No preset can be made with an empty secret, alone or in a list; the error is one for the
    command line, exit 3.
    """
    with pytest.raises(EmptySecret, match=r"empty or unset|found None") as caught:
        preset(empty)
    assert caught.value.exit_code == 3


def test_env_names_the_variable(monkeypatch: pytest.MonkeyPatch):
    """`env` reads a variable when the app starts; when it is unset or empty then, the error names
    it.
    """
    monkeypatch.setenv("ORDERS_SECRET", "s3cret")
    assert ok(
        GitHub(env("ORDERS_SECRET")),
        {"x-hub-signature-256": "sha256=" + digest(b"s3cret", BODY).hex()},
    )
    for value in ("", None):
        if value is None:
            monkeypatch.delenv("ORDERS_SECRET")
        else:
            monkeypatch.setenv("ORDERS_SECRET", value)
        with pytest.raises(
            EmptySecret,
            match=r"GitHub\(secret=\): expected a secret, found \$ORDERS_SECRET empty or unset",
        ):
            GitHub(env("ORDERS_SECRET")).check_secrets()


def test_a_secret_of_the_environment_may_be_any_bytes(monkeypatch: pytest.MonkeyPatch):
    """A secret with bytes that are not UTF-8 is used as it is."""
    monkeypatch.setenv("ORDERS_SECRET", "s3\udcffcret")
    signature = digest(b"s3\xffcret", BODY).hex()
    verify = GitHub(env("ORDERS_SECRET"))
    assert ok(verify, {"x-hub-signature-256": f"sha256={signature}"})
    assert not ok(verify, {"x-hub-signature-256": f"sha256={'0' * 64}"})


def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch):
    """No repr of a secret, a preset or an error holds the value."""
    monkeypatch.setenv("ORDERS_SECRET", "s3cret-value")
    secret = env("ORDERS_SECRET")
    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        repr(GitHub(secret)),
        repr(HMAC("s3cret-value", header="x")),
    ]
    with pytest.raises(UsageError) as caught:
        StandardWebhooks("whsec_s3cret-value")
    assert "s3cret" not in str([*shown, str(caught.value)])
    assert repr(secret) == "Secret($ORDERS_SECRET)"


def test_secrets_are_hidden_in_logs():
    """Making a preset is enough: from then on no log line shows the secret."""
    Bearer("a-token-nobody-else-has")
    assert "nobody-else" not in SECRETS.redact_text("the sender sent a-token-nobody-else-has")


def test_ed25519_keys_are_named():
    """A public-key secret is refused when the preset is made, not at the first request."""
    with pytest.raises(UsageError, match="ed25519"):
        StandardWebhooks("whpk_" + b64(bytes(32)))


@pytest.mark.parametrize(
    "options",
    [
        {"signed": "{timestamp}.{body}"},
        {"signed": "{body}", "timestamp_header": "X-Ts"},
        {"signed": "{timestamp}", "timestamp_header": "X-Ts"},
        {"signed": "{id}.{body}"},
        {"id_header": "X-Id"},
        {"algorithm": "md5"},
        {"encoding": "base32"},
    ],
)
def test_hmac_must_add_up(options: dict[str, Any]):
    """A timestamp or id that is not signed, a signature not over the body, and unknown algorithms
    are refused at once.
    """
    with pytest.raises(UsageError, match="HMAC"):
        HMAC("s3cret", header="X-Sig", **options)
