"""Looking at rows before there is a recipe: what they are, how many, and how long they are to this model.

Rows go through ingest's own reading, one by one, and their length through the index's own arithmetic, so what is refused here
is refused there. A few hundred rows of each source are opened with their pictures; the rest is counted.
"""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from terrace.data.sources.conventions import Rules
from terrace.data.sources.formats import Unit
from terrace.data.sources.image_loader import ImageLoader
from terrace.data.sources.ingest import folder_of
from terrace.data.sources.ingest_unit import UnitSettings, read_sample
from terrace.data.sources.kinds import kind_of_rows, source_name
from terrace.data.sources.listing import list_source
from terrace.data.sources.planning import plan_units
from terrace.data.sources.readers import read_rows
from terrace.data.sources.refusals import Refusal
from terrace.data.sources.running_text import alternatives
from terrace.data.template import Measure, measure_prompt, measure_sample
from terrace.data.tokenizer import TextTokenizer
from terrace.errors import InputError
from terrace.families.interface import Bounds, Family
from terrace.recipe.schema import Data, Source
from terrace.storage.files import absolute, is_remote

OPENED_ROWS = 256  # of a source: with their pictures
COUNTED_BYTES = 256 * 2**20  # of a source: rows of larger ones are estimated from those that were read
KIND_ROWS = 40
NAMELESS = ("train", "data", "dataset", "rows", "metadata", "dataset_info")  # names of files that say nothing: the folder's is better


@dataclass(frozen=True)
class Looked:
    """What a source is, as far as it was looked at."""

    name: str
    uri: str
    kind: str
    format: str
    rows: int
    exact: bool  # rows were counted and not estimated
    measures: tuple[tuple[Measure, tuple[tuple[int, int], ...]], ...]  # of the rows that were opened, with their pictures' sizes
    refused: dict[str, int]  # of those, by reason
    example: str  # the first refusal's sentence
    tasks: tuple[str, ...] = ()  # of prompts: what they ask for, most frequent first

    @property
    def with_images(self) -> bool:
        return any(sizes for _, sizes in self.measures)

    def lengths(self, pixels: Bounds, family: Family) -> np.ndarray:
        return np.asarray([measure.length(sizes, pixels, family) for measure, sizes in self.measures], np.int64)

    def areas(self) -> np.ndarray:
        """Pixels of each picture."""
        return np.asarray([width * height for _, sizes in self.measures for width, height in sizes], np.int64)


def look_at(uri: str, taken: Sequence[str], tokenizer: TextTokenizer, family: Family) -> Looked:
    """Look at the rows at a file, folder or s3:// URI. Raises InputError where there are none that can be used."""
    where = absolute(uri)
    if not is_remote(where) and not glob.has_magic(where) and not Path(where).exists():
        raise InputError(f"--data {uri}: there is no such file or folder")
    name = source_name(_stem(where), taken)
    probe = Source(uri=where, kind="instruction")
    storage = Data(sources={name: probe}).storage
    listing = list_source(name, probe, storage)
    if "webdataset" in listing.files:
        raise InputError(f"{uri}: these are shards already; init looks at rows. Name them in the recipe (`data.sources.NAME.uri`)")
    root = folder_of(where, listing.all_files)
    units = plan_units(listing, root, storage)
    first = [row for _, _, row in _spread(units, storage, KIND_ROWS)]
    kind = kind_of_rows([row for row in first if isinstance(row, dict)], Path(where).stem if _stem(where) != "rows" else name)
    if kind in ("empty", "unknown"):
        raise InputError(f"{uri}: {_why(first)}; docs/data.md shows the forms that are read")
    settings = UnitSettings(name, kind, None, None, "", 0, Data(sources={name: probe}).max_image_pixels, storage)
    rules, tasks, refused, measures, example = Rules(), Counter(), Counter(), [], ""
    loaders: dict[int, ImageLoader] = {}
    for unit, own_id, whole in _spread(units, storage, OPENED_ROWS):
        for row in alternatives(whole, kind):
            try:
                loader = loaders.setdefault(unit.number, ImageLoader(settings, unit))
                sample, contents = read_sample(row, own_id, settings, rules, loader)
                sizes = tuple(_size(data) for data in contents)
                measure = (measure_prompt if kind == "prompt" else measure_sample)(sample, sizes, tokenizer, family)
                tasks.update([str(sample.metadata["task"])] if sample.metadata.get("task") else [])
                measures.append((measure, sizes))
            except (Refusal, InputError, ValueError) as error:
                refused[getattr(error, "reason", "not_usable")] += 1
                example = example or f"{own_id}: {getattr(error, 'detail', error)}"
    if not measures:
        raise InputError(f"{uri}: all {sum(refused.values())} rows that were looked at are refused; the first: {example}")
    rows, exact = _count(units, storage, sum(refused.values()) + len(measures))
    asked = tuple(task for task, _ in tasks.most_common())
    return Looked(name, where, kind, listing.name, rows, exact, tuple(measures), dict(refused), example, asked)


def _stem(where: str) -> str:
    path = Path(where)
    stem = path.name.partition(".")[0]
    return path.parent.name if stem.lower() in NAMELESS and path.parent.name else stem


def _spread(units: Sequence[Unit], storage: Any, most: int) -> Iterator[tuple[Unit, str, Any]]:
    """The first rows of every unit, about `most` in all."""
    share = max(1, -(-most // max(1, len(units))))
    for unit in units[:most]:
        for number, (_, own_id, row, _) in enumerate(read_rows(unit, storage)):
            if number == share:
                break
            yield unit, own_id, row


def _count(units: Sequence[Unit], storage: Any, opened: int) -> tuple[int, bool]:
    """(rows of all units, whether they were counted)."""
    if sum(unit.cost for unit in units) <= COUNTED_BYTES:
        return sum(1 for unit in units for _ in read_rows(unit, storage)), True
    read = cost = 0
    for unit in units[: max(1, len(units) // 16)]:
        read += sum(1 for _ in read_rows(unit, storage))
        cost += unit.cost
        if cost > COUNTED_BYTES // 4:
            break
    return max(opened, round(read * sum(unit.cost for unit in units) / max(1, cost))), False


def _size(data: bytes) -> tuple[int, int]:
    from terrace.data.images import image_size

    return image_size(data)


def _why(rows: Sequence[Any]) -> str:
    """Why none of the first rows can be used: the first reason."""
    from terrace.data.sources.conventions import convert_row

    for row in rows:
        try:
            if isinstance(row, Refusal):
                raise row
            convert_row(row, "row", "document")
        except Refusal as refusal:
            keys = f" (its keys: {', '.join(map(str, row))})" if isinstance(row, dict) else ""
            return f"the rows are refused; the first: {refusal.detail}{keys}" if len(json.dumps(keys)) < 300 else refusal.detail
    return "there is no readable row"
