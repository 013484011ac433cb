"""Boxes and points in text, and the map from a solution's pixels to the pixels that the model saw.

Read: `[x1, y1, x2, y2]`, `[[...]]`, `(x1,y1),(x2,y2)`, JSON with `bbox`, `bbox_2d`, `box`, `point`, `point_2d`, tags
`<box>`,
`<point>`, `click(x=.., y=..)`, and bare numbers if there is nothing else.
"""

from __future__ import annotations

import re
from typing import Any

from terrace.rewards.rules.answers import boxed_contents, visible_text

_N = r"-?\d{1,7}(?:\.\d{1,6})?"
_PAIRS = re.compile(rf"\(\s?({_N})\s?,\s?({_N})\s?\)\s?,?\s?\(\s?({_N})\s?,\s?({_N})\s?\)")
_GROUP = re.compile(rf"[\[(<]\s{{0,4}}((?:{_N})(?:\s{{0,4}},\s{{0,4}}(?:{_N})){{0,40}})\s{{0,4}},?\s{{0,4}}[\])>]")
_NAMED = re.compile(rf"""["']?x["']?\s?[=:]\s?({_N})\s?,\s?["']?y["']?\s?[=:]\s?({_N})""", re.IGNORECASE)
_NAMED_BOX = re.compile(
    r"""["']?{0}["']?\s?[=:]\s?({4})\s?,\s?["']?{1}["']?\s?[=:]\s?({4})\s?,\s?["']?{2}["']?\s?[=:]\s?({4})\s?,\s?["']?{3}["']?\s?[=:]\s?({4})""".format(
        "x1", "y1", "x2", "y2", _N
    )
)
_BARE = re.compile(rf"(?<![\w.])({_N})(?![\w])")


def answer_groups(response: str) -> list[tuple[float, ...]]:
    """The distinct number groups that the answer holds, in order: (x1, y1, x2, y2) for boxes, (x, y) for points, else
    as they are."""
    text = visible_text(response)
    if text is None:
        return []
    boxed = boxed_contents(text)
    if boxed:
        text = " ; ".join(boxed)
    tag = re.findall(r"<answer>(.{0,4000}?)</answer>", text, re.DOTALL | re.IGNORECASE)
    if tag:
        text = " ; ".join(tag)
    text = re.sub(r"</?(?:box|point|bbox)(?:_start|_end)?>|<\|(?:box|point)_(?:start|end)\|>", " ", text)
    groups: list[tuple[float, ...]] = []
    for pattern in (_PAIRS, _NAMED_BOX, _NAMED):
        found = [tuple(float(value) for value in match.groups()) for match in pattern.finditer(text)]
        text = pattern.sub(" ", text)
        groups += found
    for match in _GROUP.finditer(text):
        groups.append(tuple(float(value) for value in re.findall(_N, match.group(1))))
    if not groups:
        bare = [float(value) for value in _BARE.findall(text)[:50]]
        groups = [tuple(bare)] if bare else []
    return list(dict.fromkeys(groups))


def to_model_pixels(values: list[float], metadata: dict[str, Any], image: int = 0) -> list[float]:
    """Scale x, y pairs from the pixels of the stored image to those of the resized image. Without sizes they are the
    same pixels."""
    sizes, seen = metadata.get("image_sizes"), metadata.get("model_sizes")
    if not sizes or not seen:
        return list(values)
    scale = (seen[image][0] / sizes[image][0], seen[image][1] / sizes[image][1])
    return [value * scale[place % 2] for place, value in enumerate(values)]


def from_answer_units(values: tuple[float, ...], units: str, metadata: dict[str, Any], image: int = 0) -> list[float]:
    """Answer numbers in model pixels: `pixels` as they are, `relative_1000` and `relative_1` as shares of the image's
    sides."""
    if units == "pixels":
        return list(values)
    seen = metadata.get("model_sizes")
    if not seen:
        raise ValueError("relative coordinates need metadata model_sizes")
    full = {"relative_1000": 1000.0, "relative_1": 1.0}[units]
    return [value / full * seen[image][place % 2] for place, value in enumerate(values)]
