"""A landing directory under watch, for tests: real files, a `Directory` listening, the contract's
ledger on the far side.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from eventflow.testing.trigger_contract import ContractLedger, listening
from tests.conftest import eventually
from tests.triggers.observed import ObservedTrigger
from triggers.files import Directory

QUICK: dict[str, Any] = {"settle": 0.05, "zero_byte_grace": 0.3, "rescan": 30.0, "poll": 0.1}
"""Options that make tests quick; rescan is long, so that what arrives soon arrived by a
notification.
"""

PROBE_HEADWAY = 2 * QUICK["settle"]
"""So that the probe settles after anything before it."""


class Inbox(ObservedTrigger):
    """The directory `root`, watched."""

    def __init__(self, root: Path, ledger: ContractLedger, **options: Any) -> None:
        super().__init__(ledger)
        self.root = root
        self.trigger = Directory(root, **{**QUICK, "name": "inbox", **options})

    def names(self, kind: str = "") -> list[str]:
        return sorted(event.data["relpath"] for event in self.events if event.type.endswith(kind))

    def write(self, name: str, text: str = "data") -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    async def has(self, *names: str, kind: str = "", within: float = 40.0) -> None:
        """Waits until exactly these files are events."""
        await eventually(
            lambda: self.names(kind) == sorted(names), f"{sorted(names)} are events", within=within
        )

    async def wait_until_idle(self) -> None:
        """Waits until a file written now, after whatever went before, is an event: the trigger has
        looked since.
        """
        probe = self.root / f"probe{len(list(self.root.glob('probe*')))}"
        await asyncio.sleep(PROBE_HEADWAY)
        probe.write_text("probe")
        await eventually(
            lambda: any(event.data["name"] == probe.name for event in self.events),
            "the probe is an event",
        )

    def without_probes(self, kind: str = "") -> list[str]:
        return [name for name in self.names(kind) if not name.startswith("probe")]


@asynccontextmanager
async def watched(
    root: Path, ledger: ContractLedger | None = None, *, opened: bool = True, **options: Any
) -> AsyncIterator[Inbox]:
    """An inbox whose trigger listens, and (`opened`) has looked at the tree once."""
    inbox = Inbox(root, ledger or ContractLedger(), **options)
    async with listening(inbox.trigger, inbox.ledger) as task:
        if opened:
            await eventually(
                lambda: task.done() or inbox.logged("directory.initial_scan_completed"),
                "the first walk is over",
            )
        yield inbox


def run(test: Callable[[Inbox], Awaitable[None]], root: Path, **options: Any) -> None:
    """Runs a test on an empty inbox."""

    async def main() -> None:
        root.mkdir(exist_ok=True)
        async with watched(root, **options) as inbox:
            await test(inbox)

    asyncio.run(main())


def touch(path: Path, seconds: float = 10.0) -> None:
    """Other times, the same content."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + int(seconds * 1e9)))
