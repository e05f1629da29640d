"""Large results in S3: `App(results="s3://bucket/prefix")`, each an object named by its SHA-256.

House makes a `Bucket` from the URL and hands it to `Blobs`, which calls it from threads: everything here blocks. `put` returns
when the object is durable, hence before any row names it; what S3 refuses or does not answer is ResultsUnavailable, and is
tried again by whoever called. Nothing is ever deleted here: several stores may share a prefix. Next room: `blobs.py`.
"""

import os
import threading
from typing import Any, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from eventflow.core.errors import MissingExtra, ResultsUnavailable, UsageError

_OPTIONS = {"endpoint_url": "endpoint_url", "region": "region_name"}


class Bucket:
    """A prefix of a bucket (blobs.Place). `s3://bucket/prefix?endpoint_url=…&region=…`; credentials from the usual AWS places.

    The client is made at first use, once, and serves all threads.
    """

    def __init__(self, url: str) -> None:
        _check_installed()
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query))
        if (
            parts.scheme != "s3"
            or not parts.netloc
            or parts.fragment
            or query.keys() - _OPTIONS.keys()
        ):
            expected = "s3://bucket/prefix, with ?endpoint_url= and &region= if need be"
            raise UsageError(f"results= expected {expected}, found {url!r}")
        self._bucket, prefix = parts.netloc, unquote(parts.path).strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._options = {_OPTIONS[name]: value for name, value in query.items()}
        self._client: Any = None
        self._lock = threading.Lock()

    def put(self, ref: str, data: bytes) -> None:
        """Durable when it returns; the same content again is the same object, and young again for lifecycle rules."""
        self._ask("store", ref, "put_object", Body=data)

    def get(self, ref: str) -> bytes | None:
        """The bytes, or None when there is no such object."""
        answer = self._ask("read", ref, "get_object")
        return None if answer is None else answer["Body"]

    def has(self, ref: str) -> bool:
        return self._ask("look for", ref, "head_object") is not None

    def _ask(self, what: str, ref: str, method: str, **more: Any) -> dict[str, Any] | None:
        from botocore.exceptions import BotoCoreError, ClientError  # pyright: ignore[reportMissingTypeStubs]

        key = self._prefix + ref
        try:
            answer: dict[str, Any] = getattr(self._opened(), method)(
                Bucket=self._bucket, Key=key, **more
            )
            return {**answer, "Body": answer["Body"].read()} if "Body" in answer else answer
        except ClientError as error:
            code = cast(Any, error).response.get("Error", {}).get("Code", "")
            if code in ("NoSuchKey", "404") and method != "put_object":
                return None
            raise ResultsUnavailable(what, f"s3://{self._bucket}/{key}", str(error)) from error
        except (BotoCoreError, OSError) as error:
            raise ResultsUnavailable(
                what, f"s3://{self._bucket}/{key}", f"{type(error).__name__}: {error}"
            ) from error

    def _opened(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = _client(self._options)
            return self._client


def _check_installed() -> None:
    """MissingExtra without the client library; told when the app opens, not when the first large result is there."""
    try:
        import botocore.session  # noqa: F401  # pyright: ignore[reportMissingTypeStubs, reportUnusedImport]
    except ModuleNotFoundError:
        raise MissingExtra('results="s3://…"', "botocore", "s3") from None


def _client(options: dict[str, str]) -> Any:
    """Quick to give up: callers try again. For stores that are not AWS, what they understand."""
    from botocore.config import Config  # pyright: ignore[reportMissingTypeStubs]
    from botocore.session import Session  # pyright: ignore[reportMissingTypeStubs]

    config: dict[str, Any] = {
        "retries": {"mode": "standard", "total_max_attempts": 3}, "connect_timeout": 5, "read_timeout": 30,
        "max_pool_connections": 32, "tcp_keepalive": True,
    }  # fmt: skip
    if (
        "endpoint_url" in options
        or os.environ.get("AWS_ENDPOINT_URL")
        or os.environ.get("AWS_ENDPOINT_URL_S3")
    ):
        config |= {
            "s3": {"addressing_style": "path"},
            "request_checksum_calculation": "when_required", "response_checksum_validation": "when_required",
        }  # fmt: skip
    make = cast(Any, Session)().create_client
    return make("s3", config=cast(Any, Config)(**config), **options)
