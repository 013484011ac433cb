"""Reading a unit's rows: (origin, default id, row, share of the unit done); the row is a Refusal where it cannot even be parsed.

One row, one line, one row group that cannot be read is one refusal, and the next is read. A row larger than MAX_ROW_BYTES is not held.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any

from terrace.data.sources.encoding import decode_text
from terrace.data.sources.formats import Unit, open_rows, open_seekable
from terrace.data.sources.json_rows import MAX_ROW_CHARACTERS, MAX_WHOLE_BYTES, array_rows, concatenated_rows, starts_array
from terrace.data.sources.listing import SIDE_SUFFIXES
from terrace.data.sources.llama_factory import mapped_row
from terrace.data.sources.refusals import Refusal
from terrace.recipe.schema import Storage
from terrace.storage.files import join, read_file, relative_name

MAX_ROW_BYTES = MAX_ROW_CHARACTERS
MAX_TEXT_FILE_BYTES = 256 * 2**20
_NAMES_OF_ROWS = ("messages", "conversations", "content", "text", "caption", "prompt", "instruction", "query", "question", "texts")
Row = tuple[str, str, Any, float]  # (origin, default id, row or Refusal, share of the unit done)


def read_rows(unit: Unit, storage: Storage) -> Iterator[Row]:
    """The rows of a unit. Raises nothing but what the storage raises."""
    readers = {"jsonl": _jsonl_rows, "json": _json_rows, "csv": _csv_rows, "parquet": _parquet_rows, "text": _text_rows,
               "image_folder": _image_rows, "told": _told_rows}  # fmt: skip
    rows = readers[unit.format](unit, storage)
    if not unit.mapping:
        return rows
    mapping = json.loads(unit.mapping)
    return ((origin, row_id, mapped_row(row, mapping), share) for origin, row_id, row, share in rows)


def default_id(unit: Unit, uri: str, row: int | None) -> str:
    name = relative_name(uri, unit.root)
    stem = name.rpartition(".")[0] or name
    return stem if row is None else f"{stem}-{row:07d}"


def parse_json(line: bytes) -> Any:
    """The JSON value, or a Refusal."""
    try:
        return json.loads(line)
    except UnicodeDecodeError as error:
        return Refusal("bad_row", f"the row is not UTF-8 ({error.reason} at byte {error.start} of the line)")
    except (ValueError, RecursionError) as error:
        return Refusal("bad_row", f"not readable as JSON ({error})")


def table_names(unit: Unit, storage: Storage) -> set[str]:
    """The URIs of the images that a metadata table's rows name."""
    folder = unit.files[0].rpartition("/")[0]
    rows = (row for _, _, row, _ in read_rows(unit, storage))
    return {join(folder, row["file_name"]) for row in rows if isinstance(row, dict) and isinstance(row.get("file_name"), str)}


def _told_rows(unit: Unit, storage: Storage) -> Iterator[Row]:
    name = relative_name(unit.files[0], unit.root)
    yield name, name, Refusal(*unit.told), 1.0


def _jsonl_rows(unit: Unit, storage: Storage) -> Iterator[Row]:
    uri = unit.files[0]
    name = relative_name(uri, unit.root)
    with open_rows(uri, unit.packed, storage) as stream:
        if unit.start:
            stream.seek(unit.start)
        number, place = unit.first_row - 1, unit.start
        for line in _whole(_lines(stream), name):
            if 0 <= unit.end <= place:
                return
            number += 1
            if isinstance(line, Refusal):
                yield f"{name}:{number}", default_id(unit, uri, number), line, 1.0
                continue
            content, size = line
            place += size
            if content is not None and not content.strip():
                continue
            row = parse_json(content) if content is not None else _too_large(size)
            yield f"{name}:{number}", default_id(unit, uri, number), row, min(1.0, (place - unit.start) / unit.cost)


def _lines(stream: IO[bytes]) -> Iterator[tuple[bytes | None, int]]:
    """(line, bytes); the line is None where it is too large to hold. Lines end at "\\n" only; U+2028 is text."""
    while line := stream.readline(MAX_ROW_BYTES + 1):
        size = len(line)
        if size <= MAX_ROW_BYTES:
            yield line, size
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(MAX_ROW_BYTES)
            size += len(line)
        yield None, size


