"""Notifications in every form, on messages as AWS, MinIO and EventBridge write them."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventflow.events.event import Event
from triggers._s3.key_filter import KeyFilter
from triggers._s3.notifications import (
    Notification,
    S3TestEvent,
    event_id,
    is_older,
    read_notifications,
    to_event,
    unquote_key,
)
from triggers.s3 import minio_id, minio_object

MINIO = {
    "EventName": "s3:ObjectCreated:Put",
    "Key": "lake/in/a b+c.csv",
    "Records": [
        {
            "eventVersion": "2.0",
            "eventSource": "minio:s3",
            "awsRegion": "",
            "eventTime": "2026-11-22T10:00:00.123Z",
            "eventName": "s3:ObjectCreated:Put",
            "userIdentity": {"principalId": "minio"},
            "requestParameters": {
                "principalId": "minio",
                "region": "",
                "sourceIPAddress": "127.0.0.1",
            },
            "responseElements": {
                "x-amz-id-2": "dd9025bab4ad464b049177c95eb6ebf374d3b3fd1af9251148b658df7ac2e3e8",
                "x-amz-request-id": "179A2B6C8D5E3F01",
                "x-minio-deployment-id": "b8f2e6f4",
                "x-minio-origin-endpoint": "http://127.0.0.1:9000",
            },
            "s3": {
                "s3SchemaVersion": "1.0",
                "configurationId": "Config",
                "bucket": {
                    "name": "lake",
                    "ownerIdentity": {"principalId": "minio"},
                    "arn": "arn:aws:s3:::lake",
                },
                "object": {
                    "key": "in%2Fa+b%2Bc.csv",
                    "size": 5,
                    "eTag": "5d41402abc4b2a76b9719d911017c592",
                    "contentType": "text/csv",
                    "userMetadata": {"content-type": "text/csv"},
                    "sequencer": "179A2B6C8D8A5F2E",
                },
            },
            "source": {
                "host": "127.0.0.1",
                "port": "",
                "userAgent": "MinIO (linux; amd64) minio-go/v7.0.91",
            },
        }
    ],
}
"""A message of MinIO's webhook, in the layout of its source code."""


def one(message: Any) -> Notification:
    found = read_notifications(json.dumps(message))
    assert isinstance(found, list) and len(found) == 1
    assert isinstance(found[0], Notification)
    return found[0]


def test_s2_a_minio_record():
    """MinIO's event names keep `s3:` and its keys encode the slash: type and key come out like
    AWS's.
    """
    notification = one(MINIO)
    assert (notification.action, notification.reason, notification.bucket, notification.key) == (
        "created",
        "Put",
        "lake",
        "in/a b+c.csv",
    )
    assert to_event(notification).type == "io.eventflow.s3.object.created"
    event = Event(id="1", source="/hooks/minio", type="x", data=MINIO)
    assert minio_object()(event) == {
        "bucket": "lake",
        "key": "in/a b+c.csv",
        "size": 5,
        "version": None,
        "etag": "5d41402abc4b2a76b9719d911017c592",
        "sequencer": "179A2B6C8D8A5F2E",
    }
    assert minio_id({}, json.dumps(MINIO).encode()) == event_id(notification)


def test_several_objects_in_one_message_of_minio():
    """Of several objects none is left out in silence: the id is that of all, and a flow that takes
    one object gets none of them but a reason.
    """
    record = MINIO["Records"][0]
    other = {**record, "s3": {**record["s3"], "object": {**record["s3"]["object"], "key": "b"}}}
    both = {"Records": [record, other]}
    ids = {minio_id({}, json.dumps(each).encode()) for each in (both, MINIO, {"Records": [other]})}
    assert len(ids) == 3 and None not in ids
    with pytest.raises(ValueError, match="one object, found 2"):
        minio_object()(Event(id="1", source="/hooks/minio", type="x", data=both))


