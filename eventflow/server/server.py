"""`eventflow serve`: one App as one process. It owns the signals, the socket, the logs, and the process's exit.

    bind ─► open the store, the flows' loop, the listeners ─► listen ─► the ready line ─► … ─► SIGTERM: drain ─► exit 0

`App.run()` calls `run_app`, the command line calls `serve`. Guaranteed: the process ends within `grace` + 5 s of SIGTERM
whatever flows do; within 1 s of a storage error, with its code; at once on a second signal. Intake and HTTP have this thread's
loop, flows their own. Over a memory limit it drains too, and begins anew (memory.py, succession.py). Next rooms: web/ for
requests, app.py for the rest.
"""

import asyncio
import errno
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TextIO

import msgspec
import orjson
import uvicorn

from eventflow.core.errors import EventflowError, StoreError, StoreLocked, UsageError
from eventflow.logs.capture import Configured, Level, configure
from eventflow.logs.log import get_logger
from eventflow.logs.redaction import SECRETS
from eventflow.logs.store import LogStore
from eventflow.server.memory_limits import MemoryWatch, check_limits
from eventflow.server.reexec import bequeath, inherited, succeed
from eventflow.server.watchdog import Watchdog
from eventflow.store import open_store
from eventflow.store.file_guards import Lock
from eventflow.store.key_files import secret_beside
from eventflow.web.api import make_asgi
from eventflow.web.auth import host_name
from eventflow.web.http_protocol import Connections, bounded
from eventflow.web.served import Served

LAST_CALL = 4.0
"""Seconds after `grace` at which the process ends, whatever still runs: the promise is 5."""
FAREWELL = 0.4
"""Seconds between a storage error and the exit, in which requests under way get their 503: the promise is 1 in all."""
BACKLOG = 2048
TURN = 0.0005
"""Seconds for which a thread may keep the interpreter while others wait for it; Python's own is ten times that. For one webhook
it is taken some fifteen times from a flow that computes: for the request, each statement of the commit, and the answer."""

log = get_logger("eventflow.server")


class Unavailable(EventflowError):
    """What the server needs is taken: its port."""

    exit_code: ClassVar[int] = 69


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How to serve. `fd`: a listening socket handed over; else `host` and `port` (0 picks one). `grace` in seconds.

    `log`: "json", "pretty", or "auto" (pretty on a terminal). `allow_hosts`: names besides the loopback ones under which the
    API is reached. `memory_soft`, `memory_hard`: bytes; over them the worker begins no more runs, the process is replaced.
    """

    store: str | None = None
    host: str = "127.0.0.1"
    port: int = 8710
    fd: int | None = None
    grace: float = 20.0
    tls_cert: str | None = None
    tls_key: str | None = None
    behind_proxy: bool = False
    insecure_http: bool = False
    no_auth: bool = False
    open_metrics: bool = False
    allow_hosts: Sequence[str] = ()
    memory_soft: int | None = None
    memory_hard: int | None = None
    log: str = "auto"
    log_level: Level = "info"


def run_app(app: Served, *, ready_stream: TextIO | None = None, **options: Any) -> NoReturn:
    """`App.run()`: serves, then exits the process. The options are those of `Settings`."""
    try:
        code = serve(app, Settings(**options), ready_stream)
    except EventflowError as error:
        sys.stderr.write(f"eventflow: {error}\n")
        sys.exit(error.exit_code)
    sys.exit(code)


def serve(app: Served, settings: Settings, ready_stream: TextIO | None = None) -> int:
    """Serves until a signal; returns the exit code. Raises EventflowError when it cannot start. Main thread only."""
    check(settings)
    path = open_store(settings.store or app.url, app.clock).path
    pretty = {"json": False, "pretty": True}.get(settings.log)
    ready = ready_stream or sys.stdout
    sock = _listening(settings, path)
    with (
        sock,
        configure(
            stream=sys.stderr, pretty=pretty, level=settings.log_level, clock=app.clock
        ) as output,
    ):
        root = Root(app, settings, path, sock, output, ready)
        tune_interpreter()
        with _signals(root), asyncio.Runner(loop_factory=_new_loop) as runner:
            code = runner.run(root.main())
    root.succeed_if_asked()
    return code


def tune_interpreter() -> None:
    """What a process that serves wants of Python, and a host that embeds us may not: fewer collections, quicker turns.

    By default the garbage collector walks over every run in memory each few dozen runs, and finds nothing: a settled run
    leaves no cycles. Threads take turns every `TURN` seconds instead of 5 ms.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    sys.setswitchinterval(TURN)


