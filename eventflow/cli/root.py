"""The group of commands, and the one place where an error becomes a line on stderr and an exit
code.
"""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

import click

from eventflow.cli import actions, backfill, inspect, serve, store
from eventflow.cli.client import ApiError
from eventflow.cli.output import fail
from eventflow.core.errors import EventflowError


class CommandGroup(click.Group):
    """Says what a mistyped command may have meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            near = get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"there are: {', '.join(self.list_commands(ctx))}"
            )
            raise click.UsageError(f"no command {args[0]!r}; {hint}", ctx) from None


@click.group(
    cls=CommandGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(package_name="eventflow-reactor", prog_name="eventflow")
def cli() -> None:
    """Events in, durable flows out."""


for command in (
    *serve.COMMANDS,
    *inspect.COMMANDS,
    *actions.COMMANDS,
    *backfill.COMMANDS,
    *store.COMMANDS,
):
    cli.add_command(command)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The entry point."""
    given = list(sys.argv[1:] if args is None else args)
    as_json = "--json" in given
    try:
        result: Any = cli.main(given, prog_name="eventflow", standalone_mode=False)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        usage = (
            error.ctx.command_path
            if isinstance(error, click.UsageError) and error.ctx
            else "eventflow"
        )
        fail("usage", f"{error.format_message()} (see {usage} --help)", as_json)
        sys.exit(error.exit_code)
    except EventflowError as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        if isinstance(error, ApiError):
            fail(error.error, str(error), as_json)
            sys.exit(error.code)
        fail(type(error).__name__, f"{error}{notes}", as_json)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(0)
    sys.exit(result if isinstance(result, int) else 0)
