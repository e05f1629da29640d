"""S3, SQS, SNS and EventBridge over HTTP on this machine: the servers that the tests of `S3` use.

`ministack` behaves most like AWS, `moto` is the sloppy one: no sequencers, other spellings, two
notifications for one upload. Both are installed in another environment (`make .venv-aws/.made`),
since they pin botocore. `fixtures` beside the tests start them on free ports, one of each per test
process. With EVENTFLOW_TEST_S3=http://host:port the same tests use that server instead of
ministack, with the credentials of the environment; what it does not offer is skipped.
"""

import json
import os
import socket
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from tests.conftest import wait_until

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".venv-aws"
GIVEN_URL = os.environ.get("EVENTFLOW_TEST_S3")
REGION = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
KEYS = {
    "aws_access_key_id": os.environ.get("AWS_ACCESS_KEY_ID", "test"),
    "aws_secret_access_key": os.environ.get("AWS_SECRET_ACCESS_KEY", "test"),
}


class Aws:
    """One server, and boto3's clients of it."""

    def __init__(self, kind: str, url: str) -> None:
        self.kind = kind
        self.url = url
        self.created: list[Bucket | Queue] = []
        config = botocore.config.Config(
            s3={"addressing_style": "path"}, retries={"total_max_attempts": 2}
        )
        known: dict[str, Any] = {
            "endpoint_url": url,
            "region_name": REGION,
            **KEYS,
            "config": config,
        }
        self.s3: Any = boto3.client("s3", **known)
        self.sqs: Any = boto3.client("sqs", **known)
        self.sns: Any = boto3.client("sns", **known)
        self.events: Any = boto3.client("events", **known)

    @property
    def options(self) -> dict[str, Any]:
        """What an `S3` needs to find it."""
        return {"endpoint_url": self.url, "region": REGION, "client_options": KEYS}

    @property
    def env(self) -> dict[str, str]:
        """The same for another process."""
        keys = {name.upper(): value for name, value in KEYS.items()}
        return {
            **keys,
            "AWS_ENDPOINT_URL": self.url,
            "S3_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": REGION,
        }

    def skip_without(self, call: Any) -> None:
        """Skips the test when the server that was named does not offer a service at all."""
        try:
            if self.kind == "given":
                call()
        except (ClientError, BotoCoreError) as error:
            pytest.skip(f"{self.url} does not offer this: {error}")

    def clean_up(self) -> None:
        """Removes what the tests made, for a server that outlives them."""
        for each in self.created:
            with suppress(ClientError):
                each.remove()


class Bucket:
    """A new bucket; `queue()` makes a queue with its notifications."""

    def __init__(self, aws: Aws, *, versioned: bool = False) -> None:
        self.aws = aws
        self.name = f"test-{uuid.uuid4().hex[:12]}"
        self.topic = ""
        aws.created.append(self)
        aws.s3.create_bucket(Bucket=self.name)
        if versioned:
            aws.s3.put_bucket_versioning(
                Bucket=self.name, VersioningConfiguration={"Status": "Enabled"}
            )

    def put(self, key: str, body: bytes | str = b"data") -> None:
        self.aws.s3.put_object(Bucket=self.name, Key=key, Body=body)

    def fill(self, keys: Sequence[str]) -> None:
        """Puts many small objects, several at a time."""
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(self.put, keys))

    def put_in_parts(self, key: str, parts: Sequence[bytes]) -> None:
        """A multi-part upload, part by part."""
        s3, place = self.aws.s3, {"Bucket": self.name, "Key": key}
        upload = {**place, "UploadId": s3.create_multipart_upload(**place)["UploadId"]}
        done = [
            {"PartNumber": n, "ETag": s3.upload_part(**upload, PartNumber=n, Body=part)["ETag"]}
            for n, part in enumerate(parts, 1)
        ]
        s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": done})

    def delete(self, key: str) -> None:
        self.aws.s3.delete_object(Bucket=self.name, Key=key)

    def read(self, key: str) -> bytes:
        return self.aws.s3.get_object(Bucket=self.name, Key=key)["Body"].read()

    def is_past(self, key: str) -> bool:
        """Whether the server's clock has left the second in which a key's version was written. Some
        servers list times in whole seconds, so that the next version would look the same.
        """
        found = self.aws.s3.head_object(Bucket=self.name, Key=key)
        now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
        return now > found["LastModified"]

    def remove(self) -> None:
        s3, place = self.aws.s3, {"Bucket": self.name}
        for page in s3.get_paginator("list_object_versions").paginate(**place):
            for each in [*page.get("Versions", []), *page.get("DeleteMarkers", [])]:
                s3.delete_object(**place, Key=each["Key"], VersionId=each["VersionId"])
        s3.delete_bucket(**place)

    def queue(
        self,
        *,
        through: str = "",
        fifo: bool = False,
        events: Sequence[str] = ("s3:ObjectCreated:*",),
    ) -> "Queue":
        """A new queue with this bucket's notifications: straight, through "sns" or through
        "eventbridge".
        """
        queue = Queue(self.aws, fifo=fifo)
        configuration: dict[str, Any] = {}
        match through:
            case "sns":
                self.aws.skip_without(self.aws.sns.list_topics)
                self.topic = self.aws.sns.create_topic(Name=queue.name)["TopicArn"]
                self.aws.sns.subscribe(TopicArn=self.topic, Protocol="sqs", Endpoint=queue.arn)
                configuration["TopicConfigurations"] = [
                    {"TopicArn": self.topic, "Events": list(events)}
                ]
            case "eventbridge":
                self.aws.skip_without(self.aws.events.list_rules)
                configuration["EventBridgeConfiguration"] = {}
                pattern = {"source": ["aws.s3"], "detail": {"bucket": {"name": [self.name]}}}
                self.aws.events.put_rule(Name=queue.name, EventPattern=json.dumps(pattern))
                self.aws.events.put_targets(
                    Rule=queue.name, Targets=[{"Id": "queue", "Arn": queue.arn}]
                )
            case _:
                configuration["QueueConfigurations"] = [
                    {"QueueArn": queue.arn, "Events": list(events)}
                ]
        self.aws.s3.put_bucket_notification_configuration(
            Bucket=self.name, NotificationConfiguration=configuration
        )
        return queue

    def record(self, name: str, key: str, **more: Any) -> dict[str, Any]:
        """A record as S3 writes it, for what no test server sends. `key` as it is on the
        wire.
        """
        thing = {"key": key, "size": 4, "eTag": "8d777f385d3dfec8815d20f7496026dc", **more}
        time = "2026-11-22T10:00:00.000Z"
        s3 = {"s3SchemaVersion": "1.0", "bucket": {"name": self.name}, "object": thing}
        return {
            "eventVersion": "2.6",
            "eventSource": "aws:s3",
            "eventTime": time,
            "eventName": name,
            "s3": s3,
        }


