"""A bare uvicorn that reads a POST's body and answers 202, and the load that measures it and
eventflow's webhooks alike.

Server and load are separate processes. The load keeps N connections alive, each with one request
under way (no pipelining), on raw sockets: it must cost little beside what it measures. `w1h.py`
divides by what this server does.

    python -m benchmarks.echo                         measure the echo
    python -m benchmarks.echo --load HOST:PORT/PATH   only the load, against a server that is up
"""

import argparse
import asyncio
import itertools
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import uvicorn

from benchmarks import load

CONNECTIONS = 64


async def app(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[Any]],
    send: Callable[[Any], Awaitable[None]],
) -> None:
    """The echo: reads the whole body, says 202 in JSON."""
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 202, "headers": headers})
    await send({"type": "http.response.body", "body": b"{}"})


# --------------------------------------------------------------------------- the load


class Connection(asyncio.Protocol):
    """Sends the next request when the last one's answer is complete; closes when there is none
    left.
    """

    def __init__(
        self, requests: Iterator[bytes], statuses: Counter[int], done: asyncio.Future[None]
    ) -> None:
        self.requests = requests
        self.statuses = statuses
        self.done = done
        self.buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(
            asyncio.Transport, transport
        )  # uvloop's are, though not by inheritance
        self.send()

    def send(self) -> None:
        if request := next(self.requests, None):
            self.transport.write(request)
        else:
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found or len(body) < content_length(head):
            return
        self.statuses[int(head[9:12])] += 1
        self.buffer = b""
        self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


def content_length(head: bytes) -> int:
    _, found, rest = head.lower().partition(b"\r\ncontent-length:")
    if not found:
        raise ValueError(f"expected an answer with content-length, found {head!r}")
    return int(rest.partition(b"\r\n")[0])


def requests(path: str, count: int) -> Iterator[bytes]:
    """POSTs of distinct events; the id stands in the header that webhooks without a preset are
    known by.
    """
    for number, body in enumerate(load.bodies(count)):
        head = (
            f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"webhook-id: m-{number}\r\n"
        )
        yield f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def send_all(host: str, port: int, path: str, count: int, connections: int) -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    prepared = iter(list(requests(path, count)))
    statuses: Counter[int] = Counter()
    ends = [loop.create_future() for _ in range(connections)]
    began = time.perf_counter()
    for end in ends:
        await loop.create_connection(
            lambda end=end: Connection(prepared, statuses, end), host, port
        )
    await asyncio.gather(*ends)
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "per_s": sum(statuses.values()) / seconds,
        "statuses": dict(statuses),
    }


def load_from_outside(
    port: int, path: str, count: int, connections: int = CONNECTIONS
) -> dict[str, Any]:
    """`send_all` in a process of its own; fails when an answer was not 202."""
    where = f"127.0.0.1:{port}{path}"
    call = [
        sys.executable,
        "-m",
        "benchmarks.echo",
        "--load",
        where,
        "--events",
        str(count),
        "--connections",
        str(connections),
    ]
    found = json.loads(
        subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout
    )
    if found["statuses"] != {"202": count}:
        raise RuntimeError(f"expected {count} answers 202, found {found['statuses']}")
    return found


# --------------------------------------------------------------------------- the echo, measured


@contextmanager
def serving() -> Iterator[int]:
    """The echo in a process of its own; yields its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "benchmarks.echo", "--serve", str(port)])
    try:
        wait_for_http(f"http://127.0.0.1:{port}/")
        yield port
    finally:
        server.terminate()
        server.wait()


def wait_for_http(url: str, within: float = 20.0) -> None:
    deadline = time.perf_counter() + within
    for _ in itertools.count():
        try:
            urllib.request.urlopen(url, timeout=1).read()
            return
        except OSError:
            if time.perf_counter() > deadline:
                raise
            time.sleep(0.02)


def rate(count: int) -> float:
    """Answers per second of the bare echo."""
    with serving() as port:
        load_from_outside(port, "/", count // 10)
        return load_from_outside(port, "/", count)["per_s"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.echo")
    parser.add_argument("--serve", type=int, metavar="PORT")
    parser.add_argument("--load", metavar="HOST:PORT/PATH")
    parser.add_argument("--events", type=int, default=40_000)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    args = parser.parse_args()
    if args.serve is not None:
        uvicorn.run(
            app,
            host="127.0.0.1",
            port=args.serve,
            loop="uvloop",
            http="httptools",
            log_level="error",
            access_log=False,
        )
    elif args.load:
        address, _, path = args.load.partition("/")
        host, _, port = address.rpartition(":")
        print(
            json.dumps(
                load.run(send_all(host, int(port), f"/{path}", args.events, args.connections))
            )
        )
    else:
        print(
            f"echo: {rate(args.events):,.0f} answers/s ({args.connections} connections, "
            "uvloop, httptools)"
        )


if __name__ == "__main__":
    main()
