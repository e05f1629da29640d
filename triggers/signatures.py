"""Verification of webhook senders: a table of signing schemes, and one function that checks them.

`http_endpoint.py` calls `Verify.reason_to_refuse` once per request with the raw bytes, before
anything is parsed. It returns a reason (for the log; the sender gets one fixed 401) or None, and
never raises, whatever the headers hold. Digests and tokens are compared in constant time. Each
preset takes one secret or several (for rotation: any of them is accepted); an empty or unset one
raises EmptySecret when the preset is made. Secrets never show in a repr.

    StandardWebhooks  GitHub  Stripe  Slack  GitLab  Shopify  MLflow     vendors
    HMAC  Bearer  Token                                                  other senders

`verify="none"`, written out, means no verification.
"""

import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import msgspec

from eventflow.core.declarations import declaration
from eventflow.core.errors import EmptySecret, UsageError
from eventflow.logs.redaction import SECRETS

TOLERANCE_SECONDS = 300
"""How far a signed timestamp may be off, both ways, as Standard Webhooks specifies."""

MAX_SIGNATURES = 20
"""In one header. Rotation needs two, and each costs a comparison."""

# --------------------------------------------------------------------------- secrets


class Secret:
    """A secret and its origin. The repr shows the origin, never the value."""

    __slots__ = ("_value", "source")

    def __init__(
        self, value: str | bytes | Callable[[], str], source: str = "the given value"
    ) -> None:
        self._value: str | bytes | Callable[[], str] = value
        self.source: str = source

    @property
    def is_deferred(self) -> bool:
        """Whether it is read when it is needed: not before the app starts."""
        return callable(self._value)

    def reveal(self) -> bytes:
        """The secret's bytes; those of an environment variable need not be UTF-8."""
        value = self._value() if callable(self._value) else self._value
        return value.encode(errors="surrogateescape") if isinstance(value, str) else value

    def __repr__(self) -> str:
        return f"Secret({self.source})"


Secrets: TypeAlias = str | bytes | Secret | Sequence[str | bytes | Secret]


def env(name: str) -> Secret:
    """The secret in an environment variable, read when the app starts to listen.

    Importing the app does not need it. If it is unset or empty then, the start raises EmptySecret
    (exit 3).
    """
    return Secret(lambda: os.environ.get(name, ""), f"${name}")


class SecretKeys:
    """The keys of one proof, made of its secrets: of literal ones at once, of `env` at first use.

    Raises EmptySecret naming the option and the origin, and what `convert` raises.
    """

    __slots__ = ("_convert", "_keys", "_option", "_secrets")

    def __init__(
        self, given: Secrets, option: str, convert: Callable[[bytes], bytes] | None = None
    ) -> None:
        listed: Sequence[str | bytes | Secret] = (
            [given] if isinstance(given, str | bytes | Secret) else [*(given or ())]
        )
        self._secrets: list[Secret] = [
            one if isinstance(one, Secret) else Secret(one or b"") for one in listed
        ] or [Secret(b"", "None" if given is None else "an empty list")]  # pyright: ignore[reportUnnecessaryComparison]
        self._option: str = option
        self._convert: Callable[[bytes], bytes] | None = convert
        self._keys: tuple[bytes, ...] | None = None
        for secret in self._secrets:
            if not secret.is_deferred:
                self._key(secret)

    def get(self) -> tuple[bytes, ...]:
        if self._keys is None:
            self._keys = tuple(map(self._key, self._secrets))
        return self._keys

    def _key(self, secret: Secret) -> bytes:
        value = secret.reveal()
        if not value.strip():
            raise EmptySecret(self._option, secret.source)
        SECRETS.register(value)  # logs redact it
        return value if self._convert is None else self._convert(value)


def _standard_key(secret: bytes) -> bytes:
    """The key of `whsec_` + base64, with or without padding. (Stripe's `whsec_` keys are plain
    text.)
    """
    encoded = secret.removeprefix(b"whsec_")
    try:
        key = binascii.a2b_base64(encoded + b"=" * (-len(encoded) % 4), strict_mode=True)
    except binascii.Error:
        key = b""
    if not key:
        raise UsageError(
            'StandardWebhooks: expected a secret of the form "whsec_" + base64, found another '
            "(whsk_ and whpk_ keys of ed25519 are not supported)"
        )
    return key


