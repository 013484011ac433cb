"""Mathematical answers (`text_reasoning`, `visual_reasoning`): a number with tolerance, a choice, a word, or an
expression.

The gold answer decides how the response is read. Plain numbers are compared here, exactly; everything else is left to
math-verify (`parse` and `verify` with their own timeouts off: they use `signal.alarm`, and the sandbox around this code
has the time limit). Value: 1 right, 0 wrong, unreadable or ambiguous ("3 or 4", every choice, a list of numbers for one
number).
"""

from __future__ import annotations

import logging
import re
from typing import Any

from terrace.rewards.rules.answers import final_answer
from terrace.rewards.rules.numbers import Number, find_numbers, plain_text, same_number
from terrace.rewards.types import RewardItem

_CHOICE_GOLD = re.compile(r"^\s*(?:\\text(?:bf|rm)?\{)?\(?([A-Z])\)?[.)]?\}?\s*$")
_WORD_GOLD = re.compile(r"^[A-Za-z][A-Za-z'’-]*(?: [A-Za-z'’-]+){0,5}$|^[\u4e00-\u9fff]{1,12}$")
_LETTER = re.compile(r"(?<![A-Za-z\\'’])([A-Z])(?![A-Za-z'’])")
_HEDGE = re.compile(r"\bor\b|或|\beither\b|\bmaybe\b", re.IGNORECASE)
_WRAPPERS = re.compile(
    r"\\text(?:bf|rm|it)?\s?\{([^{}]*)\}|\\math(?:rm|bf)\s?\{([^{}]*)\}|\\mbox\s?\{([^{}]*)\}|\\(?:left|right|displaystyle|quad)\b"
    r"|\\[()\[\]]|\\approx\b|\\ldots\b"
)
_MATHS = re.compile(
    r"[\\^*_{}()\[\]√π+<>|!]|\b(?:pi|sqrt|log|sin|cos|tan|infinity|inf|infty)\b|\d\s?-\s?\d", re.IGNORECASE
)
_ONE_LETTER_UNITS = set("msghLlKNJWVACFt")
_UNITS = {
    name: unit
    for unit, names in {
        "mm": "mm millimeter millimetre",
        "cm": "cm centimeter centimetre",
        "m": "m meter metre",
        "km": "km kilometer kilometre",
        "in": "inch inches",
        "ft": "ft foot feet",
        "mi": "mi mile",
        "yd": "yd yard",
        "g": "g gram",
        "kg": "kg kilogram",
        "mg": "mg milligram",
        "lb": "lb lbs pound",
        "oz": "oz ounce",
        "s": "s sec second",
        "min": "min minute",
        "h": "h hr hour",
        "day": "day",
        "week": "week",
        "year": "year",
        "ml": "ml milliliter millilitre",
        "l": "l liter litre",
    }.items()
    for name in names.split()
}
_YES_NO = ({"yes", "no"}, {"true", "false"})
_MATH_VERIFY_CHARACTERS = 2_000


def math(items: list[RewardItem], *, relative_tolerance: float = 0.0) -> list[float | None]:
    """1.0 where the response's one answer equals the solution. `metadata["tolerance"]` is an absolute tolerance for
    numbers."""
    return [_score(item, relative_tolerance) for item in items]


text_reasoning = math
visual_reasoning = math


def _score(item: RewardItem, relative_tolerance: float) -> float:
    gold = str(item.solution).strip()
    answer = final_answer(item.response)
    if answer is None or not gold:
        return 0.0
    choices = item.metadata.get("choices") or {}
    if _CHOICE_GOLD.match(gold):
        return float(_chosen(answer.text, choices) == _CHOICE_GOLD.match(gold).group(1))
    if _WORD_GOLD.match(gold):
        return float(_word_matches(gold, answer.text))
    tolerance = float(item.metadata.get("tolerance") or 0.0)
    gold_number = plain_number(gold)
    if gold_number is not None:
        if _HEDGE.search(answer.text):
            return 0.0
        if not _same_unit(gold, answer.text):
            return 0.0
        number = plain_number(answer.text)
        if number is not None:
            return float(same_number(gold_number, number, tolerance, relative_tolerance))
        if _is_prose(answer.text):
            return 0.0
        if tolerance or relative_tolerance:
            value = _numeric_value(answer.text)
            return float(value is not None and same_number(gold_number, value, tolerance, relative_tolerance))
    elif _HEDGE.search(answer.text) and not _HEDGE.search(gold):
        return 0.0
    return float(_verified(gold, answer.text, answer.mark))


def _chosen(text: str, choices: dict[str, str]) -> str | None:
    """The one letter that the text names, or None. A leading article ("A circle") is not a letter; a list of letters is
    no answer."""
    cleaned = _unwrap(text)
    for letter, words in choices.items():
        if cleaned.strip().lower() == str(words).strip().lower():
            return letter
    if _HEDGE.search(cleaned) or re.search(r"\bnot\b", cleaned):
        return None
    letters = {
        match.group(1)
        for match in _LETTER.finditer(cleaned)
        if not (match.group(1) in "AI" and re.match(r" [a-z]", cleaned[match.end() :]))
    }
    letters |= set(re.findall(r"^\s*\(?([a-h])\)?\s*$", cleaned))
    return letters.pop().upper() if len(letters) == 1 else None


