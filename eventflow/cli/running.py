"""What executes flows: `serve`, `dev`, `run`, `task`, `demo`. Only these read `.env`."""

from typing import Any

import click
from dotenv import load_dotenv

from eventflow.cli.target import load_app
from eventflow.cli.words import json_option
from eventflow.server import Settings, serve

COMMANDS: list[click.Command] = []


def serving_options(command: Any) -> Any:
    """The options that `serve` and `dev` share."""
    options = [
        click.option("--store", help="sqlite:///PATH; default: the app's own."),
        click.option("--host", default="127.0.0.1", show_default=True),
        click.option("--port", default=8710, show_default=True, type=click.IntRange(0, 65535), help="0 picks one."),
        click.option("--grace", default=20.0, show_default=True, type=click.FloatRange(0), help="Seconds a drain waits for attempts."),
        click.option("--no-auth", is_flag=True, help="No token for /api; on loopback only."),
        click.option("--open-metrics", is_flag=True, help="/metrics without a token."),
        click.option("--allow-host", "allow_hosts", multiple=True, metavar="NAME", help="A further Host under which the API is reached."),
        click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command("serve")
@click.argument("target")
@serving_options
@click.option("--fd", type=int, help="A socket handed over by the caller: it keeps queueing during a restart.")
@click.option("--tls-cert", help="PEM file.")
@click.option("--tls-key", help="PEM file.")
@click.option("--behind-proxy", is_flag=True, help="A proxy does TLS; its X-Forwarded-* headers are heard.")
@click.option("--insecure-http", is_flag=True, help="Plain HTTP on an address that other machines can reach.")
@click.option("--log", type=click.Choice(["auto", "json", "pretty"]), default="auto", show_default=True)
@json_option
def serve_command(target: str, as_json: bool, **options: Any) -> int:
    """Serves an app: TARGET is file.py, file.py:app or pkg.mod:app."""
    load_dotenv(".env")
    if as_json:
        options["log"] = "json"
    return serve(load_app(target), Settings(**options))


COMMANDS.append(serve_command)
