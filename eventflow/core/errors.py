"""The exceptions that eventflow raises. Exceptions of user code pass through unchanged.

    EventflowError
    ├── UsageError             the program or its configuration must change             exit 2
    │   ├── AppNotFound        TARGET cannot be imported                                exit 3
    │   ├── MissingExtra       an optional package is not installed                     exit 3
    │   ├── EmptySecret        a secret was given but is empty or unset                 exit 3
    │   ├── NotAsync           @flow on a plain function
    │   ├── IdempotencyConflict    a known idempotency key came with other parameters
    │   └── OutsideFlowError   a task was called outside the coroutines of its flow
    ├── RunError               a run, or something in it, failed                        exit 1
    │   ├── TaskFailed         a recorded error whose class cannot be rebuilt
    │   ├── TaskTimedOut       an attempt exceeded its timeout
    │   ├── ArgumentsChanged   a recorded call was repeated with other arguments
    │   ├── NotAwaited         a flow forgot to await a call, with App(strict=True)
    │   ├── NotStorable        a value has no lossless encoding
    │   │   └── ResultTooLarge     its JSON is over 64 MiB
    │   ├── ResultsUnavailable the store of large results does not respond; retried
    │   ├── CheckpointFailed   a checkpoint cannot be written; the previous one is intact
    │   ├── BindingError       an event lacks what a flow's signature needs
    │   ├── RunFailed, RunCancelled, RunTimedOut, RunHeld, RunDead    raised by `run.result()`
    │   └── DepthExceeded      an event was emitted more than 20 hops deep
    ├── SourceError            an event source fails; its listener is restarted
    └── StoreError             the store cannot be used                                 exit 69…75
        ├── StoreFailed        storage failed in use; nothing more is acknowledged      exit 74
        ├── StoreLocked        another process holds the store                          exit 75
        ├── StoreUnwritable    the store cannot be created or written                   exit 73
        ├── StoreCorrupt       a checksum or the high-water mark does not match         exit 65
        ├── StoreFull          the commit queue, the ledger or the disk is full
        └── NotFound           no such event, run or trigger                            exit 5

A message says what was expected, what was found, and what to do. `exit_code` is the exit status of
the command line. Recorded errors are rebuilt from the class and `args`, so constructors keep their
positional parameters.
"""

from collections.abc import Callable
from typing import Any, ClassVar, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class EventflowError(Exception):
    """The base class of all errors of eventflow."""

    exit_code: ClassVar[int] = 1


class UsageError(EventflowError):
    """The program or its configuration must change; trying again does not help.

    `location`: `file:line` of the user's code, for an error in a declaration; it is in the message
    too.
    """

    exit_code = 2
    location: str | None = None


class AppNotFound(UsageError):
    exit_code = 3

    def __init__(self, target: str, why: str) -> None:
        super().__init__(f"cannot load {target!r}: {why}")


class MissingExtra(UsageError):
    exit_code = 3

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(
            f"{what} needs the package {package!r}, which is not installed; run: pip install "
            f"'eventflow-reactor[{extra}]'"
        )


class EmptySecret(UsageError):
    exit_code = 3

    def __init__(self, where: str, source: str) -> None:
        found = f"{source} empty or unset; set it before starting"
        if source.startswith("$"):
            found += ", or write it to ./.env, which the eventflow command reads"
        if source == "None":  # of `os.getenv`
            found = 'None; write env("NAME"), which is read when the app starts'
        super().__init__(f"{where}: expected a secret, found {found}")


class NotAsync(UsageError):
    """`yields`: the function is `async def`, and a generator."""

    def __init__(self, name: str, yields: bool = False) -> None:
        super().__init__(
            f"flow {name!r} must return a value, found an async generator; collect the values in a "
            "list and return it, or emit() each one"
            if yields
            else f"flow {name!r} must be `async def`, found a plain function; write `async def "
            f"{name}(...)`, or make it a @task, "
            "which may be plain"
        )


class IdempotencyConflict(UsageError):
    """A run was started with an idempotency key that is known with other parameters.

    The first run stands, and nothing was started. `key` is the key; a host answers 409.
    """

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return (
            f"idempotency key {self.key!r} is known with other parameters; the first run stands, "
            "use another key"
        )


class OutsideFlowError(UsageError):
    """A task was called outside the coroutines of its flow, such as in a thread.

    The journal could not identify such a call when the run is replayed.
    """

    def __init__(self, task: str, found: str) -> None:
        super().__init__(
            f"task {task!r} was called from {found}; expected a call from the flow's own "
            "coroutines. "
            f"Call it with `await {task}(...)` in the flow, or call the plain function as "
            f"`{task}.fn(...)`"
        )