def _word_matches(gold: str, text: str) -> bool:
    words = re.findall(r"[a-z'’-]+|[\u4e00-\u9fff]+", _unwrap(text).lower())
    target = gold.lower().split()
    if words == target:
        return True
    if gold[0] >= "\u4e00":
        return "".join(words) == gold
    if len(words) > 12 or _HEDGE.search(text):
        return False
    for pair in _YES_NO:
        if target[0] in pair:
            return words[:1] == target and len(pair & set(words)) == 1
    if "not" in words:
        return False
    if gold.isupper():  # an acronym such as SSS: no other acronym may stand beside it
        acronyms = set(re.findall(r"\b[A-Z]{2,}\b", _unwrap(text)))
        return acronyms == {gold}
    count = sum(words[place : place + len(target)] == target for place in range(len(words)))
    return count >= 1 and not re.search(r"[,;/]|\band\b", text)


def _unwrap(text: str) -> str:
    """Text without LaTeX wrappers: `\\text{(D)}` is `(D)`, `$5$` is `5`."""
    for _ in range(3):
        text = _WRAPPERS.sub(lambda match: next((group for group in match.groups() if group), " "), text)
    return text.replace("$", "").replace("**", "").strip()


def plain_number(text: str) -> Number | None:
    """The one number that a text states, with or without unit and words; None for an expression, a list, or no number.

    "3 + 4 = 7" states 7 (what stands after the last "=").
    """
    text = _unwrap(plain_text(text))
    text = re.sub(r"\^?\\?(?:circ|degree)\b|°", " degrees", text)
    if "=" in text:
        text = text.rsplit("=", 1)[1]
    numbers = find_numbers(text)
    if not numbers or len({(number.value, number.percent) for number in numbers}) > 1:
        return None
    rest, place = "", 0
    for number in numbers:
        rest, place = rest + text[place : number.start] + " # ", number.end
    rest += text[place:]
    if re.search(r"\\(?!text)", rest) or _MATHS.search(
        rest.replace("(", " ").replace(")", " ") if "#" in rest else rest
    ):
        return None
    for number in numbers:  # "5x" is an expression, "5 m" and "5m" are lengths
        glued = re.match(r"([A-Za-z])(?![A-Za-z])", text[number.end :])
        if glued and glued.group(1) not in _ONE_LETTER_UNITS:
            return None
        before = re.search(r"(?<![A-Za-z])([A-Za-z])$", text[: number.start])
        if before:
            return None
    return numbers[-1]


def _same_unit(gold: str, text: str) -> bool:
    """False only if both name a unit that is known and the units differ."""

    def unit(value: str) -> str | None:
        words = re.findall(r"(?<![A-Za-z])[A-Za-z]+", _unwrap(plain_text(value)))
        known = [_UNITS.get(word.lower()) or _UNITS.get(word.lower().rstrip("s")) for word in words]
        return next((name for name in known if name), None)

    mine = unit(gold)
    return mine is None or unit(text) in (None, mine)


def _is_prose(text: str) -> bool:
    """Running text or a list of numbers, as opposed to one expression."""
    bare = re.sub(r"\\[A-Za-z]+", " ", re.sub(r"\$[^$]*\$|\\\(.*?\\\)", " ", plain_text(text)))
    if len(re.findall(r"[A-Za-z]{3,}", bare)) >= 3:
        return True
    numbers = find_numbers(plain_text(text))
    separators = re.search(r"\d\s*[,;、，]\s*-?\d|\d\s+\d", plain_text(text).replace("\\", " \\"))
    return len(numbers) > 1 and bool(separators)


def _numeric_value(text: str) -> Number | None:
    from fractions import Fraction

    for parsed in _parse(text):
        try:
            value = complex(parsed)
        except (TypeError, ValueError, AttributeError, OverflowError):
            continue
        if value.imag == 0 and value.real == value.real and abs(value.real) != float("inf"):
            return Number(Fraction(value.real), False, 0, 0)
    return None


def _parse(expression: str) -> list[Any]:
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return parse(f"\\boxed{{{expression}}}", parsing_timeout=None)


def _verified(gold: str, text: str, mark: str) -> bool:
    """math-verify's opinion on one expression. From running text only a single `$...$` (or what follows "=") is looked
    at."""
    from math_verify import verify

    if len(text) > _MATH_VERIFY_CHARACTERS:
        return False
    inline = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)", text)
    if inline:
        distinct = {first or second for first, second in inline}
        if len(distinct) > 1 and mark != "boxed":
            return False
        text = next(iter(distinct)) if len(distinct) == 1 else text.replace("$", "")
    reference = _parse(plain_text(gold))
    return bool(verify(reference, _parse(plain_text(text)), timeout_seconds=None))


def warm_up() -> None:
    """Import sympy and the grammar before the first item's clock starts."""
    _verified("\\frac{1}{2}", "\\frac{2}{4}", "boxed")