@pytest.mark.parametrize("spelling", ["etag", "eTag"])
def test_s9_both_spellings_of_eventbridge(spelling: str):
    """EventBridge's key is not encoded; AWS writes `etag`, other servers `eTag`; `version-id` is
    the version.
    """
    thing = {
        "key": "in/a+b%20c.csv",
        "size": 5,
        spelling: "abc",
        "version-id": "v1",
        "sequencer": "00",
    }
    detail = {"bucket": {"name": "lake"}, "object": thing, "reason": "PutObject"}
    known = {
        "version": "0",
        "id": "17793124",
        "source": "aws.s3",
        "time": "2026-11-22T10:00:00Z",
        "detail": detail,
    }
    message = {**known, "detail-type": "Object Created"}
    notification = one(message)
    assert (notification.key, notification.etag, notification.version, notification.reason) == (
        "in/a+b%20c.csv",
        "abc",
        "v1",
        "PutObject",
    )
    assert notification.action == "created"
    assert one({**message, "detail-type": "Object Deleted"}).action == "removed"
    assert one({**message, "detail-type": "Object Tags Added"}).action == "other"


def test_one_upload_has_one_identity_in_every_wrapping():
    """Directly from S3 and through EventBridge, the same upload is the same event, with the same
    content.
    """
    thing = {
        "key": "in/a+b.csv",
        "size": 5,
        "eTag": "abc",
        "versionId": "v1",
        "sequencer": "0055AE",
    }
    straight = one(
        {
            "Records": [
                {
                    "eventName": "ObjectCreated:Put",
                    "eventTime": "2026-11-22T10:00:00.123Z",
                    "s3": {"bucket": {"name": "lake"}, "object": thing},
                }
            ]
        }
    )
    bridged = one(
        {
            "detail-type": "Object Created",
            "source": "aws.s3",
            "time": "2026-11-22T10:00:00Z",
            "detail": {
                "bucket": {"name": "lake"},
                "reason": "PutObject",
                "object": {
                    "key": "in/a b.csv",
                    "size": 5,
                    "etag": "abc",
                    "version-id": "v1",
                    "sequencer": "0055AE",
                },
            },
        }
    )
    assert (
        to_event(straight).id == to_event(bridged).id
        and to_event(straight).data == to_event(bridged).data
    )


def test_s3_test_events():
    """S3's test message is not a notification, also when it is wrapped."""
    message = {
        "Service": "Amazon S3",
        "Event": "s3:TestEvent",
        "Time": "2026-11-22T10:00:00.000Z",
        "Bucket": "lake",
    }
    assert read_notifications(json.dumps(message)) == S3TestEvent("lake")
    assert read_notifications(
        json.dumps({"TopicArn": "arn", "Message": json.dumps(message)})
    ) == S3TestEvent("lake")


def test_identity_without_sequencer_is_content_and_second():
    """Where a server gives neither version nor sequencer, two notifications of one upload in one
    second are one event.
    """
    record = MINIO["Records"][0]
    thing = {key: value for key, value in record["s3"]["object"].items() if key != "sequencer"}
    bare = {**record, "s3": {**record["s3"], "object": thing}}
    copy = {
        **bare,
        "eventName": "s3:ObjectCreated:CompleteMultipartUpload",
        "eventTime": "2026-11-22T10:00:00.987Z",
    }
    later = {**bare, "eventTime": "2026-11-22T10:00:07.000Z"}
    first, again, other = (event_id(one({"Records": [each]})) for each in (bare, copy, later))
    assert first == again != other


@pytest.mark.parametrize("empty", ["", None])
def test_s3_an_empty_sequencer_is_none(empty: str | None):
    """A store that writes empty fields gives no identity by them: two uploads are two events."""
    record = MINIO["Records"][0]
    thing = {**record["s3"]["object"], "sequencer": empty, "versionId": empty}
    first = {**record, "s3": {**record["s3"], "object": thing}}
    later = {**first, "eventTime": "2026-11-22T10:00:07.000Z"}
    found = [one({"Records": [each]}) for each in (first, later)]
    assert [(each.sequencer, each.version) for each in found] == [(None, None)] * 2
    assert event_id(found[0]) != event_id(found[1])


