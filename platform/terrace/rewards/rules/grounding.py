"""Grounding: overlap of one predicted box with the solution's box, in the pixels that the model saw.

`metric="giou"` (as published for MORL) with `mapping="half"`: (GIoU + 1) / 2. With rewards normalised by the group's
standard deviation any affine map gives the same advantages, so this keeps the published signal and puts an unreadable
answer (0) where a box infinitely far away would be. `mapping="clamp"`: max(GIoU, 0). `metric="iou"` is in [0, 1]
already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from terrace.rewards.rules.coordinates import from_answer_units, one_box, solution_box, stated_box, to_model_pixels
from terrace.rewards.types import Judgement, RewardItem


def iou_and_giou(box: list[float], other: list[float]) -> tuple[float, float]:
    """Intersection over union, and the generalised form (Rezatofighi et al. 2019), of two boxes x1, y1, x2, y2."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    intersection = max(width, 0.0) * max(height, 0.0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    union = sum(areas) - intersection
    hull = (max(box[2], other[2]) - min(box[0], other[0])) * (max(box[3], other[3]) - min(box[1], other[1]))
    iou = intersection / union
    return iou, iou - (hull - union) / hull


def grounding(
    items: list[RewardItem],
    *,
    metric: Literal["giou", "iou"] = "giou",
    mapping: Literal["half", "clamp"] = "half",
    coordinates: Literal["pixels", "relative_1000", "relative_1"] = "pixels",
) -> list[float | None]:
    """Score the one box of each answer. No box, several different boxes, or one without area: 0."""
    return [_score(item, metric, mapping, coordinates) for item in items]


def stating(item: RewardItem, options: Mapping[str, Any]) -> str | None:
    """The solution's box as the model would write it, or None if there is none."""
    box = stated_box(item, options.get("coordinates", "pixels"))
    return None if box is None else str(box)


def _score(item: RewardItem, metric: str, mapping: str, coordinates: str) -> Judgement | None:
    solution = solution_box(item.solution)
    if solution is None:
        return None
    gold = to_model_pixels(solution[0], item.metadata, solution[1])
    found = one_box(item.response)
    if found is None:
        return Judgement(0.0, "", "no box, or several")
    box = from_answer_units(found, coordinates, item.metadata, solution[1])
    read = f"[{', '.join(f'{value:g}' for value in found.values)}]"
    if box is None or box[2] <= box[0] or box[3] <= box[1]:
        return Judgement(0.0, read, "a box without area")
    iou, giou = iou_and_giou(box, gold)
    value = iou if metric == "iou" else (giou + 1) / 2 if mapping == "half" else giou
    return Judgement(min(max(value, 0.0), 1.0), read, f"{metric} {iou if metric == 'iou' else giou:.3f}")
