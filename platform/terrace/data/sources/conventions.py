"""Raw rows, as people really have them, to `Sample` plus the images they name. Pure: no file is opened here.

| keys of the row | convention | becomes |
|---|---|---|
| `image` (or `images`) + `text` / `caption` | caption row | running text: image, then the caption |
| `content` list of text and image items | interleaved document | running text |
| `texts` + `images` of equal length, one of each pair null | OBELICS document | running text |
| `text` | plain text | running text, taken literally |
| `messages` (text with `<image>`, or content lists) + `images` | ms-swift, Qwen-VL, OpenAI content | conversation |
| ... with items `{"type": "video", "video": [frames], "fps" or "timestamps"}` | Qwen-VL frame lists | a video of sampled frames |
| `conversations` of `from` / `value` + `image` | LLaVA | conversation |
| `messages` + `rejected_response`, or `prompt` + `chosen` + `rejected` | preference | conversation, `metadata.rejected` |
| `messages` (user only) + `solution`, `task` | RL prompt | conversation without an answer, solution in the metadata |

Paragraphs of a document (neighbouring text items of a `content` list) are parted by a blank line where neither brings white space;
the items of a conversation's turn are joined as they stand, as chat templates do. A number of `<image>` that is not the number of
images is refused, never guessed. Text is text: a special token's spelling in it is encoded letter by letter.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

from terrace.data.sources.placeholders import Item, PlaceholderReader, merge_text
from terrace.data.sources.refusals import Refusal
from terrace.data.types import Sample

RUNNING_TEXT = "text"
METADATA_KEYS = (
    "task", "solution", "tolerance", "licence", "license", "attribution", "source", "answer", "level", "category", "split", "reward",
)  # fmt: skip
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system", "model": "assistant"}
_CAPTION_KEYS = ("text", "caption", "captions", "description", "alt_text")


@dataclass(frozen=True)
class ImageReference:
    """An image that a row names: a path relative to the source's folder of images, or the bytes themselves."""

    path: str | None = None
    data: bytes | None = None

    @property
    def label(self) -> str:
        return self.path if self.path is not None else "image in the row"


def convert_row(row: Any, default_id: str, kind: str) -> tuple[Sample, list[ImageReference]]:
    """One raw row to a sample and its images, in the order of `Sample`'s image numbers. Raises Refusal."""
    if not isinstance(row, dict):
        raise Refusal("bad_row", f"the row is a {type(row).__name__}, not a JSON object")
    sample_id = row_id(row, default_id)
    images = row_images(row)
    metadata = {key: row[key] for key in METADATA_KEYS if row.get(key) is not None}
    turns = row.get("messages") or row.get("conversations") or row.get("conversation")
    if turns is None and "prompt" in row and ("chosen" in row or "solution" in row or "rejected" in row):
        turns = _prompt_turns(row)
    if turns is not None:
        reader = PlaceholderReader(len(images), row.get("objects"))
        messages = _conversation(turns, images, reader)
        metadata |= _rejected(row, reader)
        _check_answers(messages, is_prompt=kind == "prompt" or row.get("solution") is not None)
    elif isinstance(row.get("content"), list):
        messages = [{"role": RUNNING_TEXT, "content": _document(row["content"], images)}]
    elif isinstance(row.get("texts"), list):
        messages = [{"role": RUNNING_TEXT, "content": _paired_document(row, images)}]
    else:
        messages = [{"role": RUNNING_TEXT, "content": _caption_or_text(row, images)}]
    if messages[0]["role"] == RUNNING_TEXT and not any(_has_text(item) for item in messages[0]["content"]):
        raise Refusal("empty_text", "the row has no text")
    return Sample(sample_id, kind, messages, metadata), images


def row_images(row: dict[str, Any]) -> list[ImageReference]:
    """The images of a row's `image` and `images` columns, in order. A null image is no image."""
    values: list[Any] = []
    for key in ("image", "images", "image_path", "img_path"):
        value = row.get(key)
        if value is not None:
            values += value if isinstance(value, list) else [value]
    return [image_reference(value) for value in values if value is not None]


