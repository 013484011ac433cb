"""An index as columns that the processes of a machine share: made once from its Parquet file, one group of rows after another.

They lie in `.columns` inside the index's folder; on S3, or where that cannot be written, in the user's cache folder, so once per
machine. The Parquet file stays what counts: columns made from another one are made again, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from terrace.data.index.columns import Columns, ColumnsWriter, made_once, writable
from terrace.recipe.schema import Storage
from terrace.storage.files import file_size, is_remote, join, open_sequential, read_file, read_ranges

SCALARS = {
    "id_hash": "u8", "text_hash": "u8", "shard": "i4", "fixed_tokens": "i4", "supervised_tokens": "i4", "target_place": "i4",
    "target_visuals": "i4", "target_coordinates": "i4",
}  # fmt: skip
LISTS = {
    "member": {"member_suffix": "i4", "member_offset": "i8", "member_size": "i8", "member_crc": "u4"},
    "image": {"width": "i4", "height": "i4", "image_hash": "u8"},
    "visual": {"visual_image": "i4", "visual_frames": "i4", "visual_place": "i4", "visual_coordinates": "i4"},
    "coordinate": {"coordinate_image": "i4", "coordinate_axis": "i1", "coordinate_value": "f8"},
    "cut": {"cuts": "i4"},
}
STARTS = "starts_"  # of the lists of a group: one value more than rows
IDS = ("id_bytes", "id_starts")
KIND = "kind_code"
DTYPES: dict[str, Any] = (
    SCALARS
    | {name: dtype for names in LISTS.values() for name, dtype in names.items()}
    | {f"{STARTS}{group}": "i8" for group in LISTS}
    | {IDS[0]: "u1", IDS[1]: "i8", KIND: "i1"}
)
FOOTER_BYTES = 2**16  # of the Parquet file: where its columns lie, and their smallest and largest values


def index_columns(folder: str, storage: Storage) -> Columns:
    """The columns of the finished index in `folder`, made if they are not there. FileNotFoundError where there is no index."""
    identity = _identity(folder, storage)
    return made_once(_place(folder), identity, lambda fresh: _make(folder, storage, fresh, identity))


def _place(folder: str) -> Path:
    beside = Path(folder.removeprefix("file://")) / ".columns"
    if not is_remote(folder) and (beside.is_dir() or writable(beside.parent)):
        return beside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "terrace" / "columns" / hashlib.sha256(folder.encode()).hexdigest()[:16]


def _identity(folder: str, storage: Storage) -> str:
    """Changes with the index's summary, and with the size or the footer of its Parquet file."""
    table = join(folder, "index.parquet")
    size = file_size(table, storage)
    if size is None:
        raise FileNotFoundError(table)
    start = max(0, size - FOOTER_BYTES)
    [footer] = read_ranges(table, [(start, size - start)], storage)
    return hashlib.sha256(b"%d" % size + footer + read_file(join(folder, "index.json"), storage)).hexdigest()


def _make(folder: str, storage: Storage, fresh: Path, identity: str) -> None:
    suffixes: dict[str, int] = {}
    kinds: dict[str, int] = {}
    writer, rows = ColumnsWriter(fresh, DTYPES), 0
    ends = dict.fromkeys([*LISTS, "id"], 0)
    writer.append(**{f"{STARTS}{group}": np.zeros(1, np.int64) for group in LISTS}, **{IDS[1]: np.zeros(1, np.int64)})
    try:
        for table in _row_groups(folder, storage):
            rows += table.num_rows
            writer.append(**{name: table[name].to_numpy(zero_copy_only=False) for name in SCALARS})
            writer.append(**{KIND: _codes(table["kind"], kinds)})
            for group, names in LISTS.items():
                for name in names:
                    values, lengths = _flat(table[name])
                    writer.append(**{name: _codes(values, suffixes) if name == "member_suffix" else values.to_numpy(zero_copy_only=False)})
                writer.append(**{f"{STARTS}{group}": ends[group] + np.cumsum(lengths)})
                ends[group] += int(lengths.sum())
            texts = [text.encode("utf-8") for text in table["id"].to_pylist()]
            id_ends = ends["id"] + np.cumsum([len(text) for text in texts], dtype=np.int64)
            writer.append(**{IDS[0]: np.frombuffer(b"".join(texts), np.uint8), IDS[1]: id_ends})
            ends["id"] += sum(map(len, texts))
        writer.finish({"identity": identity, "rows": rows, "suffixes": list(suffixes), "kinds": list(kinds)})
    finally:
        writer.close()


def _row_groups(folder: str, storage: Storage) -> Iterator[pa.Table]:
    with open_sequential(join(folder, "index.parquet"), storage) as stream:
        file = pq.ParquetFile(stream)
        for number in range(file.num_row_groups):
            yield file.read_row_group(number)


def _flat(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    """(values, int64 [N] how many each row has) of a list column."""
    lengths = [np.diff(chunk.offsets.to_numpy(zero_copy_only=False)).astype(np.int64) for chunk in column.chunks]
    values = pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type)
    return values, np.concatenate([np.zeros(0, np.int64), *lengths])


def _codes(column: pa.ChunkedArray, known: dict[str, int]) -> np.ndarray:
    """int32: the number of each text, in the order of their first appearance."""
    parts = [np.zeros(0, np.int32)]
    for chunk in column.chunks:
        encoded = chunk.dictionary_encode()
        numbers = [known.setdefault(text, len(known)) for text in encoded.dictionary.to_pylist()]
        parts.append(np.asarray(numbers, np.int32)[encoded.indices.to_numpy(zero_copy_only=False)])
    return np.concatenate(parts)
