"""Globs over relative paths and object keys, as one regular expression. `Directory` and `S3` call
`compile_globs`.

A name matches in every normal form of Unicode: macOS writes `é` as two characters, others as one.
A glob without a slash matches names at any depth, one with a slash the whole path; a leading slash
means the top level. `*`, `?` and `[…]` stop at a slash, `**` does not. Pure functions.
"""

import re
import unicodedata
from collections.abc import Sequence

_TOKENS = re.compile(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\])")
_WILD = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


class GlobMatcher:
    """Some globs as one expression; without globs it matches nothing."""

    def __init__(self, globs: Sequence[str]) -> None:
        expressions = [f"(?:{_regex(normal_form(glob))})" for glob in globs]
        self._pattern = re.compile("|".join(expressions) or r"(?!)", re.DOTALL)

    def fullmatch(self, text: str) -> re.Match[str] | None:
        return self._pattern.fullmatch(normal_form(text))


def compile_globs(globs: Sequence[str]) -> GlobMatcher:
    return GlobMatcher(globs)


def normal_form(text: str) -> str:
    """Text in the composed normal form, for comparisons."""
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _regex(glob: str) -> str:
    anywhere = "" if "/" in glob else "(?:.*/)?"
    return anywhere + "".join(map(_token, _TOKENS.split(glob.removeprefix("/"))))


def _token(token: str) -> str:
    if token in _WILD:
        return _WILD[token]
    if len(token) > 2 and token[0] == "[" and token[-1] == "]":
        negated = token[1] == "!"
        body = re.sub(r"([\[\]\\&~|^])", r"\\\1", token[2 if negated else 1 : -1])
        return f"[^/{body}]" if negated else f"[{body}]"
    return re.escape(token)
