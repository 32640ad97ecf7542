"""Which regular expressions of an untrusted config are run: those with a bounded matching time."""

import re
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

MAX_REPEATS = 8
MAX_WIDE_REPEATS = 3
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT)


def is_tame(pattern: str) -> bool:
    """Returns whether the matching time of a regular expression is a small power of the string's length.

    Python's matcher has no time limit. Nested repeats, or alternatives inside a repeat, may take exponential time;
    many repeats that match the same characters take a high power. So a repeat may contain neither, a pattern may have
    at most 8 repeats, at most 3 of them may match both letters and dots, as `.*` does, and backreferences are not
    allowed.

    Args:
        pattern: a valid regular expression
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
    """Returns whether the repeated part matches a letter, or is not a single character class."""
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
