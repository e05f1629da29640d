"""`eventflow demo`: the main use in some seconds, with real parts, and a check of the result.

    scenario.py      the command, and the steps in order: posts, files, the kill -9, the restart
    environment.py   the temporary folder, `eventflow serve shop.py` in it, HTTP requests and files
    verification.py  the checks afterwards: the senders' answers, the task bodies, the ledger
    report.py        the output: a timeline, totals, `ok` or `BROKEN`
    app/shop.py      the served app, loaded by its path, since eventflow does not import triggers

One task fails twice by design; everything else is what a user would do.
"""