def image_reference(value: Any) -> ImageReference:
    """A path, a `file://` or `data:` URI, bytes, or Hugging Face's `{"bytes", "path"}`. Web addresses are refused."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return ImageReference(value.get("path"), bytes(value["bytes"]))
        value = value.get("path") or value.get("url") or value.get("image")
    if isinstance(value, (bytes, bytearray)):
        return ImageReference(None, bytes(value))
    if not isinstance(value, str) or not value:
        raise Refusal("bad_row", f"an image is given as {type(value).__name__}, not as a path or bytes")
    if value.startswith(("http://", "https://")):
        raise Refusal("remote_image", f"image {value[:120]!r} is on the web")
    if value.startswith("data:"):
        try:
            return ImageReference(None, base64.b64decode(value.partition(",")[2], validate=True))
        except (binascii.Error, ValueError) as error:
            raise Refusal("not_an_image", f"a data: URI is not base64 ({error})") from error
    return ImageReference(value.removeprefix("file://"))


# ---------------------------------------------------------------- conversations


def _conversation(turns: Any, images: list[ImageReference], reader: PlaceholderReader) -> list[dict[str, Any]]:
    """Messages of a conversation. Images that its content lists name themselves are appended to `images`."""
    if not isinstance(turns, list) or not turns:
        raise Refusal("bad_row", "`messages` is not a list with at least one turn")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise Refusal("bad_row", "a turn is not a JSON object")
        role = _ROLES.get(str(turn.get("role") or turn.get("from") or "").lower())
        if role is None:
            raise Refusal("bad_row", f"a turn has the role {turn.get('role') or turn.get('from')!r}")
        content = turn["content"] if "content" in turn else turn.get("value")
        messages.append({"role": role, "content": _turn_content(content, images, reader)})
    reader.finish()
    return messages


def _turn_content(content: Any, images: list[ImageReference], reader: PlaceholderReader) -> list[Item]:
    if content is None:
        return []
    if isinstance(content, str):
        return reader.read(content)
    if not isinstance(content, list):
        raise Refusal("bad_row", f"a turn's content is a {type(content).__name__}, not text or a list")
    items: list[Item] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            # `<image>` is ordinary text beside image items; boxes are placeholders wherever the row has objects.
            items += _objects_only(reader, part["text"])
        elif kind in ("image", "image_url"):
            items.append(_content_image(part, images, reader))
        elif kind == "video":
            items.append(_content_video(part, images, reader))
        else:
            raise Refusal("unsupported", f"a content item of type {kind!r}; known are text, image, image_url and video")
    return merge_text(items)


def _objects_only(reader: PlaceholderReader, text: str) -> list[Item]:
    reader.parse_images, before = False, reader.parse_images
    try:
        return reader.read(text)
    finally:
        reader.parse_images = before


def _content_image(part: dict[str, Any], images: list[ImageReference], reader: PlaceholderReader) -> Item:
    """An image item: it names its image itself, or it stands for the next image of the row's `images`."""
    value = next((part[key] for key in ("image", "image_url", "path", "url") if part.get(key) is not None), None)
    if isinstance(value, dict) and set(value) <= {"url", "detail"}:
        value = value.get("url")
    if value is None:
        return reader.next_image()
    if reader.images_taken != reader.image_count:
        raise Refusal("placeholder_mismatch", "content items name images of their own beside the row's `images`")
    images.append(image_reference(value))
    reader.image_count += 1
    return reader.next_image()


def _content_video(part: dict[str, Any], images: list[ImageReference], reader: PlaceholderReader) -> Item:
    """A video as its sampled frames, a list of images, with `timestamps` in seconds or the `fps` they were sampled at."""
    frames = part.get("video", part.get("frames"))
    if not isinstance(frames, list) or not frames:
        raise Refusal("unsupported", "a video is given as a list of sampled frames; a video file is not decoded here")
    if reader.images_taken != reader.image_count:
        raise Refusal("placeholder_mismatch", "content items name frames of their own beside the row's `images`")
    rate = part.get("fps") or part.get("sample_fps")
    times = part.get("timestamps")
    if times is None and isinstance(rate, (int, float)) and rate > 0:
        times = [number / rate for number in range(len(frames))]
    good = isinstance(times, list) and all(isinstance(time, (int, float)) and time >= 0 for time in times)
    if not good or len(times) != len(frames) or sorted(times) != times:
        raise Refusal("bad_row", f"a video of {len(frames)} frames needs `fps`, or one rising time in seconds for each frame")
    images += [image_reference(frame) for frame in frames]
    first = reader.images_taken
    reader.images_taken += len(frames)
    reader.image_count += len(frames)
    return {"type": "video", "frames": list(range(first, first + len(frames))), "timestamps": [float(time) for time in times]}


