"""What S3 says when an object arrived or went, in every wrapping it comes in; and the one shape of event made of it.

`read_notices` takes the body of a queue's message (or of a webhook): S3's own notification, the same inside SNS, EventBridge's
form, or MinIO's, told apart by their shape. Pure functions. queue.py calls them for messages, `S3`'s helpers for webhooks, and
sweep.py makes its events here too, so that all ways in have one shape.
"""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, cast
from urllib.parse import unquote_to_bytes

import msgspec
import orjson

from eventflow.core.clock import to_us
from eventflow.events.event import Event, parse_time

CREATED = "io.eventflow.s3.object.created"
REMOVED = "io.eventflow.s3.object.removed"
COMPLETED = "io.eventflow.s3.folder.completed"

Action: TypeAlias = Literal["created", "removed", "other"]

WRAPPINGS = 4
"""How deep a notification may be wrapped: EventBridge in SNS in SQS is two."""

_SEQUENCER = 64
"""Characters of a sequencer that are compared: S3's have 16 to 20; the shorter of two is padded with zeros on its right."""


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """One object, and what happened to it. `reason` is the sender's word, such as `Put` or `CompleteMultipartUpload`.

    `key` is decoded. `etag` is opaque and without quotes. `sequencer` orders the notices of one key, and only those; it and
    `version` are None where the sender gives none, `etag` and `size` for removals.
    """

    action: Action
    bucket: str
    key: str
    size: int | None = None
    etag: str | None = None
    version: str | None = None
    sequencer: str | None = None
    time: datetime | None = None
    reason: str = ""


class SettingsSaved(msgspec.Struct, frozen=True):
    """S3's test message: somebody saved the notification settings of this bucket."""

    bucket: str


def read_notices(body: Any) -> list[Notice] | SettingsSaved:
    """The notices in a message (text, or JSON already read), in order; `SettingsSaved` for S3's test message.

    ValueError says what it is instead.
    """
    try:
        return _read(orjson.loads(body) if isinstance(body, str | bytes) else body, WRAPPINGS)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"expected a notification from S3, found no JSON: {error}") from None


def _read(found: Any, left: int) -> list[Notice] | SettingsSaved:
    if not isinstance(found, dict) or not left:
        raise ValueError(f"expected a notification from S3, found {_shown(found)}")
    message = cast(dict[str, Any], found)
    if isinstance(message.get("Records"), list):
        return [_record(record) for record in message["Records"]]
    if message.get("Event") == "s3:TestEvent":
        return SettingsSaved(str(message.get("Bucket", "")))
    if isinstance(inner := message.get("Message"), str) and "TopicArn" in message:
        try:
            return _read(orjson.loads(inner), left - 1)
        except orjson.JSONDecodeError:
            raise ValueError(
                f"expected a notification from S3 inside that of SNS, found {inner[:80]!r}"
            ) from None
    if isinstance(message.get("detail"), dict):
        return [_from_eventbridge(message)]
    raise ValueError(f"expected a notification from S3, found {_shown(message)}")


def _shown(found: Any) -> str:
    if isinstance(found, dict):
        return f"an object with the fields {', '.join(list(cast(dict[str, Any], found))[:8]) or 'none'}"
    return f"a JSON {type(found).__name__}"


# --------------------------------------------------------------------------- S3's own form, and MinIO's


def _record(record: Any) -> Notice:
    """Keys are form-encoded here. MinIO's event names keep `s3:`, and its keys encode the slash as well."""
    try:
        name = str(record["eventName"]).removeprefix("s3:")
        s3 = record["s3"]
        return _notice(
            s3["bucket"]["name"],
            unquote_key(s3["object"]["key"]),
            name,
            s3["object"],
            record.get("eventTime"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"expected a record with eventName, s3.bucket.name and s3.object.key, found none: {error!r}"
        ) from None


def unquote_key(key: str) -> str:
    """A form-encoded key, decoded once. Bytes that are not UTF-8, which S3 itself refuses, show as `\\xNN`."""
    return unquote_to_bytes(key.replace("+", " ")).decode("utf-8", "backslashreplace")


def _notice(bucket: str, key: str, name: str, thing: Mapping[str, Any], time: object) -> Notice:
    if not isinstance(bucket, str) or not bucket or not key:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"expected the names of a bucket and a key, found {bucket!r} and {key!r}")
    kind, _, reason = name.partition(":")
    action = _ACTIONS.get(kind, "other")
    size, etag = thing.get("size"), str(thing.get("eTag") or thing.get("etag") or "").strip('"')
    version = thing.get("versionId") or thing.get("version-id")
    return Notice(
        action=action,
        bucket=bucket,
        key=key,
        size=size if action == "created" and isinstance(size, int) else None,
        etag=etag or None if action == "created" else None,
        version=None if version in (None, "null") else str(version),
        sequencer=thing.get("sequencer") if isinstance(thing.get("sequencer"), str) else None,
        time=_time(time),
        reason=reason or kind,
    )


