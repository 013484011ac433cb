"""Files on local disk and on S3 behind one small set of functions; every request to S3 goes through `s3.retried`.

`read_ranges` is what streaming lives on: neighbouring ranges become one request (a gap of 64 KiB costs less than another round trip),
and larger requests are cut at 16 MiB and run in parallel. A range that ends behind the object's end comes back short: the caller knows
sample and shard and says so.
"""

from __future__ import annotations

import glob
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from terrace.errors import InputError
from terrace.recipe.schema import Storage
from terrace.storage.faults import is_no_bucket
from terrace.storage.s3 import DEFAULT_STORAGE, PARALLEL_REQUESTS, retried, s3

MERGE_GAP_BYTES = 64 * 1024
MAX_REQUEST_BYTES = 16 * 2**20
Range = tuple[int, int]  # (offset, size) in bytes


@dataclass(frozen=True)
class StoredFile:
    """One file of a listing. `version` changes when its content does: the ETag on S3, mtime in ns on disk."""

    uri: str
    size: int
    version: str


def is_remote(uri: str) -> bool:
    return "://" in uri and not uri.startswith("file://")


def local_path(uri: str) -> str:
    """An absolute path: workers on a cluster have another current folder."""
    return os.path.abspath(os.path.expanduser(uri.removeprefix("file://")))


def absolute(uri: str) -> str:
    """`uri` as it means the same in every process of this machine."""
    return uri.rstrip("/") if is_remote(uri) else local_path(uri)


def join(root: str, *names: str) -> str:
    """`root/name/...` for a local folder or an s3:// prefix."""
    return "/".join([root.rstrip("/") or "/", *(name.strip("/") for name in names)])


def relative_name(uri: str, root: str) -> str:
    """`uri` as seen from the folder `root`, or its base name if it does not lie below."""
    prefix = root.rstrip("/") + "/"
    return uri[len(prefix) :] if uri.startswith(prefix) else uri.rsplit("/", 1)[-1]


# ---------------------------------------------------------------- listing and whole files


def list_files(uri: str, storage: Storage = DEFAULT_STORAGE) -> list[StoredFile]:
    """Files below a folder, of a glob, or the one file named, sorted by URI. Hidden files are left out. Empty if nothing is there.

    Links are followed, but not in a circle. A link into nothing is listed with the version `dangling`: whoever needs it will say so.
    """
    if is_remote(uri):
        if not uri.startswith("s3://"):
            raise InputError(f"{uri}: files are read from folders and from s3://, not from {uri.partition('://')[0]}://; fetch them first")
        return _list_remote(uri, storage)
    path = local_path(uri)
    if os.path.isdir(path):
        found = list(_walk(path, frozenset()))
    elif os.path.isfile(path):
        found = [path]
    else:
        found = [name for name in glob.glob(path, recursive=True) if os.path.isfile(name)]
    root = path.rstrip("/") + "/" if os.path.isdir(path) else ""
    visible = [name for name in found if not any(part.startswith(".") for part in name.removeprefix(root).split("/") if part != "..")]
    return [_stored(name) for name in sorted(visible)]


