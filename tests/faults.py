"""An HTTP proxy in front of a real server that can be made to fail: throttle, refuse, hang up, be
slow.

Tests put it between `S3` and its server. `fail` takes a rule: which requests, how often, and what
becomes of them.
"""

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

SLOW_DOWN = (
    503,
    "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
)
THROTTLED = (
    400,
    '{"__type": "com.amazon.coral.availability#ThrottlingException", "message": "Rate exceeded"}',
)
EXPIRED = (
    400,
    '{"__type": "com.amazonaws.sqs#ExpiredToken", "message": "The security token included '
    'is expired"}',
)
DENIED = (403, "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
HANG_UP = (0, "")

RequestFilter = Callable[[str, str, Mapping[str, str]], bool]
"""Which requests: method, path with query, headers (lower-case names)."""


@dataclass
class Rule:
    """`answer` for the next `times` requests that `which` names (None: for all until `mend`).

    Without one they go through, `delay` seconds late; their answer comes `after` seconds late.
    """

    which: RequestFilter
    answer: tuple[int, str] | None
    times: int | None
    delay: float
    after: float = 0.0
    hits: int = 0
    answered: int = 0
    """Answers of the server that wait in the proxy or have passed it."""


@dataclass
class Proxy:
    """What goes through, and the rules."""

    target: str
    url: str = ""
    rules: list[Rule] = field(default_factory=list)
    seen: list[tuple[str, str, Mapping[str, str]]] = field(default_factory=list)

    def fail(
        self,
        which: RequestFilter,
        answer: tuple[int, str] | None = None,
        *,
        times: int | None = None,
        delay: float = 0.0,
        after: float = 0.0,
    ) -> Rule:
        self.rules.append(Rule(which, answer, times, delay, after))
        return self.rules[-1]

    def mend(self) -> None:
        self.rules.clear()

    def rule(self, method: str, path: str, headers: Mapping[str, str]) -> Rule | None:
        self.seen.append((method, path, headers))
        for rule in self.rules:
            if rule.which(method, path, headers) and (rule.times is None or rule.hits < rule.times):
                rule.hits += 1
                return rule
        return None


def action(name: str) -> RequestFilter:
    """SQS calls of this name."""
    return lambda method, path, headers: headers.get("x-amz-target", "").endswith(f".{name}")


def listing(method: str, path: str, headers: Mapping[str, str]) -> bool:
    """Pages of a bucket's listing."""
    return method == "GET" and "list-type=2" in path


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def _do(self) -> None:
        body = self._body()
        headers = {name.lower(): value for name, value in self.headers.items()}
        rule = self.proxy.rule(self.command, self.path, headers)
        if rule is not None:
            time.sleep(rule.delay)
            if rule.answer == HANG_UP or (rule.delay and self._is_gone()):
                self.close_connection = True
                return
            if rule.answer is not None:
                kind = "application/json" if rule.answer[1].startswith("{") else "application/xml"
                self._reply(rule.answer[0], {"content-type": kind}, rule.answer[1].encode())
                return
        self._forward(body, rule)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _do

    def _is_gone(self) -> bool:
        """Whether the client has died meanwhile: then its late request has not been sent."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _forward(self, body: bytes, rule: Rule | None) -> None:
        target = urlsplit(self.proxy.target)
        upstream = http.client.HTTPConnection(target.hostname or "", target.port, timeout=60)
        kept = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in ("transfer-encoding", "connection")
        }
        try:
            upstream.request(
                self.command, self.path, body, {**kept, "Content-Length": str(len(body))}
            )
            answer = upstream.getresponse()
            headers = {
                k: v
                for k, v in answer.getheaders()
                if k.lower() not in ("transfer-encoding", "connection", "content-length")
            }
            content = answer.read()
            if rule is not None:
                rule.answered += 1
                time.sleep(rule.after)
            self._reply(answer.status, headers, content, answer.getheader("content-length"))
        finally:
            upstream.close()

    def _reply(
        self, status: int, headers: Mapping[str, str], body: bytes, length: str | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header(
            "Content-Length", (length or "0") if self.command == "HEAD" else str(len(body))
        )
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def proxied(target: str) -> Iterator[Proxy]:
    """A proxy on a free port, in threads of its own."""
    proxy = Proxy(target)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
