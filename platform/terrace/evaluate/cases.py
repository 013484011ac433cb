"""The questions of a suite: rows of a JSON Lines file in the conventions that training reads, each with what is expected.

A suite is strict: a damaged row or a missing picture stops it, with the file and the row. A suite that silently leaves out
what it cannot read is another suite, and its score another figure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from terrace.data.images import ImageDamage, image_size
from terrace.data.sources.conventions import ImageReference, convert_row
from terrace.data.sources.placeholders import resolve_coordinates
from terrace.data.sources.refusals import Refusal
from terrace.data.types import Sample
from terrace.errors import InputError
from terrace.rewards.rules.answers import boxed_contents
from terrace.rewards.rules.counting import count_of


@dataclass(frozen=True)
class Case:
    """One question as it is asked."""

    id: str
    prompt: Sample  # without the answer; images numbered from 0
    images: tuple[ImageReference, ...]  # absolute paths, or bytes
    sizes: tuple[tuple[int, int], ...]  # (width, height) of each image
    expected: Any  # a text, a list of accepted texts, or {"bbox": [x1, y1, x2, y2] in pixels of the stored image, "image": number}
    metadata: dict[str, Any] = field(default_factory=dict)  # tolerance, choices, category
    group: str = ""  # cases that are scored together (the rotations of one question)
    rotation: int = 0
    digest: str = ""  # sha256 of all that makes the case this case

    def read_images(self) -> list[bytes]:
        """The encoded images. Raises InputError if a file went away since the suite was read."""
        try:
            return [
                image.data if image.data is not None else Path(str(image.path)).read_bytes() for image in self.images
            ]
        except OSError as error:
            raise InputError(f"case {self.id}: {error}") from error

    @property
    def text(self) -> str:
        """The prompt in words, images and coordinates as marks."""
        turns = []
        for message in self.prompt.messages:
            parts = [item["text"] if item["type"] == "text" else f"<{item['type']}>" for item in message["content"]]
            turns.append("".join(parts))
        return "\n".join(turns)


Expected = Callable[[Sample], Any]  # what a row expects; raises Refusal


def read_cases(path: Path, expected: Expected, images_root: Path | None, limit: int | None) -> list[Case]:
    """Cases of a JSON Lines file, the first `limit` of them. Image paths are relative to `images_root`, or to the file's
    folder, or to the folder above it. Raises InputError naming file, row and image."""
    roots = [images_root] if images_root is not None else [path.parent, path.parent.parent]
    cases: list[Case] = []
    for number, row in json_rows(path):
        if limit is not None and len(cases) >= limit:
            break
        where = f"{path}, row {number}"
        try:
            cases.append(_case(row, number, expected, roots))
        except Refusal as refusal:
            raise InputError(f"{where}: {refusal.detail}; mend or remove the row") from refusal
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    if not cases:
        raise InputError(f"{path}: there is no row in it")
    return cases


def json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, value) of each line. Lines end at "\\n" only: JSON strings may hold other line separators."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); a suite is NAME:FILE") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, row {number}: it is not JSON ({error}); mend or remove the row") from error


def _case(row: Any, number: int, expected: Expected, roots: list[Path]) -> Case:
    sample, references = convert_row(row, f"row-{number}", "prompt")
    images = tuple(found_image(reference, roots) for reference in references)
    sizes, digests = [], []
    for reference, image in zip(references, images):
        data = image.data if image.data is not None else Path(str(image.path)).read_bytes()
        sizes.append(checked_size(data, reference.label))
        digests.append(hashlib.sha256(data).hexdigest())
    resolve_coordinates(sample.messages, sizes)
    wanted = expected(sample)
    prompt = Sample(sample.id, "prompt", question_messages(sample), sample.metadata)
    metadata = {key: sample.metadata[key] for key in ("tolerance", "category") if key in sample.metadata}
    digest = case_digest(prompt, wanted, metadata, digests)
    return Case(sample.id, prompt, images, tuple(sizes), wanted, metadata, sample.id, 0, digest)


def found_image(reference: ImageReference, roots: list[Path]) -> ImageReference:
    """The image with its absolute path. Raises InputError naming the folders that were looked in."""
    if reference.data is not None:
        return reference
    for root in roots:
        path = (root / str(reference.path)).resolve()
        if path.is_file():
            return ImageReference(str(path))
    raise InputError(
        f"image {reference.path} is in none of {', '.join(str(root) for root in roots)}; name their folder with --images-root"
    )


def checked_size(data: bytes, label: str) -> tuple[int, int]:
    """(width, height) of an image file. Raises InputError naming the image."""
    try:
        return image_size(data)
    except ImageDamage as error:
        raise InputError(f"image {label}: {error.detail}") from error


def case_digest(prompt: Sample, expected: Any, metadata: dict[str, Any], image_digests: list[str]) -> str:
    """sha256 of the question, its pictures and what is expected."""
    value = [prompt.messages, expected, metadata, image_digests]
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def question_messages(sample: Sample) -> list[dict[str, Any]]:
    """The messages before the last answer; of running text what stands up to its last image."""
    if sample.messages[0]["role"] == "text":
        content = sample.messages[0]["content"]
        last = max((place for place, item in enumerate(content) if item["type"] == "image"), default=-1)
        return [{"role": "text", "content": content[: last + 1]}]
    return sample.messages[:-1] if sample.messages[-1]["role"] == "assistant" else sample.messages


# ---------------------------------------------------------------- what a row expects


def expected_text(sample: Sample) -> str | list[str]:
    """The row's `solution` (a text, or a list of accepted texts), else its last answer, else the text behind its last image."""
    solution = sample.metadata.get("solution")
    if isinstance(solution, list | tuple):
        texts = list(dict.fromkeys(str(text).strip() for text in solution if isinstance(text, str | int | float) and str(text).strip()))
        if not texts or len(solution) != len([text for text in solution if isinstance(text, str | int | float)]):
            raise Refusal("bad_row", f"`solution` {str(solution)[:60]} is no list of accepted texts")
        return texts if len(texts) > 1 else texts[0]
    if isinstance(solution, dict):
        raise Refusal("bad_row", f"`solution` {str(solution)[:60]} is no text and no list of texts")
    if solution is not None:
        return str(solution)
    if sample.messages[0]["role"] == "text":
        content = sample.messages[0]["content"]
        shown = [place for place, item in enumerate(content) if item["type"] == "image"]
        items = content[shown[-1] + 1 :] if shown else []
        if not shown:
            raise Refusal("bad_row", "running text without an image asks nothing")
    else:
        items = _answer(sample)
    text = "".join(item["text"] for item in items if item["type"] == "text").strip()
    if not text:
        raise Refusal(
            "empty_answer", "the row says nothing of the expected answer (`solution`, or an assistant's turn)"
        )
    return text