class RunError(EventflowError):
    """A run, or something in it, failed."""


class TaskFailed(RunError):
    """Replaces a recorded error that cannot be rebuilt, or whose class a process may not have.

    It is an instance of the nearest classes that every process has, too, such as OSError.
    """

    def __init__(self, error_type: str, message: str) -> None:
        super().__init__(error_type, message)
        self.error_type = error_type
        self.message = message

    def __str__(self) -> str:
        return f"{self.error_type}: {self.message}"


class TaskTimedOut(RunError, TimeoutError):
    """One attempt exceeded its timeout. Retried like any other failure."""

    def __init__(self, task: str, seconds: float) -> None:
        super().__init__(task, seconds)
        self.task = task
        self.seconds = seconds

    def __str__(self) -> str:
        return f"task {self.task!r} ran longer than its timeout of {self.seconds:g} s"


class ArgumentsChanged(RunError):
    """A recorded call was repeated with other arguments.

    The code changed during the run, or the flow is not deterministic.
    """

    def __init__(self, call_key: str, diff: str) -> None:
        super().__init__(call_key, diff)
        self.call_key = call_key
        self.diff = diff

    def __str__(self) -> str:
        return (
            f"{self.call_key} was recorded with other arguments ({self.diff}). If the code did not "
            "change, there is random, time, a set or a global in the flow: use "
            "current_run().random / .now, sort the set; or a flow with retries= calls the task in "
            "an `except` block too: give the task a key=. If it did, deploy the code that recorded "
            'it, or give the task on_changed="rerun" or on_changed="accept". Then retry the run; '
            "`eventflow retry RUN --from-scratch` discards what was recorded"
        )


class NotAwaited(RunError):
    """A flow made calls and never awaited them, so they did not run; see `App(strict=True)`. Or a
    flow or a task (`flow` is its name) returned a call in place of its value.
    """

    def __init__(self, flow: str, calls: str) -> None:
        super().__init__(flow, calls)
        self.flow = flow
        self.calls = calls

    def __str__(self) -> str:
        return (
            f"{self.flow!r} never awaited {self.calls}; the call did not run: write `await` before "
            "it, or pass it to asyncio.gather or a TaskGroup"
        )


class NotStorable(RunError):
    """A value has no lossless encoding. Never retried: another attempt returns the same type."""

    def __init__(self, path: str, found: str) -> None:
        super().__init__(path, found)
        self.path = path
        self.found = found

    def __str__(self) -> str:
        if ": argument " in self.path:
            return (
                f"{self.path} is a {self.found}, which has no lossless JSON form; pass plain data, "
                "or annotate the parameter with a dataclass, a msgspec.Struct or a pydantic model"
            )
        return (
            f"{self.path} is a {self.found}, which has no lossless JSON form; return plain data, "
            "or annotate the return type with a dataclass, a msgspec.Struct or a pydantic model; "
            'or use @task(codec="pickle"), return bytes, or write a file and return its path'
        )


class ResultTooLarge(NotStorable):
    """The JSON of a result is over the journal's limit. Never retried."""

    def __init__(self, path: str, size: int, limit: int) -> None:
        RunError.__init__(self, path, size, limit)
        self.path = path
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return (
            f"{self.path} is {self.size / 2**20:.0f} MiB of JSON, expected at most "
            f"{self.limit / 2**20:.0f}; return bytes, or write it to a file or object store and "
            "return its name"
        )


class ResultsUnavailable(RunError):
    """The store of large results (`results=`) refuses or does not respond.

    Nothing is lost: the attempt or the run is tried again.
    """

    def __init__(self, what: str, where: str, why: str) -> None:
        super().__init__(what, where, why)
        self.what = what
        self.where = where
        self.why = why

    def __str__(self) -> str:
        return (
            f"cannot {self.what} the result {self.where}: {self.why}; is the bucket there, and may "
            "it be read and written?"
        )


class CheckpointFailed(RunError):
    """A checkpoint cannot be saved: too large, disk full, or its attempt is over.

    The previous checkpoint is intact.
    """


class BindingError(RunError):
    """An event lacks what a flow's signature needs."""

    def __init__(self, flow: str, field: str, reason: str) -> None:
        super().__init__(flow, field, reason)
        self.flow = flow
        self.field = field
        self.reason = reason

    def __str__(self) -> str:
        return f"flow {self.flow!r} cannot bind parameter {self.field!r}: {self.reason}"


class RunFailed(RunError):
    """`run.result()` of a failed run whose error cannot be rebuilt."""


