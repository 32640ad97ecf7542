"""Which regular expressions from strangers are run: those that end soon on any module name."""

import re
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MAX_REPEATS = 8
MAX_WIDE_REPEATS = 3
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)


def is_tame(pattern: str) -> bool:
    """Returns whether a regular expression is matched in a time that is a small power of the text's length.

    Python's matcher has no time limit. It may take exponential time where a repeat holds a repeat or alternatives, and
    a high power where many repeats can match the same characters. So a repeat may hold neither, no more than 8 repeats
    may stand side by side, and no more than 3 of them may match letters and dots alike, as `.*` does; backward
    references are not allowed.

    Args:
        pattern: one that re.compile takes
    """
    counts = {"all": 0, "wide": 0}
    return _tame(parser.parse(pattern), False, counts) and counts["all"] <= MAX_REPEATS


def _tame(parsed: Any, repeated: bool, counts: dict[str, int]) -> bool:
    for code, argument in parsed:
        if code in _REPEATS:
            _, most, body = argument
            if repeated:
                return False
            counts["all"] += 1
            if most > 1:
                counts["wide"] += _is_wide(body)
                if counts["wide"] > MAX_WIDE_REPEATS:
                    return False
            if not _tame(body, repeated or most > 1, counts):
                return False
        elif code is codes.BRANCH:
            if repeated or not all(_tame(branch, repeated, counts) for branch in argument[1]):
                return False
        elif code is codes.SUBPATTERN:
            if not _tame(argument[-1], repeated, counts):
                return False
        elif code is codes.ATOMIC_GROUP:
            if not _tame(argument, repeated, counts):
                return False
        elif code in (codes.ASSERT, codes.ASSERT_NOT):
            if not _tame(argument[1], repeated, counts):
                return False
        elif code in (codes.GROUPREF, codes.GROUPREF_EXISTS):
            return False
    return True


def _is_wide(body: Any) -> bool:
    """True if what is repeated matches a letter and a dot, or more than one character at a time."""
    try:
        text = re.compile(_source(body)) if len(body) == 1 else None
    except NotImplementedError:
        text = None
    return text is None or bool(text.fullmatch("a") or text.fullmatch("_"))


def _source(body: Any) -> str:
    code, argument = body[0]
    if code is codes.LITERAL:
        return re.escape(chr(argument))
    if code is codes.IN and argument == [(codes.CATEGORY, codes.CATEGORY_DIGIT)]:
        return r"\d"
    if code is codes.IN and all(part[0] in (codes.LITERAL, codes.RANGE) for part in argument):
        parts = [
            re.escape(chr(value))
            if kind is codes.LITERAL
            else f"{re.escape(chr(value[0]))}-{re.escape(chr(value[1]))}"
            for kind, value in argument
        ]
        return "[" + "".join(parts) + "]"
    raise NotImplementedError