class Queue:
    """A new SQS queue."""

    def __init__(self, aws: Aws, *, fifo: bool = False, **attributes: str) -> None:
        self.aws = aws
        self.name = f"test-{uuid.uuid4().hex[:12]}{'.fifo' if fifo else ''}"
        aws.skip_without(aws.sqs.list_queues)
        aws.created.append(self)
        known = {"FifoQueue": "true", **attributes} if fifo else attributes
        self.url: str = aws.sqs.create_queue(QueueName=self.name, Attributes=known)["QueueUrl"]
        self.arn: str = self.attributes("QueueArn")["QueueArn"]

    def remove(self) -> None:
        self.aws.sqs.delete_queue(QueueUrl=self.url)

    def attributes(self, *names: str) -> dict[str, str]:
        return self.aws.sqs.get_queue_attributes(QueueUrl=self.url, AttributeNames=list(names))[
            "Attributes"
        ]

    def send(self, body: Any, **more: Any) -> None:
        text = body if isinstance(body, str) else json.dumps(body)
        self.aws.sqs.send_message(QueueUrl=self.url, MessageBody=text, **more)

    def receive_all(self) -> list[str]:
        """The bodies of all messages that are there, which are deleted."""
        bodies: list[str] = []
        asked = {"QueueUrl": self.url, "MaxNumberOfMessages": 10, "WaitTimeSeconds": 1}
        while found := self.aws.sqs.receive_message(**asked).get("Messages"):
            for message in found:
                bodies.append(message["Body"])
                self.aws.sqs.delete_message(
                    QueueUrl=self.url, ReceiptHandle=message["ReceiptHandle"]
                )
        return bodies

    @property
    def remaining(self) -> int:
        """Messages that are not deleted, seen or not."""
        names = (
            "ApproximateNumberOfMessages",
            "ApproximateNumberOfMessagesNotVisible",
            "ApproximateNumberOfMessagesDelayed",
        )
        found = self.attributes("All")
        return sum(int(found[name]) for name in names)

    @property
    def visible(self) -> int:
        return int(self.attributes("All")["ApproximateNumberOfMessages"])


# ------------------------------------------------------------------ starting them


@contextmanager
def serving(kind: str, folder: Path) -> Iterator[Aws]:
    """One of the servers, on a free port; or, instead of ministack, the server in
    EVENTFLOW_TEST_S3.
    """
    if kind == "ministack" and GIVEN_URL:
        aws = Aws("given", GIVEN_URL)
        yield aws
        aws.clean_up()
        return
    port = _free_port()
    with (folder / f"{kind}.log").open("wb") as log:
        process = subprocess.Popen(
            _command(kind, port), env=_environment(port), cwd=folder, stdout=log, stderr=log
        )
        try:
            aws = Aws(kind, f"http://127.0.0.1:{port}")
            wait_until(
                lambda: process.poll() is not None or _answers(aws), f"{kind} answers", within=60
            )
            assert process.poll() is None, (folder / f"{kind}.log").read_text()
            yield aws
        finally:
            process.kill()
            process.wait()


def _command(kind: str, port: int) -> list[str]:
    program = ENVIRONMENT / "bin" / {"ministack": "ministack", "moto": "moto_server"}[kind]
    if not program.exists():
        pytest.fail(f"expected {program}, found none; `make {ENVIRONMENT.name}/.made` installs it")
    return (
        [str(program)]
        if kind == "ministack"
        else [str(program), "-H", "127.0.0.1", "-p", str(port)]
    )


def _environment(port: int) -> dict[str, str]:
    """Loopback only, and none of the services that open more ports."""
    ministack = {
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "SERVICES": "s3,sqs,sns,events",
        "LOG_LEVEL": "WARNING",
    }
    off = {"IOT_MTLS_ENABLED": "0", "SFTP_ENABLED": "0"}
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AWS_", "EVENTFLOW_", "PYTEST_"))
    }
    return {**kept, **ministack, **off, "PYTHONWARNINGS": "ignore"}


def _answers(aws: Aws) -> bool:
    try:
        aws.s3.list_buckets()
    except (ClientError, BotoCoreError):
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def ministack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aws]:
    with serving("ministack", tmp_path_factory.mktemp("ministack")) as aws:
        yield aws


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Aws]:
    with serving("moto", tmp_path_factory.mktemp("moto")) as aws:
        yield aws