def test_s6_sequencers_are_padded_on_the_right():
    """Sequencers compare as hex text, the shorter one padded with zeros; an unknown one is older
    than nothing.
    """
    assert is_older("0055AED6DCD90281E5", "0055AED6DCD90281E6") and not is_older(
        "0055AED6DCD90281E6", "0055AED6DCD90281E5FF"
    )
    assert is_older("00ab", "00AB01") and not is_older("00AB", "00ab00")
    assert not is_older(None, "1") and not is_older("1", None) and not is_older("1", "1")


@given(st.text(min_size=1).filter(lambda text: text.isprintable()))
def test_keys_come_back_as_they_were(key: str):
    """A form-encoded key is decoded once, to what it was."""
    from urllib.parse import quote, quote_plus

    assert unquote_key(quote_plus(key, safe="/")) == unquote_key(quote_plus(key, safe="")) == key
    assert unquote_key(quote(key, safe="")) == key


NAMES = [
    "Records",
    "s3",
    "object",
    "key",
    "bucket",
    "name",
    "eventName",
    "Message",
    "TopicArn",
    "detail",
    "source",
    "x",
]
LEAVES = st.none() | st.booleans() | st.integers() | st.text()


@given(
    st.recursive(
        LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(NAMES), inner)
    )
)
def test_whatever_arrives_is_read_or_refused(message: Any):
    """Any JSON is notifications, a test message, or a ValueError: nothing else is raised."""
    try:
        found = read_notifications(json.dumps(message))
    except ValueError:
        return
    if isinstance(found, list):
        for notification in found:
            if isinstance(notification, Notification):
                to_event(notification).to_json()


@pytest.mark.parametrize("key", ["in/\x00", "😀\u202e", "a" * 1024])
def test_c8_odd_text_in_keys_can_be_written(key: str):
    """NUL, right-to-left overrides and four-byte UTF-8 in a key can be stored; lone surrogates are
    no JSON text.
    """
    message = {
        "detail-type": "Object Created",
        "source": "aws.s3",
        "detail": {"bucket": {"name": "lake"}, "object": {"key": key}},
    }
    event = to_event(one(message))
    assert json.loads(event.to_json())["data"]["key"] == key
    with pytest.raises(ValueError, match="surrogate"):  # a dead letter, with its bytes
        read_notifications(json.dumps({**message, "id": "\ud800"}))


def test_what_a_listing_begins_with():
    """The literal beginning of globs with a slash shortens the listing; a glob for any depth does
    not.
    """
    begins = {
        ("in/", "/2026/*.csv"): "in/2026/",
        ("", "a/b*/c"): "a/b",
        ("in/", "*.csv"): "in/",
        ("", "**/x"): "",
        ("", ("in/a/*.csv", "in/b/*.csv")): "in/",
        ("p/", ("x/y", "*.csv")): "p/",
    }
    for (prefix, pattern), listed in begins.items():
        assert KeyFilter(prefix, "", pattern, None).list_prefix == listed


def test_markers_of_objects():
    """`{name}` and `{stem}` are the object's name, in its folder; markers are not objects."""
    for marker, (key, expected) in itertools.product(
        ("{name}.done", "{stem}.ok"),
        {"in/x.csv": ("in/x.csv.done", "in/x.ok"), "y": ("y.done", "y.ok")}.items(),
    ):
        selection = KeyFilter("", "", "**/*", marker)
        assert selection.marker_for(key) == expected[marker == "{stem}.ok"]
        assert selection.matches(key) and not selection.matches(expected[marker == "{stem}.ok"])