# --------------------------------------------------------------------------- may it start so


def check(settings: Settings) -> None:
    """UsageError for what would expose the API by accident (threat S1)."""
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together")
    for name in filter(None, (settings.tls_cert, settings.tls_key)):
        if not Path(name).is_file():
            raise UsageError(f"--tls-cert, --tls-key: expected a file, found none at {name}")
    for name in settings.allow_hosts:
        if not name or name.lower() not in (host_name(name), host_name(f"[{name}]")):
            raise UsageError(
                f"--allow-host expected a name as in a Host header, without scheme and port, found {name!r}"
            )
    check_limits(settings.memory_soft, settings.memory_hard)
    if settings.fd is None:
        check_bind(settings, settings.host)


def check_bind(settings: Settings, host: str) -> None:
    if is_loopback(host):
        return
    if settings.no_auth:
        raise UsageError(f"--no-auth is for loopback addresses only, found --host {host}")
    if not (settings.tls_cert or settings.behind_proxy or settings.insecure_http):
        raise UsageError(
            f"--host {host} can be reached from other machines: give --tls-cert and --tls-key, or --behind-proxy when a proxy "
            "does TLS, or --insecure-http if you mean it"
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _listening(settings: Settings, store: str) -> socket.socket:
    """The socket, bound but not listening yet: a taken port shows before any flow starts."""
    if (fd := inherited()) is not None:
        return _handed_over(settings, fd)
    if settings.fd is not None:
        return _handed_over(settings, settings.fd)
    return bind_socket(settings, store)


def bind_socket(settings: Settings, store: str = "") -> socket.socket:
    """A socket on the settings' host and port. Raises Unavailable, or StoreLocked when the holder of the port has the store
    too.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, OverflowError) as error:
        raise UsageError(f"--host {settings.host} --port {settings.port}: {error}") from None
    sock = socket.socket(family, kind)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _cannot_bind(settings, store, error) from None
    return sock


def _cannot_bind(settings: Settings, store: str, error: OSError) -> EventflowError:
    """The port is taken; by another eventflow on the same store, that says more."""
    if error.errno == errno.EADDRINUSE and Path(f"{store}.lock").exists():
        lock = Lock(store)
        try:
            lock.take()
            lock.release()
        except StoreLocked as locked:
            return locked
        except OSError:
            pass
    why = (
        "is taken by another process"
        if error.errno == errno.EADDRINUSE
        else f"cannot be bound: {error.strerror}"
    )
    return Unavailable(
        f"port {settings.port} on {settings.host} {why}; choose another with --port (0 picks a free one)"
    )


def _handed_over(settings: Settings, fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
        name: Any = sock.getsockname()
    except OSError as error:
        raise UsageError(f"--fd {fd}: expected a socket, found {error.strerror}") from None
    if sock.family != socket.AF_UNIX:
        check_bind(settings, name[0])
    return sock


# --------------------------------------------------------------------------- the root


class Root:
    """One served App, from its opening to the exit code."""

    def __init__(
        self,
        app: Served,
        settings: Settings,
        path: str,
        sock: socket.socket,
        output: Configured,
        ready: TextIO,
    ) -> None:
        self.app, self.settings, self.path = app, settings, path
        self._sock, self._output, self._ready = sock, output, ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None
        self._sidecar = Path(f"{path}.server")
        self.stopping = False
        self._signal = ""
        self._heir: int | None = None  # the socket of the next life, once there is to be one
        self._server = _Server(self._uvicorn_config())

    async def main(self) -> int:
        self._loop = asyncio.get_running_loop()
        logs = LogStore(f"{self.path}.logs.db", clock=self.app.clock)
        logs.open()
        try:
            await self.app.open(store=self.settings.store, own_loop=True, sink=logs)
            self.app.store.on_failure(self._fail_stop)
            await self._serve()
        finally:
            await asyncio.to_thread(logs.close)
        return 0

    async def _serve(self) -> None:
        loops = {
            "intake": (asyncio.get_running_loop(), threading.get_ident()),
            "flows": self.app.house.flow_loop,
        }
        watchdog = Watchdog(loops, self.app.clock)
        watchdog.start()
        memory = asyncio.create_task(self._watch_memory(), name="memory")
        try:
            self._listen()
            self._make_token()
            await self._serve_http()
        finally:
            self.stopping = True
            memory.cancel()
            self._arm_last_call()
            await self.app.close(self.settings.grace)
            watchdog.stop()
            await asyncio.gather(memory, return_exceptions=True)
            await self._stop_http()
            self._sidecar.unlink(missing_ok=True)

    async def _watch_memory(self) -> None:
        soft, hard = self.settings.memory_soft, self.settings.memory_hard
        if soft is not None or hard is not None:
            house = self.app.house
            await MemoryWatch(
                soft, hard, house.worker, house.flow_loop[0], self.app.clock, self._recycle
            ).watch()

    def _listen(self) -> None:
        try:
            self._sock.listen(BACKLOG)
        except OSError as error:
            raise Unavailable(
                f"port {self.settings.port}: {error.strerror}; choose another with --port"
            ) from None

    async def _serve_http(self) -> None:
        """Until a signal. HTTP goes on answering during the drain: 503 to what comes in, and who looks sees how it goes."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._sock]), name="http")
        listening = asyncio.create_task(self._server.listening.wait())
        await asyncio.wait([self._serving, listening], return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        self._say_ready()
        stopped = asyncio.create_task(self._stop.wait(), name="signal")
        await asyncio.wait([stopped, self._serving], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        log.info("server.stopping", reason=self._signal or "the HTTP server ended")

    async def _stop_http(self) -> None:
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving

    def _uvicorn_config(self) -> uvicorn.Config:
        settings = self.settings
        hosts = [
            *settings.allow_hosts,
            *([settings.host] if settings.host not in ("0.0.0.0", "::") else []),
        ]
        asgi = make_asgi(
            self.app, auth=not settings.no_auth, allowed_hosts=hosts, open_metrics=settings.open_metrics, manage=False,
            draining=lambda: self.stopping,
        )  # fmt: skip
        return uvicorn.Config(
            asgi, loop="none", http=bounded(Connections()), ws="none", lifespan="off", log_config=None, log_level="critical",
            access_log=False, server_header=False, proxy_headers=settings.behind_proxy, backlog=BACKLOG, timeout_keep_alive=30,
            timeout_graceful_shutdown=1, ssl_certfile=settings.tls_cert, ssl_keyfile=settings.tls_key,
            headers=[("strict-transport-security", "max-age=31536000")] if settings.tls_cert else None,
        )  # fmt: skip

    # ----------------------------------------------------------------- ready

    @property
    def url(self) -> str:
        name: Any = self._sock.getsockname()
        if self._sock.family == socket.AF_UNIX:
            return f"unix:{name}"
        host = str({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name[0], name[0]))
        scheme = "https" if self.settings.tls_cert else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{name[1]}"

    def _say_ready(self) -> None:
        """The one line on stdout, and the same beside the store for the command line."""
        line = {
            "ready": True,
            "url": self.url,
            "pid": os.getpid(),
            "store": self.app.store.location,
        }
        fresh = self._sidecar.with_name(f"{self._sidecar.name}.{os.getpid()}")
        fresh.touch(mode=0o600)
        fresh.write_bytes(orjson.dumps({"url": self.url, "pid": os.getpid()}))
        fresh.rename(self._sidecar)
        with suppress(OSError, ValueError):  # nobody reads stdout: no reason not to serve
            self._ready.write(orjson.dumps(line).decode() + "\n")
            self._ready.flush()

    def _make_token(self) -> None:
        """At the very first start there is none yet: a person at a terminal is shown it once, a log file never."""
        if self.settings.no_auth:
            return
        fresh = not Path(f"{self.path}.token").exists()
        token = secret_beside(self.path, "token")
        SECRETS.register(token)
        if fresh:
            shown = token if sys.stderr.isatty() else f"$(cat {self.path}.token)"
            sys.stderr.write(
                f"eventflow: the API's token was made. Authorization: Bearer {shown}\n"
            )

    # ----------------------------------------------------------------- the ends

    def signalled(self, number: int, _frame: Any) -> None:
        """First signal: drain. It is said here and now, not on a loop that somebody may block. Second: out."""
        if self._heir is not None:  # it drains already, but not to end
            os.close(self._heir)
            self._heir = None
            return
        if self.stopping:
            os.write(2, b"eventflow: second signal, not waiting\n")
            self._sidecar.unlink(missing_ok=True)
            os._exit(128 + number)
        self._drain(signal.Signals(number).name)

    def _drain(self, reason: str) -> None:
        self.stopping, self._signal = True, reason
        if self.app.is_open:
            self.app.house.reactor.draining = True
        self._arm_last_call()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)

    def _recycle(self, reason: str) -> None:
        """Drains as for a signal, and then begins anew in this process. A signal meanwhile makes a plain end of it."""
        if not self.stopping:
            self._heir = bequeath(self._sock)
            self._drain(reason)

    def succeed_if_asked(self) -> None:
        """Does not return when a next life is due."""
        if self._heir is not None:
            succeed(self._heir)

    def reload_tls(self, _number: int, _frame: Any) -> None:
        """SIGHUP: a renewed certificate, for connections from now on."""
        config = self._server.config
        if config.ssl is not None and self.settings.tls_cert:
            config.ssl.load_cert_chain(self.settings.tls_cert, self.settings.tls_key)

    def _arm_last_call(self) -> None:
        if not any(thread.name == "eventflow-last-call" for thread in threading.enumerate()):
            self._leave_in(self.settings.grace + LAST_CALL, 0, "eventflow-last-call")

    def _fail_stop(self, error: StoreError) -> None:
        """The store failed: nothing is acknowledged any more. Called in the store's own thread."""
        if not self.stopping:
            log.error("store.failed", error=str(error), exit_code=error.exit_code)
        self.stopping = True
        self._leave_in(FAREWELL, error.exit_code, "eventflow-fail-stop")

    def _leave_in(self, seconds: float, code: int, name: str) -> None:
        """A thread that ends the process, whatever the loops and other threads do."""

        def leave() -> None:
            threading.Event().wait(seconds)
            flush = threading.Thread(target=self._output.flush, daemon=True)
            flush.start()
            flush.join(0.3)
            self._sidecar.unlink(missing_ok=True)
            if code == 0:
                self.succeed_if_asked()
            os._exit(code)

        threading.Thread(target=leave, name=name, daemon=True).start()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which the root has, and saying when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


@contextmanager
def _signals(root: Root) -> Generator[None]:
    handlers = {
        signal.SIGTERM: root.signalled,
        signal.SIGINT: root.signalled,
        signal.SIGHUP: root.reload_tls,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:  # not built for this platform
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
