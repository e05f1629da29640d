"""`eventflow serve`: one App as one process. Owns the signals, the socket, the logs and the exit.

    bind ─► open store, flow loop, listeners ─► listen ─► ready line ─► SIGTERM: drain ─► exit 0

`App.run()` calls `run_app`, the command line calls `serve`. Guaranteed: the process ends within
`grace` + 5 s of SIGTERM, whatever flows do; within 1 s of a storage error, with its exit code; at
once on a second signal. Intake and HTTP run on this thread's loop, flows on their own. When a
memory limit is exceeded, the process drains and re-executes itself (memory_limits.py, reexec.py).
Requests are handled in web/.
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

from eventflow.app import App
from eventflow.core.clock import to_datetime
from eventflow.core.declarations import Declared, duration
from eventflow.core.errors import EventflowError, StoreError, UsageError
from eventflow.core.uninterrupted import error_of
from eventflow.logs.capture import Level, LogConfiguration, configure
from eventflow.logs.log import get_logger
from eventflow.logs.redaction import SECRETS
from eventflow.logs.store import LogStore
from eventflow.runtime import new_event_loop
from eventflow.sdk.replay_hazards import warn_of_hazards
from eventflow.server.address import PublishedAddress
from eventflow.server.forked_children import ForkedChildren
from eventflow.server.memory_limits import MemoryMonitor, check_limits
from eventflow.server.reexec import inheritable_copy, reexec, take_inherited_fd
from eventflow.server.watchdog import Watchdog
from eventflow.store.file_guards import lock_holder
from eventflow.store.key_files import load_or_create_secret
from eventflow.store.url import open_store
from eventflow.web.api import make_asgi
from eventflow.web.auth import allowed_host, host_name
from eventflow.web.http_protocol import ConnectionLimiter, limited_protocol

FORCED_EXIT_MARGIN_SECONDS = 4.0
"""After `grace`, before the process is ended whatever still runs: the promise is 5 s."""
FAIL_STOP_DELAY_SECONDS = 0.4
"""Between a storage error and the exit, for requests under way to get their 503: the promise is 1 s
in all.
"""
INTERNAL_EXIT_CODE = 70
"""EX_SOFTWARE: a loop or thread of the server has ended or does not respond."""
BACKLOG = 2048
"""Connections that the kernel queues before they are accepted."""
THREAD_SWITCH_INTERVAL_SECONDS = 0.0005
"""For which a thread may keep the GIL while others wait; Python's default is ten times that. One
webhook takes it some fifteen times from a flow that computes: for the request, for each statement
of the commit, for the response.
"""

log = get_logger("eventflow.server")
LOG_EVENTS = {
    "server.failed": (
        "A loop, thread or task of the server has ended or does not respond (`reason`): the process"
        " ends."
    ),
    "server.stopping": "The server starts to stop; `reason` names the signal.",
    "store.failed": "Storage failed: nothing more is acknowledged, and the process ends.",
}


class PortInUse(EventflowError):
    """The server's port is taken or cannot be bound."""

    exit_code: ClassVar[int] = 69


