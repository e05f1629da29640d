"""The commands for the store's files: doctor checks them, backup copies the ledger."""

import asyncio
import importlib.util
import os
import shutil
import sqlite3
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import click
import msgspec

from eventflow.cli.client import (
    LedgerLocation,
    has_store,
    ledger_options,
    open_api,
    running_server,
    store_path,
)
from eventflow.cli.output import table, terminal_width, write_result
from eventflow.cli.progress import count_seconds
from eventflow.cli.target import load_app
from eventflow.core.clock import SystemClock
from eventflow.core.errors import EventflowError, UsageError
from eventflow.store.file_guards import lock_holder
from eventflow.store.url import open_store

EXTRAS = {
    "kafka": "aiokafka",
    "s3": "aioboto3",
    "postgres": "asyncpg",
    "drift": "scipy",
    "pydantic": "pydantic",
}
"""By extra, a package that is installed with it."""


class DoctorFinding(msgspec.Struct):
    """One row of `doctor`. `ok` None: a fact that is neither good nor bad. `code`: the exit code
    that it causes, 0 for none.
    """

    check: str
    ok: bool | None
    detail: str
    code: int = 0


# --------------------------------------------------------------------------- doctor


@click.command("doctor")
@click.option("--accept-loss", is_flag=True, help="Open a store that lost acknowledged commits.")
@ledger_options
def doctor(accept_loss: bool, as_json: bool, location: LedgerLocation) -> int:
    """Check the store, the app and the installation.

    Checked are checksums and totals of the ledger, its high-water mark, lock and free space, the
    app given by --app, and the installed extras. The exit code is that of the first problem.
    """
    if accept_loss and location.url is not None:
        raise UsageError(
            "--accept-loss opens a store on this disk; name it with --store, and leave --url out"
        )
    findings = [_python(), *_extras(), *_app(location)]
    if not any(finding.code for finding in findings):
        findings += asyncio.run(_store(location, accept_loss))
    rows = [{"check": f.check, "ok": f.ok, "detail": f.detail} for f in findings]
    lines = [{"check": f.check, "ok": _status_text(f), "detail": f.detail} for f in findings]
    text = table(lines, ("check", "ok", "detail"), "", width=terminal_width(), reason_lines=4)
    write_result({"ok": all(f.ok is not False for f in findings), "findings": rows}, as_json, text)
    return next((f.code for f in findings if f.code), 0)


def _status_text(finding: DoctorFinding) -> str:
    if finding.ok is None:
        return "-"
    return "ok" if finding.ok else "failed" if finding.code else "warning"


def _python() -> DoctorFinding:
    version = ".".join(map(str, sys.version_info[:3]))
    return DoctorFinding("python", None, f"{version}, SQLite {sqlite3.sqlite_version}")


def _extras() -> list[DoctorFinding]:
    missing = [
        extra for extra, package in EXTRAS.items() if importlib.util.find_spec(package) is None
    ]
    found = [extra for extra in EXTRAS if extra not in missing]
    hint = (
        f"; not installed: pip install 'eventflow-reactor[{','.join(missing)}]'" if missing else ""
    )
    return [DoctorFinding("extras", None, f"{', '.join(found) or 'none'}{hint}")]


def _app(location: LedgerLocation) -> list[DoctorFinding]:
    if location.app is None:
        return []
    try:
        app = load_app(location.app)
        app.check_secrets()
    except EventflowError as error:
        return [DoctorFinding("app", False, str(error), error.exit_code)]
    unverified = [
        trigger.name for trigger in app.triggers if getattr(trigger, "verified", True) is False
    ]
    found = [
        DoctorFinding(
            "app", True, f"{app.name}: {len(app.flows)} flows, {len(app.triggers)} triggers"
        )
    ]
    if unverified:
        found.append(
            DoctorFinding(
                "webhooks", False, f'anybody may post to {", ".join(unverified)}: verify="none"'
            )
        )
    return found


async def _store(location: LedgerLocation, accept_loss: bool) -> list[DoctorFinding]:
    if location.url is not None:  # the store may be on another machine
        return await _findings_of(_ledger(location))
    try:
        path = store_path(location, load_app(location.app) if location.app else None)
    except UsageError as error:
        return [DoctorFinding("store", False, str(error), error.exit_code)]
    except EventflowError as error:  # there is no store yet
        return [DoctorFinding("store", None, str(error))]
    server = await running_server(path)
    found = [_store_file(path), _server(server), _lock(path), _space(path)]
    if not has_store(path):
        return [finding for finding in found if finding.ok is not None or finding.check == "store"]
    if accept_loss:
        found += await _findings_of(_accept_loss(path, server))
    return found if found[-1].code else found + await _findings_of(_ledger(location))


