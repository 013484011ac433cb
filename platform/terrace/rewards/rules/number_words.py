"""Numerals in words: "one hundred and twenty-five", "three quarters", "a dozen", "none", 三百二十一, 四分之三, 百分之五十."""

from __future__ import annotations

import re
from fractions import Fraction

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_VALUES = {word: value for value, word in enumerate(_ONES.split())}
_VALUES |= {word: 10 * value for value, word in enumerate(_TENS.split(), start=2)}
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12}
_PARTS = {"half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourth": 4, "fourths": 4, "fifth": 5, "fifths": 5,
          "sixth": 6, "sixths": 6, "eighth": 8, "eighths": 8, "tenth": 10, "tenths": 10}  # fmt: skip
_NAMED = {"none": 0, "nothing": 0, "pair": 2, "couple": 2, "both": 2, "trio": 3, "single": 1, "dozen": 12, "half": Fraction(1, 2)}
_WORD = re.compile(r"[A-Za-z]+")
_NO_THING = re.compile(
    r"\bno (?!idea|number|count|solution|answer|way|doubt|clue|need|longer|matter|more than|fewer|less|one knows)[a-z]|没有", re.IGNORECASE
)
_UNSURE = re.compile(r"\b(?:none of|not sure|unknown|cannot|can't|don't know|do not know|unsure|impossible)\b|不知道|无法", re.IGNORECASE)

_CHINESE_ONES = dict(zip("零〇一二两三四五六七八九", (0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9)))
_PLACES = {"十": 10, "百": 100, "千": 1000}
_MYRIADS = {"万": 10**4, "亿": 10**8}
_CHINESE = "[零〇一二两三四五六七八九十百千万亿]"
_CHINESE_NUMBER = re.compile(
    rf"百分之(?P<hundredths>{_CHINESE}{{1,20}}|\d{{1,9}}(?:\.\d{{1,9}})?)"
    rf"|(?P<below>{_CHINESE}{{1,20}})分之(?P<above>{_CHINESE}{{1,20}})|(?P<whole>{_CHINESE}{{1,20}})"
)


def chinese_number(text: str) -> int:
    """The value of a Chinese numeral: 三百二十一 is 321, 一万二千 is 12000, 二〇二五 is 2025."""
    if len(text) > 1 and all(char in _CHINESE_ONES for char in text):
        return int("".join(str(_CHINESE_ONES[char]) for char in text))
    total = section = digit = 0
    for char in text:
        if char in _CHINESE_ONES:
            digit = _CHINESE_ONES[char]
        elif char in _PLACES:
            section += (digit or 1) * _PLACES[char]
            digit = 0
        else:
            total += max(section + digit, 1) * _MYRIADS[char]
            section = digit = 0
    return total + section + digit


def numbers_in_words(text: str) -> list[tuple[Fraction, bool, int, int]]:
    """(value, whether it is a percentage, start, end) of every numeral in words; "no cats" and "none" are 0."""
    found: list[tuple[Fraction, bool, int, int]] = []
    for match in _CHINESE_NUMBER.finditer(text):
        # 一 inside a word (一个 "a", 一些 "some") reads as a count; 万 or 亿 without a digit does not.
        group = match.groupdict()
        if group["hundredths"]:
            digits = group["hundredths"]
            found.append((Fraction(digits) if digits[0].isascii() else Fraction(chinese_number(digits)), True, *match.span()))
        elif group["below"]:
            below = chinese_number(group["below"])
            if below:
                found.append((Fraction(chinese_number(group["above"]), below), False, *match.span()))
        elif match.group() not in ("万", "亿") and text[match.start() : match.start() + 2] not in ("一共", "一样", "一起", "一些", "万一"):
            found.append((Fraction(chinese_number(match.group())), False, *match.span()))
    found += _english(text)
    nothing = _NO_THING.search(text)
    if not found and nothing and not _UNSURE.search(text):
        found.append((Fraction(0), False, *nothing.span()))
    return found


def _english(text: str) -> list[tuple[Fraction, bool, int, int]]:
    words = [(match.group().lower(), match.start(), match.end()) for match in _WORD.finditer(text[:4000])]
    found, place = [], 0
    while place < len(words):
        value, used = _numeral([word for word, _, _ in words[place : place + 12]])
        if used and not (used == 1 and words[place][0] in _NAMED and _UNSURE.search(text)):
            found.append((value, False, words[place][1], words[place + used - 1][2]))
        place += max(used, 1)
    return found


def _numeral(words: list[str]) -> tuple[Fraction, int]:
    """(value, number of words) of the numeral at the beginning of `words`; (0, 0) if there is none."""
    if words[:2] == ["half", "a"] and words[2:3] == ["dozen"]:
        return Fraction(6), 3
    if words[0] in ("a", "an") and words[1:2] and (words[1] in _SCALES or words[1] in ("pair", "couple", "trio", "half", "single")):
        return Fraction(_SCALES.get(words[1]) or _NAMED[words[1]]), 2
    if words[0] in ("a", "an", "one") and words[1:2] and words[1] in _PARTS and words[1] not in ("third", "fourth", "fifth", "tenth"):
        return Fraction(1, _PARTS[words[1]]), 2
    total = section = 0
    used, last = 0, None
    for word in words:
        if word in _VALUES:
            value = _VALUES[word]
            if last == "ones" or (last == "tens" and not 0 < value < 10) or (last == "scale" and value == 0):
                break
            section += value
            last = "tens" if value >= 20 else "ones"
        elif word in _SCALES and used:
            if word in ("hundred", "dozen"):
                section *= _SCALES[word]
            else:
                total, section = total + section * _SCALES[word], 0
            last = "scale"
        elif word == "and" and last == "scale" and used + 1 < len(words) and words[used + 1] in _VALUES:
            used += 1
            continue
        else:
            break
        used += 1
    value = Fraction(total + section)
    if used and words[used : used + 3] == ["and", "a", "half"]:
        return value + Fraction(1, 2), used + 3
    if used and used < len(words) and words[used] in _PARTS and value > 0:
        return value / _PARTS[words[used]], used + 1
    if not used and words[0] in _NAMED:
        return Fraction(_NAMED[words[0]]), 1
    return value, used
