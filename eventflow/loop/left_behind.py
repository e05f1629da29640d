"""Coroutines of users that cannot be ended: they catch every exception and continue to wait.

Python closes a suspended coroutine when it is freed, by raising GeneratorExit in it. One that
catches it continues, in the thread that freed it and without a loop: `await asyncio.sleep(1)`
raises there, and a `while True` around it never ends, nor does the process. Such a coroutine must
therefore never be freed, not even when the interpreter exits. engine/worker.py calls this for task
bodies at the end of a drain, loop/flow_loop.py for flows.
"""

import asyncio
import inspect
from contextlib import suppress
from typing import Any


def close_or_keep(task: "asyncio.Task[Any]") -> bool:
    """Closes the coroutine of a task that no loop steps any more. False: it refused, and the task
    is never freed.
    """
    task._log_destroy_pending = False  # pyright: ignore
    coro = task.get_coro()
    if not inspect.iscoroutine(coro):
        return True
    # Whatever its `finally` blocks raise or await is dropped: nothing of it is recorded.
    with suppress(BaseException):  # its own, or "coroutine ignored GeneratorExit"
        coro.close()
    if inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED:
        return True
    _never_free(task)
    return False


def leave_behind(task: "asyncio.Task[Any]") -> None:
    """Takes a task that ignores its cancels from its loop's list, so that `asyncio.run` does not
    wait for it, and never frees it.
    """
    asyncio.tasks._unregister_task(task)  # pyright: ignore
    task._log_destroy_pending = False  # pyright: ignore
    _never_free(task)


def _never_free(task: "asyncio.Task[Any]") -> None:
    """A reference that nothing gives back. Any object that holds one is freed at the exit, too."""
    import ctypes  # rarely needed, and slow to import

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(task))
