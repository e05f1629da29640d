"""Opens aiobotocore clients, and classifies their errors. No other file imports aiobotocore.

`S3.listen` opens clients from an `S3Endpoint` each time it starts and closes them in the same task,
so that fresh credentials are read. The session behind them is kept: its first client reads service
models for a fifth of a second (in a thread here). aiobotocore is installed with aioboto3 (extra
`s3`) or alone (extra `s3-modern`).
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

from eventflow.core.clock import Clock, sleep_for
from eventflow.core.errors import MissingExtra, SourceError
from eventflow.core.retry import Backoff

try:
    from aiobotocore.config import AioConfig  # pyright: ignore[reportMissingTypeStubs]
    from aiobotocore.session import AioSession  # pyright: ignore[reportMissingTypeStubs]
    from aiohttp import ClientError as HttpError
    from botocore import utils as botocore_utils  # pyright: ignore[reportMissingTypeStubs]
    from botocore.exceptions import (  # pyright: ignore[reportMissingTypeStubs]
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )
except ModuleNotFoundError:
    raise MissingExtra("S3", "aiobotocore", "s3") from None

LOG_EVENTS = {
    "bucket.unreachable": (
        "A bucket or queue returns errors; the next request follows in `retry_in` seconds."
    ),
}

T = TypeVar("T")

CLIENT_ERRORS = (ClientError, BotoCoreError, HttpError, OSError)
"""The errors of a client's calls."""

MAX_RETRY_DELAY_SECONDS = 30.0
"""Between two tries of a failed call, each of which includes the client's own three tries."""

_SERVICE_MODEL_FILES = ("service-2", "endpoint-rule-set-1")

_LISTED_NUMBERS = (
    ("Object", "Size"),
    ("ListObjectsV2Output", "KeyCount"),
    ("ListObjectsV2Output", "MaxKeys"),
)
"""Shapes and members in botocore's model of S3."""

_RETRYABLE_CODES = frozenset(
    (
        "Throttling ThrottlingException ThrottledException RequestThrottled SlowDown "
        "RequestThrottledException TooManyRequestsException RequestLimitExceeded OverLimit "
        "BandwidthLimitExceeded RequestTimeout InternalError InternalFailure ServiceUnavailable "
        "ServiceFailure PriorRequestNotComplete KmsThrottled"
    ).split()
)
"""Error codes of temporary failures, as are HTTP 429 and 5xx."""

_CREDENTIAL_ERRORS = (NoCredentialsError, PartialCredentialsError)


class S3Endpoint:
    """The address of buckets and queues, and the session that opens clients."""

    def __init__(
        self, endpoint_url: str | None, region: str | None, session: Any, options: Mapping[str, Any]
    ) -> None:
        self._endpoint_url: str | None = endpoint_url
        self._region: str | None = region
        self._options: dict[str, Any] = dict(options)
        self._session: Any = session
        self._session_is_ours: bool = False

    async def open_client(self, stack: AsyncExitStack, service: str) -> Any:
        """A client for `service` (`s3` or `sqs`), closed with the stack."""
        if self._session is None:
            self._session = cast(Any, AioSession)()
            self._session_is_ours = True
            parsers = self._session.get_component("response_parser_factory")
            parsers.set_parser_defaults(timestamp_parser=_time_or_none)
        if self._session_is_ours:
            await asyncio.to_thread(_load_service_models, self._session, service)
        options = {**self._options}
        if self._region is not None:
            options["region_name"] = self._region
        if self._endpoint_url is not None:
            options["endpoint_url"] = self._endpoint_url
        config = self._config(service)
        options["config"] = config.merge(options["config"]) if "config" in options else config
        made = (
            getattr(self._session, "create_client", None) or self._session.client
        )  # aioboto3's session has `client`
        client = await stack.enter_async_context(made(service, **options))
        if service == "s3":
            client.meta.events.register_first("after-call.s3.ListObjectsV2", _fill_in_keys)
        return client

    def _config(self, service: str) -> Any:
        """Three tries with backoff and short timeouts; and for other stores than AWS, the options
        that they support.
        """
        config: dict[str, Any] = {
            "retries": {"mode": "standard", "total_max_attempts": 3},
            "connect_timeout": 5,
            "read_timeout": 40,
            "max_pool_connections": 20,
            "tcp_keepalive": True,
        }
        if (
            self._endpoint_url
            or os.environ.get("AWS_ENDPOINT_URL")
            or os.environ.get(f"AWS_ENDPOINT_URL_{service.upper()}")
        ):
            config |= {
                "s3": {"addressing_style": "path"},
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            }
        return cast(Any, AioConfig)(**config)


