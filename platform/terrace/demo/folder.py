"""A demo recipe for somebody's own folder of JSON Lines: which files hold what, and a small curriculum over them.

A file is recognised by its rows first and its name second: captions, documents, plain text, boxes and points show in the
keys; reading, questions and worked solutions are conversations alike, so the name decides. Preference rows and RL prompts
are left out, because the four supervised stages have no use for them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.data.sources.kinds import has_images, kind_of_rows, source_name
from terrace.errors import InputError

SNIFFED_ROWS = 40
HELD_OUT_SHARE, HELD_OUT_MOST = 0.15, 48
MOST_SAMPLES = 1500  # of one file: more would not be seen within the demo's minutes
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
        with_images = any(has_images(row) for row in rows)
        found.append(Found(source_name(path.stem, [source.name for source in found]), path.resolve(), kind, len(lines), with_images))
    if not any(source.with_images for source in found):
        raise InputError(f"{folder}: no .jsonl file here holds rows with images; `docs/data.md` shows the conventions")
    return found, left_out


_WHY = {
    "empty": "it holds no readable row",
    "preference": "preference rows have no place in supervised stages",
    "prompt": "prompts with a solution are for an RL stage",
    "unknown": "its rows are refused, or follow no convention that is known; `terrace ingest` says why",
}


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None  # ingest will list it with its reason; here only the kind of the file is asked
    return row if isinstance(row, dict) else None


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
    name = f"demo-{source_name(folder.resolve().name)}"
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
