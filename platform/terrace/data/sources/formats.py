"""Cutting one file of rows into units of work, each for one task: a span of whole lines or rows, or some Parquet row groups.

Units are cut from the listing alone (long JSON Lines and JSON arrays are read once to find where rows start), so two runs over the same
files cut the same units, and a finished unit need never be done again. A file that cannot be cut is a unit that says why.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

from terrace.data.sources.json_rows import array_spans, starts_array
from terrace.data.sources.listing import PACKED
from terrace.data.sources.unpack import opened
from terrace.recipe.schema import Storage
from terrace.storage.files import StoredFile, is_remote, open_sequential, relative_name
from terrace.storage.s3 import s3

UNIT_BYTES = 32 * 2**20
_FIRST_LINE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Unit:
    """A share of a source's rows. `start` and `end` are bytes (jsonl, json; -1: to the end) or row groups (parquet)."""

    number: int
    format: str  # jsonl, json, csv, parquet, text, image_folder, or told: a file that cannot be read
    root: str  # folder that names are shown relative to
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    start: int = 0
    end: int = -1
    first_row: int = 1
    beside: tuple[str, ...] = field(default=())  # image_folder: caption files that lie beside the images
    described: tuple[str, ...] = field(default=())  # image_folder: those of `files` that a metadata table has already described
    packed: str = ""  # compression of the file
    mapping: str = ""  # JSON of a LLaMA-Factory entry: how its columns are named
    told: tuple[str, str] = ("", "")  # (reason, sentence)

    @property
    def cost(self) -> int:
        """Bytes of raw input, for progress."""
        if self.format in ("jsonl", "json") and self.end >= 0:
            return max(1, self.end - self.start)
        return max(1, sum(self.sizes))


def row_units(format_name: str, file: StoredFile, root: str, storage: Storage, mapping: str = "") -> list[Unit]:
    """The units of one file of rows."""
    try:
        return _row_units(format_name, file, root, storage, mapping)
    except Exception as error:  # a file that cannot even be cut: it is told, and the others are read
        what = "Parquet file" if format_name == "parquet" else f"{format_name} file"
        told = ("unreadable_shard", f"{relative_name(file.uri, root)} is not a readable {what} ({error})")
        return [Unit(0, "told", root, (file.uri,), (max(1, file.size),), told=told)]


def _row_units(format_name: str, file: StoredFile, root: str, storage: Storage, mapping: str) -> list[Unit]:
    names, sizes = (file.uri,), (file.size,)
    packed = PACKED.get(file.uri.rpartition(".")[2].lower(), "")
    if format_name in ("json", "jsonl"):
        with open_rows(file.uri, packed, storage) as stream:
            format_name = json_layout(stream, format_name)
    if format_name == "parquet":
        return [
            Unit(0, "parquet", root, names, (size,), start, end, first, mapping=mapping)
            for start, end, first, size in _row_groups(file.uri, storage)
        ]
    if packed or format_name == "csv":
        return [Unit(0, format_name, root, names, sizes, packed=packed, mapping=mapping)]
    spans = _line_spans(file, storage) if format_name == "jsonl" else _row_spans(file, storage)
    return [Unit(0, format_name, root, names, sizes, start, end, first, mapping=mapping) for start, end, first in spans]


def json_layout(stream: IO[bytes], named: str) -> str:
    """Whether a file of JSON holds an array or object (`json`) or a row on each line (`jsonl`), whatever its name says."""
    if starts_array(stream):
        if named == "json":
            return "json"
        first = stream.readline(_FIRST_LINE_BYTES)
        whole_line = first.rstrip().endswith(b"]") and _is_json(first) and stream.read(4096).strip()
        return "jsonl" if whole_line else "json"
    if named == "jsonl":
        return "jsonl"
    first = stream.readline(_FIRST_LINE_BYTES)
    while first and not first.strip():
        first = stream.readline(_FIRST_LINE_BYTES)
    return "jsonl" if _is_json(first) and isinstance(json.loads(first), dict) and stream.read(4096).strip() else "json"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _line_spans(file: StoredFile, storage: Storage) -> list[tuple[int, int, int]]:
    """[(first byte, end byte, number of the first line)]: spans of whole lines of about UNIT_BYTES."""
    if file.size <= UNIT_BYTES * 3 // 2:
        return [(0, file.size, 1)]
    spans, start, line, place, line_at_start = [], 0, 1, 0, 1
    with open_sequential(file.uri, storage) as stream:
        while block := stream.read(1 << 20):
            last = block.rfind(b"\n")
            if last >= 0 and place + last + 1 - start >= UNIT_BYTES:
                inside = block.count(b"\n", 0, last + 1)
                spans.append((start, place + last + 1, line_at_start))
                start, line_at_start = place + last + 1, line + inside
            line += block.count(b"\n")
            place += len(block)
    if start < place:
        spans.append((start, place, line_at_start))
    return spans


def _row_spans(file: StoredFile, storage: Storage) -> list[tuple[int, int, int]]:
    """[(first byte, end byte, number of the first row)] of a JSON array; a file that is none is one span."""
    if file.size <= UNIT_BYTES * 3 // 2:
        return [(0, -1, 1)]
    with open_sequential(file.uri, storage) as stream:
        return array_spans(stream, UNIT_BYTES) if starts_array(stream) else [(0, -1, 1)]


def _row_groups(uri: str, storage: Storage) -> list[tuple[int, int, int, int]]:
    """[(first row group, end, number of the first row, bytes)]: small row groups are read together."""
    import pyarrow.parquet as pq

    spans, start, row, size = [], 0, 1, 0
    with open_seekable(uri, storage) as stream:
        metadata = pq.ParquetFile(stream).metadata
        first = row
        for group in range(metadata.num_row_groups):
            facts = metadata.row_group(group)
            size += max(1, facts.total_byte_size)
            row += facts.num_rows
            if size >= UNIT_BYTES or group == metadata.num_row_groups - 1:
                spans.append((start, group + 1, first, size))
                start, first, size = group + 1, row, 0
    return spans


# ---------------------------------------------------------------- opening


@contextmanager
def open_rows(uri: str, packed: str, storage: Storage) -> Iterator[IO[bytes]]:
    """A file of rows for reading front to back, decompressed."""
    with open_sequential(uri, storage) as raw:
        yield raw if not packed else opened(raw, packed)


def open_seekable(uri: str, storage: Storage) -> Any:
    """A file that Parquet readers can jump in."""
    if is_remote(uri):
        return s3(storage).open(uri, "rb", block_size=8 * 2**20)
    return open(uri.removeprefix("file://"), "rb")
