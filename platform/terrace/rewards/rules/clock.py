"""Times of day (12:30, 3:05 PM, 15:05, half past two), dates (2024-05-01, 1/2/2020) and ratios (3:4)."""

from __future__ import annotations

import re
from fractions import Fraction

from terrace.rewards.rules.latex import inside, plain
from terrace.rewards.rules.number_words import numbers_in_words

_TIME = re.compile(r"(?<![\d:.])(\d{1,2}):([0-5]\d)(?::([0-5]\d))?\s?(?:([ap])\.?\s?m\b\.?)?(?![\d:])", re.IGNORECASE)
_HOUR = re.compile(r"(?<![\d:.])(\d{1,2})()()\s?([ap])\.?\s?m\b\.?(?![\d:])", re.IGNORECASE)
_DATE = re.compile(r"(?<![\d/-])(\d{1,4})([/.-])(\d{1,2})\2(\d{1,4})(?![\d/-])")
_RATIO = re.compile(
    r"(?<![\d:.])(\d{1,9}(?:\.\d+)?)\s?(?::|\bto\b)\s?(\d{1,9}(?:\.\d+)?)(?:\s?(?::|\bto\b)\s?(\d{1,9}(?:\.\d+)?))?(?![\d:])"
)
_PAST = re.compile(r"\b(half|quarter|(?:[a-z]+[- ]?){1,2})\s(?:minutes\s)?(past|to)\s([a-z]+|\d{1,2})\b", re.IGNORECASE)
Time = tuple[int, int, int, str | None]


def is_time(gold: str) -> bool:
    text = inside(plain(gold))
    return any(pattern.fullmatch(text) for pattern in (_TIME, _HOUR)) and _time(text) is not None


def is_date(gold: str) -> bool:
    match = _DATE.fullmatch(inside(plain(gold)))
    return match is not None and (len(match[1]) == 4 or len(match[4]) in (2, 4))


def is_ratio(gold: str) -> bool:
    return _RATIO.fullmatch(inside(plain(gold))) is not None and ":" in gold


def same_time(gold: str, text: str) -> bool:
    """The same time of day: 3:00 PM is 15:00; where only one of the two says AM or PM, the dial decides."""
    wanted, said = _time(inside(plain(gold))), _time(plain(text))
    if wanted is None or said is None:
        return False
    if wanted[3] and said[3]:
        return wanted == said
    first, second = (_day_hour(one) if one[3] else one[0] for one in (wanted, said))
    same_hour = first == second or (
        (wanted[3] or said[3]) and first % 12 == second % 12 and min(wanted[0], said[0]) <= 12 == _twelve(wanted, said)
    )
    return bool(same_hour) and wanted[1:3] == said[1:3]


def _twelve(first: Time, second: Time) -> int:
    """12 if the one without AM or PM is written on the dial of twelve hours, else 24."""
    without = first if first[3] is None else second
    return 12 if 1 <= without[0] <= 12 else 24


def _day_hour(time: Time) -> int:
    return time[0] % 12 + (12 if time[3] == "p" else 0)


def _time(text: str) -> Time | None:
    times = list(dict.fromkeys(match.groups() for match in (*_TIME.finditer(text), *_HOUR.finditer(text))))
    if len(times) == 1:
        hour, minute, second, half = times[0]
        return (int(hour), int(minute or 0), int(second or 0), half and half.lower()) if int(hour) < 24 else None
    past = _PAST.search(text)
    if times or past is None:
        return None
    minutes = {"half": 30, "quarter": 15}.get(past[1].lower().removeprefix("a ")) or next(
        (int(v[0]) for v in numbers_in_words(past[1])), None
    )
    hour = int(past[3]) if past[3].isdigit() else next((int(value[0]) for value in numbers_in_words(past[3])), None)
    if minutes is None or hour is None or not 1 <= hour <= 12:
        return None
    return (hour, minutes, 0, None) if past[2].lower() == "past" else ((hour - 2) % 12 + 1, 60 - minutes, 0, None)


def same_date(gold: str, text: str) -> bool:
    """The same digits in the same order, whatever stands between them."""
    [wanted], said = _dates(gold), _dates(text)
    return len(said) == 1 and said[0] == wanted


def _dates(text: str) -> list[tuple[int, ...]]:
    return list(dict.fromkeys((int(m[1]), int(m[3]), int(m[4])) for m in _DATE.finditer(plain(text))))


def same_ratio(gold: str, text: str) -> bool | None:
    """Ratios are compared as proportions; None if the answer holds no ratio (a fraction may still be the same number)."""
    wanted, said = ratios(gold), ratios(text)
    if not said:
        return None
    return len(said) == 1 and _proportional(wanted[0], said[0])


def ratios(text: str) -> list[tuple[Fraction, ...]]:
    found = [tuple(Fraction(part) for part in match.groups() if part) for match in _RATIO.finditer(plain(text))]
    return list(dict.fromkeys(found))


def _proportional(first: tuple[Fraction, ...], second: tuple[Fraction, ...]) -> bool:
    if len(first) != len(second):
        return False
    return all(first[a] * second[b] == first[b] * second[a] for a in range(len(first)) for b in range(a))