# --------------------------------------------------------------------------- the table


class SigningScheme(msgspec.Struct, frozen=True, kw_only=True):
    """How a sender signs a request, as its documentation says.

    `header` holds the signatures, split at `separator` (empty: one); those that do not begin with
    `prefix` are ignored. `signed` is the text under the digest: literal text, `{body}`, `{id}`
    (from `id_header`) and `{timestamp}` (from `timestamp_header`, or from the entry of `header`
    that begins with `timestamp_prefix`). An empty `signed`: the header holds the secret itself.
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
        """All that it reads. A repeated one is refused: two readers might use different values."""
        return [name for name in (self.header, self.id_header, self.timestamp_header) if name]


class Vendor(msgspec.Struct, frozen=True, kw_only=True):
    """Ids and types of a sender's events. Fields are paths into the JSON body: `event.type`.

    The event id is a signed one, else the first of `id_headers` whose headers are all present,
    joined by "/", else `id_field`. Where one header covers more than one event (all topics of an
    action, a chain of events), a second one tells them apart; `body` is the body's digest.
    `delivery_fields` are fields of the body about the delivery, which may change when it is
    repeated: the event's data leaves them out. The type is `type_prefix` and the value of
    `type_header`, or of the first present one of `type_fields` (`a+b` joins two). `cloudevents`:
    requests may hold CloudEvents. `challenge`: the sender expects its `url_verification` challenge
    in the response.
    """

    name: str
    id_headers: tuple[tuple[str, ...], ...] = ()
    id_field: str = ""
    delivery_fields: tuple[str, ...] = ()
    type_prefix: str = ""
    type_header: str = ""
    type_fields: tuple[str, ...] = ()
    cloudevents: bool = False
    challenge: bool = False


def _standard(family: str) -> SigningScheme:
    return SigningScheme(
        header=f"{family}-signature",
        id_header=f"{family}-id",
        timestamp_header=f"{family}-timestamp",
        signed="{id}.{timestamp}.{body}",
        separator=" ",
        prefix="v1,",
        encoding="base64",
    )


STANDARD = (_standard("webhook"), _standard("svix"))
GITHUB = SigningScheme(header="x-hub-signature-256", prefix="sha256=")
STRIPE = SigningScheme(
    header="stripe-signature",
    separator=",",
    prefix="v1=",
    timestamp_prefix="t=",
    signed="{timestamp}.{body}",
)
SLACK = SigningScheme(
    header="x-slack-signature",
    timestamp_header="x-slack-request-timestamp",
    prefix="v0=",
    signed="v0:{timestamp}:{body}",
)
GITLAB = SigningScheme(header="x-gitlab-token", signed="")
SHOPIFY = SigningScheme(header="x-shopify-hmac-sha256", encoding="base64")
MLFLOW = SigningScheme(
    header="x-mlflow-signature",
    id_header="x-mlflow-delivery-id",
    timestamp_header="x-mlflow-timestamp",
    signed="{id}.{timestamp}.{body}",
    separator=" ",
    prefix="v1,",
    encoding="base64",
)
BEARER = SigningScheme(header="authorization", prefix="Bearer ", signed="")

# --------------------------------------------------------------------------- checking


class RequiredProof(msgspec.Struct, frozen=True):
    """One proof that a request must have: by any of `schemes`, with any of `keys`."""

    schemes: tuple[SigningScheme, ...]
    keys: SecretKeys


class Verify:
    """The verification of one webhook: a request must have every proof."""

    __slots__ = ("_proofs", "vendor")

    def __init__(self, vendor: Vendor, *proofs: RequiredProof) -> None:
        self.vendor = vendor
        self._proofs = tuple(
            (proof.keys, tuple((scheme, _template(scheme.signed)) for scheme in proof.schemes))
            for proof in proofs
        )

    def __repr__(self) -> str:
        return f"{self.vendor.name}(...)"

    def check_secrets(self) -> None:
        """Raises EmptySecret for a secret of the environment that is empty or unset."""
        for keys, _ in self._proofs:
            keys.get()

    @property
    def signed_headers(self) -> list[str]:
        """The headers of all proofs; none of them is ever stored."""
        return [
            name for _, schemes in self._proofs for scheme, _ in schemes for name in scheme.headers
        ]

    @property
    def challenge(self) -> str | None:
        """The `WWW-Authenticate` of a 401 (RFC 9110) for `Basic` and `Bearer`; some senders need
        it.
        """
        names = [
            scheme.prefix.strip()
            for _, schemes in self._proofs
            for scheme, _ in schemes
            if scheme.header == "authorization"
        ]
        return f'{names[0]} realm="hooks"' if names and names[0] else None

    def signed_id(self, headers: Mapping[str, str]) -> str | None:
        """The id that the signature covers, of a request that `reason_to_refuse` has accepted."""
        for _, schemes in self._proofs:
            scheme, _ = _scheme_of(schemes, headers)
            if scheme.id_header:
                return headers.get(scheme.id_header)
        return None

    def reason_to_refuse(
        self, headers: Mapping[str, str], repeated: Iterable[str], body: bytes, now: int
    ) -> str | None:
        """None for a request with valid proofs, else the reason, for the log only.

        `headers` by lower-case name as latin-1 text; `repeated`: names that occur more than once;
        `now` in seconds.
        """
        try:
            self.check_secrets()
        except EmptySecret as missing:  # a test that opened the app without its secrets
            return str(missing)
        for keys, schemes in self._proofs:
            scheme, template = _scheme_of(schemes, headers)
            if repeated and any(name in repeated for name in scheme.headers):
                return "repeated header"
            if reason := _rejection_reason(scheme, template, keys.get(), headers, body, now):
                return reason
        return None


_Template: TypeAlias = tuple[str | bytes, ...]


def _scheme_of(
    schemes: Sequence[tuple[SigningScheme, _Template]], headers: Mapping[str, str]
) -> tuple[SigningScheme, _Template]:
    """The first scheme whose signature is present."""
    for pair in schemes:
        if pair[0].header in headers:
            return pair
    return schemes[0]


def _template(signed: str) -> _Template:
    """Literal bytes, and the names `id`, `timestamp`, `body` as text."""
    parts = re.split(r"\{(id|timestamp|body)\}", signed)
    return tuple(part if index % 2 else part.encode() for index, part in enumerate(parts) if part)


def _rejection_reason(
    scheme: SigningScheme,
    template: _Template,
    keys: Sequence[bytes],
    headers: Mapping[str, str],
    body: bytes,
    now: int,
) -> str | None:
    text = headers.get(scheme.header)
    if text is None:
        return "missing header"
    if not template:
        return None if _is_token(scheme, text, keys) else "wrong token"
    entries = text.split(scheme.separator) if scheme.separator else [text]
    if len(entries) > MAX_SIGNATURES:
        return "too many signatures"
    values: dict[str | bytes, bytes] = {"body": body}
    if scheme.timestamp_header or scheme.timestamp_prefix:
        timestamp = _timestamp(scheme, headers, entries)
        if not _is_recent(timestamp, now):
            return "timestamp missing, malformed or outside the window"
        values["timestamp"] = timestamp.encode()
    if scheme.id_header:
        if not headers.get(scheme.id_header):
            return "missing id"
        values["id"] = headers[scheme.id_header].encode("latin-1")
    message = b"".join([values[part] if isinstance(part, str) else part for part in template])
    return None if _is_signed(scheme, entries, keys, message) else "no signature matches"


def _timestamp(scheme: SigningScheme, headers: Mapping[str, str], entries: Sequence[str]) -> str:
    if scheme.timestamp_header:
        return headers.get(scheme.timestamp_header, "")
    stamps = [entry for entry in entries if entry.startswith(scheme.timestamp_prefix)]
    return stamps[0][len(scheme.timestamp_prefix) :] if len(stamps) == 1 else ""


_TIMESTAMP = re.compile(r"[0-9]{1,12}")


def _is_recent(timestamp: str, now: int) -> bool:
    return (
        _TIMESTAMP.fullmatch(timestamp) is not None
        and abs(int(timestamp) - now) <= TOLERANCE_SECONDS
    )


def _is_signed(
    scheme: SigningScheme, entries: Sequence[str], keys: Sequence[bytes], message: bytes
) -> bool:
    digests = [hmac.digest(key, message, scheme.algorithm) for key in keys]
    found = False
    for entry in entries:
        offered = (
            _decoded(entry[len(scheme.prefix) :], scheme.encoding)
            if entry.startswith(scheme.prefix)
            else b""
        )
        for digest in digests:
            found |= hmac.compare_digest(offered, digest)
    return found


def _decoded(text: str, encoding: str) -> bytes:
    """The digest in a header; empty, which matches nothing, if it is not strictly encoded."""
    try:
        return (
            binascii.unhexlify(text)
            if encoding == "hex"
            else binascii.a2b_base64(text, strict_mode=True)
        )
    except ValueError:
        return b""


def _is_token(scheme: SigningScheme, text: str, keys: Sequence[bytes]) -> bool:
    """Compares hashes, so that the time does not show the length. The prefix matches in
    any case.
    """
    if text[: len(scheme.prefix)].lower() != scheme.prefix.lower():
        return False
    offered = hashlib.sha256(text[len(scheme.prefix) :].encode("latin-1")).digest()
    found = False
    for key in keys:
        found |= hmac.compare_digest(offered, hashlib.sha256(key).digest())
    return found


# --------------------------------------------------------------------------- presets


@declaration
def StandardWebhooks(secret: Secrets) -> Verify:
    """Standard Webhooks v1, with `webhook-*` or `svix-*` headers; the id is `webhook-id`.

    Secrets are `whsec_` + base64.
    """
    vendor = Vendor(name="StandardWebhooks", type_fields=("type",), cloudevents=True)
    return Verify(
        vendor, RequiredProof(STANDARD, _standard_keys(secret, "StandardWebhooks(secret=)"))
    )


def _standard_keys(secret: Secrets, where: str) -> SecretKeys:
    return SecretKeys(secret, where, _standard_key)


@declaration
def GitHub(secret: Secrets) -> Verify:
    """`X-Hub-Signature-256`. Types are `com.github.push`…; the id is `X-GitHub-Delivery`."""
    ids = (("x-github-delivery",),)
    vendor = Vendor(
        name="GitHub", id_headers=ids, type_prefix="com.github.", type_header="x-github-event"
    )
    return Verify(vendor, RequiredProof((GITHUB,), SecretKeys(secret, "GitHub(secret=)")))


@declaration
def Stripe(secret: Secrets) -> Verify:
    """`Stripe-Signature`; the key is the whole text `whsec_…`. Types are `com.stripe.…`; the id is
    `id`. The data is without `pending_webhooks`, a count that changes from delivery to delivery.
    """
    vendor = Vendor(
        name="Stripe",
        id_field="id",
        delivery_fields=("pending_webhooks",),
        type_prefix="com.stripe.",
        type_fields=("type",),
    )
    return Verify(vendor, RequiredProof((STRIPE,), SecretKeys(secret, "Stripe(secret=)")))


@declaration
def Slack(secret: Secrets) -> Verify:
    """`X-Slack-Signature`; answers the `url_verification` challenge.

    Types are `com.slack.message`…; the id is `event_id`.
    """
    types = ("event.type", "type")
    vendor = Vendor(
        name="Slack",
        id_field="event_id",
        type_prefix="com.slack.",
        type_fields=types,
        challenge=True,
    )
    return Verify(vendor, RequiredProof((SLACK,), SecretKeys(secret, "Slack(secret=)")))


@declaration
def GitLab(token: Secrets | None = None, *, signing: Secrets | None = None) -> Verify:
    """The secret token (`X-Gitlab-Token`), the signing token (Standard Webhooks), or both of them.

    Types are `com.gitlab.push`…; the id is the signed `webhook-id`, else `Idempotency-Key`, else
    (of GitLab before 17.4) `X-Gitlab-Event-UUID`, which all events of a chain share, with the
    body's digest.
    """
    ids = (("idempotency-key",), ("x-gitlab-event-uuid", "body"))
    vendor = Vendor(
        name="GitLab", id_headers=ids, type_prefix="com.gitlab.", type_fields=("object_kind",)
    )
    proofs: list[RequiredProof] = []
    if token is not None or signing is None:
        proofs.append(RequiredProof((GITLAB,), SecretKeys(token or "", "GitLab(token=)")))
    if signing is not None:
        proofs.append(RequiredProof(STANDARD[:1], _standard_keys(signing, "GitLab(signing=)")))
    return Verify(vendor, *proofs)


@declaration
def Shopify(secret: Secrets) -> Verify:
    """`X-Shopify-Hmac-Sha256`. Types are `com.shopify.orders.create`…; the id is
    `X-Shopify-Event-Id`, which all topics of one action share, with `X-Shopify-Topic`.
    """
    ids = (("x-shopify-event-id", "x-shopify-topic"), ("x-shopify-webhook-id",))
    vendor = Vendor(
        name="Shopify", id_headers=ids, type_prefix="com.shopify.", type_header="x-shopify-topic"
    )
    return Verify(vendor, RequiredProof((SHOPIFY,), SecretKeys(secret, "Shopify(secret=)")))


@declaration
def MLflow(secret: Secrets) -> Verify:
    """`X-MLflow-Signature`. Types are `org.mlflow.model_version.created`…; the id is
    `X-MLflow-Delivery-Id`.
    """
    vendor = Vendor(name="MLflow", type_prefix="org.mlflow.", type_fields=("entity+action",))
    return Verify(vendor, RequiredProof((MLFLOW,), SecretKeys(secret, "MLflow(secret=)")))


@declaration
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

    `signed` is the text under the digest, of `{body}`, `{timestamp}` and `{id}`; by default
    `{timestamp}.{body}` if there is a `timestamp_header` (seconds, 300 either way), else `{body}`.
    UsageError for a timestamp or id that is not signed.
    """
    signed = signed or ("{timestamp}.{body}" if timestamp_header else "{body}")
    for field, given in (
        ("{body}", "header"),
        ("{timestamp}", timestamp_header),
        ("{id}", id_header),
    ):
        if (field in signed) != bool(given):
            raise UsageError(
                f"HMAC(signed={signed!r}): expected {field} to be signed "
                "and its header to be named, found one of the two"
            )
    if algorithm not in ("sha256", "sha384", "sha512", "sha1") or encoding not in ("hex", "base64"):
        raise UsageError(
            "HMAC: expected sha256, sha384, sha512 or sha1 in hex or base64, "
            f"found {algorithm} in {encoding}"
        )
    scheme = SigningScheme(
        header=header.lower(),
        algorithm=algorithm,
        encoding=encoding,
        prefix=prefix,
        signed=signed,
        timestamp_header=timestamp_header.lower(),
        id_header=id_header.lower(),
    )
    vendor = Vendor(name="HMAC", cloudevents=True)
    return Verify(vendor, RequiredProof((scheme,), SecretKeys(secret, "HMAC(secret=)")))


@declaration
def Bearer(token: Secrets) -> Verify:
    """`Authorization: Bearer TOKEN`."""
    return Verify(
        Vendor(name="Bearer", cloudevents=True),
        RequiredProof((BEARER,), SecretKeys(token, "Bearer(token=)")),
    )


@declaration
def Token(token: Secrets, *, header: str, prefix: str = "") -> Verify:
    """`header` equals the token, after `prefix`."""
    scheme = SigningScheme(header=header.lower(), prefix=prefix, signed="")
    return Verify(
        Vendor(name="Token", cloudevents=True),
        RequiredProof((scheme,), SecretKeys(token, "Token(token=)")),
    )


NO_VERIFICATION = Verify(Vendor(name="none", cloudevents=True))
"""`verify="none"`: nothing is checked."""
