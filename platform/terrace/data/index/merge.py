"""The parts of an index joined: in the order of the shards, each sample under an id of its own, each true repeat once.

Ids that name a picture, or count from 0 in every file, are ordinary: a sample whose id came before is left out only if its files are the
same, and gets a suffix (`id-2`) if they are not. No more than one part is in memory, and of it only what two ids share is looked at.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from terrace.data.sources.refusals import RefusedSample
from terrace.recipe.schema import Storage
from terrace.storage.files import join, read_file, upload, write_file


def id_hash(sample_id: str) -> int:
    """64 bits of an id, the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def merge_parts(folder: str, shards: int, schema: pa.Schema, storage: Storage) -> tuple[int, int, list[RefusedSample]]:
    """Join the part files in shard order. Returns (samples, renamed ones, refused duplicates).

    A sample whose id came before is left out if its files are the same, and gets a suffix if they are not.
    """
    parts = [join(folder, "parts", f"{number:06d}.parquet") for number in range(shards)]
    hashes = [_read_parquet(part, storage, ["id_hash"])["id_hash"].to_numpy() for part in parts]
    values, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]), return_counts=True)
    doubtful = set(values[counts > 1].tolist())  # small: only ids whose hash occurs more than once are compared as text
    seen: dict[str, set[tuple[int, ...]]] = {}
    refused: list[RefusedSample] = []
    samples = renamed = 0
    with tempfile.TemporaryDirectory(prefix="terrace-index-") as beside:
        local = Path(beside) / "index.parquet"
        with pq.ParquetWriter(local, schema, compression="zstd") as writer:
            for part, part_hashes in zip(parts, hashes):
                table = _read_parquet(part, storage)
                suspects = [row for row, value in enumerate(part_hashes.tolist()) if value in doubtful] if doubtful else []
                if suspects:
                    table, again, lines = _without_repeats(table, suspects, seen, values)
                    renamed += again
                    refused += lines
                writer.write_table(table)
                samples += table.num_rows
        _publish(local, join(folder, "index.parquet"), storage)
    return samples, renamed, refused


def _without_repeats(
    table: pa.Table, suspects: list[int], seen: dict[str, set[tuple[int, ...]]], hashes: np.ndarray
) -> tuple[pa.Table, int, list[RefusedSample]]:
    """A part's table with other ids for samples that share theirs, and without true repeats; how many of the first, lines of the second."""
    ids, keep = table["id"].to_pylist(), np.ones(table.num_rows, bool)
    refused, renamed = [], 0
    for row in suspects:
        sample_id, content = ids[row], tuple(table["member_crc"][row].as_py() + table["member_size"][row].as_py())
        before = seen.setdefault(sample_id, set())
        if content in before:
            keep[row] = False
            shard = f"shard {table['shard'][row].as_py()}"
            refused.append(RefusedSample(shard, sample_id, "duplicate_id", "an earlier sample has its id, text and images"))
            continue
        before.add(content)
        if len(before) > 1:
            renamed += 1
            number = len(before)
            while f"{sample_id}-{number}" in seen or _holds(hashes, id_hash(f"{sample_id}-{number}")):
                number += 1
            ids[row] = f"{sample_id}-{number}"
            seen[ids[row]] = {content}
    if renamed:
        table = table.set_column(0, "id", pa.array(ids, pa.string()))
        table = table.set_column(1, "id_hash", pa.array([id_hash(sample_id) for sample_id in ids], pa.uint64()))
    return table.filter(pa.array(keep)), renamed, refused


def _holds(values: np.ndarray, value: int) -> bool:
    """Whether sorted uint64 values hold this one."""
    place = int(np.searchsorted(values, np.uint64(value)))
    return place < len(values) and int(values[place]) == value


def write_parquet(table: pa.Table, uri: str, storage: Storage) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_file(uri, sink.getvalue().to_pybytes(), storage)


def _read_parquet(uri: str, storage: Storage, columns: list[str] | None = None) -> pa.Table:
    # `read_table` goes through the dataset machinery: several times the seconds of the file itself, for a part of a few hundred rows
    return pq.ParquetFile(pa.BufferReader(read_file(uri, storage))).read(columns=columns, use_threads=False)


def _publish(local: Path, uri: str, storage: Storage) -> None:
    if "://" in uri:
        upload(local, uri, storage)
    else:  # another disk perhaps: copied, then renamed
        write_file(uri, local.read_bytes(), storage)
