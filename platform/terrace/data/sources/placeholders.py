"""Text with `<image>`, `<video>`, `<bbox>`, `<point>` and `<ref-object>` placeholders to content items, consumed strictly in order.

Follows ms-swift: `objects` holds `ref` (names), `bbox` (boxes of four numbers, or points of two) and `point`; optional `bbox_type`
(`real`, `norm1000`, `norm1`) and `image_id` (the image of each box). A row without `objects` keeps `<bbox>` as ordinary text.
Boxes and points stay in pixels of the *original* image: the template renders them once the resolution is known.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from terrace.data.sources.fields import Fields, is_empty
from terrace.data.sources.media import ImageReference, VideoReference
from terrace.data.sources.refusals import Refusal

Item = dict[str, Any]
BYTE_ORDER_MARK = "\ufeff"  # where a file began; no text
_MEDIA = ("<image>", "<video>", "<audio>")
_MEDIA_TAGS = re.compile(r"(<image>|<video>|<audio>)")
_ALL_TAGS = re.compile(r"(<image>|<video>|<audio>|<bbox>|<point>|<ref-object>)")
_OBJECT_TAGS = re.compile(r"(<bbox>|<point>|<ref-object>)")
_QWEN_1_IMAGE = re.compile(r"<img>[^<>\n]{1,500}</img>")
_BOX_TYPES = {"real": None, "norm1000": 1000.0, "norm1": 1.0}
_AS_TEXT = "to write the tag itself, give the turn a content list (tags in its texts are letters), or set `placeholders: text`"


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
    """Turns the texts of one row, in order, into content items, and checks at the end that everything was used once.

    `images` are those of the row's own keys; images that content items name, and the frames of videos, are appended to it.
    """

    def __init__(self, images: list[ImageReference], videos: Sequence[VideoReference] = (), objects: Any = None, tags: bool = True):
        self.images = images
        self.tags = tags
        self.objects = None if objects is None else read_objects(objects)
        self._row_images = len(images)
        self._shown: list[int] = []  # of the row's images, in the order of the text
        self._by_index: bool | None = None
        self._videos = list(videos)
        self._videos_taken = 0

    def read(self, text: str, media: bool = True) -> list[Item]:
        """Content items of one text. `media`: `<image>` and its like are placeholders."""
        media, text = media and self.tags, text.removeprefix(BYTE_ORDER_MARK)
        if media and _QWEN_1_IMAGE.search(text):
            told = "`<img>file</img>` of Qwen-VL 1 in the text: write `<image>` and name the file in `images`"
            raise Refusal("unsupported", f"{told}; {_AS_TEXT}")
        pattern = (_ALL_TAGS if media else _OBJECT_TAGS) if self.objects is not None else _MEDIA_TAGS if media else None
        if pattern is None:
            return [{"type": "text", "text": text}] if text else []
        items: list[Item] = []
        for piece in pattern.split(text):
            if media and piece in _MEDIA:
                items.append(self._next_medium(piece))
            elif self.objects is not None and piece in self.objects.taken:
                items.append(self._next_object(piece))
            elif piece:
                items.append({"type": "text", "text": piece})
        return merge_text(items)

    def next_image(self) -> Item:
        """The row's next image."""
        self._in_order(by_index=False)
        self._shown.append(len(self._shown))
        return {"type": "image", "image": self._shown[-1]}

    def image_at(self, index: Any) -> Item:
        """The row's image of this number, from 0."""
        self._in_order(by_index=True)
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < self._row_images:
            raise Refusal("placeholder_mismatch", f"an image item has the index {index!r}, the row has {self._row_images} images")
        self._shown.append(index)
        return {"type": "image", "image": index}

    def named_image(self, reference: ImageReference) -> Item:
        """An image that a content item names itself, or the row's image of that name."""
        if len(self._shown) < self._row_images:
            if reference.path is None or reference.path != self.images[len(self._shown)].path:
                raise Refusal("placeholder_mismatch", "content items name images of their own beside the row's `images`")
            return self.next_image()
        self.images.append(reference)
        return {"type": "image", "image": len(self.images) - 1}

    def named_video(self, video: VideoReference) -> Item:
        """A video as an item; its frames become images."""
        first = len(self.images)
        self.images += video.frames
        return {"type": "video", "frames": list(range(first, len(self.images))), "timestamps": list(video.timestamps)}

    def next_video(self) -> Item:
        """The row's next video."""
        self._videos_taken += 1
        if self._videos_taken > len(self._videos):
            raise Refusal("placeholder_mismatch", f"a `<video>` in the text, and {len(self._videos)} videos in the row; {_AS_TEXT}")
        return self.named_video(self._videos[self._videos_taken - 1])

    @property
    def nothing_shown(self) -> bool:
        """Whether no text has asked for an image or a video of the row yet."""
        return not self._shown and not self._videos_taken

    def rest(self) -> list[Item]:
        """Items of all images and videos that no text has asked for."""
        return [self.next_image() for _ in range(self._row_images - len(self._shown))] + [
            self.next_video() for _ in range(len(self._videos) - self._videos_taken)
        ]

    def finish(self) -> None:
        """Raises Refusal unless every image, video and object was named exactly once."""
        if sorted(self._shown) != list(range(self._row_images)):
            told = f"{len(self._shown)} <image> in the text, {self._row_images} images in the row"
            raise Refusal("placeholder_mismatch", told + (f"; {_AS_TEXT}" if not self._row_images else ""))
        if self._videos_taken != len(self._videos):
            raise Refusal("placeholder_mismatch", f"{self._videos_taken} <video> in the text, {len(self._videos)} videos in the row")
        if self.objects is None:
            return
        for tag, values in (("<bbox>", self.objects.boxes), ("<point>", self.objects.points)):
            if self.objects.taken[tag] != len(values):
                count = self.objects.taken[tag]
                raise Refusal("placeholder_mismatch", f"{count} {tag} in the text, {len(values)} in the row's objects")
        if self.objects.taken["<ref-object>"] > len(self.objects.references):
            raise Refusal("placeholder_mismatch", "more <ref-object> in the text than names in the row's objects")

    def _in_order(self, by_index: bool) -> None:
        if self._by_index is not None and self._by_index is not by_index:
            raise Refusal("placeholder_mismatch", "some image items have an `index` and others have none; their order is not known")
        self._by_index = by_index

    def _next_medium(self, tag: str) -> Item:
        if tag == "<audio>":
            raise Refusal("unsupported", f"`<audio>` in the text: no model here hears; {_AS_TEXT}")
        return self.next_image() if tag == "<image>" else self.next_video()

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
    """The `objects` field of a row, checked: lists under its keys, or (older ms-swift) a list of {caption, bbox, image}."""
    if isinstance(objects, str):
        try:
            objects = json.loads(objects)
        except ValueError as error:
            raise Refusal("bad_row", f"`objects` is text, and no JSON ({error})") from error
    if isinstance(objects, list):
        objects = _columns(objects)
    if not isinstance(objects, dict):
        raise Refusal("bad_row", "`objects` is not an object with `ref` and `bbox` or `point`")
    fields = Fields(objects, where="objects")
    unit = fields.take("bbox_type") or "real"
    if unit not in _BOX_TYPES:
        raise Refusal("unsupported", f"objects.bbox_type {unit!r}; known are real, norm1000 and norm1")
    references = _as_list(fields.take("ref"))
    if not all(isinstance(name, str) for name in references):
        raise Refusal("bad_row", f"objects.ref is {str(references)[:80]}, not a list of names")
    image_of_box = fields.take("image_id")
    if image_of_box is not None:
        image_of_box = _as_list(image_of_box)
        if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in image_of_box):
            raise Refusal("bad_row", "objects.image_id is not a list of image numbers")
    boxes = _number_lists(fields.take("bbox"), "bbox", (2, 4))
    if image_of_box is not None and len(image_of_box) != len(boxes):
        raise Refusal("bad_row", f"objects.image_id has {len(image_of_box)} entries for {len(boxes)} boxes")
    points = _number_lists(fields.take("point"), "point", (2,))
    fields.drop("width", "height", "image_id")
    if left := fields.left():
        raise fields.unknown(left[0])
    return Objects(list(references), boxes, points, image_of_box, unit)


