"""Numbers as people and models write them: 1,520 / 1 520 / $1{,}520$ / 3/4 / \\frac{3}{4} / 1 1/2 / 40% / 3 x 10^5 /
三百二十一 / seven.

Values are exact fractions, so 0.1 is one tenth. Patterns have bounded repetition: text of any size is read in linear
time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from terrace.rewards.rules.latex import inside, plain
from terrace.rewards.rules.number_words import numbers_in_words
from terrace.rewards.rules.units import without_unit

_DIGITS = r"\d{1,3}(?:,\d{3}){1,12}(?!\d)|\d{1,40}"
_PLAIN = rf"(?:(?:{_DIGITS})(?:\.\d{{1,40}})?|\.\d{{1,40}})"
_SIGN = r"(?:(?<![A-Za-z0-9_.)\]}])[-+]\s?)?"
_TEN = r"\s?(?:\\times|\\cdot|[x×*·])\s?10\s?\^\s?\{?\s?(?P<ten>[-+]?\d{1,3})\}?"
_MULTIPLIERS = {
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "万": 10**4,
    "萬": 10**4,
    "亿": 10**8,
    "億": 10**8,
    "k": 10**3,
    "M": 10**6,
    "mn": 10**6,
    "B": 10**9,
    "bn": 10**9,
}
_MATHS = re.compile(r"[\\^*_{}\[\]+<>|]|\b(?:pi|sqrt|log|sin|cos|tan|infinity|inf|infty)\b", re.IGNORECASE)
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})(?<![A-Za-z_])(?:"
    rf"(?P<mixed>\d{{1,12}})\s{{1,2}}(?P<mixed_n>\d{{1,12}})/(?P<mixed_d>\d{{1,12}})(?![\d/])"
    rf"|(?P<whole>\d{{1,12}})?\s?\\[dt]?frac\s?\{{\s?(?P<frac_n>[-+]?{_PLAIN})\s?\}}\s?\{{\s?(?P<frac_d>{_PLAIN})\s?\}}"
    rf"|\\[dt]?frac\s?(?P<short_n>\d)\s?(?P<short_d>\d)(?!\d)"
    rf"|(?P<over_n>{_PLAIN})\s?/\s?(?P<over_d>{_PLAIN})(?![\d/])"
    rf"|(?P<plain>{_PLAIN})(?:[eE](?P<exponent>[-+]?\d{{1,3}})(?![A-Za-z0-9])|{_TEN})?"
    rf")(?:\s?(?P<multiplier>thousand|million|billion|万|萬|亿|億)(?![a-z])|(?P<short>(?<=\d)(?:k|M|mn|B|bn))(?![A-Za-z]))?"
    r"(?P<percent>\s?\\?%|\s?per ?cent\b)?"
)


@dataclass(frozen=True)
class Number:
    """A number found in text: its value as written (40% has value 40) and the place it was found."""

    value: Fraction
    percent: bool
    start: int
    end: int


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", ""))


def _value(match: re.Match) -> Fraction | None:
    group = match.groupdict()
    if group["mixed"]:
        if int(group["mixed_d"]) == 0:
            return None
        value = int(group["mixed"]) + Fraction(int(group["mixed_n"]), int(group["mixed_d"]))
    elif group["frac_n"]:
        if _fraction(group["frac_d"]) == 0:
            return None
        value = int(group["whole"] or 0) + _fraction(group["frac_n"]) / _fraction(group["frac_d"])
    elif group["short_n"]:
        if int(group["short_d"]) == 0:
            return None
        value = Fraction(int(group["short_n"]), int(group["short_d"]))
    elif group["over_n"]:
        if _fraction(group["over_d"]) == 0:
            return None
        value = _fraction(group["over_n"]) / _fraction(group["over_d"])
    else:
        exponent = group["exponent"] or group["ten"]
        value = _fraction(group["plain"]) * (Fraction(10) ** int(exponent) if exponent else 1)
    value *= _MULTIPLIERS.get(group["multiplier"] or group["short"] or "", 1)
    return -value if group["sign"].strip() == "-" else value


def find_numbers(text: str) -> list[Number]:
    """Every number in `text` (already through `plain_text`). Numerals in words count only where there are no digits at
    all."""
    found = []
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if value is not None:
            found.append(Number(value, bool(match.group("percent")), match.start(), match.end()))
    if found:
        return found
    return [Number(value, percent, start, end) for value, percent, start, end in numbers_in_words(text)]


@lru_cache(maxsize=1024)  # a group asks for one solution again and again
def plain_number(text: str) -> Number | None:
    """The one number that a text states, with or without unit and words; None for an expression, a list, or no number.

    "3 + 4 = 7" states 7 (what stands after the last "="). A sign before brackets is no number of its own: `-(5)` is an
    expression.
    """
    return stated(without_unit(inside(plain(text)))[0])


def stated(text: str) -> Number | None:
    if re.search(r"[\d)}]\s?!+$", text) and not re.search(r"(?<!\\)\b[A-Za-z]{3,}", text):
        return None  # a factorial, not an exclamation
    if "=" in text:
        text = text.rsplit("=", 1)[1]
    numbers = find_numbers(text)
    if not numbers or len({(number.value, number.percent) for number in numbers}) > 1:
        return None
    rest, place = "", 0
    for number in numbers:
        before, after = text[: number.start], text[number.end :]
        # "5x" is an expression ("5m" is a length: its unit is cut off before), and so is "-(5)"
        if re.match(r"[A-Za-z](?![A-Za-z])|\s?[(\[]\s?\d", after) or re.search(r"(?<![A-Za-z])[A-Za-z]$|[-+/*]\s?[(\[{]\s?$", before):
            return None
        rest, place = rest + text[place : number.start] + " # ", number.end
    rest += text[place:]
    return None if _MATHS.search(rest) or re.search(r"#\s*!(?=\s*\S)|#\s*[-+*/:]\s*#|^\s*[-+*/]\s*#|#\s*_", rest) else numbers[-1]


def same_number(gold: Number, answer: Number, tolerance: float = 0.0, relative_tolerance: float = 0.0) -> bool:
    """Whether two numbers agree. A percentage agrees with its share too (40%, 0.4 and 40 are one answer to "what
    percent")."""
    allowed = max(Fraction(str(tolerance)), abs(gold.value) * Fraction(str(relative_tolerance)))
    if abs(gold.value - answer.value) <= allowed:
        return not (answer.percent and not gold.percent and 0 < abs(gold.value) < 1)  # 0.5 is not 0.5 %
    if gold.percent and not answer.percent:
        return abs(gold.value / 100 - answer.value) <= allowed / 100
    return answer.percent and not gold.percent and abs(gold.value - answer.value / 100) <= allowed