_ACTIONS: Mapping[str, Action] = {
    "ObjectCreated": "created", "ObjectRemoved": "removed", "LifecycleExpiration": "removed",
    "Object Created": "created", "Object Deleted": "removed",
}  # fmt: skip


def _time(text: object) -> datetime | None:
    try:
        return parse_time(text) if isinstance(text, str) else None
    except ValueError:
        return None


# --------------------------------------------------------------------------- EventBridge's form


def _from_eventbridge(message: Mapping[str, Any]) -> Notice:
    """Keys are as they are here."""
    source, detail = message.get("source"), message["detail"]
    if source != "aws.s3":
        raise ValueError(f'expected source "aws.s3", found {source!r}')
    try:
        thing = detail["object"]
        found = _notice(
            detail["bucket"]["name"],
            thing["key"],
            str(message.get("detail-type")),
            thing,
            message.get("time"),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"expected detail.bucket.name and detail.object.key, found none: {error!r}"
        ) from None
    reason = detail.get("reason")
    return msgspec.structs.replace(found, reason=str(reason)) if reason else found


# --------------------------------------------------------------------------- identity, order, event


def identity(notice: Notice) -> str:
    """The event's id: the object's version if the sender names one, else its place in the key's order, else what is known.

    The same for every copy and every wrapping of a notice. Without version and sequencer (no AWS, an old store) it is content
    and second, so that two notices of one upload are one event.
    """
    version = notice.version or notice.sequencer
    if version is None:
        version = f"{notice.etag}\0{notice.time.replace(microsecond=0).isoformat() if notice.time else ''}"
    return digest(notice.bucket, notice.key, notice.action, version)


def digest(*parts: object) -> str:
    """A short stable id of these parts."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def is_older(one: str | None, other: str | None) -> bool:
    """Whether one sequencer of a key comes before another; False when either is unknown."""
    if not one or not other:
        return False
    return one.upper().ljust(_SEQUENCER, "0") < other.upper().ljust(_SEQUENCER, "0")


def to_event(notice: Notice, *, superseded: bool = False, ident: str | None = None) -> Event:
    """The event of a notice. `superseded`: a later notice of the same key was seen before."""
    more: dict[str, str | int | bool] = {"s3reason": notice.reason} if notice.reason else {}
    if superseded:
        more["superseded"] = True
    return Event(
        id=ident or identity(notice),
        source=f"s3://{notice.bucket}",
        type=CREATED if notice.action == "created" else REMOVED,
        subject=notice.key,
        time=notice.time,
        data=shape(notice),
        extensions=more,
    )


def shape(notice: Notice) -> dict[str, Any]:
    """The data of an event: the same six fields, whichever way it came."""
    return {
        "bucket": notice.bucket, "key": notice.key, "size": notice.size, "etag": notice.etag,
        "version": notice.version, "sequencer": notice.sequencer,
    }  # fmt: skip


# --------------------------------------------------------------------------- what a listing says


class Listed(msgspec.Struct, frozen=True):
    """One object as a listing shows it. `modified` in microseconds; some stores stamp when an upload began."""

    key: str
    size: int
    etag: str
    modified: int


def to_listed(entry: Mapping[str, Any]) -> Listed:
    modified = entry.get("LastModified")
    at = (
        to_us(modified if modified.tzinfo else modified.replace(tzinfo=UTC))
        if isinstance(modified, datetime)
        else 0
    )
    return Listed(
        str(entry["Key"]), int(entry.get("Size") or 0), str(entry.get("ETag") or "").strip('"'), at
    )


def listed_identity(bucket: str, found: Listed) -> str:
    """The id of a listed version. AWS lists whole seconds: what is replaced and put back within one is one version."""
    return digest(bucket, found.key, "listed", found.etag, found.size, found.modified)


def folder_event(marker: Event, folder: str, objects: Sequence[Listed], truncated: bool) -> Event:
    """The event of a whole folder, made of its marker's: the same id, and the objects that were there."""
    there = [{"key": each.key, "size": each.size, "etag": each.etag} for each in objects]
    data = {**marker.data, "folder": folder, "objects": there, "truncated": truncated}
    return msgspec.structs.replace(marker, type=COMPLETED, subject=folder, data=data)