def _prompt_turns(row: dict[str, Any]) -> list[dict[str, Any]]:
    prompt = row["prompt"]
    turns = list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    chosen = row.get("chosen")
    if chosen is None:
        return turns
    return turns + (list(chosen)[-1:] if isinstance(chosen, list) else [{"role": "assistant", "content": chosen}])


def _rejected(row: dict[str, Any], reader: PlaceholderReader) -> dict[str, Any]:
    """`metadata.rejected`: the content items of the reply that was not chosen."""
    rejected = row.get("rejected_response", row.get("rejected"))
    if isinstance(rejected, list) and rejected and isinstance(rejected[-1], dict):
        rejected = rejected[-1].get("content")
    if rejected is None:
        return {}
    if not isinstance(rejected, str) or not rejected.strip():
        raise Refusal("empty_answer", "the rejected reply is empty or not text")
    return {"rejected": [{"type": "text", "text": rejected}]}


def _check_answers(messages: list[dict[str, Any]], is_prompt: bool) -> None:
    """Every assistant turn says something, and there is one unless the row is a prompt."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers and not is_prompt:
        raise Refusal("empty_answer", "the conversation has no assistant turn")
    for answer in answers:
        if not any(_has_text(item) or item["type"] in ("box", "point") for item in answer["content"]):
            raise Refusal("empty_answer", "an assistant turn is empty")
    if messages[-1]["role"] == "system" or all(message["role"] == "system" for message in messages):
        raise Refusal("empty_text", "the conversation ends in a system turn")


# ---------------------------------------------------------------- running text


def _document(content: list[Any], images: list[ImageReference]) -> list[Item]:
    reader = PlaceholderReader(len(images))
    items: list[Item] = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            items.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "image_url"):
            items.append(_content_image(part, images, reader))
        elif kind == "video":
            items.append(_content_video(part, images, reader))
        else:
            raise Refusal("unsupported", f"a content item of type {kind!r}; known are text, image and video")
    reader.finish()
    return _with_paragraphs(items)


def _paired_document(row: dict[str, Any], images: list[ImageReference]) -> list[Item]:
    texts, pictures = row["texts"], row.get("images") or [None] * len(row["texts"])
    if len(texts) != len(pictures):
        raise Refusal("placeholder_mismatch", f"{len(texts)} texts and {len(pictures)} images do not pair up")
    items: list[Item] = []
    count = 0
    for text, image in zip(texts, pictures):
        if image is not None:
            items.append({"type": "image", "image": count})
            count += 1
        if isinstance(text, str):
            items.append({"type": "text", "text": text})
    return _with_paragraphs(items)


def _with_paragraphs(items: list[Item]) -> list[Item]:
    """Neighbouring texts joined by a blank line, unless one of them brings white space of its own."""
    merged: list[Item] = []
    for item in items:
        if item["type"] == "text" and not item["text"]:
            continue
        if item["type"] == "text" and merged and merged[-1]["type"] == "text":
            before = merged[-1]["text"]
            gap = "" if before[-1].isspace() or item["text"][0].isspace() else "\n\n"
            merged[-1] = {"type": "text", "text": before + gap + item["text"]}
        else:
            merged.append(item)
    return merged


def _caption_or_text(row: dict[str, Any], images: list[ImageReference]) -> list[Item]:
    text = next((row[key] for key in _CAPTION_KEYS if row.get(key) is not None), None)
    if isinstance(text, list):
        text = next((entry for entry in text if isinstance(entry, str)), None)
    if text is None:
        raise Refusal("unknown_convention" if not images else "empty_text", f"the row has only the keys {sorted(row)[:12]}")
    if not isinstance(text, str):
        raise Refusal("bad_row", f"the text is a {type(text).__name__}")
    if not text.strip():
        raise Refusal("empty_text", "the text is empty")
    return [{"type": "image", "image": number} for number in range(len(images))] + [{"type": "text", "text": text}]


def _has_text(item: Item) -> bool:
    return item["type"] == "text" and bool(item["text"].strip())


def row_id(row: dict[str, Any], default_id: str) -> str:
    """The id that a row gives itself."""
    for key in ("id", "sample_id", "uid"):
        value = row.get(key)
        if isinstance(value, str) and value:
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
    return default_id
