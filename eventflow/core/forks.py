"""What happens in a process that user code forks from ours: `multiprocessing`, `os.fork()`.

Only the forking thread lives on in the child. Everything else is a copy: locks that other threads
held stay locked for ever, sockets and file locks stay open after the parent's death, signal
handlers only set a flag that nobody reads. Objects that own such things register a method here. A
child that runs another program (`subprocess`) inherits none of it.
"""

import os
import weakref
from collections.abc import Callable
from typing import Any, Final

_METHODS: Final[weakref.WeakKeyDictionary[Any, str]] = weakref.WeakKeyDictionary()
"""The method to call of each registered object that lives."""


def call_in_forked_children(method: Callable[[], None]) -> None:
    """Calls a bound method in every child forked from now on, in the thread that forked, while its
    object lives. One method per object; it must not raise, and must not wait for a lock.
    """
    owner: Any = getattr(method, "__self__")  # noqa: B009
    _METHODS[owner] = method.__name__


def _after_fork() -> None:
    for owner, name in list(_METHODS.items()):
        getattr(owner, name)()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
