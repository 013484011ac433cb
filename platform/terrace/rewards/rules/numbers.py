"""Numbers as people and models write them: 1,520 / 1 520 / $1{,}520$ / 3/4 / \\frac{3}{4} / 1 1/2 / 40% / 3 x 10^5 /
三百二十一 / seven.

Values are exact fractions, so 0.1 is one tenth. Patterns have bounded repetition: text of any size is read in linear
time.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

_DIGITS = r"\d{1,3}(?:,\d{3}){1,12}(?!\d)|\d{1,40}"
_PLAIN = rf"(?:(?:{_DIGITS})(?:\.\d{{1,40}})?|\.\d{{1,40}})"
_SIGN = r"(?:(?<![A-Za-z0-9_.)\]}])[-+]\s?)?"
_TEN = r"\s?(?:\\times|\\cdot|[x×*·])\s?10\s?\^\s?\{?\s?([-+]?\d{1,3})\}?"
_MULTIPLIERS = {
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "万": 10**4,
    "萬": 10**4,
    "亿": 10**8,
    "億": 10**8,
}
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})(?<![A-Za-z_])(?:"
    rf"(?P<mixed>\d{{1,12}})\s{{1,2}}(?P<mixed_n>\d{{1,12}})/(?P<mixed_d>\d{{1,12}})(?![\d/])"
    rf"|(?P<whole>\d{{1,12}})?\s?\\[dt]?frac\s?\{{\s?(?P<frac_n>[-+]?{_PLAIN})\s?\}}\s?\{{\s?(?P<frac_d>{_PLAIN})\s?\}}"
    rf"|\\[dt]?frac\s?(?P<short_n>\d)\s?(?P<short_d>\d)(?!\d)"
    rf"|(?P<over_n>{_PLAIN})\s?/\s?(?P<over_d>{_PLAIN})(?![\d/])"
    rf"|(?P<plain>{_PLAIN})(?:[eE](?P<exponent>[-+]?\d{{1,3}})(?![A-Za-z0-9])|{_TEN})?"
    rf")(?:\s?(?P<multiplier>thousand|million|billion|万|萬|亿|億)(?![a-z]))?"
    r"(?P<percent>\s?\\?%|\s?per ?cent\b)?"
)
_ONES = dict(zip("零〇一二两三四五六七八九", (0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9)))
_PLACES = {"十": 10, "百": 100, "千": 1000}
_CHINESE = re.compile(r"[零〇一二两三四五六七八九十百千万亿]{1,20}")
_ONES_IN_WORDS = (
    "zero one two three four five six seven eight nine ten "
    "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
)
_TENS_IN_WORDS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: value for value, word in enumerate(_ONES_IN_WORDS.split())}
_WORDS |= {word: 10 * value for value, word in enumerate(_TENS_IN_WORDS.split(), start=2)}
_WORD_NUMBER = re.compile(
    rf"\b({'|'.join(_WORDS)})(?:[- ]({'|'.join(list(_WORDS)[1:10])}))?\b( hundred\b)?", re.IGNORECASE
)


@dataclass(frozen=True)
class Number:
    """A number found in text: its value as written (40% has value 40) and the place it was found."""

    value: Fraction
    percent: bool
    start: int
    end: int


def plain_text(text: str) -> str:
    """Write LaTeX spacing, Unicode digits, minus signs and vulgar fractions in their plain ASCII form."""
    text = re.sub(r"(\d)([¼½¾⅐-⅞])", r"\1 \2", text)
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/").replace("\u2212", "-").replace("\u2013", "-")
    text = re.sub(r"\\[!;:]|\{,\}", lambda match: "," if match.group() == "{,}" else "", text)
    text = re.sub(r"(\d)(?:\\,|\\ |[ ])(?=\d{3}(?!\d))(?<![.]\d)", r"\1,", text)
    return (
        text.replace("\\,", " ")
        .replace("\\ ", " ")
        .replace("\\%", "%")
        .replace("\\$", "$")
        .replace("^{\\circ}", "^\\circ")
    )


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
        exponent = group["exponent"] or match.group(match.re.groupindex["exponent"] + 1)
        value = _fraction(group["plain"]) * (Fraction(10) ** int(exponent) if exponent else 1)
    value *= _MULTIPLIERS.get(group["multiplier"] or "", 1)
    return -value if group["sign"].strip() == "-" else value


def chinese_number(text: str) -> int:
    """The value of a Chinese numeral: 三百二十一 is 321, 一万二千 is 12000, 二〇二五 is 2025."""
    if len(text) > 1 and all(char in _ONES for char in text):
        return int("".join(str(_ONES[char]) for char in text))
    total = section = digit = 0
    for char in text:
        if char in _ONES:
            digit = _ONES[char]
        elif char in _PLACES:
            section += (digit or 1) * _PLACES[char]
            digit = 0
        else:
            total += max(section + digit, 1) * _MULTIPLIERS[char]
            section = digit = 0
    return total + section + digit


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
    for match in _CHINESE.finditer(text):
        # 一 inside a word (一个 "a", 一些 "some") still reads as a count; single 万/亿 without a digit does not.
        if match.group() not in ("万", "亿"):
            found.append(Number(Fraction(chinese_number(match.group())), False, match.start(), match.end()))
    for match in _WORD_NUMBER.finditer(text):
        first, second, hundred = match.groups()
        value = _WORDS[first.lower()]
        if second and value >= 20:
            value += _WORDS[second.lower()]
        found.append(Number(Fraction(value * (100 if hundred else 1)), False, match.start(), match.end()))
    return found


def same_number(gold: Number, answer: Number, tolerance: float = 0.0, relative_tolerance: float = 0.0) -> bool:
    """Whether two numbers agree. A percentage agrees with its share too (40%, 0.4 and 40 are one answer to "what
    percent")."""
    allowed = max(
        Fraction(str(tolerance)),
        abs(gold.value) * Fraction(str(relative_tolerance)),
        abs(gold.value) * Fraction(1, 10**9),
    )
    if abs(gold.value - answer.value) <= allowed:
        return True
    if gold.percent and not answer.percent:
        return abs(gold.value / 100 - answer.value) <= allowed / 100
    return answer.percent and not gold.percent and abs(gold.value - answer.value / 100) <= allowed
