"""The `eventflow` command.

    root.py      the group, its help page, errors and exit codes; aliases.py: old spellings
    serve.py     serve, dev, run, task, demo; with run.py (one run) and reload.py (dev's reloader)
    inspect.py   ls, status, show, explain, logs
    actions.py   emit, retry, replay, redrive, cancel, pause, resume; with dry_run.py
    backfill.py  backfill
    store.py     doctor, backup
    client.py    the API of a ledger, with or without a server
    target.py    TARGET to App, flow or task; output.py: tables and colours; times.py: instants

Data goes to stdout, the rest to stderr; `--json` makes both JSON. Exit codes: 0 clean, 1 run
failed, 2 usage, 3 app cannot be imported, 4 server not reachable, 5 not found, 65 data check
failed, 69 unavailable, 73 cannot write, 74 I/O error, 75 already running.
"""

from eventflow.cli.root import cli, main

__all__ = ["cli", "main"]
