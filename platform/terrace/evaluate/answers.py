"""What an answer says, and whether it is right: numbers, words, letters, boxes and points. Pure functions over text.

These are the plain readings that a demo or an evaluation shows to people. The rewards of an RL stage are stricter about
tricks (see `terrace.rewards`); here an answer is either right, or it is shown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from terrace.data.types import Sample
from terrace.families.interface import Sight

RIGHT_IOU = 0.5  # a box counts as right from this overlap on (the usual threshold of RefCOCO)
RIGHT_POINT_SHARE = 0.08  # a point counts as right within this share of the image's diagonal

_NUMBER = r"-?\d+(?:\.\d+)?"
_LIST = re.compile(rf"[\[(]\s*({_NUMBER}(?:\s*,\s*{_NUMBER})*)\s*[\])]")


@dataclass(frozen=True)
class Question:
    """One turn of a conversation asked on its own, without the turns before it."""

    prompt: Sample  # the images and the question; no assistant turn; images numbered from 0
    images: tuple[int, ...]  # for each image of the prompt, its number in the original sample
    text: str  # the question in words
    expected: str  # the right answer as text, coordinates in pixels of the resized image
    box: tuple[int, ...] | None = None  # expected box or point in pixels of the resized image
    image: int = 0  # the image that `box` lies in, or that the text follows; numbered as in the prompt


def numbers_in_brackets(text: str, count: int) -> tuple[float, ...] | None:
    """The first bracketed list of exactly `count` numbers, for example the box in `[1, 2, 30, 40]`; None without one."""
    for match in _LIST.finditer(text):
        numbers = tuple(float(value) for value in match.group(1).split(","))
        if len(numbers) == count:
            return numbers
    return None


def iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes [x1, y1, x2, y2]; 0 for an empty or reversed box."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    areas = sum(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (first, second))
    return shared / (areas - shared)


def is_right(answer: str, question: Question, diagonal: float, whole: bool = False) -> bool:
    """Whether `answer` says what `question` expects: box by overlap, point by distance (`diagonal` of the resized image in
    pixels), a boxed result by its value (`whole`: with every step towards it), everything else by equal words."""
    if question.box is not None and len(question.box) == 4:
        found = numbers_in_brackets(answer, 4)
        return found is not None and iou(found, question.box) >= RIGHT_IOU
    if question.box is not None:
        found = numbers_in_brackets(answer, 2)
        if found is None:
            return False
        distance = ((found[0] - question.box[0]) ** 2 + (found[1] - question.box[1]) ** 2) ** 0.5
        return distance <= RIGHT_POINT_SHARE * diagonal
    expected_result = re.search(r"\\boxed\{([^{}]*)\}", question.expected)
    if expected_result and not whole:
        result = re.search(r"\\boxed\{([^{}]*)\}", answer)
        return result is not None and result.group(1).strip() == expected_result.group(1).strip()
    return _words(answer) == _words(question.expected)


def _words(text: str) -> list[str]:
    return re.findall(r"[\w+]+", text.lower())


# ---------------------------------------------------------------- questions of a sample


def questions_of(sample: Sample, sizes: Sequence[tuple[int, int]], sight: Sight) -> list[Question]:
    """Every (user, assistant) turn of a conversation as a question of its own, with all images of the turns so far.

    A caption or document is one question without words, whose answer is the paragraph after its last image. `sizes` are
    (width, height) of the original images.
    """
    if sample.messages[0]["role"] == "text":
        content = sample.messages[0]["content"]
        last = max((place for place, item in enumerate(content) if item["type"] == "image"), default=-1)
        beginning = [{"role": "text", "content": content[: last + 1]}]
        expected, _, _ = _read(content[last + 1 :], sizes, sight)
        expected = expected.strip().split("\n\n")[0]
        if not expected.strip():
            return []
        prompt = Sample(sample.id, "prompt", beginning, sample.metadata)
        shown = content[last]["image"] if last >= 0 else 0
        return [Question(prompt, tuple(range(len(sizes))), "", expected.strip(), image=shown)]
    found, system, images = [], [], []
    for place, message in enumerate(sample.messages):
        if message["role"] == "system":
            system.append(message)
        if message["role"] != "user":
            continue
        images += [item for item in message["content"] if item["type"] == "image"]
        following = sample.messages[place + 1] if place + 1 < len(sample.messages) else None
        if following is None or following["role"] != "assistant":
            continue
        words = [item for item in message["content"] if item["type"] != "image"]
        numbers = tuple(item["image"] for item in images)
        shown = [{"type": "image", "image": place} for place in range(len(numbers))]
        asked = [{**item, "image": numbers.index(item["image"])} if "image" in item else item for item in words]
        prompt = Sample(sample.id, "prompt", [*system, {"role": "user", "content": [*shown, *asked]}], sample.metadata)
        text, _, _ = _read(words, sizes, sight)
        expected, box, image = _read(following["content"], sizes, sight)
        box_image = numbers.index(image) if box is not None and image in numbers else 0
        found.append(Question(prompt, numbers, text.strip(), expected.strip(), box, box_image))
    return found


def _read(
    content: list[dict[str, Any]], sizes: Sequence[tuple[int, int]], sight: Sight
) -> tuple[str, tuple[int, ...] | None, int]:
    """(text, the only box or point if there is exactly one, its image) of content items, as the model would write them."""
    parts, boxes, image = [], [], 0
    for item in content:
        if item["type"] == "text":
            parts.append(item["text"])
        elif item["type"] in ("box", "point"):
            image = item["image"]
            values = sight.coordinates(item[item["type"]], sizes[image])
            boxes.append(values)
            parts.append(f"[{', '.join(map(sight.family.coordinate_text, values))}]")
    return "".join(parts), boxes[0] if len(boxes) == 1 else None, image