def expected_count(sample: Sample) -> str | list[str]:
    """A whole number."""
    expected = expected_text(sample)
    for text in expected if isinstance(expected, list) else [expected]:
        if count_of(text) is None:
            raise Refusal("bad_row", f"the expected count {text[:60]!r} is no number")
    return expected


def expected_result(sample: Sample) -> str | list[str]:
    """The `solution`, or what the answer puts in its last \\boxed{}."""
    text = expected_text(sample)
    if sample.metadata.get("solution") is not None or isinstance(text, list):
        return text
    boxed = boxed_contents(text)
    if not boxed:
        raise Refusal("bad_row", "the row has neither `solution` nor an answer with a result in \\boxed{}")
    return boxed[-1]


def expected_box(sample: Sample) -> dict[str, Any]:
    """The `solution` as a box or {"bbox", "image"}, or the one box of the answer. Pixels of the stored image."""
    solution = sample.metadata.get("solution")
    if solution is None:
        boxes = [item for item in _answer(sample) if item["type"] == "box"]
        if len(boxes) != 1:
            raise Refusal("bad_row", f"the answer has {len(boxes)} boxes; a case needs one, or `solution` with `bbox`")
        solution = {"bbox": boxes[0]["box"], "image": boxes[0]["image"]}
    box = solution.get("bbox") if isinstance(solution, dict) else solution
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)
    if not numbers or box[2] <= box[0] or box[3] <= box[1]:
        raise Refusal("bad_coordinates", f"the expected box {str(box)[:80]} is not [x1, y1, x2, y2] with an area")
    image = int(solution.get("image", 0)) if isinstance(solution, dict) else 0
    shown = {item["image"] for message in sample.messages for item in message["content"] if item["type"] == "image"}
    if image not in shown:
        raise Refusal("bad_coordinates", f"the expected box lies in image {image}, which the row does not show")
    return {"bbox": [float(value) for value in box], "image": image}


def _answer(sample: Sample) -> list[dict[str, Any]]:
    if sample.messages[-1]["role"] != "assistant":
        raise Refusal("bad_row", "the row has neither `solution` nor an assistant's turn at its end")
    return sample.messages[-1]["content"]
