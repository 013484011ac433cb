"""GUI actions in the unified JSON action space of MiMo-VL (arXiv 2506.03569, table 5): one action per answer.

`{"action": "click", "start_point": [x, y]}`; scroll and drag have `start_point` and `end_point` or `direction`; input and select
have `text`; open and appswitch `app`; press `keys`; finished `status`; longpress and hover a point; wait nothing. The solution is
such an action, its points as `bbox` (and `end_bbox`) or as points that must be met within `distance_share` of the image's
diagonal. Right is the same action with every field that the solution names; a field that it leaves out is free.
`type_share` is what the right action alone earns (0 as published).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

from terrace.rewards.rules.coordinates import Group, from_answer_units, one_point, to_model_pixels
from terrace.rewards.rules.json_answer import json_values
from terrace.rewards.rules.text_distance import plain_words
from terrace.rewards.types import Judgement, RewardItem

ACTIONS = ("click", "scroll", "input", "drag", "open", "press", "finished", "longpress", "hover", "select", "wait", "appswitch")
_SAME_ACTION = {"type": "input", "tap": "click", "long_press": "longpress", "swipe": "scroll", "finish": "finished", "open_app": "open",
                "switch_app": "appswitch", "app_switch": "appswitch", "left_click": "click", "key": "press", "hotkey": "press"}  # fmt: skip
_POINTS = {
    "start": ("start_point", "point", "coordinate", "position", "start_box"),
    "end": ("end_point", "end_coordinate", "to", "end_box"),
}
_TEXTS = {"text": ("text", "value", "content"), "app": ("app", "app_name"), "direction": ("direction",), "status": ("status",)}
_BOXES = {"start": ("bbox", "start_bbox"), "end": ("end_bbox",)}


def gui_action(
    items: list[RewardItem],
    *,
    coordinates: Literal["pixels", "relative_1000", "relative_1"] = "pixels",
    distance_share: float = 0.14,
    type_share: float = 0.0,
) -> list[float | None]:
    """Score the one action of each answer."""
    return [_score(item, coordinates, distance_share, type_share) for item in items]


def stating(item: RewardItem, options: Mapping[str, Any]) -> str | None:
    wanted = action_of(item.solution)
    if wanted is None:
        return None
    said: dict[str, Any] = {"action": wanted["action"]}
    for end in ("start", "end"):
        target = wanted.get(f"{end}_bbox") or wanted.get(end)
        if target:
            middle = [(target[0] + target[2]) / 2, (target[1] + target[3]) / 2] if len(target) == 4 else list(target)
            said[f"{end}_point"] = _stated_point(middle, item, options.get("coordinates", "pixels"))
    said |= {name: wanted[name] for name in (*_TEXTS, "keys") if name in wanted}
    return json.dumps(said, ensure_ascii=False)


def _stated_point(point: list[float], item: RewardItem, units: str) -> list[float]:
    seen = to_model_pixels(point, item.metadata)
    if units == "pixels":
        return seen
    full = {"relative_1000": 1000.0, "relative_1": 1.0}[units]
    sizes = item.metadata.get("model_sizes")
    if not sizes:
        raise ValueError("relative coordinates need metadata model_sizes")
    return [value * full / sizes[0][place] for place, value in enumerate(seen)]


def action_of(value: Any) -> dict[str, Any] | None:
    """An action with its fields under their own names: action, start, end, start_bbox, end_bbox, text, app, direction, keys, status."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if isinstance(value, dict) and isinstance(value.get("arguments"), dict) and "action" in value["arguments"]:
        value = value["arguments"]
    if not isinstance(value, dict) or not isinstance(value.get("action"), str):
        return None
    name = value["action"].strip().lower()
    name = _SAME_ACTION.get(name, name)
    if name not in ACTIONS:
        return None
    found: dict[str, Any] = {"action": name}
    for fields, shape in ((_POINTS, 2), (_BOXES, 4)):
        for end, keys in fields.items():
            given = next((value[key] for key in keys if value.get(key) is not None), None)
            if given is None:
                continue
            numbers = _numbers(given, shape)
            if numbers is None:
                return None
            found[end if shape == 2 else f"{end}_bbox"] = numbers
    for field, keys in _TEXTS.items():
        given = next((value[key] for key in keys if value.get(key) is not None), None)
        if given is not None:
            found[field] = given[0] if isinstance(given, list) and len(given) == 1 else given
            if not isinstance(found[field], str):
                return None
    keys = value.get("keys", value.get("key"))
    if keys is not None:
        found["keys"] = sorted(part.strip().lower() for part in (re.split(r"[+ ]", keys) if isinstance(keys, str) else map(str, keys)))
    return found


def _numbers(value: Any, count: int) -> list[float] | None:
    if isinstance(value, str):
        group = one_point(value) if count == 2 else None
        return list(group.values) if group else None
    if (
        not isinstance(value, list | tuple)
        or len(value) != count
        or any(isinstance(one, bool) or not isinstance(one, int | float) for one in value)
    ):
        return None
    return [float(one) for one in value]


def _score(item: RewardItem, coordinates: str, distance_share: float, type_share: float) -> Judgement | None:
    wanted = action_of(item.solution)
    if wanted is None:
        return None
    values = json_values(item.response)
    actions = [action_of(value) for value in values]
    if len(actions) != 1 or actions[0] is None:
        return Judgement(0.0, item.response[-200:], "no action, or several")
    said = actions[0]
    read = json.dumps(said, ensure_ascii=False)
    if said["action"] != wanted["action"]:
        return Judgement(0.0, read, f"{said['action']}, expected {wanted['action']}")
    wrong = [name for name in ("text", "app", "direction", "status") if name in wanted and not _same_text(wanted[name], said.get(name))]
    wrong += [f"{end} point" for end in ("start", "end") if not _point_fits(end, wanted, said, item, coordinates, distance_share)]
    if "keys" in wanted and wanted["keys"] != said.get("keys"):
        wrong.append("keys")
    return Judgement(type_share if wrong else 1.0, read, f"wrong {', '.join(wrong)}" if wrong else "equal action")


def _same_text(wanted: str, said: str | None) -> bool:
    return said is not None and plain_words(wanted).casefold() == plain_words(said).casefold()


def _point_fits(end: str, wanted: dict, said: dict, item: RewardItem, coordinates: str, distance_share: float) -> bool:
    box, point = wanted.get(f"{end}_bbox"), wanted.get(end)
    if box is None and point is None:
        return True
    if end not in said:
        return False
    found = from_answer_units(Group(tuple(said[end])), coordinates, item.metadata)
    if found is None:
        return False
    if box is not None:
        x1, y1, x2, y2 = to_model_pixels(box, item.metadata)
        return x1 <= found[0] <= x2 and y1 <= found[1] <= y2
    target = to_model_pixels(point or [], item.metadata)
    sizes = item.metadata.get("model_sizes") or item.metadata.get("image_sizes")
    if not sizes:
        raise ValueError("a point as the solution needs metadata image_sizes (the distance is a share of the image's diagonal)")
    return math.dist(found, target) <= distance_share * math.hypot(*sizes[0])
