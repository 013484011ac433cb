"""Point in box (GUI clicks, pointing): 1 if the one predicted point lies in the solution's box, in the pixels the model
saw.

A box instead of a point scores 0, however it is placed (a box over the whole image contains every target), and so do
several points.
"""

from __future__ import annotations

from typing import Literal

from terrace.rewards.rules.coordinates import answer_groups, from_answer_units, to_model_pixels
from terrace.rewards.types import RewardItem


def gui_point(
    items: list[RewardItem], *, coordinates: Literal["pixels", "relative_1000", "relative_1"] = "pixels"
) -> list[float | None]:
    """Score the one point of each answer against `solution["bbox"]` (original pixels, borders included)."""
    return [_score(item, coordinates) for item in items]


def _score(item: RewardItem, coordinates: str) -> float:
    solution = item.solution if isinstance(item.solution, dict) else {"bbox": item.solution}
    image = int(solution.get("image", 0))
    x1, y1, x2, y2 = to_model_pixels([float(value) for value in solution["bbox"]], item.metadata, image)
    groups = answer_groups(item.response)
    if len(groups) != 1 or len(groups[0]) != 2:
        return 0.0
    x, y = from_answer_units(groups[0], coordinates, item.metadata, image)
    return float(x1 <= x <= x2 and y1 <= y <= y2)
