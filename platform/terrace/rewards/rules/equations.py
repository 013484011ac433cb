"""Equations. `x = 7` is the value 7 of x; `3x - y + 13 = 0` is a line, which `0` does not name and `y = 3x + 13` does."""

from __future__ import annotations

import re

from terrace.rewards.rules.clock import ratios, same_ratio
from terrace.rewards.rules.expressions import NoExpression, Tree, parse, symbols_of
from terrace.rewards.rules.latex import plain, split_top
from terrace.rewards.rules.scalars import EXACT, Limits, same_value
from terrace.rewards.rules.sequences import Values, same_values, values_of
from terrace.rewards.rules.values import TooLarge, constant_ratio

_EQUALS = re.compile(r"(?<![<>!:=\\])=(?!=)|\\equiv(?![a-z])")
_NAME = re.compile(
    r"\\?[A-Za-z]{1,12}'?(?:_\{?\w{1,8}\}?)?'?(?:\([^()=]{1,12}\))?|\\(?:angle|triangle)\s?[A-Z]{1,3}|[A-Za-z][A-Za-z ]{2,40}"
)
_OF_X = re.compile(r"y|[fghyu]\([a-z]\)")


def sides_of(text: str) -> list[str]:
    """The sides of an equation; one if there is no "="."""
    text, sides, start = plain(text).rstrip(". "), [], 0
    for match in _EQUALS.finditer(text):
        before = text[: match.start()]
        if before.count("{") == before.count("}"):  # the "=" of \sum_{k=1} is none of the text's
            sides.append(text[start : match.start()].strip())
            start = match.end()
    return [*sides, text[start:].strip()]


def is_equation(gold: str) -> bool:
    sides = sides_of(gold)
    return len(sides) == 2 and all(sides)


def assignments(text: str) -> dict[str, list[str]] | None:
    """Names and values of `x=2, y=3` or `x=2 or x=3`; None unless every part is of this form and there are several."""
    parts = [
        piece for part in split_top(plain(text).rstrip("."), ",;") for piece in re.split(r"\band\b|\bor\b|或|和", part) if piece.strip()
    ]
    named: dict[str, list[str]] = {}
    for part in parts:
        sides = [side.strip() for side in _EQUALS.split(part)]
        if len(sides) != 2 or not _is_name(sides[0]) or not sides[1]:
            return None
        named.setdefault(_normal(sides[0]), []).append(sides[1])
    return named if len(parts) > 1 else None


def same_assignments(gold: dict[str, list[str]], text: str) -> bool:
    """The same values under the same names; solutions of one unknown also as a bare list, of several as a tuple in their order."""
    said = assignments(text)
    if said is not None:
        return said.keys() == gold.keys() and all(same_values(Values("bare", tuple(gold[name])), ", ".join(said[name])) for name in gold)
    if len(gold) > 1 and len({name.partition("_")[0] for name in gold}) == 1:  # x_1 = 1, x_2 = 2: the solutions of x
        return same_values(Values("bare", tuple(value for values in gold.values() for value in values)), text)
    if len(gold) == 1:
        [(name, wanted)] = gold.items()
        bare = re.sub(r"^\s*([^=]+)=", lambda match: "" if _normal(match.group(1)) == name else match.group(), plain(text))
        return same_values(Values("bare", tuple(wanted)), bare)
    tuple_of = values_of(text)
    in_order = tuple(values[0] for values in gold.values())
    return list(gold) == sorted(gold) and tuple_of.kind == "tuple" and same_values(Values("tuple", in_order), text)


def same_equation(gold: str, text: str, limits: Limits = EXACT) -> bool:
    """Whether an answer is the equation `gold`, in any form that is 0 at the same places, or names its value."""
    left, right = sides_of(gold)
    sides = sides_of(text)
    if ":" in left and ratios(right):
        return len(sides) == 2 and _normal(sides[0]) == _normal(left) and bool(same_ratio(right, sides[1]))
    if _is_name(left):
        if len(sides) == 1:
            return _same_side(right, sides[0], limits)
        if len(sides) >= 2 and _names_alike(left, sides[0], right) and _same_side(right, sides[-1], limits):
            return True
    return len(sides) == 2 and _same_curve((left, right), (sides[0], sides[1]))


def _same_side(gold: str, text: str, limits: Limits) -> bool:
    wanted = values_of(gold)
    if len(wanted.elements) > 1:
        return same_values(wanted, text)
    return same_value(gold, text, limits)


def _is_name(text: str) -> bool:
    """A name that has a value. `xy` is a product of the unknowns of a curve."""
    return _NAME.fullmatch(text.strip()) is not None and not re.fullmatch(r"(?=.*[xyz])[a-z]{2,3}", text.strip())


def _normal(name: str) -> str:
    return re.sub(r"[\s{}\\]", "", name)


def _names_alike(gold: str, said: str, right: str) -> bool:
    first, second = _normal(gold), _normal(said)
    if first == second:
        return True
    try:
        of_x = bool(symbols_of(parse(right)))
    except NoExpression:
        of_x = False
    return (of_x and bool(_OF_X.fullmatch(first) and _OF_X.fullmatch(second))) or re.search(r"(?<!\\)\b[A-Za-z]{4,}", said) is not None


def _same_curve(gold: tuple[str, str], said: tuple[str, str]) -> bool:
    try:
        first, second = (_cleared(("add", parse(sides[0]), ("negative", parse(sides[1])))) for sides in (gold, said))
        if not symbols_of(first) or symbols_of(first) != symbols_of(second):
            return False
        return constant_ratio(first, second)
    except (NoExpression, TooLarge, RecursionError):
        return False


def _cleared(tree: Tree) -> Tree:
    """A sum times every denominator of its terms that holds a variable: `y - 4/x` becomes `x (y - 4/x)`."""
    below: list[Tree] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if node[0] in ("add", "negative"):
            waiting += node[1:]
        elif node[0] == "divide" and symbols_of(node[2]) and node[2] not in below:
            below.append(node[2])
    for denominator in below:
        tree = ("multiply", tree, denominator)
    return tree