def _columns(entries: list[Any]) -> dict[str, Any]:
    """[{"caption": name, "bbox": box, "bbox_type": unit, "image": number}, ...] with one list for each key."""
    if not all(isinstance(entry, dict) and set(entry) <= {"caption", "ref", "bbox", "bbox_type", "image"} for entry in entries):
        raise Refusal("bad_row", "`objects` is a list, and not one of {caption, bbox, bbox_type, image}")
    units = {entry.get("bbox_type") or "real" for entry in entries}
    if len(units) != 1 or any("bbox" not in entry for entry in entries):
        raise Refusal("bad_row", "each entry of the list `objects` needs a `bbox`, all of one `bbox_type`")
    names = [entry.get("caption", entry.get("ref")) for entry in entries]
    return {
        "ref": [name for name in names if name is not None], "bbox": [entry["bbox"] for entry in entries], "bbox_type": units.pop(),
        "image_id": [entry.get("image") or 0 for entry in entries],
    }  # fmt: skip


def _as_list(value: Any) -> list[Any]:
    """A single name or number where a list is meant is a list of one."""
    return [] if is_empty(value) else value if isinstance(value, list) else [value]


def _number_lists(values: Any, name: str, lengths: tuple[int, ...]) -> list[list[float]]:
    if is_empty(values):
        return []
    if isinstance(values, list) and all(isinstance(value, (int, float)) for value in values):
        values = [values]  # one box where a list of boxes is meant
    result = []
    for value in values if isinstance(values, list) else [values]:
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
            elif max(size) > 2 and all(value <= 1 for value in numbers) and (len(numbers) == 4 or any(v % 1 for v in numbers)):
                told = "looks like a share of the image; say `bbox_type: norm1` in `objects`, or give pixels"
                raise Refusal("bad_coordinates", f"{item['type']} {numbers} on an image of {size[0]}x{size[1]} {told}")
            if not all(-1 <= value <= size[place % 2] + 1 for place, value in enumerate(numbers)):
                raise Refusal("bad_coordinates", f"{item['type']} {numbers} lies outside its image of {size[0]}x{size[1]}")
            if len(numbers) == 4 and (numbers[0] > numbers[2] or numbers[1] > numbers[3]):
                raise Refusal("bad_coordinates", f"box {numbers} has its corners exchanged; it is [x1, y1, x2, y2]")
            if len(numbers) == 4 and (numbers[0] == numbers[2] or numbers[1] == numbers[3]):
                raise Refusal("bad_coordinates", f"box {numbers} has no area; give a `point` where a place is meant")


def merge_text(items: list[Item]) -> list[Item]:
    """Neighbouring text items joined as they stand."""
    merged: list[Item] = []
    for item in items:
        if item["type"] == "text" and merged and merged[-1]["type"] == "text":
            merged[-1] = {"type": "text", "text": merged[-1]["text"] + item["text"]}
        else:
            merged.append(item)
    return merged
