"""What rows are, told from the rows themselves: the kind that a source of them has, and a name for it.

Captions, documents, plain text, boxes and points show in the keys; reading, questions and worked solutions are conversations alike, so
the file's name decides between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from itertools import islice
from pathlib import PurePath
from typing import Any

from terrace.data.sources.conventions import RUNNING_TEXT, convert_row
from terrace.data.sources.listing import list_source
from terrace.data.sources.planning import plan_units
from terrace.data.sources.readers import read_rows
from terrace.data.sources.refusals import Refusal
from terrace.recipe.schema import Source, Storage
from terrace.storage.files import absolute

FIRST_ROWS = 40

CONVERSATION_NAMES = {  # part of a file's name -> kind
    "ocr": "ocr",
    "read": "ocr",
    "count": "counting",
    "chart": "chart",
    "reason": "reasoning",
    "math": "reasoning",
    "cot": "reasoning",
    "vqa": "qa",
    "qa": "qa",
    "question": "qa",
}


def kind_of_rows(rows: list[Mapping[str, Any]], name: str) -> str:
    """The kind that most rows speak for: a sample kind, or empty, preference, prompt, unknown."""
    if not rows:
        return "empty"
    return Counter(_kind_of_row(row, name.lower()) for row in rows).most_common(1)[0][0]


def _kind_of_row(row: Mapping[str, Any], name: str) -> str:
    """The kind of one row, as ingest itself reads it: what it refuses is of no kind."""
    try:
        sample, images = convert_row(dict(row), "row", "document")
    except Refusal:
        return _kind_of_prompt(row)
    if "rejected" in sample.metadata:
        return "preference"
    items = [item["type"] for message in sample.messages for item in message["content"]]
    if sample.messages[0]["role"] != RUNNING_TEXT:
        if "solution" in sample.metadata and not any(message["role"] == "assistant" for message in sample.messages):
            return "prompt"
        if "point" in items:
            return "gui"
        if "box" in items:
            return "grounding"
        return next((kind for part, kind in CONVERSATION_NAMES.items() if part in name), "instruction")
    if isinstance(row.get("content"), list) or isinstance(row.get("texts"), list):
        return "document"
    return "caption" if images else "text"


def _kind_of_prompt(row: Mapping[str, Any]) -> str:
    try:
        convert_row(dict(row), "row", "prompt")
    except Refusal:
        return "unknown"
    return "prompt"


def has_images(row: Mapping[str, Any]) -> bool:
    try:
        return bool(convert_row(dict(row), "row", "document")[1])
    except Refusal:
        return False


def source_name(stem: str, taken: Collection[str] = ()) -> str:
    """A name in the letters that names may have; numbered where another file has it."""
    letters = (letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in stem)
    name = "".join(letters).strip("._-")[:55].strip("._-") or "rows"
    return next(name for name in (name, *(f"{name}-{number}" for number in range(2, len(taken) + 3))) if name not in taken)


def kind_of_source(uri: str, storage: Storage) -> str:
    """`kind_of_rows` of the first rows at a file or folder; `unknown` for shards. Raises InputError where nothing is there."""
    where = absolute(uri)
    listing = list_source("rows", Source(uri=where), storage)
    if "webdataset" in listing.files:
        return "unknown"
    units = plan_units(listing, where.rpartition("/")[0], storage)
    share = -(-FIRST_ROWS // max(1, len(units)))
    rows = [row for unit in units[:FIRST_ROWS] for _, _, row, _ in islice(read_rows(unit, storage), share)]
    return kind_of_rows([row for row in rows if isinstance(row, dict)], PurePath(where).stem)
