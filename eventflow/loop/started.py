"""A coroutine whose first step is taken before its asyncio task is scheduled.

`asyncio.Task(coro)` takes the first step in the loop's next turn, even if the coroutine never
waits. Python 3.12 has `eager_start` for this; this module also works on 3.11.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, Self, TypeVar

T = TypeVar("T")


def run_as_task(
    task: "asyncio.Task[Any]",
    loop: asyncio.AbstractEventLoop,
    context: Context,
    step: Callable[..., T],
    *args: Any,
) -> T:
    """Calls `step` as a step of `task`, in its context. The task must not have begun.

    `loop` must be the running loop, outside a step of any other task.
    """
    asyncio._enter_task(loop, task)  # pyright: ignore
    try:
        return context.run(step, *args)
    finally:
        asyncio._leave_task(loop, task)  # pyright: ignore


class StartedCoroutine(Coroutine[Any, Any, Any]):
    """Continues a coroutine after `take_first_step`, when it is awaited or a task steps it.

    If the coroutine has ended in its first step, this returns its value or raises its error.
    """

    __slots__ = ("_coro", "_error", "_is_waiting", "_value", "context", "has_ended")

    def __init__(self, context: Context) -> None:
        self.context = context
        """The context of the task."""
        self.has_ended = False
        self._coro: Coroutine[Any, Any, Any] | None = None
        self._value: Any = None  # returned, or what the coroutine waits for after its first step
        self._error: BaseException | None = None
        self._is_waiting = False

    def take_first_step(self, coro: Coroutine[Any, Any, Any]) -> None:
        """Never raises."""
        self._coro = coro
        try:
            self._value = coro.send(None)
            self._is_waiting = True
        except StopIteration as stop:
            self.has_ended = True
            self._value = stop.value
        except BaseException as error:
            self.fail(error)

    def follow(self, coro: Coroutine[Any, Any, Any]) -> None:
        """Leaves also the first step of this coroutine to the task."""
        self._coro = coro

    def end(self) -> None:
        """The task has nothing to do: it returns None in its first step."""
        self.has_ended = True

    def fail(self, error: BaseException) -> None:
        """Without the caller's frame, which refers to this object: no cycle if nothing takes it."""
        self.has_ended = True
        step = error.__traceback__
        self._error = error.with_traceback(None if step is None else step.tb_next)

    @property
    def has_value(self) -> bool:
        """Whether the coroutine has returned."""
        return self.has_ended and self._error is None

    @property
    def value(self) -> Any:
        """What the coroutine has returned."""
        return self._value

    # ----------------------------------------------------------------- called by the task

    def send(self, value: Any) -> Any:
        if self.has_ended:
            self._finish()
        if self._is_waiting:
            self._is_waiting = False
            waits_for = self._value
            self._value = None
            return waits_for
        assert self._coro is not None
        return self._coro.send(value)

    def _finish(self) -> None:
        if (error := self._error) is None:
            raise StopIteration(self._value)
        self._error = None
        try:
            raise error
        finally:  # breaks a cycle: the error refers to this frame
            del error

    def throw(self, *error: Any) -> Any:
        if self.has_ended or self._coro is None:
            self._finish()
        if self._is_waiting:
            waits_for: asyncio.Future[Any] | None = self.send(None)
            # Cancelled before the task could wait: asyncio cancels what a task waits for, with the
            # message of the cancel.
            if isinstance(waits_for, asyncio.Future) and waits_for.cancel(_message_of(error[0])):
                return waits_for
        assert self._coro is not None
        try:
            return self._coro.throw(*error)
        finally:  # breaks a cycle: the error refers to this frame
            del error

    def close(self) -> None:
        if self._coro is not None:
            self._coro.close()

    def __await__(self) -> Self:
        return self

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self.send(None)

    def __getattr__(self, name: str) -> Any:
        """`cr_frame`, `__qualname__` and the like, which asyncio shows for a task."""
        return getattr(self._coro, name)


def _message_of(error: Any) -> Any:
    """The message with which a task was cancelled."""
    return error.args[0] if isinstance(error, asyncio.CancelledError) and error.args else None
