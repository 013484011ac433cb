"""Point in box (GUI clicks, pointing): 1 if the one predicted point lies in the solution's box, in the pixels the model saw.

A box instead of a point scores 0, however it is placed (a box over the whole image contains every target), and so do
several points.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from terrace.rewards.rules.coordinates import from_answer_units, one_point, solution_box, stated_box, to_model_pixels
from terrace.rewards.types import Judgement, RewardItem


def gui_point(items: list[RewardItem], *, coordinates: Literal["pixels", "relative_1000", "relative_1"] = "pixels") -> list[float | None]:
    """Score the one point of each answer against `solution["bbox"]` (original pixels, borders included)."""
    return [_score(item, coordinates) for item in items]


def stating(item: RewardItem, options: Mapping[str, Any]) -> str | None:
    """The middle of the solution's box as the model would write it, or None if there is none."""
    box = stated_box(item, options.get("coordinates", "pixels"))
    return None if box is None else str([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2])


def _score(item: RewardItem, coordinates: str) -> Judgement | None:
    solution = solution_box(item.solution)
    if solution is None:
        return None
    x1, y1, x2, y2 = to_model_pixels(solution[0], item.metadata, solution[1])
    found = one_point(item.response)
    if found is None:
        return Judgement(0.0, "", "no point, or several")
    point = from_answer_units(found, coordinates, item.metadata, solution[1])
    read = f"[{', '.join(f'{value:g}' for value in found.values)}]"
    if point is None:
        return Judgement(0.0, read, "percentages where pixels are asked")
    inside = x1 <= point[0] <= x2 and y1 <= point[1] <= y2
    return Judgement(float(inside), read, "inside the box" if inside else "outside the box")
