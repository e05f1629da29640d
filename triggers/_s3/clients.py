"""The one place that knows aiobotocore: opening clients, and what their errors mean.

`S3.listen` opens a `Clients` each time it is opened and closes it in the same task, so that fresh credentials are read; the
session behind it is kept, since its first client costs a fifth of a second of reading service models (done in a thread here).
aiobotocore comes with aioboto3 (extra `s3`) or alone (extra `s3-modern`); either serves.
"""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, TypeVar, cast

from eventflow.core.clock import Clock, microseconds
from eventflow.core.errors import MissingExtra, SourceError

try:
    from aiobotocore.config import AioConfig  # pyright: ignore[reportMissingTypeStubs]
    from aiobotocore.session import AioSession  # pyright: ignore[reportMissingTypeStubs]
    from aiohttp import ClientError as HttpError
    from botocore.exceptions import (  # pyright: ignore[reportMissingTypeStubs]
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )
except ModuleNotFoundError:
    raise MissingExtra("S3", "aiobotocore", "s3") from None

T = TypeVar("T")

FAILURES = (ClientError, BotoCoreError, HttpError, OSError)
"""What a call of a client raises."""

BACKOFF = (0.5, 30.0)
"""Seconds before a failed call is tried again, first and longest, with full jitter; after the client's own three tries."""

_MODELS = ("service-2", "endpoint-rule-set-1")

_PASSING = frozenset({
    "Throttling", "ThrottlingException", "ThrottledException", "RequestThrottled", "RequestThrottledException", "SlowDown",
    "TooManyRequestsException", "RequestLimitExceeded", "BandwidthLimitExceeded", "OverLimit", "RequestTimeout",
    "InternalError", "InternalFailure", "ServiceUnavailable", "ServiceFailure", "PriorRequestNotComplete", "KmsThrottled",
})  # fmt: skip
"""Error codes that say: later. So do HTTP 429 and 5xx."""

_DEFECTS = (NoCredentialsError, PartialCredentialsError)


class Place:
    """Where the buckets and queues are, and how to reach them; made once, opens clients as often as asked."""

    def __init__(
        self, endpoint_url: str | None, region: str | None, session: Any, options: Mapping[str, Any]
    ) -> None:
        self._endpoint_url, self._region, self._options = endpoint_url, region, dict(options)
        self._session, self._ours = session, False

    async def open(self, stack: AsyncExitStack, service: str) -> Any:
        """A client of `s3` or `sqs`, closed with the stack."""
        if self._session is None:
            self._session = cast(Any, AioSession)()
            self._ours = True
        if self._ours:
            await asyncio.to_thread(_read_models, self._session, service)
        options = {**self._options}
        if self._region is not None:
            options["region_name"] = self._region
        if self._endpoint_url is not None:
            options["endpoint_url"] = self._endpoint_url
        config = self._config(service)
        options["config"] = config.merge(options["config"]) if "config" in options else config
        made = (
            getattr(self._session, "create_client", None) or self._session.client
        )  # aioboto3's session says `client`
        return await stack.enter_async_context(made(service, **options))

    def _config(self, service: str) -> Any:
        """Three tries with backoff, quick to notice a dead peer; and for stores that are not AWS, what they understand."""
        config: dict[str, Any] = {
            "retries": {"mode": "standard", "total_max_attempts": 3}, "connect_timeout": 5, "read_timeout": 40,
            "max_pool_connections": 20, "tcp_keepalive": True,
        }  # fmt: skip
        if (
            self._endpoint_url
            or os.environ.get("AWS_ENDPOINT_URL")
            or os.environ.get(f"AWS_ENDPOINT_URL_{service.upper()}")
        ):
            config |= {
                "s3": {"addressing_style": "path"},
                "request_checksum_calculation": "when_required", "response_checksum_validation": "when_required",
            }  # fmt: skip
        return cast(Any, AioConfig)(**config)


