"""Intervals and inequalities: `(-1, 4]`, `-1 < x \\le 4`, `x \\in (-\\infty, 0) \\cup (3, \\infty)`, `x < 0 or x > 3`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from terrace.rewards.rules.expressions import NoExpression, parse, symbols_of
from terrace.rewards.rules.latex import plain, split_top
from terrace.rewards.rules.scalars import same_value
from terrace.rewards.rules.values import TooLarge, constant_ratio

INFINITE = ("-\\infty", "\\infty")
_SIGN = re.compile(r"\\le(?![a-z])|\\ge(?![a-z])|<=|>=|<|>|\\lt(?![a-z])|\\gt(?![a-z])")
_UNION = re.compile(r"\\cup(?![a-z])|\bor\b|或")
_EVERY_REAL = re.compile(r"R|\\R|ℝ|all (?:the )?real numbers|all reals|any real number|全体实数", re.IGNORECASE)
_BUILDER = re.compile(r"^\\\{\s*([A-Za-z])\s*(?:\\in\s?\\?[A-Za-z]+\s*)?(?:\\?\||:|\\mid|\\vert)\s*(.*)\\\}$")


@dataclass(frozen=True)
class Interval:
    low: str
    low_closed: bool
    high: str
    high_closed: bool


def intervals_of(text: str) -> list[Interval] | None:
    """The union of intervals that a text is; None for anything else. A pair `(1, 3)` counts as one."""
    text = plain(text).strip().rstrip(".")
    builder = _BUILDER.match(text)
    if builder:
        text = builder.group(2)
    text = re.sub(r"^[A-Za-z]\s*\\in\s*", "", text)
    if _EVERY_REAL.fullmatch(text):
        return [Interval(INFINITE[0], False, INFINITE[1], False)]
    parts = _UNION.split(text)
    if len(parts) == 1 and _SIGN.search(text):
        parts = split_top(text, ",;")
    found = []
    for part in parts:
        one = _interval(re.sub(r"^\s*[A-Za-z]\s*\\in\s*", "", part.strip(" ,")))
        if one is None:
            return None
        found.append(one)
    return found


def says_interval(text: str) -> bool:
    """Whether a text can only be intervals: an inequality in one name, infinity, a union, or brackets of two kinds."""
    text = plain(text)
    return intervals_of(text) is not None and (
        bool(_SIGN.search(text)) or "infty" in text or "\\cup" in text or bool(re.fullmatch(r".*(?:\([^()\[\]]*\]|\[[^()\[\]]*\)).*", text))
    )


def same_intervals(gold: list[Interval], text: str) -> bool:
    """The same intervals in any order, ends included or not alike."""
    said = intervals_of(text)
    if said is None or len(said) != len(gold):
        return False
    left = list(said)
    for one in gold:
        match = next((other for other in left if _same(one, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same(first: Interval, second: Interval) -> bool:
    if (first.low_closed, first.high_closed) != (second.low_closed, second.high_closed):
        return False
    return all(
        (one == other) if one in INFINITE or other in INFINITE else same_value(one, other)
        for one, other in ((first.low, second.low), (first.high, second.high))
    )


def _interval(text: str) -> Interval | None:
    brackets = re.fullmatch(r"([(\[\]])(.+)([)\]\[])", text)
    if brackets and not _SIGN.search(text):
        ends = split_top(brackets.group(2), ",;")
        if len(ends) != 2 or not all(ends):
            return None
        low, high = (_end(end) for end in ends)
        return Interval(low, brackets.group(1) == "[" and low not in INFINITE, high, brackets.group(3) == "]" and high not in INFINITE)
    pieces = re.split(r"\band\b|且", text)
    if len(pieces) == 2:
        both = [_interval(piece.strip()) for piece in pieces]
        lows = [one for one in both if one and one.high == INFINITE[1]]
        highs = [one for one in both if one and one.low == INFINITE[0]]
        if len(lows) == 1 and len(highs) == 1:
            return Interval(lows[0].low, lows[0].low_closed, highs[0].high, highs[0].high_closed)
        return None
    return _inequality(text)


def _end(text: str) -> str:
    bare = re.sub(r"\s", "", text)
    return {
        "\\infty": INFINITE[1],
        "+\\infty": INFINITE[1],
        "infinity": INFINITE[1],
        "-\\infty": INFINITE[0],
        "-infinity": INFINITE[0],
    }.get(bare, text.strip())


def _inequality(text: str) -> Interval | None:
    signs = [{"\\le": "<=", "\\ge": ">=", "\\lt": "<", "\\gt": ">"}.get(sign, sign) for sign in _SIGN.findall(text)]
    sides = [side.strip() for side in _SIGN.split(text)]
    if len(sides) == 2 and not sides[0]:
        sides[0] = "x"  # "≥ 3" says it of the unknown
    if not signs or len(signs) > 2 or len({sign[0] for sign in signs}) > 1 or not all(sides):
        return None
    if signs[0][0] == ">":
        signs, sides = [sign.replace(">", "<") for sign in reversed(signs)], sides[::-1]
    inner = re.fullmatch(r"\|\s*[A-Za-z]\s*\|", sides[0])
    if inner and len(sides) == 2:
        return Interval(f"-({_end(sides[1])})", signs[0] == "<=", _end(sides[1]), signs[0] == "<=")
    names = [place for place, side in enumerate(sides) if re.fullmatch(r"\\?[A-Za-z](?:[a-z]{0,8})(?:_\{?\w\}?)?", side) and side != "e"]
    if len(names) != 1 or (len(sides) == 3 and names != [1]):
        return None
    if len(sides) == 3:
        return Interval(_end(sides[0]), signs[0] == "<=", _end(sides[2]), signs[1] == "<=")
    if names == [0]:
        return Interval(INFINITE[0], False, _end(sides[1]), signs[0] == "<=")
    return Interval(_end(sides[0]), signs[0] == "<=", INFINITE[1], False)


def same_relation(gold: str, text: str) -> bool:
    """Inequalities between expressions: `x + y \\ge 3` is `2x + 2y \\ge 6` and `3 - x \\le y`."""
    try:
        wanted, said = _difference(gold), _difference(text)
        if wanted is None or said is None or wanted[1] != said[1] or not symbols_of(wanted[0]):
            return False
        return constant_ratio(wanted[0], said[0], positive=True)
    except (NoExpression, TooLarge, RecursionError):
        return False


def is_relation(text: str) -> bool:
    return len(_SIGN.findall(plain(text))) == 1


def _difference(text: str) -> tuple[tuple, bool] | None:
    """(smaller side minus larger side, whether they may be equal)."""
    text = plain(text)
    signs = _SIGN.findall(text)
    if len(signs) != 1:
        return None
    left, right = _SIGN.split(text)
    greater = signs[0] in (">", ">=", "\\ge", "\\gt")
    first, second = (right, left) if greater else (left, right)
    return ("add", parse(first), ("negative", parse(second))), signs[0] in ("<=", ">=", "\\le", "\\ge")
