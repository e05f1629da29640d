"""How senders prove who they are: one table of the ways, one function that checks them.

`webhook.py` calls `Verify.reason_to_refuse` once per request with the raw bytes, before anything is parsed. Whatever the
headers hold, the answer is a reason (for the log; the sender gets one fixed 401) or None, never an exception. Digests and
tokens are compared in constant time. Every preset takes one secret or several (rotation: any of them will do); an empty or
unset one raises EmptySecret when the preset is made. Secrets never show in a repr.

    StandardWebhooks  GitHub  Stripe  Slack  GitLab  Shopify  MLflow        vendors
    HMAC  Bearer  Token                                                     anybody else; `verify="none"` is written out
"""

import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import msgspec

from eventflow.core.errors import EmptySecret, UsageError
from eventflow.logs.redaction import SECRETS

TOLERANCE = 300
"""Seconds a signed timestamp may be off, both ways, as Standard Webhooks asks."""

MAX_SIGNATURES = 20
"""Signatures one header may list: rotation needs two, and each costs a comparison."""

# --------------------------------------------------------------------------- secrets


class Secret:
    """A secret and where it came from. It shows the place, never the value."""

    __slots__ = ("_value", "source")

    def __init__(self, value: str | bytes, source: str = "the given value") -> None:
        self._value, self.source = value, source

    def reveal(self) -> bytes:
        return self._value.encode() if isinstance(self._value, str) else self._value

    def __repr__(self) -> str:
        return f"Secret({self.source})"


Secrets: TypeAlias = str | bytes | Secret | Sequence[str | bytes | Secret]


def env(name: str) -> Secret:
    """The secret in an environment variable. If it is unset or empty, the preset that takes it raises EmptySecret naming it."""
    return Secret(os.environ.get(name, ""), f"${name}")


def _revealed(given: Secrets, where: str) -> tuple[bytes, ...]:
    listed: Sequence[str | bytes | Secret] = (
        [given] if isinstance(given, str | bytes | Secret) else list(given or ())
    )
    secrets = [one if isinstance(one, Secret) else Secret(one or b"") for one in listed]
    for secret in secrets or [Secret(b"", "an empty list")]:
        if not secret.reveal().strip():
            raise EmptySecret(where, secret.source)
        SECRETS.register(secret.reveal())  # whoever prints it, the log hides it
    return tuple(secret.reveal() for secret in secrets)


def _standard_key(secret: bytes) -> bytes:
    """`whsec_` + base64, with or without padding. Stripe writes the same prefix before plain text: not the same key."""
    encoded = secret.removeprefix(b"whsec_")
    try:
        key = binascii.a2b_base64(encoded + b"=" * (-len(encoded) % 4), strict_mode=True)
    except binascii.Error:
        key = b""
    if not key:
        raise UsageError(
            'StandardWebhooks: expected a secret of the form "whsec_" + base64, found another (whsk_ and whpk_ keys '
            "of ed25519 are not supported)"
        )
    return key