def _time_or_none(text: str) -> datetime | None:
    """A time of a response, in UTC; None for one that no calendar has, whose error would cost the
    whole response.
    """
    try:
        moment: datetime = cast(Any, botocore_utils).parse_timestamp(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def _load_service_models(session: Any, service: str) -> None:
    """Loads service models into the session's cache: most of the time that its first client takes.
    Blocks.
    """
    loader = session.get_component("data_loader")
    loader.load_data("endpoints")
    loader.load_data("partitions")
    for name in _SERVICE_MODEL_FILES:
        model = loader.load_service_model(service, name)
        if (service, name) == ("s3", "service-2"):
            _read_numbers_as_text(model["shapes"])


def _read_numbers_as_text(shapes: Mapping[str, Any]) -> None:
    """A listing's numbers are not botocore's to read: one that is none would cost the response."""
    for shape, member in _LISTED_NUMBERS:
        shapes[shape]["members"][member]["shape"] = "ETag"  # a plain text


def _fill_in_keys(parsed: Mapping[str, Any], **_: Any) -> None:
    """An empty key for an entry that has none: botocore decodes the keys of all entries."""
    for entry in parsed.get("Contents") or ():
        if not isinstance(entry.get("Key"), str):
            entry["Key"] = ""


# --------------------------------------------------------------------------- errors


def error_code(error: BaseException) -> str:
    """The service's error code; the class name of other errors."""
    return (
        str(cast(Any, error).response.get("Error", {}).get("Code", ""))
        if isinstance(error, ClientError)
        else type(error).__name__
    )


def is_retryable(error: BaseException) -> bool:
    """Whether another try with the same credentials and names can succeed."""
    if isinstance(error, ClientError):
        status = cast(Any, error).response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return error_code(error) in _RETRYABLE_CODES or status == 429 or status >= 500
    return not isinstance(error, _CREDENTIAL_ERRORS)


def is_bad_request(error: BaseException) -> bool:
    """Whether the service finds a fault in the request itself, such as a token that has expired."""
    status = cast(Any, error).response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status in (400, 410, 416) and not is_retryable(error) and not _is_about_access(error)


def _is_about_access(error: BaseException) -> bool:
    return any(error_code(error) in codes for codes, _ in _HINTS)


def source_error(operation: str, error: BaseException) -> SourceError:
    """The error for people: the operation, the code, and what to check."""
    code = error_code(error)
    hint = next((hint for codes, hint in _HINTS if code in codes), "see the source's own logs")
    return SourceError(f"{operation}: {code}: {error}; {hint}")


_HINTS = (
    (
        ("NoSuchBucket", "404"),
        "create the bucket, or correct its name, `region` or `endpoint_url`",
    ),
    (
        ("NonExistentQueue", "AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist"),
        "create the queue, or correct `queue`",
    ),
    (
        ("AccessDenied", "403", "AccessDeniedException"),
        "grant s3:ListBucket on the bucket, sqs:ReceiveMessage, sqs:DeleteMessage and "
        "sqs:ChangeMessageVisibility on the queue",
    ),
    (
        (
            "ExpiredToken",
            "ExpiredTokenException",
            "InvalidAccessKeyId",
            "SignatureDoesNotMatch",
            "InvalidClientTokenId",
            "RequestExpired",
            "UnrecognizedClientException",
        ),
        "renew the credentials; they are read again at each attempt",
    ),
    (
        ("NoCredentialsError", "PartialCredentialsError"),
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role",
    ),
)


class RetryingCaller:
    """Repeats calls until they succeed, for one listener: temporary errors are retried, others
    raise SourceError.

    `failing`: the current error of each operation that is being retried, by its description.
    """

    def __init__(self, clock: Clock, rng: random.Random, log: Any) -> None:
        self._clock: Clock = clock
        self._rng: random.Random = rng
        self._log: Any = log
        self._sleepers: set[asyncio.Event] = set()
        self.stopping: bool = False
        self.failing: dict[str, str] = {}

    async def call(
        self,
        operation: str,
        request: Callable[[], Awaitable[T]],
        *,
        retry_all: bool = False,
    ) -> T | None:
        """The result of `request`; None when it failed and the listener is stopping.

        `operation` describes it, for errors. `retry_all`: also errors that are not temporary are
            retried.
        """
        backoff = Backoff(max_delay=MAX_RETRY_DELAY_SECONDS, jitter=0.75, rng=self._rng)
        while True:
            try:
                answer = await request()
            except CLIENT_ERRORS as error:
                if not retry_all and not is_retryable(error):
                    raise source_error(operation, error) from error
                if self.stopping:
                    return None
                retry_in = next(backoff)
                self._log_failure(operation, source_error(operation, error), retry_in)
                await self.sleep(retry_in)
            else:
                self.failing.pop(operation, None)
                return answer
        return None

    def _log_failure(self, operation: str, error: SourceError, retry_in: float) -> None:
        self.failing[operation] = str(error)
        self._log.warning("bucket.unreachable", error=str(error), retry_in=round(retry_in, 2))

    def stop(self) -> None:
        """Ends all sleeps, and all retries after the current try."""
        self.stopping = True
        for wake in self._sleepers:
            wake.set()

    async def sleep(self, seconds: float) -> None:
        """Waits that long, or until `stop`."""
        if self.stopping:
            return
        wake = asyncio.Event()
        self._sleepers.add(wake)
        try:
            await sleep_for(self._clock, seconds, wake)
        finally:
            self._sleepers.discard(wake)
