"""Text with `<image>`, `<bbox>`, `<point>` and `<ref-object>` placeholders to content items, consumed strictly in order.

Follows ms-swift: `objects` holds `ref` (names), `bbox` (boxes of four numbers, or points of two) and `point`; optional `bbox_type`
(`real`, `norm1000`, `norm1`) and `image_id` (the image of each box). A row without `objects` keeps `<bbox>` as ordinary text.
Boxes and points stay in pixels of the *original* image: the template renders them once the resolution is known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from terrace.data.sources.refusals import Refusal

Item = dict[str, Any]
_TAGS = re.compile(r"(<image>|<bbox>|<point>|<ref-object>)")
_IMAGE_TAG = re.compile(r"(<image>)")
_BOX_TYPES = {"real": None, "norm1000": 1000.0, "norm1": 1.0}


@dataclass
class Objects:
    """The `objects` of a row, with a place in each list."""

    references: list[str] = field(default_factory=list)
    boxes: list[list[float]] = field(default_factory=list)
    points: list[list[float]] = field(default_factory=list)
    image_of_box: list[int] | None = None
    unit: str = "real"
    taken: dict[str, int] = field(default_factory=lambda: {"<ref-object>": 0, "<bbox>": 0, "<point>": 0})


class PlaceholderReader:
    """Turns the texts of one row, in order, into content items, and checks at the end that everything was used once."""

    def __init__(self, image_count: int, objects: Any = None, parse_images: bool = True):
        self.image_count = image_count
        self.images_taken = 0
        self.objects = None if objects is None else read_objects(objects)
        self.parse_images = parse_images

    def read(self, text: str) -> list[Item]:
        """Content items of one text."""
        pattern = _TAGS if self.objects is not None else _IMAGE_TAG
        items: list[Item] = []
        for piece in pattern.split(text):
            if piece == "<image>" and self.parse_images:
                items.append(self.next_image())
            elif self.objects is not None and piece in self.objects.taken:
                items.append(self._next_object(piece))
            elif piece:
                items.append({"type": "text", "text": piece})
        return merge_text(items)

    def next_image(self) -> Item:
        self.images_taken += 1
        return {"type": "image", "image": self.images_taken - 1}

    def finish(self) -> None:
        """Raises Refusal unless every image and every object was named exactly once."""
        if self.images_taken != self.image_count:
            raise Refusal("placeholder_mismatch", f"{self.images_taken} <image> in the text, {self.image_count} images in the row")
        if self.objects is None:
            return
        for tag, values in (("<bbox>", self.objects.boxes), ("<point>", self.objects.points)):
            if self.objects.taken[tag] != len(values):
                count = self.objects.taken[tag]
                raise Refusal("placeholder_mismatch", f"{count} {tag} in the text, {len(values)} in the row's objects")
        if self.objects.taken["<ref-object>"] > len(self.objects.references):
            raise Refusal("placeholder_mismatch", "more <ref-object> in the text than names in the row's objects")

    def _next_object(self, tag: str) -> Item:
        objects = self.objects
        assert objects is not None
        place = objects.taken[tag]
        objects.taken[tag] += 1
        values: Sequence[Any] = {"<ref-object>": objects.references, "<bbox>": objects.boxes, "<point>": objects.points}[tag]
        if place >= len(values):
            raise Refusal("placeholder_mismatch", f"the text has more {tag} than the row's objects hold ({len(values)})")
        if tag == "<ref-object>":
            return {"type": "text", "text": objects.references[place]}
        numbers = list(values[place])
        image = objects.image_of_box[place] if objects.image_of_box is not None and tag == "<bbox>" else 0
        item = {"type": "box" if len(numbers) == 4 else "point", "image": image}
        item["box" if len(numbers) == 4 else "point"] = numbers
        if objects.unit != "real":
            item["unit"] = objects.unit  # resolved by `resolve_coordinates`, which knows the image sizes
        return item


def read_objects(objects: Any) -> Objects:
    """The `objects` field of a row, checked."""
    if not isinstance(objects, dict):
        raise Refusal("bad_row", "`objects` is not an object with `ref` and `bbox` or `point`")
    unit = objects.get("bbox_type") or "real"
    if unit not in _BOX_TYPES:
        raise Refusal("unsupported", f"objects.bbox_type {unit!r}; known are real, norm1000 and norm1")
    references = objects.get("ref") or []
    if not all(isinstance(name, str) for name in references):
        raise Refusal("bad_row", "objects.ref is not a list of names")
    image_of_box = objects.get("image_id")
    if image_of_box is not None and not all(isinstance(number, int) and number >= 0 for number in image_of_box):
        raise Refusal("bad_row", "objects.image_id is not a list of image numbers")
    boxes = _number_lists(objects.get("bbox") or [], "bbox", (2, 4))
    if image_of_box is not None and len(image_of_box) != len(boxes):
        raise Refusal("bad_row", f"objects.image_id has {len(image_of_box)} entries for {len(boxes)} boxes")
    return Objects(list(references), boxes, _number_lists(objects.get("point") or [], "point", (2,)), image_of_box, unit)


def _number_lists(values: Any, name: str, lengths: tuple[int, ...]) -> list[list[float]]:
    result = []
    for value in values if isinstance(values, list) else [None]:
        good = isinstance(value, list) and len(value) in lengths
        if not good or not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in value):
            raise Refusal("bad_coordinates", f"objects.{name} holds {str(value)[:80]!r}, not lists of {lengths} finite numbers")
        result.append(list(value))
    return result


def resolve_coordinates(messages: list[dict[str, Any]], sizes: Sequence[tuple[int, int]]) -> None:
    """Bring boxes and points to pixels of their original image, in place, and check them against its size (width, height).

    Corners may lie up to one pixel outside (annotation tools round); further out, or with exchanged corners, is a Refusal.
    """
    for message in messages:
        for item in message["content"]:
            if item["type"] not in ("box", "point"):
                continue
            if not 0 <= item["image"] < len(sizes):
                raise Refusal("bad_coordinates", f"a {item['type']} refers to image {item['image']} of {len(sizes)}")
            size = sizes[item["image"]]
            scale = _BOX_TYPES[item.pop("unit", "real")]
            numbers = item[item["type"]]
            if scale is not None:
                numbers = [value / scale * size[place % 2] for place, value in enumerate(numbers)]
                item[item["type"]] = numbers
            if not all(-1 <= value <= size[place % 2] + 1 for place, value in enumerate(numbers)):
                raise Refusal("bad_coordinates", f"{item['type']} {numbers} lies outside its image of {size[0]}x{size[1]}")
            if len(numbers) == 4 and (numbers[0] > numbers[2] or numbers[1] > numbers[3]):
                raise Refusal("bad_coordinates", f"box {numbers} has its corners exchanged; it is [x1, y1, x2, y2]")


def merge_text(items: list[Item]) -> list[Item]:
    """Neighbouring text items joined as they stand."""
    merged: list[Item] = []
    for item in items:
        if item["type"] == "text" and merged and merged[-1]["type"] == "text":
            merged[-1] = {"type": "text", "text": merged[-1]["text"] + item["text"]}
        else:
            merged.append(item)
    return merged
