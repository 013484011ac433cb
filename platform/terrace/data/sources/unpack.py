"""Compressed tars, as they are sometimes found, rewritten as plain ones: a sample inside a compressed tar has no byte offset.

Whether a tar is compressed is told from its first bytes, never from its name. A copy holds exactly what `gunzip` would leave, and its
samples get the ids that they would have then. Compressing pictures again saves under two per cent, so the copies are hardly larger
than what they are made of. gzip, bzip2, xz and zstd are known.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from terrace.data.sources.refusals import RefusedSample
from terrace.recipe.schema import Storage
from terrace.storage.files import StoredFile, is_remote, join, open_sequential, read_file, read_ranges, upload, write_file

BLOCK_BYTES = 2**20
MAX_EXPANSION = 200  # times the compressed size: text shrinks to a tenth, only a bomb goes further
PARALLEL_LOOKS = 16
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_ENDINGS = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".tar")


@dataclass(frozen=True)
class UnpackSettings:
    """What a worker needs beside its file."""

    folder: str  # of the source: copies go to `shards/`, receipts to `units/`
    root: str  # folder that names are shown relative to
    storage: Storage


def compression(head: bytes) -> str | None:
    """What the first bytes of a file say."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


def compressed_files(files: Sequence[StoredFile], storage: Storage) -> dict[int, str]:
    """Number in `files` -> compression, of those that are compressed. One small request each."""

    def look(file: StoredFile) -> str | None:
        return compression(read_ranges(file.uri, [(0, 6)], storage)[0])

    with ThreadPoolExecutor(PARALLEL_LOOKS) as pool:
        found = list(pool.map(look, files))
    return {number: name for number, name in enumerate(found) if name is not None}


def unpack_tar(
    settings: UnpackSettings, item: tuple[int, StoredFile, str, str], inside: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Write the plain copy of one (number, file, its name, compression) and its receipt {"shard", "size", "refused"}; reuse it if there.

    A file that breaks off in the middle is used up to there, and told.
    """
    number, file, name, method = item
    receipt_uri = join(settings.folder, "units", f"{number:06d}.json")
    try:
        return json.loads(read_file(receipt_uri, settings.storage))
    except FileNotFoundError:
        pass
    shard = join(f"{number:06d}", plain_name(name))
    target = join(settings.folder, "shards", shard)
    beside = None
    if not is_remote(target):
        beside = Path(target).parent  # same disk: the move is a rename
        beside.mkdir(parents=True, exist_ok=True)
    refused: list[RefusedSample] = []
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=beside) as folder, open_sequential(file.uri, settings.storage) as packed:
        local = Path(folder) / "plain.tar"
        size = 0
        with local.open("wb") as plain:
            for block in _blocks(packed, method, MAX_EXPANSION * file.size + BLOCK_BYTES):
                if isinstance(block, str):
                    refused.append(RefusedSample(name, name, "unreadable_shard", block))
                    break
                plain.write(block)
                size += len(block)
                if inside is not None:
                    inside(min(file.size, packed.tell()))
        upload(local, target, settings.storage)
    receipt = {"shard": shard, "size": size, "refused": [line.as_json() for line in refused]}
    write_file(receipt_uri, json.dumps(receipt).encode(), settings.storage)
    return receipt


def plain_name(name: str) -> str:
    """`deep/x.tar.gz` -> `deep-x.tar`, from which samples get the ids that they have in an unpacked `deep/x.tar`."""
    lower = name.lower()
    while ending := next((ending for ending in _ENDINGS if lower.endswith(ending)), None):
        lower = lower.removesuffix(ending)
    return name[: len(lower)].replace("/", "-") + ".tar"


def _blocks(packed: IO[bytes], method: str, most_bytes: int) -> Iterator[bytes | str]:
    """Decompressed blocks; at last a sentence if the rest cannot be had."""
    stream, size = opened(packed, method), 0
    while True:
        try:
            block = stream.read(BLOCK_BYTES)
        except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, ValueError) as error:
            yield f"it cannot be decompressed behind {size:,} bytes ({error}); what comes before is used"
            return
        except OSError as error:
            if type(error) is not OSError or error.errno is not None:  # the disk's, not the decompressor's
                raise
            yield f"it cannot be decompressed behind {size:,} bytes ({error}); what comes before is used"
            return
        if not block:
            return
        size += len(block)
        if size > most_bytes:
            yield f"it expands to more than {MAX_EXPANSION} times its size, like a decompression bomb; what comes before is used"
            return
        yield block


def opened(packed: IO[bytes], method: str) -> Any:
    """What a compressed file holds, for reading front to back."""
    if method == "zstd":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(packed, "r"), "zstd"), 2**20)
    return {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[method](packed, "rb")
