"""Units of measurement: which unit stands behind a number, and when two quantities are the same.

A unit is a factor and powers of base dimensions, so `5 km` is `5000 m`, `9.8 m\\,s^{-2}` is `9.8 m/s²`, and `10 A` is not
`10 V`. A unit that only one of the two names, or that nobody here knows ("5 apples"), does not decide. Degrees Celsius and
Fahrenheit, and currencies, are dimensions of their own: nothing is converted between them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

Dimensions = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Unit:
    """`factor` times the product of base dimensions to their powers, sorted by name."""

    factor: Fraction
    dimensions: Dimensions


_PREFIXES = {"": 0, "n": -9, "u": -6, "μ": -6, "m": -3, "k": 3, "M": 6, "G": 9}
_LONG_PREFIXES = {"": 0, "nano": -9, "micro": -6, "milli": -3, "kilo": 3, "mega": 6, "giga": 9}
_METRIC = {  # symbol, words: factor in grams, metres, seconds, ..., dimensions
    ("m", "meter metre"): (1, {"m": 1}), ("g", "gram"): (1, {"g": 1}), ("L", "liter litre"): (Fraction(1, 1000), {"m": 3}),
    ("V", "volt"): (1000, {"g": 1, "m": 2, "s": -3, "A": -1}), ("A", "ampere amp"): (1, {"A": 1}),
    ("\\Omega", "ohm"): (1000, {"g": 1, "m": 2, "s": -3, "A": -2}), ("W", "watt"): (1000, {"g": 1, "m": 2, "s": -3}),
    ("J", "joule"): (1000, {"g": 1, "m": 2, "s": -2}), ("N", "newton"): (1000, {"g": 1, "m": 1, "s": -2}),
    ("Pa", "pascal"): (1000, {"g": 1, "m": -1, "s": -2}), ("Hz", "hertz"): (1, {"s": -1}), ("C", "coulomb"): (1, {"A": 1, "s": 1}),
    ("F", "farad"): (Fraction(1, 1000), {"g": -1, "m": -2, "s": 4, "A": 2}), ("mol", "mole"): (1, {"mol": 1}),
    ("T", "tesla"): (1000, {"g": 1, "s": -2, "A": -1}), ("eV", "electronvolt"): (1, {"eV": 1}), ("cal", "calorie"): (1, {"cal": 1}),
    ("s", "second sec"): (1, {"s": 1}),
}  # fmt: skip
_OTHERS = {
    "cm centimeter centimetre": (Fraction(1, 100), {"m": 1}), "dm": (Fraction(1, 10), {"m": 1}), "K kelvin": (1, {"K": 1}),
    "in inch inches": (Fraction(254, 10_000), {"m": 1}), "ft foot feet": (Fraction(3048, 10_000), {"m": 1}),
    "yd yard": (Fraction(9144, 10_000), {"m": 1}), "mi mile": (Fraction(1_609_344, 1000), {"m": 1}),
    "lb lbs pound": (Fraction(45_359_237, 100_000), {"g": 1}), "oz ounce": (Fraction(45_359_237, 1_600_000), {"g": 1}),
    "ton tonne": (10**6, {"g": 1}), "min minute": (60, {"s": 1}), "h hr hour": (3600, {"s": 1}), "day": (86_400, {"s": 1}),
    "week": (7 * 86_400, {"s": 1}), "month": (1, {"month": 1}), "yr year": (12, {"month": 1}), "l": (Fraction(1, 1000), {"m": 3}),
    "ml": (Fraction(1, 10**6), {"m": 3}), "°C celsius": (1, {"°C": 1}), "°F fahrenheit": (1, {"°F": 1}), "° degree deg": (1, {"°": 1}),
    "rad radian": (1, {"rad": 1}), "dollar USD": (1, {"$": 1}), "cent": (Fraction(1, 100), {"$": 1}), "€ euro EUR": (1, {"€": 1}),
    "£ GBP": (1, {"£": 1}), "元 yuan RMB CNY": (1, {"¥": 1}), "mph": (Fraction(1_609_344, 3_600_000), {"m": 1, "s": -1}),
    "kph kmph": (Fraction(1000, 3600), {"m": 1, "s": -1}), "acre": (1, {"acre": 1}), "gallon gal": (1, {"gallon": 1}),
    "厘米": (Fraction(1, 100), {"m": 1}), "米": (1, {"m": 1}), "千米 公里": (1000, {"m": 1}), "毫米": (Fraction(1, 1000), {"m": 1}),
    "千克 公斤": (1000, {"g": 1}), "克": (1, {"g": 1}), "秒": (1, {"s": 1}), "分钟": (60, {"s": 1}), "小时": (3600, {"s": 1}),
    "天": (86_400, {"s": 1}),
    "度": (1, {"°": 1}), "升": (Fraction(1, 1000), {"m": 3}), "摄氏度": (1, {"°C": 1}),
}  # fmt: skip
_CURRENCY = {"$": "$", "€": "€", "£": "£", "¥": "¥"}
_WORDS_ONLY = {"in", "second", "day", "week", "month"}  # "in" is a unit only at the end: "5 in total"


def _table() -> dict[str, Unit]:
    table: dict[str, Unit] = {}

    def put(name: str, factor: Fraction, dimensions: dict[str, int]) -> None:
        table.setdefault(name, Unit(factor, tuple(sorted(dimensions.items()))))

    for words, (factor, dimensions) in _OTHERS.items():
        for word in words.split():
            put(word, Fraction(factor), dimensions)
            if len(word) > 2 and word.isascii() and not word.isupper():
                put(word + "s", Fraction(factor), dimensions)
    put("° C", Fraction(1), {"°C": 1})
    put("° F", Fraction(1), {"°F": 1})
    for kind in ("Celsius", "Fahrenheit"):
        for start in ("degrees ", "degree ", "° "):
            put(start + kind, Fraction(1), {"°" + kind[0]: 1})
            put(start + kind.lower(), Fraction(1), {"°" + kind[0]: 1})
        put("degrees " + kind[0], Fraction(1), {"°" + kind[0]: 1})
    for (symbol, words), (factor, dimensions) in _METRIC.items():
        for prefix, power in _PREFIXES.items():
            put(prefix + symbol, factor * Fraction(10) ** power, dimensions)
        for prefix, power in _LONG_PREFIXES.items():
            for word in words.split():
                put(prefix + word, factor * Fraction(10) ** power, dimensions)
                put(prefix + word + "s", factor * Fraction(10) ** power, dimensions)
    return table


_UNITS = _table()
_NAME = "|".join(re.escape(name) for name in sorted(_UNITS, key=len, reverse=True))
_ONE = rf"(?:(square|cubic|sq\.?|cu\.?)\s)?({_NAME})(?![A-Za-z])(?:\s?\^\s?\{{?\s?(-?\s?\d)\s?\}}?|([23])(?!\d))?(?:\s(squared|cubed))?"
_UNIT = re.compile(rf"\s?(?:{_ONE})(?:\s?(?:/|\bper\b|\*|\\cdot|\s)\s?(?:{_ONE}))*")
_PART = re.compile(rf"(/|\bper\b)?\s?{_ONE}")
_NUMBER_END = re.compile(r"[\d)}°½¼¾](?=[\s°A-Za-z€£元\\μ\u4e00-\u9fff])|\b(?:one|two|three|four|five|six|seven|eight|nine|ten|a|an)(?= )")


def unit_of(text: str) -> Unit | None:
    """The unit that a whole text is, for example `km/h`, `m s^{-2}`, `square centimeters`; None for anything else."""
    text = text.strip()
    if not _UNIT.fullmatch(text):
        return None
    factor, powers = Fraction(1), Counter()
    for match in _PART.finditer(text):
        per, square, name, power, digit, word = match.groups()
        exponent = int(power.replace(" ", "")) if power else int(digit) if digit else 1
        exponent *= {"squ": 2, "sq": 2, "sq.": 2, "cub": 3, "cu": 3, "cu.": 3}.get((square or word or "")[:3], 1)
        exponent *= -1 if per else 1
        unit = _UNITS[name]
        factor *= unit.factor**exponent
        for dimension, value in unit.dimensions:
            powers[dimension] += value * exponent
    return Unit(factor, tuple(sorted((name, value) for name, value in powers.items() if value)))


@lru_cache(maxsize=1024)
def without_unit(text: str) -> tuple[str, Unit | None]:
    """(`text` without the first unit behind a number, that unit); a currency's sign before the number counts too.

    `text` has been through `latex.plain`. A unit further on of other dimensions ("5 m and 3 kg") stays in the text.
    """
    text = re.sub(r"(?<=[A-Za-z])\s?/\s?\(\s?(\w{1,4})\s?(?:\\cdot|\*|\s)\s?(\w{1,4})\s?\)", r"/\1/\2", text)  # J/(kg·K)
    for match in _NUMBER_END.finditer(text[:2000]):
        found = _UNIT.match(text, match.end())
        if found is None or (found.group().strip() in _WORDS_ONLY and re.match(r"\s[A-Za-z]", text[found.end() :])):
            continue
        unit = unit_of(found.group())
        if unit is not None:
            return text[: found.start()] + " " + text[found.end() :], unit
    sign = re.search(r"[$€£¥](?=\s?[-\d.])", text)
    if sign is not None:
        return text[: sign.start()] + text[sign.end() :], Unit(Fraction(1), ((_CURRENCY[sign.group()], 1),))
    return text, None


def quantities(text: str) -> list[tuple[Fraction, Unit]]:
    """Every (number, unit) of a compound quantity such as "5 min 30 s" or "6 feet 2 inches"; empty for other text."""
    number = r"(\d{1,12}(?:\.\d{1,12})?)"
    parts = re.fullmatch(rf"(?:\s?(?:and\s)?{number}\s?({_NAME})(?![A-Za-z])\s?,?){{2,4}}", text.strip())
    if parts is None:
        return []
    return [(Fraction(value), _UNITS[name]) for value, name in re.findall(rf"{number}\s?({_NAME})(?![A-Za-z])", text)]


def compound_value(text: str) -> tuple[Fraction, Dimensions] | None:
    """The sum of a compound quantity in base units, if all its parts measure the same."""
    parts = quantities(text)
    if not parts or len({unit.dimensions for _, unit in parts}) != 1:
        return None
    return sum((value * unit.factor for value, unit in parts), Fraction(0)), parts[0][1].dimensions
