"""Counts what one event costs in our own code: the files visited and the Python functions called.

    python -m benchmarks path            # this tree
    python benchmarks/path.py --root DIR # another checkout of it

Two scenarios: a webhook that starts a run of one task, and the same with an emitted event and a
sink. Each starts `eventflow serve` in a process of its own, warms it, and then posts one event per
sample. A profile hook in every thread counts from the request to the moment nothing more happens:
the run is settled, the emitted event is sent. Printed are the sample with the median number of
calls, and its files in the order of the first call. `entered` also counts comprehensions, generator
expressions and every time that a coroutine is resumed. The counter knows no module's name, so that
two versions of the tree can be compared; docs/architecture.md quotes its output.
"""

import argparse
import dis
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from functools import cache, partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

WARM_UP_EVENTS = 300
PACKAGES = ("eventflow", "triggers")
SAMPLES = 15
WINDOW_SECONDS = 0.4
"""Time in which one event of a warm server is done: some milliseconds are enough."""

APP = """
from eventflow import App, emit, flow, task
from triggers import Webhook

class Sink:
    name = "sink"

    async def send(self, *messages): ...

    async def close(self): ...

@task
async def double(amount: int) -> int:
    return amount * 2

@flow
async def one_task(amount: int) -> int:
    return await double(amount)

@flow
async def one_task_and_emit(amount: int) -> int:
    value = await double(amount)
    await emit("amount.doubled", {"amount": value})
    return value

app = App("path")
"""

SCENARIOS = {
    "one webhook, one task": 'app.on(Webhook("/orders", verify="none"), one_task)\n',
    "one webhook, one task, one emitted event, one sink": (
        'app.on(Webhook("/orders", verify="none"), one_task_and_emit)\n'
        'app.send("amount.doubled", Sink())\n'
    ),
}


# --------------------------------------------------------------------------- inside the server


class CallCounter:
    """Counts the calls of functions below `root`, by file, in every thread that starts after it."""

    def __init__(self, root: Path) -> None:
        self._is_counting = False
        self._calls: Counter[str] = Counter()
        self._entered = 0
        self._place = cache(partial(_place, root))
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)

    def start(self) -> None:
        self._calls = Counter()
        self._entered = 0
        self._is_counting = True

    def stop(self) -> dict[str, Any]:
        """Calls by file, in the order of each file's first call, and the frames entered."""
        self._is_counting = False
        return {"calls": dict(self._calls), "entered": self._entered}

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if self._is_counting and event == "call":
            place = self._place(frame.f_code)
            if place is not None:
                file, call_offset = place
                self._entered += 1
                if frame.f_lasti <= call_offset:
                    self._calls[file] += 1


def _place(root: Path, code: CodeType) -> tuple[str, int] | None:
    """The file of our own code, and the offset up to which a frame of it is a new call: that of
    its first RESUME, or -1 where no frame is a call of a function. None for other code.
    """
    file = Path(code.co_filename)
    if not file.is_relative_to(root) or file.relative_to(root).parts[0] not in PACKAGES:
        return None
    offsets = (step.offset for step in dis.get_instructions(code) if step.opname == "RESUME")
    is_function = not code.co_name.startswith("<") or code.co_name == "<lambda>"
    return file.relative_to(root).as_posix(), next(offsets, 0) if is_function else -1


def serve(root: Path, arguments: list[str]) -> None:
    """`eventflow serve`, with the counter driven by lines on stdin; each `stop` writes one line."""
    counter = CallCounter(root)
    replies = os.fdopen(3, "w")

    def run_commands() -> None:
        sys.setprofile(None)
        for line in sys.stdin:
            if line.strip() == "start":
                counter.start()
            else:
                print(json.dumps(counter.stop()), file=replies, flush=True)

    threading.Thread(target=run_commands, daemon=True).start()
    sys.path[0] = str(root)
    from eventflow.cli import main  # the root decides which one

    main(["serve", *arguments])


# --------------------------------------------------------------------------- outside


class ProfiledServer:
    """The server of one scenario, and the way to sample it."""

    def __init__(self, root: Path, folder: Path, app: str) -> None:
        (folder / "path_app.py").write_text(app)
        read_end, write_end = os.pipe()
        self._replies = os.fdopen(read_end)
        command = [
            sys.executable,
            __file__,
            "--root",
            str(root),
            "--serve",
            "path_app.py",
            "--port",
            "0",
            "--store",
            f"sqlite:///{folder / 'path.db'}",
        ]
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", f'exec "$@" 3>&{write_end}', "bash", *command],
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(root)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                pass_fds=(write_end,),
            )
        os.close(write_end)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError((folder / "log").read_text())
        self._url = json.loads(line)["url"]

    def post(self, amount: int) -> None:
        request = urllib.request.Request(
            f"{self._url}/hooks/orders",
            json.dumps({"amount": amount}).encode(),
            {"content-type": "application/json", "webhook-id": f"event-{amount}"},
        )
        urllib.request.urlopen(request, timeout=10).close()

    def sample(self, amount: int) -> dict[str, Any]:
        """What CallCounter.stop returns for one event."""
        self._command("start")
        self.post(amount)
        time.sleep(WINDOW_SECONDS)
        self._command("stop")
        return json.loads(self._replies.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._replies.close()

    def _command(self, command: str) -> None:
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)


def measure(root: Path, app: str) -> list[dict[str, Any]]:
    """Samples of one event each."""
    with tempfile.TemporaryDirectory() as folder:
        server = ProfiledServer(root, Path(folder), app)
        try:
            for amount in range(WARM_UP_EVENTS):
                server.post(amount)
            time.sleep(2)
            return [server.sample(WARM_UP_EVENTS + number) for number in range(SAMPLES)]
        finally:
            server.close()


def report(scenario: str, samples: list[dict[str, Any]]) -> None:
    ranked = sorted(samples, key=lambda sample: sum(sample["calls"].values()))
    median = ranked[len(ranked) // 2]
    files: dict[str, int] = median["calls"]
    calls, entered = sum(files.values()), median["entered"]
    print(f"{scenario}: {len(files)} files, {calls} calls, {entered} frames entered")
    for file, calls in files.items():
        print(f"  {calls:>4}  {file}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks path")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--serve", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(options.root.resolve(), options.serve)
        return 0
    for scenario, subscriptions in SCENARIOS.items():
        report(scenario, measure(options.root.resolve(), APP + subscriptions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
