"""Old spellings that the command line still accepts. --help does not show them.

`COMMANDS` and `KINDS` map an old word to today's; an `Option` names its own old words. Scripts use
them, so a word stays once it was documented. tests/cli/test_aliases.py lists all of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import click

COMMANDS: Final[Mapping[str, str]] = {"reprocess": "replay"}
"""`reprocess` is the other way round: a second name, since `replay` also means a run's journal."""

KINDS: Final[Mapping[str, str]] = {"outlets": "sinks", "dead": "dead-letters"}
"""What `ls` lists."""


class KindChoice(click.Choice[str]):
    """The kinds of `ls`, under their current and old names."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return super().convert(KINDS.get(value, value), param, ctx)


class Option(click.Option):
    """An option with `old_names`, which are parsed and not shown."""

    def __init__(self, declarations: Sequence[str], *, old_names: Sequence[str], **attrs: Any):
        super().__init__(declarations, **attrs)
        self.old_names = list(old_names)

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        shown = self.opts
        self.opts = [*shown, *self.old_names]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = shown
