"""Globs over relative paths and object keys, as one regular expression. `Directory` and `S3` call
`compile_globs`.

A glob without a slash matches names at any depth, one with a slash the whole path; a leading slash
means the top level. `*`, `?` and `[…]` stop at a slash, `**` does not. Pure functions.
"""

import re
from collections.abc import Sequence

_TOKENS = re.compile(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\])")
_WILD = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def compile_globs(globs: Sequence[str]) -> re.Pattern[str]:
    """A pattern for `fullmatch`; without globs it matches nothing."""
    return re.compile("|".join(f"(?:{_regex(glob)})" for glob in globs) or r"(?!)", re.DOTALL)


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
