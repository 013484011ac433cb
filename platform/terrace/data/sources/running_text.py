"""Captions, documents and plain text: rows without turns, which become one message of running text.

Paragraphs of a document (neighbouring text items of a `content` list) are parted by a blank line where neither brings white space.
"""

from __future__ import annotations

from typing import Any

from terrace.data.sources.conversation import has_text, read_part
from terrace.data.sources.fields import Fields
from terrace.data.sources.media import KINDS_WITH_PICTURES
from terrace.data.sources.placeholders import BYTE_ORDER_MARK, Item, PlaceholderReader
from terrace.data.sources.refusals import Refusal

TEXT_KEYS = ("text", "caption", "captions", "description", "alt_text", "ocr", "sentences", "content", "texts")
ALTERNATIVE_KEYS = ("captions", "caption", "sentences", "description", "alt_text")  # a list in them is several captions, not lines


def caption_or_text(fields: Fields, reader: PlaceholderReader, kind: str) -> list[Item]:
    """Items of a row that has pictures and a text: where the text says `<image>` for each, else pictures first. Of a picture
    that stands for itself the text may be missing."""
    texts = [(name, text) for name in fields.of(TEXT_KEYS) if (text := _joined(name, fields.take(name), kind)) is not None]
    if kind == "picture" and not any(text.strip() for _, text in texts):
        items = reader.rest()
        reader.finish()
        return items
    if not texts:
        keys = ", ".join(f"`{name}`" for name in fields.names()[:12])
        raise Refusal("empty_text" if reader.images else "unknown_convention", f"no known text in a row with {keys}")
    said = [(name, text) for name, text in texts if text.strip()]
    if not said:
        raise Refusal("empty_text", "the text is empty")
    name, text = said[0]
    other = next((entry for entry in said[1:] if entry[1].strip() != text.strip()), None)
    if other is not None:
        raise Refusal("unknown_field", f"`{name}` and `{other[0]}` hold different texts; write the one that is not meant into `ignore`")
    placed = "<image>" in text and reader.images and reader.tags
    items = reader.read(text) if placed else [*reader.rest(), *reader.read(text, media=False)]
    reader.finish()
    return items


def alternatives(row: Any, kind: str) -> list[Any]:
    """A row for each caption of its picture, where it has a list of several; else the row alone."""
    if not isinstance(row, dict) or kind == "ocr" or any(name in row for name in ("messages", "conversations", "content", "text")):
        return [row]
    for key in row:
        value = row[key]
        if str(key).lower() in ALTERNATIVE_KEYS and isinstance(value, list):
            said = [entry for entry in value if isinstance(entry, str) and entry.strip()]
            if len(said) > 1 and len(said) == len(value):
                return [{**row, key: entry} for entry in said]
    return [row]


def document(content: list[Any], reader: PlaceholderReader, rules: Any) -> list[Item]:
    """Items of an interleaved document: a `content` list."""
    items: list[Item] = []
    for part in content:
        items += read_part(part, reader, rules)
    reader.finish()
    return _with_paragraphs(items)


def paired_document(texts: list[Any], pictures: list[Any], reader: PlaceholderReader) -> list[Item]:
    """Items of an OBELICS document: texts and images of equal length, one of each pair null."""
    if len(texts) != len(pictures):
        raise Refusal("placeholder_mismatch", f"{len(texts)} texts and {len(pictures)} images do not pair up")
    items: list[Item] = []
    for text, image in zip(texts, pictures):
        if image is not None:
            items.append(reader.next_image())
        if text is not None and not isinstance(text, str):
            raise Refusal("bad_row", f"`texts` holds a {type(text).__name__}, not text")
        if text is not None:
            items.append({"type": "text", "text": text.removeprefix(BYTE_ORDER_MARK)})
    reader.finish()
    return _with_paragraphs(items)


def check_text(items: list[Item]) -> None:
    if not any(has_text(item) for item in items):
        raise Refusal("empty_text", "the row has no text")


def check_pictures(kind: str, images: int) -> None:
    """Refuse a sample without a picture of a kind that is about pictures."""
    if not images and kind in KINDS_WITH_PICTURES:
        raise Refusal("missing_image", f"the row has no image, and a sample of kind {kind} needs one; plain text has the kind `text`")


def _joined(name: str, value: Any, kind: str) -> str | None:
    """One text; the lines of a list joined. A byte order mark at its beginning is no text."""
    if isinstance(value, list):
        if not all(isinstance(entry, str) for entry in value):
            raise Refusal("bad_row", f"`{name}` is a list that holds a {type(next(e for e in value if not isinstance(e, str))).__name__}")
        if len(value) > 1 and name in ALTERNATIVE_KEYS and kind != "ocr":
            raise Refusal("unsupported", f"`{name}` holds {len(value)} texts; write a row for each, or `text` for lines")
        value = "\n".join(value)
    if value is not None and not isinstance(value, str):
        raise Refusal("bad_row", f"the text `{name}` is a {type(value).__name__}")
    return value.removeprefix(BYTE_ORDER_MARK) if value is not None else None


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