class Settings(msgspec.Struct, frozen=True, kw_only=True, metaclass=Declared):
    """How to serve. `fd`: an inherited listening socket; else `host` and `port` (0 picks one).

    `grace`: seconds that attempts may take to end at a stop. `log`: "json", "pretty", or "auto"
    (pretty on a terminal). `allow_hosts`: host names of the API besides the loopback ones.
    `memory_soft`, `memory_hard`: bytes; over the first the worker starts no runs, over the second
    the process restarts. `stall_timeout`: seconds after which the process ends if a loop or
    thread does not respond. `dev`: each event received is logged, and on a terminal the ready line
    is text.
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
    stall_timeout: float = 60.0
    log: str = "auto"
    log_level: Level = "info"
    dev: bool = False

    def __post_init__(self) -> None:
        duration(self.grace, "grace=")
        duration(self.stall_timeout, "stall_timeout=", positive=True)


def run_app(app: App, *, ready_stream: TextIO | None = None, **options: Any) -> NoReturn:
    """`App.run()`: serves, then exits the process. The options are those of `Settings`."""
    try:
        code = serve(app, Settings(**options), ready_stream)
    except EventflowError as error:
        sys.stderr.write(f"eventflow: {error}\n")
        sys.exit(error.exit_code)
    sys.exit(code)


def serve(app: App, settings: Settings, ready_stream: TextIO | None = None) -> int:
    """Serves until a signal; returns the exit code. Main thread only.

    Raises EventflowError when it cannot start.
    """
    check(settings)
    app.check_secrets()
    path = open_store(settings.store or app.url, app.clock).path
    pretty = {"json": False, "pretty": True}.get(settings.log)
    ready = ready_stream or sys.stdout
    sock = _open_socket(settings, path)
    with (
        sock,
        configure(
            stream=sys.stderr, pretty=pretty, level=settings.log_level, clock=app.clock
        ) as output,
    ):
        process = ServerProcess(app, settings, path, sock, output, ready)
        tune_interpreter()
        with _signal_handlers(process), asyncio.Runner(loop_factory=new_event_loop) as runner:
            try:
                code = runner.run(process.main())
            except (SystemExit, KeyboardInterrupt) as error:  # of user code on the intake loop
                process.fail(f"the intake loop has ended: {error!r}")
                code = INTERNAL_EXIT_CODE
    process.reexec_if_requested()
    return code


def tune_interpreter() -> None:
    """Interpreter settings for a server process: fewer garbage collections, a shorter switch
    interval.

    By default the collector walks over every run in memory each few dozen runs and finds nothing,
    since a settled run leaves no cycles. An embedding program keeps its own settings.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    sys.setswitchinterval(THREAD_SWITCH_INTERVAL_SECONDS)


# --------------------------------------------------------------------------- checks


def check(settings: Settings) -> None:
    """UsageError for settings that would expose the API by accident (threat S1) or cannot work."""
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise UsageError("--tls-cert and --tls-key go together")
    for name in filter(None, (settings.tls_cert, settings.tls_key)):
        if not Path(name).is_file():
            raise UsageError(f"--tls-cert, --tls-key: expected a file, found none at {name}")
    for name in settings.allow_hosts:
        allowed_host(name)
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
            f"--host {host} can be reached from other machines: give --tls-cert and --tls-key,"
            " or --behind-proxy when a proxy does TLS, or --insecure-http if you mean it"
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _open_socket(settings: Settings, store: str) -> socket.socket:
    """The socket, bound but not listening yet: a taken port is found before any flow starts."""
    if (fd := take_inherited_fd()) is not None:
        return _adopt_socket(settings, fd)
    if settings.fd is not None:
        return _adopt_socket(settings, settings.fd)
    return bind_socket(settings, store)