class RunCancelled(RunError):
    """`run.result()` of a cancelled run."""


class RunTimedOut(RunError, TimeoutError):
    """A run exceeded its flow's timeout."""

    def __init__(self, flow: str, seconds: float) -> None:
        super().__init__(flow, seconds)
        self.flow = flow
        self.seconds = seconds

    def __str__(self) -> str:
        return f"flow {self.flow!r} ran longer than its timeout of {self.seconds:g} s"


class RunHeld(RunError):
    """`run.result()` of a run in state held: it needs attention and a retry or a cancel."""


class RunDead(RunError):
    """`run.result()` of a run that was quarantined after it crashed the process repeatedly."""


class DepthExceeded(RunError):
    def __init__(self, event_type: str, depth: int) -> None:
        super().__init__(event_type, depth)
        self.event_type = event_type
        self.depth = depth

    def __str__(self) -> str:
        found = f"event {self.event_type!r} was emitted at depth {self.depth}"
        return f"{found}; expected at most 20: is a flow emitting to itself?"


class SourceError(EventflowError):
    """An event source fails. The reactor logs it and restarts the listener with backoff."""


class StoreError(EventflowError):
    """The store cannot be used."""

    exit_code = 69


class StoreFailed(StoreError):
    """Storage failed in use. Nothing more is acknowledged.

    Whether a commit in progress took effect is unknown.
    """

    exit_code = 74


class StoreLocked(StoreError):
    exit_code = 75

    def __init__(self, path: str, pid: int | None, *, by_sibling: bool = False) -> None:
        self.path = path
        self.pid = pid
        self.holder = f"process {pid}" if pid else "another process"
        super().__init__(
            f"the store {path} is in use by {self.holder}, another worker of this server; "
            "one process serves an app: run one worker"
            if by_sibling
            else f"the store {path} is in use by {self.holder}; stop it, "
            "or point this one elsewhere with --store"
        )


class StoreUnwritable(StoreError):
    exit_code = 73

    def __init__(self, path: str, why: str) -> None:
        super().__init__(
            f"cannot create or write the store {path}: {why}; check the directory's owner, mode "
            "and free space"
        )


class StoreCorrupt(StoreError):
    exit_code = 65


class StoreFull(StoreError):
    """The commit queue, the ledger or the disk is full: nothing was recorded, sources slow down.

    `retry_after`: seconds after which to try again. `disk`: free space is below its limit.
    `closing`: the intake is shutting down, so waiting does not help.
    """

    def __init__(
        self, what: str, retry_after: float, *, disk: bool = False, closing: bool = False
    ) -> None:
        super().__init__(what)
        self.retry_after = retry_after
        self.disk = disk
        self.closing = closing

    def copy(self) -> "StoreFull":
        """An equal error to raise, where this one is kept: a raised error refers to its frames."""
        return StoreFull(str(self), self.retry_after, disk=self.disk, closing=self.closing)


class NotFound(StoreError):
    exit_code = 5

    def __init__(self, kind: str, ident: str, hint: str | None = None) -> None:
        listed = "dead-letters" if kind == "dead letter" else f"{kind}s"
        hint = hint or f"`eventflow ls {listed}` lists what there is"
        super().__init__(f"no {kind} matches {ident!r}; {hint}")


ANY_FAILURE = (Exception, SystemExit, KeyboardInterrupt)
"""What user code may raise in an asyncio task of ours. asyncio passes the last two on to the loop,
which they would end.
"""


def error_summary(error: BaseException) -> dict[str, Any]:
    """`{"type": "module:QualName", "message": str}`, the short form used in logs and the API."""
    cls = type(error)
    return {"type": f"{cls.__module__}:{cls.__qualname__}", "message": error_text(error)}


def error_text(error: BaseException) -> str:
    """`str(error)`; a replacement text if the `__str__` of a user's error raises."""
    try:
        return str(error)
    except BaseException as broken:  # user code: the text says so
        return f"<{type(error).__name__}.__str__ raised {type(broken).__name__}>"


def error_line(error: BaseException) -> str:
    """`TypeName: text`, in which the type has no module."""
    return f"{type(error).__name__}: {error_text(error)}"


def value_or_none(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """What the call returns, or None if it raises, whatever it raises.

    For user code whose exception is not needed and must not stop the caller. If the exception is
    needed, write `try` and `except ... as error`, and do not keep it in another local variable: an
    error refers to the frames that it passed through, so the error, these frames and all that they
    refer to would stay in memory until the garbage collector runs.
    """
    try:
        return call(*args, **kwargs)
    except BaseException:  # user code: any exception is a result
        return None