def _read_models(session: Any, service: str) -> None:
    """Fills the session's cache of models, which is most of what its first client costs, off the loop."""
    loader = session.get_component("data_loader")
    loader.load_data("endpoints")
    loader.load_data("partitions")
    for name in _MODELS:
        loader.load_service_model(service, name)


# --------------------------------------------------------------------------- what errors mean


def code_of(error: BaseException) -> str:
    """The service's own word for an error; its class where there is none."""
    return (
        str(cast(Any, error).response.get("Error", {}).get("Code", ""))
        if isinstance(error, ClientError)
        else type(error).__name__
    )


def is_passing(error: BaseException) -> bool:
    """Whether trying again, with the same credentials and names, can help."""
    if isinstance(error, ClientError):
        status = cast(Any, error).response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return code_of(error) in _PASSING or status == 429 or status >= 500
    return not isinstance(error, _DEFECTS)


def explained(what: str, error: BaseException) -> SourceError:
    """The error for people: what was asked of whom, what came back, what to look at."""
    code = code_of(error)
    hint = next((hint for words, hint in _HINTS if code in words), "see the source's own logs")
    return SourceError(f"{what}: {code}: {error}; {hint}")


_HINTS = (
    (("NoSuchBucket", "404"), "create the bucket, or mend its name, `region` or `endpoint_url`"),
    (("NonExistentQueue", "AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist"), "create the queue, or mend `queue`"),
    (("AccessDenied", "403", "AccessDeniedException"), "grant s3:ListBucket on the bucket, sqs:ReceiveMessage, "
     "sqs:DeleteMessage and sqs:ChangeMessageVisibility on the queue"),
    (("ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidClientTokenId",
      "RequestExpired", "UnrecognizedClientException"), "renew the credentials; they are read again at each attempt"),
    (("NoCredentialsError", "PartialCredentialsError"), "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"),
)  # fmt: skip


class Caller:
    """Calls that go on until they succeed, for one listener: passing failures wait here, others raise SourceError.

    `failing` says what is being waited out, by what was asked.
    """

    def __init__(self, clock: Clock, draw: random.Random, log: Any) -> None:
        self._clock, self._draw, self._log = clock, draw, log
        self._resting: set[asyncio.Event] = set()
        self.stopping = False
        self.failing: dict[str, str] = {}
        self.failures = 0

    async def ask(
        self, what: str, call: Callable[[], Awaitable[T]], *, patient: bool = False
    ) -> T | None:
        """What the call returns; None when it failed and the listener is stopping. `patient`: all errors are waited out."""
        wait = BACKOFF[0]
        while True:
            try:
                answer = await call()
            except FAILURES as error:
                if not patient and not is_passing(error):
                    raise explained(what, error) from error
                if self.stopping:
                    return None
                pause = self._draw.uniform(wait / 4, wait)
                self._note(what, explained(what, error), pause)
                await self.rest(pause)
                wait = min(wait * 2, BACKOFF[1])
            else:
                self.failing.pop(what, None)
                return answer
        return None

    def _note(self, what: str, error: SourceError, pause: float) -> None:
        self.failures += 1
        self.failing[what] = str(error)
        self._log.warning("bucket.unreachable", error=str(error), retry_in=round(pause, 2))

    def stop(self) -> None:
        """Ends all rests, and whatever waits to be tried again."""
        self.stopping = True
        for over in self._resting:
            over.set()

    async def rest(self, seconds: float) -> None:
        """Waits that long, or until `stop`. The timer follows the wall clock; should that be set back, the loop's own wakes."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        timer = self._clock.timer(loop, self._clock.now() + microseconds(seconds), over.set)
        backstop = loop.call_later(seconds + 1, over.set)
        self._resting.add(over)
        try:
            if not self.stopping:
                await over.wait()
        finally:
            self._resting.discard(over)
            timer.cancel()
            backstop.cancel()