# --------------------------------------------------------------------------- the table


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One way to prove a request, as the sender's documentation has it.

    `header` holds the signatures: split at `separator` (empty: one), each begins with `prefix`, others are ignored. `signed` is
    what the digest is over: literal text, `{body}`, `{id}` (from `id_header`) and `{timestamp}` (from `timestamp_header`, or
    from the entry of `header` that begins with `timestamp_prefix`). An empty `signed`: the header carries the secret itself.
    """

    header: str
    signed: str = "{body}"
    prefix: str = ""
    separator: str = ""
    encoding: Literal["hex", "base64"] = "hex"
    algorithm: str = "sha256"
    id_header: str = ""
    timestamp_header: str = ""
    timestamp_prefix: str = ""

    @property
    def headers(self) -> list[str]:
        """All it reads. One of them given twice is refused: two readers might take different ones."""
        return [name for name in (self.header, self.id_header, self.timestamp_header) if name]


class Vendor(msgspec.Struct, frozen=True, kw_only=True):
    """What a sender's events are known by and called. Fields are paths into the JSON body, such as `event.type`.

    The event id is a signed one, else the first of `id_headers` that is there, else `id_field`. The type is `type_prefix` and
    what `type_header` holds, or the first of `type_fields` that is there (`a+b` joins two). `cloudevents`: its requests may
    carry CloudEvents. `challenge`: it asks for its `url_verification` challenge back.
    """

    name: str
    id_headers: tuple[str, ...] = ()
    id_field: str = ""
    type_prefix: str = ""
    type_header: str = ""
    type_fields: tuple[str, ...] = ()
    cloudevents: bool = False
    challenge: bool = False


def _standard(family: str) -> Way:
    return Way(
        header=f"{family}-signature", id_header=f"{family}-id", timestamp_header=f"{family}-timestamp",
        signed="{id}.{timestamp}.{body}", separator=" ", prefix="v1,", encoding="base64",
    )  # fmt: skip


STANDARD = (_standard("webhook"), _standard("svix"))
GITHUB = Way(header="x-hub-signature-256", prefix="sha256=")
STRIPE = Way(
    header="stripe-signature",
    separator=",",
    prefix="v1=",
    timestamp_prefix="t=",
    signed="{timestamp}.{body}",
)
SLACK = Way(
    header="x-slack-signature",
    timestamp_header="x-slack-request-timestamp",
    prefix="v0=",
    signed="v0:{timestamp}:{body}",
)
GITLAB = Way(header="x-gitlab-token", signed="")
SHOPIFY = Way(header="x-shopify-hmac-sha256", encoding="base64")
MLFLOW = Way(
    header="x-mlflow-signature", id_header="x-mlflow-delivery-id", timestamp_header="x-mlflow-timestamp",
    signed="{id}.{timestamp}.{body}", separator=" ", prefix="v1,", encoding="base64",
)  # fmt: skip
BEARER = Way(header="authorization", prefix="Bearer ", signed="")

# --------------------------------------------------------------------------- checking


class Check(msgspec.Struct, frozen=True):
    """One proof a request must give: any of `ways`, with any of `keys`."""

    ways: tuple[Way, ...]
    keys: tuple[bytes, ...]


class Verify:
    """How the requests of one webhook are verified: every check must hold. `vendor` says what its events are called."""

    __slots__ = ("_checks", "vendor")

    def __init__(self, vendor: Vendor, *checks: Check) -> None:
        self.vendor = vendor
        self._checks = tuple(
            (check.keys, tuple((way, _template(way.signed)) for way in check.ways))
            for check in checks
        )

    def __repr__(self) -> str:
        return f"{self.vendor.name}(...)"

    @property
    def signed_headers(self) -> list[str]:
        """Every header that proves something; none of them is ever stored."""
        return [name for _, ways in self._checks for way, _ in ways for name in way.headers]

    @property
    def challenge(self) -> str | None:
        """What a 401 asks for (RFC 9110): `Basic` or `Bearer`, where the proof is that. Some senders wait for it."""
        schemes = [
            way.prefix.strip()
            for _, ways in self._checks
            for way, _ in ways
            if way.header == "authorization"
        ]
        return f'{schemes[0]} realm="hooks"' if schemes and schemes[0] else None

    def signed_id(self, headers: Mapping[str, str]) -> str | None:
        """The id that the signature covers. Ask after `reason_to_refuse`: another family's id header may be forged."""
        for _, ways in self._checks:
            way, _ = _offered(ways, headers)
            if way.id_header:
                return headers.get(way.id_header)
        return None

    def reason_to_refuse(
        self, headers: Mapping[str, str], repeated: Iterable[str], body: bytes, now: int
    ) -> str | None:
        """None for a request from a real sender, else the reason, for the log alone.

        `headers` by lower-case name as latin-1 text; `repeated` are those given more than once; `now` in seconds.
        """
        for keys, ways in self._checks:
            way, template = _offered(ways, headers)
            if repeated and any(name in repeated for name in way.headers):
                return "repeated header"
            if why := _fault(way, template, keys, headers, body, now):
                return why
        return None


_Template: TypeAlias = tuple[str | bytes, ...]


def _offered(
    ways: Sequence[tuple[Way, _Template]], headers: Mapping[str, str]
) -> tuple[Way, _Template]:
    """The first way whose signature is there."""
    for pair in ways:
        if pair[0].header in headers:
            return pair
    return ways[0]


def _template(signed: str) -> _Template:
    """Literal bytes, and the names `id`, `timestamp`, `body` for what stands in their place."""
    parts = re.split(r"\{(id|timestamp|body)\}", signed)
    return tuple(part if place % 2 else part.encode() for place, part in enumerate(parts) if part)


