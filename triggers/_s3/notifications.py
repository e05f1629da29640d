"""Parses S3 notifications in all their wrappings, and builds the one shape of event made of them.

`read_notifications` takes the body of a queue's message (or of a webhook): S3's own notification,
the same inside SNS, EventBridge's form, or MinIO's; it finds out which by the fields. Pure
functions. queue.py calls them for messages, `S3`'s helpers for webhooks, and listing.py builds its
events here too, so that all events have one shape.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, cast
from urllib.parse import unquote_to_bytes

import msgspec
import orjson

from eventflow.core.clock import to_us
from eventflow.core.errors import value_or_none
from eventflow.events.event import Event, parse_time

CREATED = "io.eventflow.s3.object.created"
REMOVED = "io.eventflow.s3.object.removed"
COMPLETED = "io.eventflow.s3.folder.completed"

Action: TypeAlias = Literal["created", "removed", "other"]

MAX_WRAPPING_DEPTH = 4
"""EventBridge in SNS in SQS has a depth of two."""

_SEQUENCER_WIDTH = 64
"""Sequencers are padded on the right with zeros to so many characters, and then compared. S3's have
16 to 20.
"""


class Notification(msgspec.Struct, frozen=True, kw_only=True):
    """One object, and what happened to it. `reason` is the sender's, such as `Put` or
    `CompleteMultipartUpload`.

    `key` is decoded. `etag` is opaque and without quotes. `sequencer` orders the notifications of
    one key only; it and `version` are None where the sender gives none, `etag` and `size` for
    removals.
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


class MalformedRecord(msgspec.Struct, frozen=True):
    """One record of a message that is no notification, beside others that are. `index` counts from
    0.
    """

    index: int
    body: bytes  # JSON; empty when it is nested too deep to be written by itself
    error: str


Parsed: TypeAlias = "list[Notification | MalformedRecord] | S3TestEvent"


class S3TestEvent(msgspec.Struct, frozen=True):
    """S3's test message, sent when the notification settings of a bucket are saved."""

    bucket: str


def read_notifications(body: Any) -> Parsed:
    """The notifications in a message (text, or parsed JSON), in order; `S3TestEvent` for S3's test
    message.

    Of several records, those that are no notifications are `MalformedRecord`s among the others.
    Raises ValueError when nothing in the message is a notification.
    """
    try:
        return _read_message(
            _parse(body) if isinstance(body, str | bytes) else body, MAX_WRAPPING_DEPTH
        )
    except orjson.JSONDecodeError as error:
        raise ValueError(f"expected a notification from S3, found no JSON: {error}") from None


def _parse(text: str | bytes) -> Any:
    """The JSON of a message. One record that orjson refuses (a lone surrogate in its key) must not
    cost those beside it, so then the standard library's parser reads it. Raises JSONDecodeError.
    """
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        found = value_or_none(json.loads, text)
        if isinstance(found, dict) and "Records" in found:
            return cast(dict[str, Any], found)
        raise


def _read_message(found: Any, left: int) -> Parsed:
    if not isinstance(found, dict) or not left:
        raise ValueError(f"expected a notification from S3, found {_describe(found)}")
    message = cast(dict[str, Any], found)
    if isinstance(message.get("Records"), list):
        return _from_records(message["Records"])
    if message.get("Event") == "s3:TestEvent":
        return S3TestEvent(str(message.get("Bucket", "")))
    if isinstance(inner := message.get("Message"), str) and "TopicArn" in message:
        try:
            return _read_message(_parse(inner), left - 1)
        except orjson.JSONDecodeError:
            raise ValueError(
                f"expected a notification from S3 inside that of SNS, found {inner[:80]!r}"
            ) from None
    if isinstance(message.get("detail"), dict):
        return [_from_eventbridge(message)]
    raise ValueError(f"expected a notification from S3, found {_describe(message)}")


def _describe(found: Any) -> str:
    if isinstance(found, dict):
        fields = list(cast(dict[str, Any], found))[:8]
        return f"an object with the fields {', '.join(fields) or 'none'}"
    return f"a JSON {type(found).__name__}"


# --------------------------------------------------------------------------- S3 and MinIO


def _from_records(records: Sequence[Any]) -> list[Notification | MalformedRecord]:
    """One result for each record. Raises the first record's ValueError when none is a
    notification.
    """
    found: list[Notification | MalformedRecord] = []
    readable = 0
    for index, record in enumerate(records):
        try:
            found.append(_from_record(record))
            readable += 1
        except ValueError as error:  # of this record: the others are recorded
            found.append(MalformedRecord(index, _record_json(record), str(error)))
    if records and not readable:
        raise ValueError(cast(MalformedRecord, found[0]).error)
    return found


def _record_json(record: Any) -> bytes:
    written = value_or_none(orjson.dumps, record)
    if written is None:  # more than 254 levels, or a lone surrogate
        text = value_or_none(json.dumps, record)
        written = (text or "").encode()
    return written


def _from_record(record: Any) -> Notification:
    """Keys are form-encoded. MinIO's event names begin with `s3:`, and its keys encode the slash
    too.
    """
    try:
        name = str(record["eventName"]).removeprefix("s3:")
        s3 = record["s3"]
        return _notification(
            s3["bucket"]["name"],
            unquote_key(s3["object"]["key"]),
            name,
            s3["object"],
            record.get("eventTime"),
        )
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise ValueError(
            "expected a record with eventName, s3.bucket.name and s3.object.key, "
            f"found none: {error!r}"
        ) from None


