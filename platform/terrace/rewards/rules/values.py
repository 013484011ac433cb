"""Whether two expressions are the same function: their values at fixed points, to 50 digits, within bounds on size.

Two expressions that agree at three points chosen without regard to them are the same for every answer that a person or a
model writes (Schwartz and Zippel's argument), and no simplification is tried, so nothing can take for ever. `\\sqrt{2}` and
`1.41421356` differ in the tenth digit and are therefore different. A value whose size is out of bounds (`10^{10^{10}}`, one
million factorial) is `TooLarge`: cheap to find out, and no answer.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import mpmath

from terrace.rewards.rules.expressions import NoExpression, Tree, parse, symbols_of

DIGITS = 50
_AGREE = mpmath.mpf(10) ** -30
_ZERO = mpmath.mpf(10) ** -42
_LARGEST_EXPONENT = 200_000  # binary digits of a value, at most
_LARGEST_FACTORIAL = 5_000
_POINTS = ((1, "0.7390851332151606"), (1, "1.6180339887498948"), (-1, "4.1547005383792515"))
_CONTEXT = mpmath.mp.clone()
_CONTEXT.dps = DIGITS


class TooLarge(ArithmeticError):
    """A value is out of bounds, or there is none (a division by zero)."""


def same_expression(gold: str, text: str) -> bool | None:
    """Whether two texts are the same expression; None if `gold` is none that can be valued. Never raises."""
    gold, text = str(gold), str(text)
    if re.search(r"\+\s*C$", gold):
        text = re.sub(r"\+\s*[cCkK]\s*$", "+C", text)  # a constant of integration has any name
    if re.sub(r"[\s$]", "", gold) == re.sub(r"[\s$]", "", text):
        return True
    try:
        wanted = _parsed(gold)
        points = [_value(wanted, point) for point in range(2)]
    except (NoExpression, TooLarge, RecursionError):
        return None
    try:
        said = _parsed(text)
        return _same_values(wanted, said, points)
    except (NoExpression, TooLarge, RecursionError):
        return False


def constant_ratio(first: Tree, second: Tree, positive: bool = False) -> bool:
    """Whether `first` is a constant (not 0) times `second`: both are then 0 at the same places. Raises TooLarge."""
    ratios = []
    for point in range(3):
        above, below = _value(first, point), _value(second, point)
        if _is_zero(above) or _is_zero(below):
            return False
        ratios.append(above / below)
    agree = all(_close(ratio, ratios[0]) for ratio in ratios)
    return agree and (not positive or (mpmath.im(ratios[0]) == 0 and mpmath.re(ratios[0]) > 0))


def real_value(text: str) -> Any | None:
    """The value of an expression without variables as a real mpf, or None."""
    try:
        tree = _parsed(text)
        if symbols_of(tree):
            return None
        value = _value(tree, 0)
    except (NoExpression, TooLarge, RecursionError):
        return None
    return mpmath.re(value) if abs(mpmath.im(value)) < _ZERO else None


@lru_cache(maxsize=512)
def _parsed(text: str) -> Tree:
    return parse(text)


def _same_values(wanted: Tree, said: Tree, points: list[Any]) -> bool:
    exact = not (_cancels(wanted) or _cancels(said))
    for point, value in enumerate(points):
        if not _close(_value(said, point), value, exact):
            return False
    try:  # at a negative point x and |x| differ; what is not real there does not decide
        first, second = _value(wanted, 2), _value(said, 2)
    except TooLarge:
        return True
    real = all(abs(mpmath.im(value)) < _ZERO for value in (first, second))
    return _close(first, second, exact) if real else True


def _is_zero(value: Any) -> bool:
    return abs(value) < _ZERO


def _close(first: Any, second: Any, exact: bool = False) -> bool:
    """Equal to 30 digits. What is left of a difference of equal terms counts as 0, unless there is no such (`exact`)."""
    size = max(abs(first), abs(second))
    return bool((size < _ZERO and not exact) or abs(first - second) <= _AGREE * size)


def _cancels(tree: Tree) -> bool:
    """Whether a value near 0 may be the rest of a difference."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if node[0] in ("number", "symbol"):
            continue
        if node[0] not in ("multiply", "divide", "power", "negative", "root", "factorial", "binomial", "abs"):
            return True
        waiting += node[1:]
    return False


def _symbol(name: str, point: int) -> Any:
    if name == "e":
        return _CONTEXT.e
    if name == "i":
        return _CONTEXT.mpc(0, 1)
    if name == "\\pi":
        return +_CONTEXT.pi
    sign, start = _POINTS[point]
    # a value of its own for every name, the same in every process
    code = 0
    for letter in name:
        code = (code * 131 + ord(letter)) % 1_000_003
    return sign * (_CONTEXT.mpf(start) + _CONTEXT.mpf(code) / 1_000_003 + _CONTEXT.sqrt(code + 2) / 1000)


def _value(tree: Tree, point: int) -> Any:
    try:
        value = _compute(tree, point)
    except (ZeroDivisionError, OverflowError, ValueError) as error:
        raise TooLarge(str(error)) from error
    if not _CONTEXT.isfinite(value):
        raise TooLarge("not finite")
    return value


def _compute(tree: Tree, point: int) -> Any:
    kind = tree[0]
    if kind == "number":
        return _CONTEXT.mpf(tree[1].numerator) / tree[1].denominator
    if kind == "symbol":
        return _symbol(tree[1], point)
    values = [_compute(part, point) for part in tree[1:]]
    first = values[0]
    if kind == "add":
        return _CONTEXT.fsum(values)
    if kind == "negative":
        return -first
    if kind == "multiply":
        return first * values[1]
    if kind == "divide":
        return first / values[1]
    if kind == "power":
        return _power(first, values[1])
    if kind == "root":
        return _root(first, values[1])
    if kind == "degrees":
        return first * _CONTEXT.pi / 180
    if kind == "abs":
        return abs(first)
    if kind in ("factorial", "binomial"):
        return _counted(kind, values)
    if kind == "exp":
        return _power(_CONTEXT.e, first)
    if kind == "log":
        return _CONTEXT.log(first) / _CONTEXT.log(values[1] if len(values) > 1 else 10)
    if kind == "floor" or kind == "ceiling":
        return _CONTEXT.floor(first + _ZERO) if kind == "floor" else _CONTEXT.ceil(first - _ZERO)
    if abs(first) > 10**15:
        raise TooLarge("the argument of a function")
    names = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}
    return getattr(_CONTEXT, names.get(kind, kind))(first)


def _power(base: Any, exponent: Any) -> Any:
    size = abs(base)
    if size != 0 and abs(exponent) * abs(_CONTEXT.log(size, 2)) > _LARGEST_EXPONENT:
        raise TooLarge("a power")
    if base == 0 and exponent == 0:
        return _CONTEXT.mpf(1)
    return _CONTEXT.power(base, exponent)


def _root(value: Any, degree: Any) -> Any:
    if degree == 3 and mpmath.im(value) == 0 and value < 0:
        return -_CONTEXT.cbrt(-value)  # the real cube root, as in every school book
    return _CONTEXT.sqrt(value) if degree == 2 else _power(value, 1 / degree)


def _counted(kind: str, values: list[Any]) -> Any:
    if any(abs(value) > _LARGEST_FACTORIAL for value in values):
        raise TooLarge(kind)
    return _CONTEXT.factorial(values[0]) if kind == "factorial" else _CONTEXT.binomial(values[0], values[1])
