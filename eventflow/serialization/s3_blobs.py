"""Large results in S3: `App(results="s3://bucket/prefix")`, each an object named by its SHA-256.

`Runtime` makes an `S3BlobStore` from the URL for `Blobs` (blobs.py), which calls it from threads:
everything here blocks. `put` returns when the object is durable, so before any row references it.
An error or a missing answer of S3 is ResultsUnavailable, and the caller tries again. Nothing is
ever deleted: several stores may share a prefix.
"""

import os
import threading
from typing import Any, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from eventflow.core.errors import MissingExtra, ResultsUnavailable, UsageError

_OPTIONS = {"endpoint_url": "endpoint_url", "region": "region_name"}


class S3BlobStore:
    """A prefix of a bucket (`blobs.BlobStore`): `s3://bucket/prefix?endpoint_url=…&region=…`.

    Credentials come from AWS's usual sources. The client is made once, at first use, and is shared
    by all threads.
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
        self._bucket = parts.netloc
        prefix = unquote(parts.path).strip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._options = {_OPTIONS[name]: value for name, value in query.items()}
        self._client: Any = None
        self._lock = threading.Lock()

    def put(self, ref: str, data: bytes) -> None:
        """Durable when it returns. The same content again replaces its object, which renews it for
        lifecycle rules.
        """
        self._request("store", ref, "put_object", Body=data)

    def get(self, ref: str) -> bytes | None:
        """The bytes, or None if there is no such object."""
        answer = self._request("read", ref, "get_object")
        return None if answer is None else answer["Body"]

    def has(self, ref: str) -> bool:
        return self._request("look for", ref, "head_object") is not None

    def _request(self, what: str, ref: str, method: str, **more: Any) -> dict[str, Any] | None:
        from botocore.exceptions import BotoCoreError, ClientError  # pyright: ignore[reportMissingTypeStubs]

        key = self._prefix + ref
        try:
            answer: dict[str, Any] = getattr(self._open_client(), method)(
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

    def _open_client(self) -> Any:
        with self._lock:
            if self._client is None:
                self._client = _client(self._options)
            return self._client


def _check_installed() -> None:
    """Raises MissingExtra without the client library: at the start of the app, not at the first
    large result.
    """
    try:
        import botocore.session  # noqa: F401  # pyright: ignore[reportMissingTypeStubs, reportUnusedImport]
    except ModuleNotFoundError:
        raise MissingExtra('results="s3://…"', "botocore", "s3") from None


def _client(options: dict[str, str]) -> Any:
    """Few retries: callers try again. With an endpoint that is not AWS, options that such stores
    understand.
    """
    from botocore.config import Config  # pyright: ignore[reportMissingTypeStubs]
    from botocore.session import Session  # pyright: ignore[reportMissingTypeStubs]

    config: dict[str, Any] = {
        "retries": {"mode": "standard", "total_max_attempts": 3},
        "connect_timeout": 5,
        "read_timeout": 30,
        "max_pool_connections": 32,
        "tcp_keepalive": True,
    }
    if (
        "endpoint_url" in options
        or os.environ.get("AWS_ENDPOINT_URL")
        or os.environ.get("AWS_ENDPOINT_URL_S3")
    ):
        config |= {
            "s3": {"addressing_style": "path"},
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
        }
    make = cast(Any, Session)().create_client
    return make("s3", config=cast(Any, Config)(**config), **options)