async def _findings_of(check: Awaitable[list[DoctorFinding]]) -> list[DoctorFinding]:
    """The findings of `check`; an error is one finding."""
    try:
        return await check
    except EventflowError as error:
        return [DoctorFinding("ledger", False, str(error), getattr(error, "code", error.exit_code))]


def _store_file(path: str) -> DoctorFinding:
    folder = next(parent for parent in Path(path).parents if parent.exists())
    if not os.access(folder, os.W_OK):
        return DoctorFinding("store", False, f"{folder} cannot be written", 73)
    size = sum(
        Path(f"{path}{end}").stat().st_size
        for end in ("", "-wal", ".logs.db")
        if Path(f"{path}{end}").exists()
    )
    what = (
        f"{path}, {size / 2**20:.1f} MiB"
        if has_store(path)
        else f"{path} is created at the first start"
    )
    return DoctorFinding("store", True, what)


def _server(server: str | None) -> DoctorFinding:
    return DoctorFinding(
        "server", None, f"runs at {server}" if server else "none runs on this store"
    )


def _lock(path: str) -> DoctorFinding:
    """The owner of the lock. Only taking it for a moment shows whether it is free."""
    if not Path(path).exists():
        return DoctorFinding("lock", None, "free")
    try:
        locked = lock_holder(path)
    except OSError as error:
        return DoctorFinding("lock", False, f"{path}.lock: {error.strerror}", 73)
    if locked is None:
        return DoctorFinding("lock", None, "free")
    holder = f"process {locked.pid}" if locked.pid else "another process"
    return DoctorFinding("lock", None, f"held by {holder}")


def _space(path: str) -> DoctorFinding:
    folder = next(parent for parent in Path(path).parents if parent.exists())
    disk = shutil.disk_usage(folder)
    floor = min(256 << 20, disk.total // 50)
    fine = disk.free > floor
    return DoctorFinding(
        "free space",
        fine,
        f"{disk.free >> 20} MiB; events are taken above {floor >> 20} MiB",
        0 if fine else 74,
    )


async def _accept_loss(path: str, server: str | None) -> list[DoctorFinding]:
    """Open the store once without the missing commits, so that its marks match its content."""
    if server is not None:
        raise UsageError(
            "--accept-loss is for a store that does not open; "
            f"a server has this one open at {server}"
        )
    store = open_store(f"sqlite:///{path}", SystemClock(), accept_loss=True)
    await asyncio.to_thread(store.open)
    await asyncio.to_thread(store.close)
    return [
        DoctorFinding(
            "high-water mark", True, "the store was opened as it is; what was lost stays lost"
        )
    ]


async def _ledger(location: LedgerLocation) -> list[DoctorFinding]:
    async with open_api(location) as api:
        if api.is_read_only:
            why = "not checked: another process has it open; stop that first"
            return [DoctorFinding("ledger", None, why)]
        check = api.get("/api/check", timeout=None)
        wrong: list[str] = (await count_seconds("checking the ledger", check))["wrong"]
        counts: dict[str, int] = await api.get("/api/counts")
    found = [DoctorFinding("ledger", False, sentence, 65) for sentence in wrong]
    totals = ", ".join(
        f"{counts[name]:,} {name}" for name in ("events", "runs", "pending", "failed", "dead")
    )
    return found or [DoctorFinding("ledger", True, f"checksums and sums hold: {totals}")]


# --------------------------------------------------------------------------- backup


@click.command("backup")
@click.argument("path", type=click.Path(dir_okay=False))
@ledger_options
def backup(path: str, as_json: bool, location: LedgerLocation) -> None:
    """Copy the ledger to PATH while it is in use.

    The copy is consistent. An existing file is never overwritten.
    """
    absolute = os.path.abspath(path)  # the server has another working directory

    async def copy() -> Any:
        async with open_api(location) as api:
            return await api.post("/api/backup", {"path": absolute})

    done = asyncio.run(copy())
    write_result(done, as_json, f"the ledger is copied to {done['path']}")


COMMANDS = [doctor, backup]
