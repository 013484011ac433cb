"""One value against one value: numbers exactly (or within a tolerance), quantities with their units, expressions by value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from terrace.rewards.rules.latex import inside, plain
from terrace.rewards.rules.numbers import Number, find_numbers, plain_number, same_number, stated
from terrace.rewards.rules.units import compound_value, without_unit
from terrace.rewards.rules.values import real_value, same_expression

_HEDGE = re.compile(r"\bor\b|或|\beither\b|\bmaybe\b|\bbetween\b|\bnot (?:be )?[-\d]|不是|不等于", re.IGNORECASE)
_NAME = re.compile(r"\s*(?:\\?[A-Za-z][A-Za-z ]*'?(?:_\{?\w{1,8}\}?)?(?:\(\w{1,4}\))?'?|\\angle\s?[A-Z]{1,3}|[^=]*[A-Za-z]{3,}[^=]*)\s*")


@dataclass(frozen=True)
class Limits:
    """How far a number may be off: absolute, or as a share of the expected one."""

    absolute: float = 0.0
    relative: float = 0.0

    @property
    def exact(self) -> bool:
        return not self.absolute and not self.relative


EXACT = Limits()


def same_value(gold: str, text: str, limits: Limits = EXACT) -> bool:
    """Whether two texts state the same value; False where `gold` is none."""
    gold_number = plain_number(gold)
    if gold_number is None:
        return compound_same(gold, text) or bool(same_expression(gold, text))
    return same_quantity(gold, gold_number, text, limits)


def compound_same(gold: str, text: str) -> bool:
    """`5 min 30 s` and `330 seconds`."""
    wanted = compound_value(plain(gold))
    if wanted is None:
        return False
    said = compound_value(inside(plain(text)))
    if said is None:
        rest, unit = without_unit(inside(plain(text)))
        number = stated(rest)
        said = (number.value * unit.factor, unit.dimensions) if number is not None and unit is not None else None
    return said == wanted


def same_quantity(gold: str, gold_number: Number, text: str, limits: Limits = EXACT) -> bool:
    """Whether `text` states the number `gold`, in the same or a convertible unit, or without one."""
    said = plain(text)
    if (
        _HEDGE.search(said)
        or re.fullmatch(r"-?\d+(?: -?\d+)+", said)
        or re.fullmatch(r"[^A-Za-z]*\d\s*[,;]\s+[^A-Za-z]*", said)
        or not _says_its_value(said, gold_number)
    ):
        return False
    said = said.rsplit("=", 1)[-1].strip()
    unit = without_unit(inside(plain(gold)))[1]
    rest, other = without_unit(inside(said))
    number = None if re.fullmatch(r"\d+\s?!+", said) else stated(rest)
    if unit is not None and other is not None and unit != other:
        compound = compound_value(inside(said))
        if number is None or unit.dimensions != other.dimensions:
            return compound == (gold_number.value * unit.factor, unit.dimensions)
        converted = Number(number.value * other.factor / unit.factor, number.percent, 0, 0)
        return same_number(gold_number, converted, limits.absolute, limits.relative)
    if number is not None:
        return same_number(gold_number, number, limits.absolute, limits.relative)
    if is_prose(said):
        return False
    if not limits.exact:
        value = real_value(rest)
        if value is None:
            return False
        return same_number(gold_number, Number(Fraction(str(value)), False, 0, 0), limits.absolute, limits.relative)
    wanted = without_unit(inside(plain(gold)))[0]
    exact = f"({gold_number.value.numerator})/({gold_number.value.denominator})"
    return any(bool(same_expression(form, rest)) for form in (exact, wanted, gold)) or (
        other is not None and bool(same_expression(gold, said))
    )


def _says_its_value(text: str, gold: Number) -> bool:
    """Whether what stands before the last "=" may be a name or a calculation: `x = 7` says 7, `3x - 2y = 0` is a line, not 0."""
    if "=" not in text:
        return True
    left = text.rsplit("=", 1)[0].rsplit("=", 1)[-1]
    if _NAME.fullmatch(left) or not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+|[A-Za-z]{2,}", " ", left)):
        return True
    return gold.value != 0


def is_prose(text: str) -> bool:
    """Running text or a list of numbers, as opposed to one expression."""
    bare = re.sub(r"\\[A-Za-z]+", " ", text)
    if len(re.findall(r"[A-Za-z]{3,}", bare)) >= 3:
        return True
    separators = re.search(r"\d\s*[,;、，]\s*-?\d|\d\s+\d", text.replace("\\", " \\"))
    return bool(separators) and len(find_numbers(text)) > 1
