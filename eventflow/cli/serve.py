"""The commands that execute flows: serve, dev, run, task, demo.

The server itself is in server/server.py, the restarts of dev in reload.py, one run in run.py, and
the demo in demo/scenario.py. Results are JSON on stdout; a failed run exits with 1.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import click
import orjson

from eventflow.cli.actions import read_json_option
from eventflow.cli.client import LedgerLocation, store_path
from eventflow.cli.output import json_option, write_result
from eventflow.cli.reload import Reloader, serve_with_reload
from eventflow.cli.run import RunRequest, bind, run_flow
from eventflow.cli.target import load_app, load_flow, load_task, note_other_store
from eventflow.core.errors import UsageError
from eventflow.demo.scenario import demo
from eventflow.events.strict_json import read_json
from eventflow.server.memory_limits import parse_size
from eventflow.server.server import Settings, serve

_SERVER_OPTIONS = (
    click.option("--store", help="sqlite:///PATH; default: the app's own."),
    click.option("--host", default="127.0.0.1", show_default=True, help="Bind this address."),
    click.option(
        "--port",
        default=8710,
        show_default=True,
        type=click.IntRange(0, 65535),
        help="Bind this port; 0 picks a free one.",
    ),
    click.option(
        "--grace",
        default=20.0,
        show_default=True,
        type=click.FloatRange(0),
        help="Wait this many seconds for running attempts when stopping.",
    ),
    click.option("--no-auth", is_flag=True, help="Require no token for /api; on loopback only."),
    click.option("--open-metrics", is_flag=True, help="Require no token for /metrics."),
    click.option(
        "--allow-host",
        "allow_hosts",
        multiple=True,
        metavar="NAME",
        help="Accept this Host header for the API too.",
    ),
    click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="info",
        show_default=True,
        help="Log nothing below this level.",
    ),
)

_PARAMETER_OPTIONS = (
    click.option(
        "-p", "pairs", multiple=True, metavar="K=V", help="Set one parameter: JSON or text."
    ),
    click.option("--params", help="Set all parameters: a JSON object, @FILE, or @- for stdin."),
)


def _size(_: click.Context, option: click.Parameter, text: str | None) -> int | None:
    return None if text is None else parse_size(option.opts[0], text)


def with_options(*options: Any) -> Any:
    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


# --------------------------------------------------------------------------- servers


@click.command("serve")
@click.argument("target")
@with_options(*_SERVER_OPTIONS)
@click.option(
    "--fd", type=int, help="Serve on this inherited socket, which queues during a restart."
)
@click.option("--tls-cert", help="PEM file of the certificate; SIGHUP reloads it.")
@click.option("--tls-key", help="PEM file of the private key.")
@click.option(
    "--behind-proxy", is_flag=True, help="Trust the X-Forwarded-* headers of a proxy that does TLS."
)
@click.option(
    "--insecure-http", is_flag=True, help="Allow plain HTTP on an address that others can reach."
)
@click.option(
    "--log",
    type=click.Choice(["auto", "json", "pretty"]),
    default="auto",
    show_default=True,
    help="Format of the log; auto is pretty on a terminal, else JSON.",
)
@click.option(
    "--memory-soft",
    callback=_size,
    metavar="SIZE",
    help="Start no runs above this size: 2GB, 1.5GiB, 512Mi. Linux.",
)
@click.option(
    "--memory-hard",
    callback=_size,
    metavar="SIZE",
    help="Drain and restart above this size. Linux.",
)
@click.option(
    "--stall-timeout",
    default=60.0,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="End with code 70 when a loop or thread does not respond for this many seconds.",
)
@click.option(
    "--dev",
    is_flag=True,
    help="Log each event received, and write the ready line as text on a terminal; "
    "`eventflow dev` sets it.",
)
@json_option
def serve_command(target: str, as_json: bool, **options: Any) -> int:
    """Serve an app until SIGTERM or SIGINT.

    TARGET is file.py, file.py:app or pkg.mod:app. Prints one JSON line when it is ready.
    """
    if as_json:
        options["log"] = "json"
    app = load_app(target)
    note_other_store(target, store_path(LedgerLocation(options["store"]), app))
    return serve(app, Settings(**options))


@click.command("dev")
@click.argument("target")
@with_options(*_SERVER_OPTIONS)
@json_option
def dev_command(target: str, as_json: bool, **options: Any) -> int:
    """Serve an app and restart when a *.py file or .env changes.

    Requests wait during a restart. Logs are pretty, with one line for each event received.
    """
    flags = [f"--{name.replace('_', '-')}" for name in ("no_auth", "open_metrics") if options[name]]
    flags += [part for name in options["allow_hosts"] for part in ("--allow-host", name)]
    flags += ["--store", options["store"]] if options["store"] else []
    flags += [
        "--grace",
        str(options["grace"]),
        "--log-level",
        options["log_level"],
        "--log",
        "json" if as_json else "pretty",
        "--dev",
    ]
    return serve_with_reload(target, options["host"], options["port"], flags)


# --------------------------------------------------------------------------- one run, one task


@click.command("run")
@click.argument("target", metavar="FILE:FLOW")
@with_options(*_PARAMETER_OPTIONS)
@click.option("--event", help="Run for this event: CloudEvents JSON or its data; JSON or @FILE.")
@click.option("--idempotency-key", help="Return the result of an earlier run with this key.")
@click.option("--store", envvar="EVENTFLOW_STORE", help="sqlite:///PATH; default: the app's own.")
@click.option(
    "--watch", is_flag=True, help="Run again whenever a *.py file next to it, or .env, changes."
)
@json_option
def run_command(
    target: str,
    pairs: tuple[str, ...],
    params: str | None,
    event: str | None,
    watch: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Run a flow once and print its result as JSON.

    A server that has the app's store executes the run; otherwise it runs here.
    """
    if watch:
        return Reloader(target.partition(":")[0]).repeat()
    if options["idempotency_key"] == "":
        raise UsageError(
            "--idempotency-key expected a text, found an empty one; leave it out for a new run"
        )
    flow, app = load_flow(target)
    given = read_json_option(event, "--event")
    if event is not None and (pairs or params):
        raise UsageError("expected --event, or -p and --params, found both")
    request = RunRequest(
        flow,
        app,
        target,
        _parameters(flow.fn, pairs, params) if event is None else None,
        given,
        **options,
    )
    return asyncio.run(run_flow(request, as_json))