def _whole(items: Iterator[Any], name: str) -> Iterator[Any]:
    """The items of a reader that may break off: a compressed file that is cut, a damaged page. The break is a Refusal, the last item."""
    try:
        yield from items
    except (EOFError, ValueError, csv.Error) as error:
        yield Refusal("unreadable_shard", f"{name} cannot be read from here on ({error})")
    except OSError as error:
        if error.errno is not None:  # the disk's or the network's
            raise
        yield Refusal("unreadable_shard", f"{name} cannot be read from here on ({error})")
    except Exception as error:  # zlib.error, lzma.LZMAError and pyarrow's own
        yield Refusal("unreadable_shard", f"{name} cannot be read from here on ({type(error).__name__}: {error})")


def _whole_file(stream: IO[bytes], name: str, what: str) -> bytes | Refusal:
    """All that a file holds, where it must be held whole."""
    content = next(_whole(iter(lambda: stream.read(MAX_WHOLE_BYTES + 1), None), name))
    if not isinstance(content, Refusal) and len(content) > MAX_WHOLE_BYTES:
        return Refusal("too_large", f"{name} has more than {MAX_WHOLE_BYTES:,} bytes, which must be held whole, as {what}")
    return content


def _too_large(size: int) -> Refusal:
    return Refusal("too_large", f"the row has {size:,} bytes; a row may have {MAX_ROW_BYTES:,}. Keep pictures in files of their own")


def _json_rows(unit: Unit, storage: Storage) -> Iterator[Row]:
    uri = unit.files[0]
    name = relative_name(uri, unit.root)
    with open_rows(uri, unit.packed, storage) as stream:
        if starts_array(stream):
            end = unit.end if unit.end >= 0 else None
            rows = _whole(array_rows(stream, unit.start, end), name)
            for number, found in enumerate(rows, start=unit.first_row):
                row, place = found if isinstance(found, tuple) else (found, unit.start)
                yield f"{name}[{number}]", default_id(unit, uri, number), row, min(1.0, (place - unit.start) / unit.cost)
            return
        value = _whole_file(stream, name, "a file that is one object; write its rows as an array or as JSON Lines")
    rows = [value] if isinstance(value, Refusal) else _rows_of_value(value)
    for number, row in enumerate(rows, start=1):
        yield f"{name}[{number}]", default_id(unit, uri, number), row, number / len(rows)


def _rows_of_value(content: bytes) -> list[Any]:
    """The rows of a file that is one JSON value, or several behind each other."""
    try:
        value = json.loads(decode_text(content, "the file"))
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):
            return list(concatenated_rows(content))
        return [Refusal("bad_row", f"not readable as JSON ({error})")]
    except Refusal as refusal:
        return [refusal]
    if not isinstance(value, dict):
        return [Refusal("bad_row", f"the file holds one {type(value).__name__}, not rows")]
    lists = {key: entry for key, entry in value.items() if isinstance(entry, list) and entry and isinstance(entry[0], dict)}
    if any(key in value for key in _NAMES_OF_ROWS) or len(lists) != 1:
        return [value]
    return next(iter(lists.values()))


def _csv_rows(unit: Unit, storage: Storage) -> Iterator[Row]:
    """Rows of a CSV or TSV file with a header. More fields than the header has means a comma that nobody quoted."""
    uri = unit.files[0]
    name = relative_name(uri, unit.root)
    with open_rows(uri, unit.packed, storage) as stream:
        found = _whole_file(stream, name, "a table; cut it into several files")
    try:
        if isinstance(found, Refusal):
            raise found
        text = decode_text(found, "the table")
    except Refusal as refusal:
        yield name, default_id(unit, uri, None), refusal, 1.0
        return
    csv.field_size_limit(MAX_ROW_BYTES)
    delimiter = "\t" if ".tsv" in uri.lower() else ","
    table = csv.DictReader(io.StringIO(text), delimiter=delimiter, restkey="", restval=None, strict=True)
    for number, row in enumerate(_whole(table, name), start=1):
        if isinstance(row, dict) and "" in row:
            fields = len(row) - 1 + len(row[""])
            row = Refusal("bad_row", f"the row has {fields} fields, the header {len(row) - 1}; quote texts that hold the separator")
        elif isinstance(row, dict) and None in row.values():
            missing = ", ".join(name for name, value in row.items() if value is None)
            row = Refusal("bad_row", f"the row has fewer fields than the header: {missing} missing")
        yield f"{name}:{number + 1}", default_id(unit, uri, number), row, min(1.0, number / max(1, text.count("\n")))