def _fault(
    way: Way,
    template: _Template,
    keys: Sequence[bytes],
    headers: Mapping[str, str],
    body: bytes,
    now: int,
) -> str | None:
    text = headers.get(way.header)
    if text is None:
        return "missing header"
    if not template:
        return None if _is_token(way, text, keys) else "wrong token"
    entries = text.split(way.separator) if way.separator else [text]
    if len(entries) > MAX_SIGNATURES:
        return "too many signatures"
    values: dict[str | bytes, bytes] = {"body": body}
    if way.timestamp_header or way.timestamp_prefix:
        timestamp = _timestamp(way, headers, entries)
        if not _recent(timestamp, now):
            return "timestamp missing, malformed or outside the window"
        values["timestamp"] = timestamp.encode()
    if way.id_header:
        if not headers.get(way.id_header):
            return "missing id"
        values["id"] = headers[way.id_header].encode("latin-1")
    message = b"".join([values[part] if isinstance(part, str) else part for part in template])
    return None if _is_signed(way, entries, keys, message) else "no signature matches"


def _timestamp(way: Way, headers: Mapping[str, str], entries: Sequence[str]) -> str:
    if way.timestamp_header:
        return headers.get(way.timestamp_header, "")
    stamps = [entry for entry in entries if entry.startswith(way.timestamp_prefix)]
    return stamps[0][len(way.timestamp_prefix) :] if len(stamps) == 1 else ""


_TIMESTAMP = re.compile(r"[0-9]{1,12}")


def _recent(timestamp: str, now: int) -> bool:
    return _TIMESTAMP.fullmatch(timestamp) is not None and abs(int(timestamp) - now) <= TOLERANCE


def _is_signed(way: Way, entries: Sequence[str], keys: Sequence[bytes], message: bytes) -> bool:
    digests = [hmac.digest(key, message, way.algorithm) for key in keys]
    found = False
    for entry in entries:
        offered = (
            _decoded(entry[len(way.prefix) :], way.encoding)
            if entry.startswith(way.prefix)
            else b""
        )
        for digest in digests:
            found |= hmac.compare_digest(offered, digest)
    return found


def _decoded(text: str, encoding: str) -> bytes:
    """The digest a header offers; empty, which matches nothing, when it is not written strictly."""
    try:
        return (
            binascii.unhexlify(text)
            if encoding == "hex"
            else binascii.a2b_base64(text, strict_mode=True)
        )
    except ValueError:
        return b""


def _is_token(way: Way, text: str, keys: Sequence[bytes]) -> bool:
    """Both sides are hashed first, so that not even the length shows in the time. Schemes are matched in any case."""
    if text[: len(way.prefix)].lower() != way.prefix.lower():
        return False
    offered = hashlib.sha256(text[len(way.prefix) :].encode("latin-1")).digest()
    found = False
    for key in keys:
        found |= hmac.compare_digest(offered, hashlib.sha256(key).digest())
    return found


# --------------------------------------------------------------------------- presets


def StandardWebhooks(secret: Secrets) -> Verify:
    """Standard Webhooks v1, with `webhook-*` or `svix-*` headers. Secrets are `whsec_` + base64. The id is `webhook-id`."""
    vendor = Vendor(name="StandardWebhooks", type_fields=("type",), cloudevents=True)
    return Verify(vendor, Check(STANDARD, _standard_keys(secret, "StandardWebhooks(secret=)")))


def _standard_keys(secret: Secrets, where: str) -> tuple[bytes, ...]:
    return tuple(_standard_key(one) for one in _revealed(secret, where))


def GitHub(secret: Secrets) -> Verify:
    """`X-Hub-Signature-256`. Types are `com.github.push`…; the id is `X-GitHub-Delivery`, the same on redelivery."""
    ids = ("x-github-delivery",)
    vendor = Vendor(
        name="GitHub", id_headers=ids, type_prefix="com.github.", type_header="x-github-event"
    )
    return Verify(vendor, Check((GITHUB,), _revealed(secret, "GitHub(secret=)")))


def Stripe(secret: Secrets) -> Verify:
    """`Stripe-Signature`; the key is the whole `whsec_…` string as text. Types are `com.stripe.…`; the id is `id`."""
    vendor = Vendor(name="Stripe", id_field="id", type_prefix="com.stripe.", type_fields=("type",))
    return Verify(vendor, Check((STRIPE,), _revealed(secret, "Stripe(secret=)")))


def Slack(secret: Secrets) -> Verify:
    """`X-Slack-Signature`; answers the `url_verification` challenge. Types are `com.slack.message`…; the id is `event_id`."""
    types = ("event.type", "type")
    vendor = Vendor(
        name="Slack",
        id_field="event_id",
        type_prefix="com.slack.",
        type_fields=types,
        challenge=True,
    )
    return Verify(vendor, Check((SLACK,), _revealed(secret, "Slack(secret=)")))