@click.command("task")
@click.argument("target", metavar="FILE:TASK")
@with_options(*_PARAMETER_OPTIONS)
@json_option
def task_command(target: str, pairs: tuple[str, ...], params: str | None, as_json: bool) -> int:
    """Call one task outside any run and print its value as JSON.

    Retries and timeout apply; nothing is recorded.
    """
    task = load_task(target)
    arguments = bind(task.fn, task.name, _parameters(task.fn, pairs, params), noun="task")
    return asyncio.run(_call_task(task, arguments, as_json))


async def _call_task(task: Any, arguments: dict[str, Any], as_json: bool) -> int:
    value = await task(**arguments)
    _, data = task.result.encode(value)
    value_json = orjson.loads(data)
    write_result(value_json, as_json, orjson.dumps(value_json, option=orjson.OPT_INDENT_2).decode())
    return 0


def _parameters(fn: Any, pairs: tuple[str, ...], params: str | None) -> dict[str, Any]:
    """The parameters of `-p` and `--params`. `-p id=007` is text for a parameter of type str."""
    read: Any = {} if params is None else read_json_option(params, "--params")
    if not isinstance(read, dict):
        raise UsageError(f"--params: expected a JSON object, found {type(read).__name__}")
    given = cast(dict[str, Any], read)
    hints: Mapping[str, Any] = getattr(fn, "__annotations__", {})
    for pair in pairs:
        name, mark, text = pair.partition("=")
        if not mark or not name:
            raise UsageError(f"-p expected NAME=VALUE, found {pair!r}")
        given[name] = text if hints.get(name) in (str, "str") else _value(name, text)
    return given


def _value(name: str, text: str) -> Any:
    """JSON, or the text itself where it is none. UsageError for JSON that would lose something."""
    if text.startswith("@") and Path(text[1:]).is_file():
        return read_json_option(text, "-p")
    try:
        return read_json(text.encode(errors="surrogateescape"))
    except (orjson.JSONDecodeError, UnicodeError):
        return text
    except ValueError as error:
        raise UsageError(f"-p {name}: {error}") from None


COMMANDS = [serve_command, dev_command, run_command, task_command, demo]
