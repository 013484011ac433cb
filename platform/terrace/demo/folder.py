"""A demo recipe for somebody's own folder of JSON Lines: which files hold what, and a small curriculum over them.

A file is recognised by its rows first and its name second: captions, documents, plain text, boxes and points show in the
keys; reading, questions and worked solutions are conversations alike, so the name decides. Preference rows and RL prompts
are left out, because the four supervised stages have no use for them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.data.sources.conventions import RUNNING_TEXT, convert_row
from terrace.data.sources.refusals import Refusal
from terrace.errors import InputError

SNIFFED_ROWS = 40
HELD_OUT_SHARE, HELD_OUT_MOST = 0.15, 48
MOST_SAMPLES = 1500  # of one file: more would not be seen within the demo's minutes
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
# Which kinds each stage sees and their weight in samples. Documents are long and questions have answers of one word:
# without weights against it, nearly every token that a small budget learns from would be a document's.
STAGE_KINDS = {
    "projector-warmup": {"caption": 1.0},
    "alignment": {"caption": 2.0, "ocr": 1.0, "document": 0.3},
    "multimodal": {
        "caption": 2.0, "ocr": 1.0, "document": 0.15, "grounding": 1.5, "gui": 0.8, "qa": 3.0, "counting": 1.0, "chart": 1.0,
        "text": 0.5, "instruction": 1.0,
    },
    "long-context": {
        "caption": 1.5, "ocr": 1.0, "document": 0.15, "grounding": 2.0, "gui": 1.0, "qa": 4.0, "counting": 1.0, "chart": 1.0,
        "text": 0.3, "instruction": 1.0, "reasoning": 1.0,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """One usable file of the folder."""

    name: str
    path: Path
    kind: str
    rows: int
    with_images: bool


def find_sources(folder: Path) -> tuple[list[Found], list[str]]:
    """The usable files of a folder (not of its sub-folders) and, for those left out, a line each that says why.

    Raises InputError when nothing in the folder can be trained on.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; name one that holds .jsonl files")
    found, left_out = [], []
    for path in sorted(folder.glob("*.jsonl")):
        if not path.is_file():
            left_out.append(f"{path.name}: it is a folder, or a link to nothing")
            continue
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
        rows = [row for row in map(_parse, lines[:SNIFFED_ROWS]) if row is not None]
        kind = kind_of_rows(rows, path.stem)
        if kind in ("empty", "preference", "prompt", "unknown"):
            left_out.append(f"{path.name}: {_WHY[kind]}")
            continue
        with_images = any(_has_image(row) for row in rows)
        found.append(Found(_source_name(path.stem, [source.name for source in found]), path.resolve(), kind, len(lines), with_images))
    if not any(source.with_images for source in found):
        raise InputError(f"{folder}: no .jsonl file here holds rows with images; `docs/data.md` shows the conventions")
    return found, left_out


_WHY = {
    "empty": "it holds no readable row",
    "preference": "preference rows have no place in supervised stages",
    "prompt": "prompts with a solution are for an RL stage",
    "unknown": "its rows are refused, or follow no convention that is known; `terrace ingest` says why",
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


def _has_image(row: Mapping[str, Any]) -> bool:
    try:
        return bool(convert_row(dict(row), "row", "document")[1])
    except Refusal:
        return False


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None  # ingest will list it with its reason; here only the kind of the file is asked
    return row if isinstance(row, dict) else None


def _source_name(stem: str, taken: Collection[str] = ()) -> str:
    """A name in the letters that names may have; numbered where another file has it."""
    letters = (letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in stem)
    name = "".join(letters).strip("._-")[:55].strip("._-") or "rows"
    return next(name for name in (name, *(f"{name}-{number}" for number in range(2, len(taken) + 3))) if name not in taken)


# ---------------------------------------------------------------- the recipe


def folder_recipe(base: Mapping[str, Any], found: list[Found], folder: Path) -> dict[str, Any]:
    """The recipe of `base` (folder.yaml beside this file, as a mapping) with the folder's sources and mixtures over them."""
    sources = {
        source.name: {
            "uri": str(source.path),
            "kind": source.kind,
            "format": "jsonl",
            "holdout_samples": max(1, min(HELD_OUT_MOST, int(source.rows * HELD_OUT_SHARE))),
            "max_samples": min(MOST_SAMPLES, source.rows),
            "too_long": "truncate_text" if source.kind in ("text", "document") else "refuse",
        }
        for source in found
    }
    stages = []
    for stage in base["stages"]:
        weights = stage_weights(STAGE_KINDS[stage["name"]], found)
        stages.append({**stage, "mixture": {"weights": weights, "unit": "samples"}})
    name = f"demo-{_source_name(folder.resolve().name)}"
    return {**base, "name": name, "data": {**base.get("data", {}), "sources": sources}, "stages": stages}


def stage_weights(kinds: Mapping[str, float], found: list[Found]) -> dict[str, float]:
    """Mixture weights per source: its kind's share, split over the sources of that kind by the square root of their rows.

    A folder without any of the stage's kinds gives all its sources with images, so that every stage has something to learn.
    """
    chosen = [source for source in found if source.kind in kinds]
    if not any(source.with_images for source in chosen):
        chosen, kinds = [source for source in found if source.with_images], {}
    totals: Counter[str] = Counter()
    for source in chosen:
        totals[source.kind] += source.rows**0.5
    return {source.name: round(kinds.get(source.kind, 1.0) * source.rows**0.5 / totals[source.kind], 4) for source in chosen}
