"""Old spellings of the command line: each still works, and --help shows none of them."""

import click
import pytest

from eventflow.cli import aliases, cli

COMMANDS = {"reprocess": "replay"}

KINDS = {"outlets": "sinks", "dead": "dead-letters"}

OPTIONS = {
    ("retry", "--fresh"): (("run-1",), "from_scratch", True),
    ("backfill", "--again"): (
        ("report", "--trigger", "daily", "--from", "2026-01-01", "--to", "2026-02-01"),
        "rerun",
        "label",
    ),
}
"""Command and old option: the other arguments, the parameter that it sets, and to what."""


def command(name: str) -> click.Command:
    found = cli.get_command(click.Context(cli), name)
    assert found is not None
    return found


def help_of(name: str) -> str:
    return command(name).get_help(click.Context(command(name), info_name=name))


def test_this_file_lists_every_old_spelling():
    """An alias that is added or removed is added here or removed here."""
    options = {
        (name, old)
        for name, each in cli.commands.items()
        for option in each.params
        if isinstance(option, aliases.Option)
        for old in option.old_names
    }
    assert (COMMANDS, KINDS) == (aliases.COMMANDS, aliases.KINDS)
    assert OPTIONS.keys() == options


@pytest.mark.parametrize(("old", "new"), COMMANDS.items())
def test_an_old_command_is_the_new_one(old: str, new: str):
    """The old word runs the same command; the list of commands has the new word only."""
    assert command(old) is command(new)
    assert old not in cli.get_help(click.Context(cli)).split()


@pytest.mark.parametrize(("old", "new"), KINDS.items())
def test_an_old_kind_of_ls_is_the_new_one(old: str, new: str):
    """`eventflow ls OLD` lists what `eventflow ls NEW` lists."""
    assert command("ls").make_context("ls", [old]).params["kind"] == new
    (kind,) = (each for each in command("ls").params if each.name == "kind")
    assert isinstance(kind.type, click.Choice) and old not in kind.type.choices


@pytest.mark.parametrize("name", OPTIONS, ids=" ".join)
def test_an_old_option_is_the_new_one(name: tuple[str, str]):
    """The old option sets the parameter of the new one."""
    arguments, parameter, value = OPTIONS[name]
    given = [name[1]] if value is True else [name[1], str(value)]
    context = command(name[0]).make_context(name[0], [*arguments, *given])
    assert context.params[parameter] == value
    assert name[1] not in help_of(name[0])
