"""Several values: tuples and points (in order), sets, solutions and lists (in any order), matrices (row by row)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from terrace.rewards.rules.latex import ROW, plain, split_top
from terrace.rewards.rules.numbers import plain_number
from terrace.rewards.rules.scalars import same_value

MOST_ELEMENTS = 200
_MATRIX = re.compile(
    r"\\begin\s?\{([pbvBV]?(?:small)?matrix|array|cases)\}\s?(?:\{[lcr| ]{0,20}\}|\[[lcr| ]\])?(.*?)\\end\s?\{\1\}", re.DOTALL
)
_JOIN = re.compile(r"\s*(?:,\s*)?(?:\band\b|\bor\b|和|或|、)\s*")
_ASSIGNED = re.compile(r"\s*(\\?[A-Za-z][A-Za-z]?'?(?:_\{?\w{1,4}\}?)?)\s*=\s*(.+)", re.DOTALL)


@dataclass(frozen=True)
class Values:
    """`kind` is tuple, bracket, set or bare; `elements` are texts."""

    kind: str
    elements: tuple[str, ...]
    name: str = ""  # of a point: A(2, 3)


@dataclass(frozen=True)
class Matrix:
    """Rows of texts; a determinant (bars around it) is no matrix of brackets. `factor` stands in front."""

    rows: tuple[tuple[str, ...], ...]
    bars: bool
    factor: str


def matrix_of(text: str) -> Matrix | None:
    """The one matrix of a text; None for none, several, or a calculation with one."""
    text = plain(text).strip(" .")
    text = re.sub(r"^[A-Za-z\\]{1,3}(?:\^\{?-?\w+\}?)?\s?=\s?", "", text)
    text = re.sub(r"^[(\[]\s*(?=\\begin\{(?:array|matrix|smallmatrix)\})|(?<=\})\s*[)\]]$", "", text)
    found = list(_MATRIX.finditer(text))
    if len(found) != 1 or found[0].group(1) == "cases" or text[found[0].end() :].strip():
        return None
    rows = [tuple(split_top(row, "&")) for row in found[0].group(2).split(ROW) if row.strip()]
    if not rows or sum(map(len, rows)) > MOST_ELEMENTS:
        return None
    return Matrix(tuple(rows), found[0].group(1)[0] in "vV", text[: found[0].start()].strip())


def same_matrix(gold: Matrix, text: str) -> bool:
    """Equal in shape and in every element; a factor in front multiplies the elements."""
    said = matrix_of(text)
    if said is None or said.bars != gold.bars or [len(row) for row in said.rows] != [len(row) for row in gold.rows]:
        return False
    pairs = [(one, other) for first, second in zip(gold.rows, said.rows) for one, other in zip(first, second)]
    return all(same_value(_times(gold.factor, one), _times(said.factor, other)) for one, other in pairs)


def _times(factor: str, element: str) -> str:
    return f"{factor}({element})" if factor else element


def values_of(text: str) -> Values:
    """A text cut into its elements; one element if it is no list. `\\pm a` is two."""
    text = plain(text).strip().rstrip(".。;")
    text = re.sub(r"^(?:[A-Za-z]\s?\\in\s?|\([A-Za-z](?:,\s?[A-Za-z]){1,3}\)\s?=\s?)", "", text)
    kind, point = "bare", re.match(r"([A-Z]'?)\s?(?=\([^()]*,)", text)
    text = text[point.end() :] if point else text
    for start, end, name in (("\\{", "\\}", "set"), ("(", ")", "tuple"), ("[", "]", "bracket"), ("\\langle", "\\rangle", "tuple")):
        if text.startswith(start) and text.endswith(end) and _one_pair(text, start, end):
            text, kind = text[len(start) : -len(end)].strip(), name
            break
    if kind == "set" and not text:
        return Values("set", ())
    if text in ("\\emptyset", "\\emptyset ") or re.fullmatch(r"(?:the |an )?empty set|空集|no (?:real )?solutions?", text, re.IGNORECASE):
        return Values("set", ())
    pieces = [piece for part in split_top(text, ",;，；") for piece in _JOIN.split(part)]
    if kind == "bare" and len(pieces) > 1 and plain_number(text) is not None and re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        pieces = [text]
    elements = [both for piece in pieces if piece.strip() for both in _plus_minus(piece.strip())]
    return Values(kind, tuple(elements[:MOST_ELEMENTS]), point.group(1) if point and kind == "tuple" else "")


def _one_pair(text: str, start: str, end: str) -> bool:
    depth, place = 0, 0
    while place < len(text):
        if text.startswith(start, place):
            depth += 1
            place += len(start)
        elif text.startswith(end, place):
            depth -= 1
            place += len(end)
            if depth == 0:
                return place == len(text)
        else:
            place += 1
    return False


def _plus_minus(element: str) -> list[str]:
    if len(re.findall(r"\\pm(?![a-z])", element)) != 1:
        return [element]
    return [re.sub(r"\\pm(?![a-z])\s*", sign, element).replace("+ ", "+") for sign in ("+", "-")]


def same_values(gold: Values, text: str) -> bool:
    """Whether an answer gives the same elements: in order for tuples, in any order for sets and bare lists."""
    said = values_of(text)
    if len(said.elements) != len(gold.elements) or (gold.name and said.name and gold.name != said.name):
        return False
    if not gold.elements:
        return said.kind == "set"
    ordered = gold.kind in ("tuple", "bracket")
    if ordered and said.kind not in (gold.kind, "bare"):
        return False
    if ordered and said.kind == "bare":
        assigned = [_ASSIGNED.fullmatch(element) for element in said.elements]
        if all(assigned):  # x=3, y=-1 for (3, -1): the names' order is the tuple's
            named = {match.group(1): match.group(2) for match in assigned if match}
            return len(named) == len(gold.elements) and all(_same(one, named[name]) for one, name in zip(gold.elements, sorted(named)))
    if gold.kind == "set" and said.kind not in ("set", "bare"):
        return False
    if ordered or said.kind in ("tuple", "bracket"):
        return all(_same(one, other) for one, other in zip(gold.elements, said.elements))
    left = list(said.elements)
    for one in gold.elements:
        match = next((place for place, other in enumerate(left) if _same(one, other)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def _same(gold: str, text: str) -> bool:
    inner = values_of(gold)
    if inner.kind != "bare" and len(inner.elements) > 1:
        return same_values(inner, text)
    wanted, said = _ASSIGNED.fullmatch(gold), _ASSIGNED.fullmatch(text)
    if wanted and said and wanted.group(1) != said.group(1):
        return False
    gold, text = (match.group(2) if match else one for match, one in ((wanted, gold), (said, text)))
    number, other = plain_number(gold), plain_number(text)
    if number is not None and other is not None:
        return number.value == other.value or _share(number) == _share(other)
    if re.fullmatch(r"[A-Za-z' ]{2,40}", gold):
        return gold.strip().lower() == text.strip().lower()
    return same_value(gold, text)


def _share(number: object) -> Fraction:
    return number.value / (100 if number.percent else 1)  # type: ignore[attr-defined]