def bind_socket(settings: Settings, store: str = "") -> socket.socket:
    """A socket on the settings' host and port.

    Raises PortInUse, or StoreLocked when the process on that port has the store open too.
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
    """The error for a failed bind; StoreLocked, the more specific one, if it holds too."""
    if error.errno == errno.EADDRINUSE and Path(store).exists():
        with suppress(OSError):  # no lock to read: report the port
            if (locked := lock_holder(store)) is not None:
                return locked
    why = (
        "is taken by another process"
        if error.errno == errno.EADDRINUSE
        else f"cannot be bound: {error.strerror}"
    )
    return PortInUse(
        f"port {settings.port} on {settings.host} {why};"
        " choose another with --port (0 picks a free one)"
    )


def _adopt_socket(settings: Settings, fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
        name: Any = sock.getsockname()
    except OSError as error:
        raise UsageError(f"--fd {fd}: expected a socket, found {error.strerror}") from None
    if sock.family != socket.AF_UNIX:
        check_bind(settings, name[0])
    return sock


# --------------------------------------------------------------------------- the process


class ServerProcess:
    """One served App, from its opening to the exit code. `path`: of the store's file."""

    def __init__(
        self,
        app: App,
        settings: Settings,
        path: str,
        sock: socket.socket,
        output: LogConfiguration,
        ready: TextIO,
    ) -> None:
        self.app = app
        self.settings = settings
        self.path = path
        self.stopping: bool = False
        self._sock = sock
        self._output = output
        self._address = PublishedAddress(path, ready)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._stop_reason: str = ""
        self._next_socket: int | None = None  # descriptor for the re-executed process, if requested
        self._server = _Server(self._uvicorn_config())
        self._serving: asyncio.Task[None] | None = None
        self._logs: LogStore | None = None

    async def main(self) -> int:
        self._loop = asyncio.get_running_loop()
        logs = self._logs = LogStore(f"{self.path}.logs.db", clock=self.app.clock)
        logs.open()
        self._forks = ForkedChildren(self._sock, self._server, self._loop)
        try:
            await self.app.open(store=self.settings.store, own_loop=True, logs=logs)
            self.app.store.on_failure(self._fail_stop)
            self.app.runtime.reactor.logs_received = self.settings.dev
            if self.settings.dev:
                warn_of_hazards(self.app.flows.values())
            await self._serve()
        finally:
            await asyncio.to_thread(logs.close)
        return 0

    async def _serve(self) -> None:
        loops = {
            "intake": (asyncio.get_running_loop(), threading.get_ident()),
            "flows": self.app.runtime.flow_loop,
        }
        watchdog = Watchdog(
            loops,
            self.app.clock,
            self.app.runtime,
            {
                "the log": lambda: self._output.output.is_alive,
                "the log store": lambda: self._logs is None or self._logs.is_alive,
            },
            self.settings.stall_timeout,
            self.fail,
        )
        watchdog.start()
        memory = asyncio.create_task(self._watch_memory(), name="memory")
        try:
            self._listen()
            self._ensure_token()
            await self._serve_http()
        except asyncio.CancelledError:
            self.fail("user code has cancelled the tasks of the server's loop")
            raise
        except Exception as error:  # reported here if the end is forced
            code = error.exit_code if isinstance(error, EventflowError) else 1
            self._schedule_forced_exit(code, f"eventflow: {error}\n")
            raise
        finally:
            self.stopping = True
            memory.cancel()
            await self.app.close(self.settings.grace)
            watchdog.stop()
            await asyncio.gather(memory, return_exceptions=True)
            await self._stop_http()
            self._address.remove()

    async def _watch_memory(self) -> None:
        soft = self.settings.memory_soft
        hard = self.settings.memory_hard
        if soft is not None or hard is not None:
            runtime = self.app.runtime
            flow_loop, _ = runtime.flow_loop
            monitor = MemoryMonitor(
                soft, hard, runtime.worker, flow_loop, self.app.clock, self._restart
            )
            if (error := await error_of(monitor.run())) is not None:
                self.fail(f"the memory monitor has ended: {error!r}")

    def _listen(self) -> None:
        try:
            self._sock.listen(BACKLOG)
        except OSError as error:
            raise PortInUse(
                f"port {self.settings.port}: {error.strerror}; choose another with --port"
            ) from None

    async def _serve_http(self) -> None:
        """Serves until a signal. During the drain HTTP answers reads, and 503 to new work."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._sock]), name="http")
        listening = asyncio.create_task(self._server.listening.wait())
        await asyncio.wait([self._serving, listening], return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        self._address.publish(self.url, self._ready_line())
        stopped = asyncio.create_task(self._stop.wait(), name="signal")
        await asyncio.wait([stopped, self._serving], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if self._stop.is_set():
            log.info("server.stopping", reason=self._stop_reason)
        else:
            self.fail("the HTTP server has ended")

    async def _stop_http(self) -> None:
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving

    def _uvicorn_config(self) -> uvicorn.Config:
        settings = self.settings
        bound = host_name(settings.host) or host_name(f"[{settings.host}]")
        hosts = [*settings.allow_hosts, *([bound] if bound not in ("", "0.0.0.0", "::") else [])]
        asgi = make_asgi(
            self.app,
            auth=not settings.no_auth,
            allowed_hosts=hosts,
            open_metrics=settings.open_metrics,
            manage=False,
            draining=lambda: self.stopping,
        )
        return uvicorn.Config(
            asgi,
            loop="none",
            http=limited_protocol(ConnectionLimiter()),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            proxy_headers=settings.behind_proxy,
            backlog=BACKLOG,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
            headers=[("strict-transport-security", "max-age=31536000")]
            if settings.tls_cert
            else None,
        )

    # ----------------------------------------------------------------- ready

    @property
    def url(self) -> str:
        name: Any = self._sock.getsockname()
        if self._sock.family == socket.AF_UNIX:
            return f"unix:{name}"
        host = str({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name[0], name[0]))
        scheme = "https" if self.settings.tls_cert else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{name[1]}"

    def _ready_line(self) -> str:
        if self.settings.dev and self.settings.log != "json" and self._address.is_terminal:
            zone = to_datetime(self.app.clock.now()).astimezone().tzname()
            return f"eventflow: ready at {self.url}; times in {zone}"
        line = {
            "ready": True,
            "url": self.url,
            "pid": os.getpid(),
            "store": self.app.store.location,
        }
        return orjson.dumps(line).decode()

    def _ensure_token(self) -> None:
        """Makes the token at the first start. It is shown on a terminal, never in a log file."""
        if self.settings.no_auth:
            return
        fresh = not Path(f"{self.path}.token").exists()
        token = load_or_create_secret(self.path, "token")
        SECRETS.register(token)
        if fresh:
            shown = token if sys.stderr.isatty() else f"$(cat {self.path}.token)"
            sys.stderr.write(
                f"eventflow: the API token was created; requests to /api need the header\n"
                f"  Authorization: Bearer {shown}\n"
            )

    # ----------------------------------------------------------------- stop, restart, exit

    def on_signal(self, number: int, _frame: Any) -> None:
        """First signal: drain. Set here and not on a loop, which a flow may block. Second: exit."""
        if self._next_socket is not None:  # it drains for a restart: now it ends instead
            os.close(self._next_socket)
            self._next_socket = None
            return
        if self.stopping:
            os.write(2, b"eventflow: second signal, not waiting\n")
            self._address.remove()
            os._exit(128 + number)
        self._drain(signal.Signals(number).name)

    def _drain(self, reason: str) -> None:
        self.stopping = True
        self._stop_reason = reason
        if self.app.is_open:
            self.app.runtime.reactor.draining = True
        self._schedule_forced_exit()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)

    def _restart(self, reason: str) -> None:
        """Drains, then re-executes the program. A signal during this drain makes it a normal
        shutdown.
        """
        if not self.stopping:
            self._next_socket = inheritable_copy(self._sock)
            self._drain(reason)

    def reexec_if_requested(self) -> None:
        """Re-executes the program if `_restart` was called; then it does not return."""
        if self._next_socket is not None:
            reexec(self._next_socket)

    def reload_tls(self, _number: int, _frame: Any) -> None:
        """SIGHUP: load a renewed certificate for new connections."""
        config = self._server.config
        if config.ssl is not None and self.settings.tls_cert:
            config.ssl.load_cert_chain(self.settings.tls_cert, self.settings.tls_key)

    def _schedule_forced_exit(self, code: int = 0, reason: str = "") -> None:
        """The first call counts. `reason` is written to stderr if the exit is forced."""
        name = "eventflow-forced-exit"
        if not any(thread.name == name for thread in threading.enumerate()):
            seconds = self.settings.grace + FORCED_EXIT_MARGIN_SECONDS
            self._exit_after(seconds, code, name, reason)

    def _fail_stop(self, error: StoreError) -> None:
        """The store failed: nothing is acknowledged any more. Called on the writer thread."""
        if not self.stopping:
            log.error("store.failed", error=str(error), exit_code=error.exit_code)
        self.stopping = True
        self._exit_after(FAIL_STOP_DELAY_SECONDS, error.exit_code, "eventflow-fail-stop")

    def fail(self, reason: str) -> None:
        """Ends the process, because a part of it has ended or does not respond. From any
        thread.
        """
        if self.stopping:
            return  # the forced exit ends the process
        self.stopping = True
        log.error("server.failed", reason=reason, exit_code=INTERNAL_EXIT_CODE)
        self._exit_after(FAIL_STOP_DELAY_SECONDS, INTERNAL_EXIT_CODE, "eventflow-fault")

    def _exit_after(self, seconds: float, code: int, name: str, reason: str = "") -> None:
        """Ends the process from a new thread, whatever the loops and other threads do."""

        def exit_process() -> None:
            threading.Event().wait(seconds)
            flush = threading.Thread(target=self._output.flush, daemon=True)
            flush.start()
            flush.join(0.3)
            os.write(2, reason.encode())
            self._address.remove()
            if code == 0:
                self.reexec_if_requested()
            os._exit(code)

        threading.Thread(target=exit_process, name=name, daemon=True).start()


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers; `listening` is set once it accepts connections."""

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
def _signal_handlers(process: ServerProcess) -> Generator[None]:
    handlers = {
        signal.SIGTERM: process.on_signal,
        signal.SIGINT: process.on_signal,
        signal.SIGHUP: process.reload_tls,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
