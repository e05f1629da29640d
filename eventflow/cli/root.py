"""The group of commands, and the one place where an error becomes a line on stderr and an exit
code.
"""

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

import click

from eventflow.cli import actions, aliases, backfill, inspect, serve, store
from eventflow.cli.client import ApiError
from eventflow.cli.output import fail
from eventflow.cli.streams import flush_streams, prepare_streams
from eventflow.core.errors import EventflowError
from eventflow.events.storable import storable_text

SECTIONS = {
    "Run": serve.COMMANDS,
    "Inspect": inspect.COMMANDS,
    "Change": [*actions.COMMANDS, *backfill.COMMANDS],
    "Maintain": store.COMMANDS,
}
"""The commands in the order and under the headings of --help."""


class CommandGroup(click.Group):
    """Lists commands by section, resolves aliases, and suggests a command for a mistyped one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, aliases.COMMANDS.get(cmd_name, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            near = get_close_matches(args[0], self.list_commands(ctx), n=1, cutoff=0.7)
            kind = "dead-letters" if args[0].startswith("dead") else args[0]
            if kind in inspect.COLUMNS:
                hint = f"did you mean `eventflow ls {kind}`?"
            elif near:
                hint = f"did you mean {near[0]!r}?"
            else:
                hint = f"there are: {', '.join(self.list_commands(ctx))}"
            raise click.UsageError(f"no command {args[0]!r}; {hint}", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for heading, commands in SECTIONS.items():
            with formatter.section(heading):
                formatter.write_dl(
                    [
                        (str(each.name).ljust(width), each.get_short_help_str(formatter.width))
                        for each in commands
                    ]
                )


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="eventflow-reactor", prog_name="eventflow")
def cli() -> None:
    """Events in, durable flows out.

    See it work with `eventflow demo`; serve your app with `eventflow dev FILE`.
    """


for commands in SECTIONS.values():
    for command in commands:
        cli.add_command(command)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit; `args` defaults to sys.argv."""
    prepare_streams()
    given = list(sys.argv[1:] if args is None else args)
    code = _run(given)
    flush_streams()
    sys.exit(code)


def _undecodable_text(given: Sequence[str]) -> str | None:
    """The error for the first argument, or EVENTFLOW_ variable, that is not UTF-8; else None.

    Python keeps such bytes as lone surrogates, which neither JSON nor the ledger can hold.
    """
    for argument in given:
        if storable_text(argument) != argument:
            shown = os.fsencode(argument).decode(errors="backslashreplace")
            return f"the argument {shown}: expected text in UTF-8, found other bytes"
    for name, value in os.environ.items():
        if name.startswith("EVENTFLOW_") and storable_text(value) != value:
            return f"${storable_text(name)}: expected text in UTF-8, found other bytes"
    return None


def _run(given: Sequence[str]) -> int:
    """Run a command. The exit code."""
    as_json = "--json" in given
    if (problem := _undecodable_text(given)) is not None:
        fail("usage", problem, as_json)
        return click.UsageError.exit_code
    try:
        result: Any = cli.main(list(given), prog_name="eventflow", standalone_mode=False)
    except click.Abort:
        return 130
    except click.exceptions.NoArgsIsHelpError as bare:
        click.echo(bare.ctx.get_help() if bare.ctx else bare.format_message())
        return 0
    except click.ClickException as error:
        usage = (
            error.ctx.command_path
            if isinstance(error, click.UsageError) and error.ctx
            else "eventflow"
        )
        fail("usage", f"{error.format_message()} (see {usage} --help)", as_json)
        return error.exit_code
    except EventflowError as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        if isinstance(error, ApiError):
            fail(error.error, str(error), as_json)
            return error.code
        fail(type(error).__name__, f"{error}{notes}", as_json)
        return error.exit_code
    except BrokenPipeError:  # `eventflow ls | head`
        return 0
    except OSError as error:
        fail("io_error", str(error), as_json)
        return 74
    return result if isinstance(result, int) else 0
