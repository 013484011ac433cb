"""Boxes and points in text, and the map from a solution's pixels to the pixels that the model saw.

Read: `[x1, y1, x2, y2]` with commas, spaces or semicolons, `[[...]]`, `(x1,y1),(x2,y2)` and two points with words between them,
JSON with `bbox`, `bbox_2d`, `box`, `point`, `point_2d`, `coordinate`, numbers in quotation marks, tags `<box>`, `<point>`,
`<point x=".." y="..">`, `click(x=.., y=..)`, `x1=.. y1=..`, `xmin`, `left`, percentages, and bare numbers if there is nothing else.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from terrace.rewards.rules.answers import boxed_contents, visible_text
from terrace.rewards.types import RewardItem

_N = r"[-+]?(?:\d{1,7}(?:\.\d{0,12})?|\.\d{1,12})(?:[eE][-+]?\d{1,2})?\s?%?"
_STEP = r"\s{0,4}(?:[,;]|\s)\s{0,4}"
_PAIRS = re.compile(rf"[\[(]\s?({_N})\s?,\s?({_N})\s?[\])]\s?[,;]?\s?[\[(]\s?({_N})\s?,\s?({_N})\s?[\])]")
_GROUP = re.compile(rf"[\[(<{{]\s{{0,4}}((?:{_N})(?:{_STEP}(?:{_N})){{0,40}})\s{{0,4}},?\s{{0,4}}[\])>}}]")
_KEY = r"""["'\\]{{0,2}}{0}["'\\]{{0,2}}\s?[=:]\s?["']?(""" + _N.replace("{", "{{").replace("}", "}}") + r""")["']?"""
_BETWEEN = r"(?:\s{0,4}[,;]?\s{0,4})"


def _named(*names: str) -> re.Pattern:
    return re.compile(_BETWEEN.join(r"(?<![A-Za-z0-9])" + _KEY.format(name) for name in names), re.IGNORECASE)


_NAMED_BOXES = (_named("x1", "y1", "x2", "y2"), _named("x_?min", "y_?min", "x_?max", "y_?max"), _named("left", "top", "right", "bottom"))
_NAMED_POINTS = (_named("x1?", "y1?"),)
_BARE = re.compile(rf"(?<![\w.])({_N})(?![\w])")
_TAGS = re.compile(r"</?(?:box|point|bbox)(?:_start|_end)?>|<\|(?:box|point)_(?:start|end)\|>|\\(?:left|right)(?![a-z])|\$|\\[()]")


@dataclass(frozen=True)
class Group:
    """Numbers that stand together; `percent` if they are written as percentages."""

    values: tuple[float, ...]
    percent: bool = False


def answer_groups(response: str) -> list[tuple[float, ...]]:
    """The distinct number groups that the answer holds, in order: (x1, y1, x2, y2) for boxes, (x, y) for points, else as they are."""
    return [group.values for group in groups_of(response)]


def groups_of(response: str) -> list[Group]:
    """The distinct groups of an answer, each with its way of writing."""
    text = visible_text(response)
    if text is None:
        return []
    tag = re.findall(r"<answer>(.{0,4000}?)(?:</answer>|\Z)", text, re.DOTALL | re.IGNORECASE)
    if tag:
        text = " ; ".join(tag)
    boxed = boxed_contents(text)
    if boxed:
        text = " ; ".join(boxed)
    text = _TAGS.sub(" ", unicodedata.normalize("NFKC", text).replace("\u2212", "-"))
    text = re.sub(rf"[\"']({_N})[\"'](?=\s?[,\]])", r"\1", text)
    groups: list[Group] = []
    for pattern in (*_NAMED_BOXES, *_NAMED_POINTS, _PAIRS):
        found = [match.groups() for match in pattern.finditer(text)]
        # one point written twice is a point, not a box
        groups += [_group(texts[:2] if pattern is _PAIRS and texts[:2] == texts[2:] else texts) for texts in found]
        text = pattern.sub(" ", text)
    groups += [_group(re.findall(_N, match.group(1))) for match in _GROUP.finditer(text)]
    if not groups:
        bare = _BARE.findall(text)[:50]
        groups = [_group(bare)] if bare else []
    return list(dict.fromkeys(groups))


def _group(texts: Any) -> Group:
    return Group(tuple(float(text.replace("%", "")) for text in texts), any("%" in text for text in texts))


def one_box(response: str) -> Group | None:
    """The answer's one box; two points and nothing else are its corners. None without a box or with several."""
    groups = groups_of(response)
    if len(groups) == 2 and all(len(group.values) == 2 for group in groups):
        groups = [Group(groups[0].values + groups[1].values, groups[0].percent)]
    return groups[0] if len(groups) == 1 and len(groups[0].values) == 4 else None


def one_point(response: str) -> Group | None:
    """The answer's one point; None without one, with several, or with a box."""
    groups = groups_of(response)
    return groups[0] if len(groups) == 1 and len(groups[0].values) == 2 else None


def solution_box(solution: Any) -> tuple[list[float], int] | None:
    """(x1, y1, x2, y2 in pixels of the stored image, number of the image) of a solution: a list, `{"bbox"}` (`box`, `bbox_2d`),
    a list of one box, or any of these as JSON text. None for anything else and for a box without area."""
    if isinstance(solution, str):
        try:
            solution = json.loads(solution)
        except ValueError:
            groups = groups_of(solution)
            solution = list(groups[0].values) if len(groups) == 1 else None
    image = 0
    if isinstance(solution, dict):
        try:
            image = int(solution.get("image") or 0)
        except (TypeError, ValueError):
            return None
        solution = next((solution[key] for key in ("bbox", "box", "bbox_2d") if key in solution), None)
    if isinstance(solution, list | tuple) and len(solution) == 1 and isinstance(solution[0], list | tuple):
        solution = solution[0]
    if not isinstance(solution, list | tuple) or len(solution) != 4:
        return None
    try:
        box = [float(value) for value in solution]
    except (TypeError, ValueError):
        return None
    finite = all(value == value and abs(value) < 1e9 for value in box)
    return (box, image) if finite and box[2] > box[0] and box[3] > box[1] else None


def stated_box(item: RewardItem, units: str) -> list[float] | None:
    """The solution's box in the numbers that an answer would hold, to 12 digits; None if the solution is no box."""
    solution = solution_box(item.solution)
    if solution is None:
        return None
    box = to_model_pixels(solution[0], item.metadata, solution[1])
    if units != "pixels":
        seen = item.metadata.get("model_sizes")
        if not seen:
            raise ValueError("relative coordinates need metadata model_sizes")
        full = {"relative_1000": 1000.0, "relative_1": 1.0}[units]
        box = [value * full / seen[solution[1]][place % 2] for place, value in enumerate(box)]
    return [round(value, 9) for value in box]


def to_model_pixels(values: list[float], metadata: dict[str, Any], image: int = 0) -> list[float]:
    """Scale x, y pairs from the pixels of the stored image to those of the resized image. Without sizes they are the same pixels."""
    sizes, seen = metadata.get("image_sizes"), metadata.get("model_sizes")
    if not sizes or not seen:
        return list(values)
    scale = (seen[image][0] / sizes[image][0], seen[image][1] / sizes[image][1])
    return [value * scale[place % 2] for place, value in enumerate(values)]


def from_answer_units(group: Group, units: str, metadata: dict[str, Any], image: int = 0) -> list[float] | None:
    """Answer numbers in model pixels: `pixels` as they are, `relative_1000` and `relative_1` as shares of the image's
    sides; percentages are shares too, and no pixels (None)."""
    if units == "pixels":
        return None if group.percent else list(group.values)
    seen = metadata.get("model_sizes")
    if not seen:
        raise ValueError("relative coordinates need metadata model_sizes")
    full = 100.0 if group.percent else {"relative_1000": 1000.0, "relative_1": 1.0}[units]
    return [value / full * seen[image][place % 2] for place, value in enumerate(group.values)]
