"""The `eventflow` command: its verbs, and how every mistake ends as one line and an exit code.

    running.py    dev, serve, run, task, demo: what executes flows
    looking.py    ls, show, explain, logs
    doing.py      emit, retry, replay, redrive, cancel, pause, resume
    backfilling.py  backfill
    storing.py    doctor, backup

Data goes to stdout, the rest to stderr; `--json` makes both JSON. Exit codes: 0 clean, 1 run
failed, 2 usage, 3 app cannot be imported, 4 server not reachable, 5 not found, 65 data check
failed, 69 unavailable, 73 cannot write, 74 I/O error, 75 already running.
"""

from eventflow.cli.root import cli, main

__all__ = ["cli", "main"]