def _parquet_rows(unit: Unit, storage: Storage) -> Iterator[Row]:
    import pyarrow.parquet as pq

    uri = unit.files[0]
    name = relative_name(uri, unit.root)
    with open_seekable(uri, storage) as stream:
        file = pq.ParquetFile(stream)
        counts = [file.metadata.row_group(group).num_rows for group in range(unit.start, unit.end)]
        first, total, done = unit.first_row, max(1, sum(counts)), 0
        for group, count in zip(range(unit.start, unit.end), counts):
            number = first
            for row in _whole(_rows_of_group(file, group), name):
                if isinstance(row, Refusal):
                    lost = first + count - number
                    told = f"row group {group} of {name} cannot be read, {lost} of its rows are lost: {row.detail}"
                    row = Refusal("unreadable_shard", told)
                yield f"{name}:{number}", default_id(unit, uri, number), row, (done + number - first) / total
                number += 1
            first, done = first + count, done + count


def _rows_of_group(file: Any, group: int) -> Iterator[Any]:
    for batch in file.iter_batches(batch_size=64, row_groups=[group]):
        try:
            rows = batch.to_pylist()
        except (ValueError, OverflowError):  # text that is no UTF-8, dates that Python has none for: that row alone
            rows = [_row_alone(batch, number) for number in range(batch.num_rows)]
        yield from (_without_nulls(row) for row in rows)


def _row_alone(batch: Any, number: int) -> Any:
    try:
        return batch.slice(number, 1).to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return Refusal("bad_row", f"a value of the row cannot be read ({error})")


def _without_nulls(value: Any) -> Any:
    """Arrow fills every struct field; a null field means the key was absent."""
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    return value


def _text_rows(unit: Unit, storage: Storage) -> Iterator[Row]:
    for number, (uri, size) in enumerate(zip(unit.files, unit.sizes)):
        row: Any
        try:
            if size > MAX_TEXT_FILE_BYTES:
                raise Refusal("too_large", f"the document has {size:,} bytes; one may have {MAX_TEXT_FILE_BYTES:,}")
            row = {"text": decode_text(read_file(uri, storage), "the file").strip()}
        except Refusal as refusal:
            row = refusal
        except OSError as error:
            row = Refusal("bad_row", f"the file cannot be read ({error.strerror or error})")
        yield relative_name(uri, unit.root), default_id(unit, uri, None), row, number / len(unit.files)


def _image_rows(unit: Unit, storage: Storage) -> Iterator[Row]:
    beside: dict[str, list[str]] = {}
    for uri in unit.beside:
        beside.setdefault(uri.rpartition(".")[0], []).append(uri)
    stems = Counter(uri.rpartition(".")[0] for uri in unit.files)
    for number, uri in enumerate(unit.files):
        name, stem = relative_name(uri, unit.root), uri.rpartition(".")[0]
        row: Any
        try:
            if uri in unit.described:
                told = f"{name} has a row in a metadata table and {relative_name(beside[stem][0], unit.root)} beside it; which one counts?"
                raise Refusal("unknown_field", told)
            row = {**_caption(beside.get(stem, []), storage), "image": name}
        except Refusal as refusal:
            row = refusal
        row_id = default_id(unit, uri, None) if stems[stem] == 1 else name
        yield name, row_id, row, number / len(unit.files)


def _caption(files: list[str], storage: Storage) -> dict[str, Any]:
    """What the files beside an image say of it. Raises Refusal where two of them say different things."""
    row: dict[str, Any] = {}
    for uri in sorted(files, key=lambda name: SIDE_SUFFIXES.index(name.rpartition(".")[2].lower())):
        content = read_file(uri, storage)
        if uri.lower().endswith(".json"):
            parsed = parse_json(content)
            if isinstance(parsed, Refusal):
                raise parsed
            if not isinstance(parsed, dict):
                raise Refusal("bad_row", f"{uri.rsplit('/', 1)[-1]} is a {type(parsed).__name__}, not a JSON object")
            row = {**{key: value for key, value in parsed.items() if key not in ("file_name", "image", "images")}, **row}
            continue
        text = decode_text(content, uri.rsplit("/", 1)[-1]).strip()
        if text and row.get("text", text) != text:
            raise Refusal("unknown_field", "the .txt and the .caption beside the image hold different texts; which one counts?")
        if text:
            row["text"] = text
    return row