def unquote_key(key: str) -> str:
    """A form-encoded key, decoded once. Bytes that are not UTF-8 (S3 refuses such keys) become
    `\\xNN`.
    """
    return unquote_to_bytes(key.replace("+", " ")).decode("utf-8", "backslashreplace")


def _notification(
    bucket: object, key: object, name: str, thing: Mapping[str, Any], time: object
) -> Notification:
    if not (isinstance(bucket, str) and isinstance(key, str) and bucket and key):
        raise ValueError(f"expected the names of a bucket and a key, found {bucket!r} and {key!r}")
    kind, _, reason = name.partition(":")
    action = _ACTIONS.get(kind, "other")
    size = thing.get("size")
    etag = str(thing.get("eTag") or thing.get("etag") or "").strip('"')
    version = thing.get("versionId") or thing.get("version-id")
    sequencer = thing.get("sequencer") or None  # some stores write an empty one
    orjson.dumps((bucket, key, etag, str(version), sequencer, reason))  # or TypeError
    return Notification(
        action=action,
        bucket=bucket,
        key=key,
        size=size if action == "created" and _is_size(size) else None,
        etag=etag or None if action == "created" else None,
        version=None if version in (None, "null") else str(version),
        sequencer=sequencer if isinstance(sequencer, str) else None,
        time=_parse_time(time),
        reason=reason or kind,
    )


def _is_size(size: object) -> bool:
    return isinstance(size, int) and 0 <= size < 2**63


_ACTIONS: Mapping[str, Action] = {
    "ObjectCreated": "created", "ObjectRemoved": "removed", "LifecycleExpiration": "removed",
    "Object Created": "created", "Object Deleted": "removed",
}  # fmt: skip


def _parse_time(text: object) -> datetime | None:
    try:
        return parse_time(text) if isinstance(text, str) else None
    except ValueError:  # the event goes without a time
        return None


# --------------------------------------------------------------------------- EventBridge's form


def _from_eventbridge(message: Mapping[str, Any]) -> Notification:
    """Keys are not encoded."""
    source = message.get("source")
    detail = message["detail"]
    if source != "aws.s3":
        raise ValueError(f'expected source "aws.s3", found {source!r}')
    try:
        thing = detail["object"]
        found = _notification(
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


# --------------------------------------------------------------------------- id, order, event


def event_id(notification: Notification) -> str:
    """The event's id, from the object's version, else its sequencer, else its ETag and time.

    The same for every copy and wrapping of a notification. Without version and sequencer (other
    stores than AWS) the time counts in seconds, so that two notifications of one upload are one
    event.
    """
    version = notification.version or notification.sequencer
    if version is None:
        time = notification.time.replace(microsecond=0).isoformat() if notification.time else ""
        version = f"{notification.etag}\0{time}"
    return stable_id(notification.bucket, notification.key, notification.action, version)


def stable_id(*parts: object) -> str:
    """128 bits over these parts, in hex."""
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def is_older(one: str | None, other: str | None) -> bool:
    """Whether one sequencer of a key precedes another; False when either is unknown."""
    if not one or not other:
        return False
    return one.upper().ljust(_SEQUENCER_WIDTH, "0") < other.upper().ljust(_SEQUENCER_WIDTH, "0")


def to_event(
    notification: Notification, *, superseded: bool = False, ident: str | None = None
) -> Event:
    """The event of a notification. `superseded`: a later one of the same key arrived before."""
    more: dict[str, str | int | bool] = (
        {"s3reason": notification.reason} if notification.reason else {}
    )
    if superseded:
        more["superseded"] = True
    return Event(
        id=ident or event_id(notification),
        source=f"s3://{notification.bucket}",
        type=CREATED if notification.action == "created" else REMOVED,
        subject=notification.key,
        time=notification.time,
        data=event_data(notification),
        extensions=more,
    )


def event_data(notification: Notification) -> dict[str, Any]:
    """The data of every event: the same six fields."""
    return {
        "bucket": notification.bucket,
        "key": notification.key,
        "size": notification.size,
        "etag": notification.etag,
        "version": notification.version,
        "sequencer": notification.sequencer,
    }


# --------------------------------------------------------------------------- listed objects


class ListedObject(msgspec.Struct, frozen=True):
    """One listed object. `modified`: microseconds, in some stores when the upload began; 0: none
    that can be read.
    """

    key: str
    size: int
    etag: str
    modified: int


def to_listed_object(entry: Mapping[str, Any]) -> ListedObject | None:
    """None for an entry without a key, or with a size that is none."""
    try:
        size = int(entry.get("Size", 0))
    except (TypeError, ValueError):
        return None
    if not entry.get("Key") or not 0 <= size < 2**63:
        return None
    modified = entry.get("LastModified")
    at = (
        to_us(modified if modified.tzinfo else modified.replace(tzinfo=UTC))
        if isinstance(modified, datetime)
        else 0
    )
    return ListedObject(str(entry["Key"]), size, str(entry.get("ETag") or "").strip('"'), at)


def listed_event_id(bucket: str, found: ListedObject) -> str:
    """The id of a listed version. AWS lists whole seconds: the same content twice in one second is
    one version.
    """
    return stable_id(bucket, found.key, "listed", found.etag, found.size, found.modified)


def folder_event(
    marker: Event, folder: str, objects: Sequence[ListedObject], truncated: bool
) -> Event:
    """The event of a folder: its marker's event with the same id, and the objects of the folder."""
    listed = [{"key": each.key, "size": each.size, "etag": each.etag} for each in objects]
    data = {**marker.data, "folder": folder, "objects": listed, "truncated": truncated}
    return msgspec.structs.replace(marker, type=COMPLETED, subject=folder, data=data)