def _walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Files below a folder; a folder that is one of those above it (a link in a circle) is not entered again."""
    facts = os.stat(folder)
    place = (facts.st_dev, facts.st_ino)
    if place in above:
        return
    for entry in os.scandir(folder):
        try:
            is_folder = entry.is_dir()
        except OSError:  # a link to itself
            is_folder = False
        if is_folder:
            yield from _walk(entry.path, above | {place})
        else:
            yield entry.path


def _stored(name: str) -> StoredFile:
    try:
        facts = os.stat(name)
    except OSError:
        return StoredFile(name, 0, "dangling")
    return StoredFile(name, facts.st_size, str(facts.st_mtime_ns))


def file_size(uri: str, storage: Storage = DEFAULT_STORAGE) -> int | None:
    """Bytes of a file, or None where there is none."""
    if not is_remote(uri):
        path = uri.removeprefix("file://")
        return os.path.getsize(path) if os.path.isfile(path) else None

    def size() -> int | None:
        try:
            return int(s3(storage).info(uri)["size"])
        except FileNotFoundError as error:
            if is_no_bucket(error):
                raise
            return None

    return retried(size, uri, storage)


def read_file(uri: str, storage: Storage = DEFAULT_STORAGE) -> bytes:
    """All bytes of a file. FileNotFoundError where there is none, StorageError when the storage fails for good."""
    if not is_remote(uri):
        return Path(uri.removeprefix("file://")).read_bytes()
    return retried(lambda: s3(storage).cat_file(uri), uri, storage)


def write_file(uri: str, data: bytes, storage: Storage = DEFAULT_STORAGE) -> None:
    """Write a whole file atomically: readers see the old content or the new, never a part."""
    if is_remote(uri):
        retried(lambda: s3(storage).pipe_file(uri, data), uri, storage, writes=True)  # one PUT: S3 shows it only when complete
        return
    with atomic_path(Path(uri.removeprefix("file://"))) as temporary:
        temporary.write_bytes(data)


def upload(local: Path, uri: str, storage: Storage = DEFAULT_STORAGE) -> None:
    """Move a finished local file to `uri`, atomically."""
    if is_remote(uri):
        retried(lambda: s3(storage).put_file(str(local), uri), uri, storage, writes=True)
        local.unlink()
        return
    target = Path(uri.removeprefix("file://"))
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(local, target)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that takes its place when the block ends well, and vanishes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def open_sequential(uri: str, storage: Storage = DEFAULT_STORAGE) -> Iterator[IO[bytes]]:
    """A file for reading front to back. On S3 in blocks of 16 MiB, each of them retried."""
    if not is_remote(uri):
        with open(uri.removeprefix("file://"), "rb", buffering=1 << 20) as file:
            yield file
        return
    size = file_size(uri, storage)
    if size is None:
        raise FileNotFoundError(uri)
    with io.BufferedReader(_RangeFile(uri, size, storage), buffer_size=MAX_REQUEST_BYTES) as file:
        yield file


# ---------------------------------------------------------------- ranges


def read_ranges(uri: str, ranges: Sequence[Range], storage: Storage = DEFAULT_STORAGE) -> list[bytes]:
    """The bytes of each (offset, size), in the order asked. Short or empty where the file ends before."""
    merged = merge_ranges(ranges)
    if is_remote(uri):
        blocks = _read_remote(uri, [span for span, _ in merged], storage)
    else:
        blocks = _read_local(uri.removeprefix("file://"), [span for span, _ in merged])
    results: list[bytes] = [b""] * len(ranges)
    for ((start, _), members), block in zip(merged, blocks):
        view = memoryview(block)
        for member in members:
            offset, size = ranges[member]
            results[member] = bytes(view[offset - start : offset - start + size])
    return results


def read_ranges_into(uri: str, ranges: Sequence[Range], buffers: Sequence[memoryview], storage: Storage = DEFAULT_STORAGE) -> list[int]:
    """The bytes of each (offset, size) into the buffer of that size, without a copy in between on disk; how many came of each."""
    if is_remote(uri):
        blocks = iter(read_ranges(uri, [wanted for wanted in ranges if wanted[1]], storage))  # nothing cannot be asked for
        lengths = []
        for (_, size), buffer in zip(ranges, buffers):
            block = next(blocks) if size else b""
            buffer[: len(block)] = block
            lengths.append(len(block))
        return lengths
    got = []
    with open(uri.removeprefix("file://"), "rb", buffering=0) as file:
        for (offset, size), buffer in zip(ranges, buffers):
            filled = 0
            while filled < size and (more := os.preadv(file.fileno(), [buffer[filled:]], offset + filled)):
                filled += more
            got.append(filled)
    return got


def merge_ranges(ranges: Sequence[Range], gap: int = MERGE_GAP_BYTES) -> list[tuple[Range, list[int]]]:
    """Ranges joined where the gap between them is at most `gap` bytes: [((offset, size), [numbers of the ranges inside])]."""
    order = sorted(range(len(ranges)), key=lambda number: ranges[number])
    merged: list[tuple[Range, list[int]]] = []
    for number in order:
        offset, size = ranges[number]
        if merged:
            (start, length), members = merged[-1]
            if offset <= start + length + gap:
                merged[-1] = ((start, max(length, offset + size - start)), [*members, number])
                continue
        merged.append(((offset, size), [number]))
    return merged


def _read_local(path: str, spans: list[Range]) -> list[bytes]:
    with open(path, "rb", buffering=0) as file:
        return [_pread(file.fileno(), offset, size) for offset, size in spans]


def _pread(descriptor: int, offset: int, size: int) -> bytes:
    block = os.pread(descriptor, size, offset)
    if len(block) in (0, size):
        return block
    parts, got = [block], len(block)
    while got < size and (block := os.pread(descriptor, size - got, offset + got)):
        parts.append(block)
        got += len(block)
    return b"".join(parts)


def _read_remote(uri: str, spans: list[Range], storage: Storage) -> list[bytes]:
    requests = [
        (number, at, min(MAX_REQUEST_BYTES, offset + size - at))
        for number, (offset, size) in enumerate(spans)
        for at in range(offset, offset + size, MAX_REQUEST_BYTES)
    ]
    parts: list[list[bytes]] = [[] for _ in spans]
    fetch = lambda request: _get_range(uri, request[1], request[2], storage)  # noqa: E731
    if len(requests) == 1:
        blocks = [fetch(requests[0])]
    else:
        with ThreadPoolExecutor(min(PARALLEL_REQUESTS, max(1, len(requests)))) as pool:
            blocks = list(pool.map(fetch, requests))
    for (number, _, _), block in zip(requests, blocks):
        parts[number].append(block)
    return [b"".join(blocks) for blocks in parts]


def _get_range(uri: str, offset: int, size: int, storage: Storage) -> bytes:

    def get() -> bytes:
        try:
            return s3(storage).cat_file(uri, start=offset, end=offset + size)
        except OSError as error:
            if "InvalidRange" in str(error) or "not satisfiable" in str(error):
                return b""  # the object ends before this range
            raise

    return retried(get, uri, storage)


# ---------------------------------------------------------------- S3


def _list_remote(uri: str, storage: Storage) -> list[StoredFile]:

    def listing() -> dict[str, dict[str, Any]]:
        filesystem = s3(storage)
        found = filesystem.find(uri, detail=True)
        if not found and any(mark in uri for mark in "*?["):  # as on disk: what has that very name comes before what a glob means
            return filesystem.glob(uri, detail=True)
        return found

    try:
        found = retried(listing, uri, storage)
    except FileNotFoundError:
        return []
    files = [
        StoredFile(f"s3://{name}", int(info["size"]), str(info.get("ETag", "")).strip('"'))
        for name, info in found.items()
        if info.get("type") == "file" and not name.rsplit("/", 1)[-1].startswith(".")
    ]
    return sorted(files, key=lambda file: file.uri)


class _RangeFile(io.RawIOBase):
    """An object on S3 as a raw seekable file; each read is one retried range request."""

    def __init__(self, uri: str, size: int, storage: Storage):
        super().__init__()
        self._uri, self._size, self._storage, self._at = uri, size, storage, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), MAX_REQUEST_BYTES, self._size - self._at)
        if size <= 0:
            return 0
        block = _get_range(self._uri, self._at, size, self._storage)
        buffer[: len(block)] = block
        self._at += len(block)
        return len(block)