def GitLab(token: Secrets | None = None, *, signing: Secrets | None = None) -> Verify:
    """The secret token (`X-Gitlab-Token`), the signing token (Standard Webhooks), or both: then both must hold.

    Types are `com.gitlab.push`…; the id is the signed `webhook-id`, else `Idempotency-Key` or `X-Gitlab-Event-UUID`.
    """
    ids = ("idempotency-key", "x-gitlab-event-uuid")
    vendor = Vendor(
        name="GitLab", id_headers=ids, type_prefix="com.gitlab.", type_fields=("object_kind",)
    )
    checks: list[Check] = []
    if token is not None or signing is None:
        checks.append(Check((GITLAB,), _revealed(token or "", "GitLab(token=)")))
    if signing is not None:
        checks.append(Check(STANDARD[:1], _standard_keys(signing, "GitLab(signing=)")))
    return Verify(vendor, *checks)


def Shopify(secret: Secrets) -> Verify:
    """`X-Shopify-Hmac-Sha256`. Types are `com.shopify.orders.create`…; the id is `X-Shopify-Event-Id`."""
    ids = ("x-shopify-event-id", "x-shopify-webhook-id")
    vendor = Vendor(
        name="Shopify", id_headers=ids, type_prefix="com.shopify.", type_header="x-shopify-topic"
    )
    return Verify(vendor, Check((SHOPIFY,), _revealed(secret, "Shopify(secret=)")))


def MLflow(secret: Secrets) -> Verify:
    """`X-MLflow-Signature`. Types are `org.mlflow.model_version.created`…; the id is `X-MLflow-Delivery-Id`."""
    vendor = Vendor(name="MLflow", type_prefix="org.mlflow.", type_fields=("entity+action",))
    return Verify(vendor, Check((MLFLOW,), _revealed(secret, "MLflow(secret=)")))


def HMAC(
    secret: Secrets,
    *,
    header: str,
    algorithm: Literal["sha256", "sha384", "sha512", "sha1"] = "sha256",
    encoding: Literal["hex", "base64"] = "hex",
    prefix: str = "",
    signed: str = "",
    timestamp_header: str = "",
    id_header: str = "",
) -> Verify:
    """A digest of the body in `header`, after `prefix`.

    `signed` is what the digest is over, from `{body}`, `{timestamp}` and `{id}`; by default `{timestamp}.{body}` when there is
    a `timestamp_header` (seconds, 300 either way), else `{body}`. What is not signed proves nothing and is refused here.
    """
    signed = signed or ("{timestamp}.{body}" if timestamp_header else "{body}")
    for field, given in (
        ("{body}", "header"),
        ("{timestamp}", timestamp_header),
        ("{id}", id_header),
    ):
        if (field in signed) != bool(given):
            raise UsageError(
                f"HMAC(signed={signed!r}): expected {field} to be signed and its header to be named, found one of the two"
            )
    if algorithm not in ("sha256", "sha384", "sha512", "sha1") or encoding not in ("hex", "base64"):
        raise UsageError(
            f"HMAC: expected sha256, sha384, sha512 or sha1 in hex or base64, found {algorithm} in {encoding}"
        )
    way = Way(
        header=header.lower(), algorithm=algorithm, encoding=encoding, prefix=prefix, signed=signed,
        timestamp_header=timestamp_header.lower(), id_header=id_header.lower(),
    )  # fmt: skip
    vendor = Vendor(name="HMAC", cloudevents=True)
    return Verify(vendor, Check((way,), _revealed(secret, "HMAC(secret=)")))


def Bearer(token: Secrets) -> Verify:
    """`Authorization: Bearer TOKEN`."""
    return Verify(
        Vendor(name="Bearer", cloudevents=True),
        Check((BEARER,), _revealed(token, "Bearer(token=)")),
    )


def Token(token: Secrets, *, header: str, prefix: str = "") -> Verify:
    """`header` equals the token, after `prefix`."""
    way = Way(header=header.lower(), prefix=prefix, signed="")
    return Verify(
        Vendor(name="Token", cloudevents=True), Check((way,), _revealed(token, "Token(token=)"))
    )


NOBODY = Verify(Vendor(name="none", cloudevents=True))
"""What `verify="none"` stands for: nothing is checked."""
