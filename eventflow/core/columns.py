"""The columns that a text takes on a terminal, for log lines and the command line's tables."""

import unicodedata


def display_width(text: str) -> int:
    """The columns of a text on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(each) else 1 + (unicodedata.east_asian_width(each) in "WF")
        for each in text
    )


def clip(text: str, width: int | None) -> str:
    """The text, cut to `width` columns."""
    if width is None or display_width(text) <= width:
        return text
    kept = text[: max(0, width - 1)]
    while display_width(kept) > width - 1:
        kept = kept[:-1]
    return f"{kept}…"


def wrap(text: str, width: int | None, lines: int) -> list[str]:
    """At most `lines` lines of `width` columns; the rest is cut. None: one line."""
    if width is None or display_width(text) <= width:
        return [text]
    found: list[str] = []
    rest = text
    while rest and len(found) < lines - 1:
        size = width
        while display_width(rest[:size]) > width:
            size -= 1
        gap = rest.rfind(" ", 0, size + 1)
        at = gap if len(rest) > size and gap > size // 2 else size
        found.append(rest[:at])
        rest = rest[at:].lstrip()
    return [*found, clip(rest, width)] if rest else found
