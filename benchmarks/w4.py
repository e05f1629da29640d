"""W4: how long a newcomer waits: `import eventflow` beside importing what it stands on, and a
script up to its first run.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import time

from benchmarks.measure import Figure, alone

FIGURES = (
    Figure(
        key="import", what="import eventflow", unit="ms", floor=1.3, goal=1.1, lower_is_better=True
    ),
    Figure(
        key="first_run",
        what="start of a script → first run done",
        unit="ms",
        floor=600,
        goal=300,
        combine=alone,
        lower_is_better=True,
    ),
)

WRITES_BYTE_CODE = {
    name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
}
"""As everywhere but on some developers' machines: there each import would compile eventflow anew,
and nothing else.
"""

TIMED_IMPORT = (
    "import time; began = time.perf_counter(); import {}; print(time.perf_counter() - began)"
)
SCRIPT = """
import asyncio
from eventflow import App
from eventflow import flow, task

@task
async def double(n: int) -> int:
    return n * 2

@flow
async def first(n: int) -> int:
    return await double(n)

async def main():
    app = App("first", store="sqlite:///first.db")
    async with app:
        print(await (await app.start(first, n=21)).result(), flush=True)

asyncio.run(main())
"""


async def eventflow(quick: bool) -> dict[str, float]:
    return await asyncio.to_thread(
        lambda: {"import": imported("eventflow"), "first_run": first_run()}
    )


async def bare(quick: bool) -> dict[str, float]:
    return {
        "import": await asyncio.to_thread(imported, "structlog, orjson, msgspec, anyio, sqlite3")
    }


def imported(names: str) -> float:
    """Milliseconds; the best of three, with byte code and disk warm."""
    call = [sys.executable, "-c", TIMED_IMPORT.format(names)]
    return min(float(subprocess.check_output(call, env=WRITES_BYTE_CODE)) for _ in range(3)) * 1e3


def first_run() -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        script = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            stdout=subprocess.PIPE,
            cwd=folder,
            env=WRITES_BYTE_CODE,
            text=True,
        )
        assert script.stdout is not None
        answer = script.stdout.readline()
        took = time.perf_counter() - began
        if script.wait() or answer != "42\n":
            raise RuntimeError(
                f"expected the script to print 42 and exit 0, found {answer!r} and "
                f"{script.returncode}"
            )
        return took * 1e3


SIDES = {"eventflow": eventflow, "limit": bare}
