"""Where raw rows come from: listing a source's files, recognising their format, cutting them into units, reading a unit's rows.

A unit is work for one task: a span of whole lines or rows, a Parquet row group, a list of files. Units are cut from the listing alone
(long JSON Lines and JSON arrays are read once to find where rows start), so two runs over the same files cut the same units, and a
finished unit need never be done again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from terrace.data.images import IMAGE_EXTENSIONS
from terrace.data.sources.json_rows import MAX_WHOLE_BYTES, array_rows, array_spans, starts_array
from terrace.data.sources.refusals import Refusal
from terrace.errors import InputError
from terrace.recipe.schema import Source, Storage
from terrace.storage.files import StoredFile, is_remote, list_files, open_sequential, read_file, relative_name, s3

UNIT_BYTES = 32 * 2**20
FILES_PER_UNIT = 1_000
_FORMAT_OF_EXTENSION = {"tar": "webdataset", "parquet": "parquet", "jsonl": "jsonl", "ndjson": "jsonl", "json": "json"}
_PACKED_TARS = ("tar.gz", "tgz", "tar.zst", "tar.bz2", "tar.xz")
_SIDE_SUFFIXES = ("txt", "caption", "json")
_TABLE_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

Row = tuple[str, str, Any, float]  # (origin, default id, row or Refusal, share of the unit done)


@dataclass(frozen=True)
class Unit:
    """A share of a source's rows. `start` and `end` are bytes (jsonl, json; -1: to the end) or row groups (parquet)."""

    number: int
    format: str
    root: str  # folder that names are shown relative to
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    start: int = 0
    end: int = -1
    first_row: int = 1
    table: str | None = None  # image_folder: the metadata file with captions
    beside: tuple[str, ...] = field(default=())  # image_folder: caption files that lie beside the images

    @property
    def cost(self) -> int:
        """Bytes of raw input, for progress."""
        if self.format in ("jsonl", "json") and self.end >= 0:
            return self.end - self.start
        return max(1, sum(self.sizes) // max(1, self.end))


# ---------------------------------------------------------------- listing


def source_files(name: str, source: Source, storage: Storage) -> tuple[str, list[StoredFile]]:
    """(format, files) of a source. Raises InputError when there is nothing, or nothing known, at its URI."""
    listed = list_files(source.uri, storage)
    if not listed:
        raise InputError(f"source {name}: there is no file at {source.uri}; check data.sources.{name}.uri")
    formats: dict[str, list[StoredFile]] = {}
    for file in listed:
        formats.setdefault(_format_of(file.uri), []).append(file)
    if source.format != "auto":
        wanted = formats.get(source.format, [])
        if source.format == "jsonl" and not wanted:
            wanted = formats.get("json", []) or ([listed[0]] if len(listed) == 1 else [])
        if source.format == "image_folder":
            return source.format, listed
        if not wanted:
            raise InputError(f"source {name}: format is {source.format}, but {source.uri} holds {_counts(formats)}")
        return source.format, wanted
    for known in ("webdataset", "parquet", "jsonl", "json", "image_folder", "text"):
        if known == "jsonl" and "image_folder" in formats and _only_tables(formats.get("jsonl", [])):
            continue
        if known == "json" and "image_folder" in formats and _beside_images(formats):
            continue
        if known in formats:
            return known, listed if known == "image_folder" else formats[known]
    raise InputError(
        f"source {name}: nothing at {source.uri} has a known format (found {_counts(formats)}); known are tar, parquet, jsonl,"
        " json, txt and images"
    )


def _format_of(uri: str) -> str:
    base = uri.rsplit("/", 1)[-1].lower()
    if base.endswith(_PACKED_TARS):
        return "webdataset"  # ingest rewrites it
    extension = base.rpartition(".")[2]
    if extension in IMAGE_EXTENSIONS:
        return "image_folder"
    if extension in ("txt", "md"):
        return "text"
    return _FORMAT_OF_EXTENSION.get(extension, f".{extension}")


def _only_tables(files: list[StoredFile]) -> bool:
    return bool(files) and all(file.uri.rsplit("/", 1)[-1] in _TABLE_NAMES for file in files)


def _beside_images(formats: dict[str, list[StoredFile]]) -> bool:
    stems = {file.uri.rpartition(".")[0] for file in formats["image_folder"]}
    return all(file.uri.rpartition(".")[0] in stems for file in formats.get("json", []))


def _counts(formats: dict[str, list[StoredFile]]) -> str:
    return ", ".join(f"{len(files)} {kind}" for kind, files in sorted(formats.items())) or "nothing"


# ---------------------------------------------------------------- units


def plan_units(format_name: str, files: list[StoredFile], root: str, storage: Storage) -> list[Unit]:
    """Cut the files into units, in order."""
    units: list[Unit] = []
    if format_name == "jsonl":
        for file in files:
            for start, end, first_row in _line_spans(file, storage):
                units.append(Unit(len(units), "jsonl", root, (file.uri,), (file.size,), start, end, first_row))
    elif format_name == "parquet":
        for file in files:
            groups, rows = _row_groups(file.uri, storage), 1
            for group, count in enumerate(groups):
                size = max(1, file.size // max(1, len(groups)))
                units.append(Unit(len(units), "parquet", root, (file.uri,), (size,), group, group + 1, rows))
                rows += count
    elif format_name == "json":
        for file in files:
            for start, end, first_row in _row_spans(file, storage):
                units.append(Unit(len(units), "json", root, (file.uri,), (file.size,), start, end, first_row))
    else:
        units = _file_units(format_name, files, root)
    return units


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


def _row_groups(uri: str, storage: Storage) -> list[int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open_seekable(uri, storage) as stream:
            metadata = pq.ParquetFile(stream).metadata
            return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    except pa.ArrowInvalid as error:
        raise InputError(f"{uri} is not a readable Parquet file: {error}") from error


def _file_units(format_name: str, files: list[StoredFile], root: str) -> list[Unit]:
    table: str | None = None
    beside: tuple[str, ...] = ()
    if format_name == "image_folder":
        table = next((file.uri for file in files if file.uri.rsplit("/", 1)[-1] in _TABLE_NAMES), None)
        beside = tuple(file.uri for file in files if file.uri.rpartition(".")[2].lower() in _SIDE_SUFFIXES)
        files = [file for file in files if file.uri.rpartition(".")[2].lower() in IMAGE_EXTENSIONS]
    units = []
    for start in range(0, len(files), FILES_PER_UNIT):
        part = files[start : start + FILES_PER_UNIT]
        stems = {file.uri.rpartition(".")[0] for file in part}
        near = tuple(uri for uri in beside if uri.rpartition(".")[0] in stems)
        names, sizes = tuple(file.uri for file in part), tuple(file.size for file in part)
        units.append(Unit(len(units), format_name, root, names, sizes, table=table, beside=near))
    return units


# ---------------------------------------------------------------- rows


def read_rows(unit: Unit, storage: Storage) -> Iterator[Row]:
    """(origin, default id, row, share done) of a unit; the row is a Refusal where it cannot even be parsed."""
    readers = {"jsonl": _jsonl_rows, "json": _json_rows, "parquet": _parquet_rows, "text": _text_rows, "image_folder": _image_rows}
    return readers[unit.format](unit, storage)


def default_id(unit: Unit, uri: str, row: int | None) -> str:
    stem = relative_name(uri, unit.root).rpartition(".")[0].replace("/", "-")
    return stem if row is None else f"{stem}-{row:07d}"


def _jsonl_rows(unit: Unit, storage: Storage) -> Iterator[Row]:
    uri = unit.files[0]
    name = relative_name(uri, unit.root)
    with open_sequential(uri, storage) as stream:
        stream.seek(unit.start)
        number, place = unit.first_row - 1, unit.start
        for line in stream:  # binary: lines end at "\n" only; U+2028 is text
            if place >= unit.end:
                return
            place += len(line)
            number += 1
            if not line.strip():
                continue
            yield f"{name}:{number}", default_id(unit, uri, number), parse_json(line), (place - unit.start) / max(1, unit.cost)


def parse_json(line: bytes) -> Any:
    """The JSON value, or a Refusal."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return Refusal("bad_row", f"not readable as JSON ({error})")


def _json_rows(unit: Unit, storage: Storage) -> Iterator[Row]:
    uri = unit.files[0]
    name = relative_name(uri, unit.root)
    with open_sequential(uri, storage) as stream:
        if starts_array(stream):
            end = unit.end if unit.end >= 0 else None
            for number, (row, place) in enumerate(array_rows(stream, unit.start, end), start=unit.first_row):
                yield f"{name}[{number}]", default_id(unit, uri, number), row, (place - unit.start) / max(1, unit.cost)
            return
    if unit.sizes[0] > MAX_WHOLE_BYTES:
        told = f"a file of {unit.sizes[0]:,} bytes that is one object must be held whole; write its rows as an array or as JSON Lines"
        yield name, default_id(unit, uri, None), Refusal("unsupported", told), 1.0
        return
    value = parse_json(read_file(uri, storage))
    if isinstance(value, dict):
        lists = [entry for entry in value.values() if isinstance(entry, list) and entry and isinstance(entry[0], dict)]
        is_row = any(key in value for key in ("messages", "conversations", "content", "text", "caption"))
        value = [value] if is_row or len(lists) != 1 else lists[0]
    rows = [value] if isinstance(value, Refusal) else value
    for number, row in enumerate(rows, start=1):
        yield f"{name}[{number}]", default_id(unit, uri, number), row, number / len(rows)


def _parquet_rows(unit: Unit, storage: Storage) -> Iterator[Row]:
    import pyarrow.parquet as pq

    uri = unit.files[0]
    name = relative_name(uri, unit.root)
    with _open_seekable(uri, storage) as stream:
        number, file = unit.first_row, pq.ParquetFile(stream)
        rows = max(1, file.metadata.row_group(unit.start).num_rows)
        for batch in file.iter_batches(batch_size=64, row_groups=[unit.start]):
            for row in batch.to_pylist():
                yield f"{name}:{number}", default_id(unit, uri, number), _without_nulls(row), (number - unit.first_row) / rows
                number += 1


def _without_nulls(value: Any) -> Any:
    """Arrow fills every struct field; a null field means the key was absent."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    return value


def _text_rows(unit: Unit, storage: Storage) -> Iterator[Row]:
    for number, uri in enumerate(unit.files):
        row: Any
        try:
            row = {"text": read_file(uri, storage).decode("utf-8-sig").strip()}
        except UnicodeDecodeError as error:
            row = Refusal("bad_row", f"the file is not UTF-8 ({error})")
        yield relative_name(uri, unit.root), default_id(unit, uri, None), row, number / len(unit.files)


def _image_rows(unit: Unit, storage: Storage) -> Iterator[Row]:
    captions = _table_captions(unit, storage) if unit.table else {}
    beside: dict[str, list[str]] = {}
    for uri in unit.beside:
        beside.setdefault(uri.rpartition(".")[0], []).append(uri)
    stems = Counter(uri.rpartition(".")[0] for uri in unit.files)
    for number, uri in enumerate(unit.files):
        name, stem = relative_name(uri, unit.root), uri.rpartition(".")[0]
        row: Any = dict(captions.get(name) or captions.get(name.rsplit("/", 1)[-1]) or {})
        for side in beside.get(stem, []):
            text = read_file(side, storage)
            if side.endswith(".json"):
                parsed = parse_json(text)
                row = {**parsed, **row} if isinstance(parsed, dict) else parsed
            elif isinstance(row, dict):
                row.setdefault("text", text.decode("utf-8", "replace").strip())
        if isinstance(row, dict):
            row = {key: value for key, value in row.items() if key not in ("file_name", "image", "images")} | {"image": name}
        row_id = default_id(unit, uri, None) if stems[stem] == 1 else name.replace("/", "-")
        yield name, row_id, row, number / len(unit.files)


def _table_captions(unit: Unit, storage: Storage) -> dict[str, dict[str, Any]]:
    """Rows of metadata.jsonl / .csv / .parquet by `file_name`, as Hugging Face's image folders have them."""
    assert unit.table is not None
    rows: list[Any]
    if unit.table.endswith(".parquet"):
        import pyarrow.parquet as pq

        with _open_seekable(unit.table, storage) as stream:
            rows = pq.read_table(stream).to_pylist()
    elif unit.table.endswith(".csv"):
        import csv
        import io

        rows = list(csv.DictReader(io.StringIO(read_file(unit.table, storage).decode("utf-8-sig"))))
    else:
        rows = [parse_json(line) for line in read_file(unit.table, storage).split(b"\n") if line.strip()]
    return {row["file_name"]: row for row in rows if isinstance(row, dict) and row.get("file_name")}


def _open_seekable(uri: str, storage: Storage) -> Any:
    """A file that Parquet readers can jump in."""
    if is_remote(uri):
        return s3(storage).open(uri, "rb", block_size=8 * 2**20)
    return open(uri.removeprefix("file://"), "rb")
