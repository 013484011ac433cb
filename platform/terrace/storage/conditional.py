"""Objects on S3 that several writers want: each write says which version it replaces, and loses if that is no longer there.

This is what leases, journals and fences rest on (`If-Match` and `If-None-Match` of S3's PUT). A conditional request that is tried
again after its answer was lost meets its own effect as a conflict, so a refused write looks at the object before it gives up:
bytes equal to its own mean that it went through. Contents must therefore be unique to their writer (a token, a time, an attempt).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terrace.errors import TerraceError
from terrace.recipe.schema import Storage
from terrace.storage.faults import StorageError, condition_refused, is_no_bucket, not_implemented
from terrace.storage.files import MAX_REQUEST_BYTES, read_ranges
from terrace.storage.s3 import DEFAULT_STORAGE, retried, s3

DOWNLOAD_BYTES = 8 * MAX_REQUEST_BYTES


class Changed(TerraceError):
    """The object is not the version that was to be replaced: somebody else has written it."""


@dataclass(frozen=True)
class Listed:
    """One object of a listing. `name` is relative to what was listed, `modified` seconds since the epoch by the storage's clock."""

    name: str
    size: int
    version: str
    modified: float


def read_versioned(uri: str, storage: Storage = DEFAULT_STORAGE) -> tuple[bytes, str] | None:
    """Content and version (ETag) of an object, None where there is none."""
    from fsspec.asyn import sync

    bucket, key = split(uri)

    def get() -> tuple[bytes, str] | None:
        filesystem = s3(storage)
        try:
            return sync(filesystem.loop, _get_object, filesystem, bucket, key)
        except FileNotFoundError as error:
            if is_no_bucket(error):
                raise
            return None

    return retried(get, uri, storage)


def write_if(uri: str, data: bytes, version: str | None, storage: Storage = DEFAULT_STORAGE) -> str:
    """Replace the object of that version (None: there must be no object) and return the new version. Raises Changed."""
    written = _put_if(uri, data, version, storage)
    if written is not None:
        return written
    found = read_versioned(uri, storage)
    if found is not None and found[0] == data:
        return found[1]
    raise Changed(f"{uri} was changed by somebody else")


def _put_if(uri: str, data: bytes, version: str | None, storage: Storage) -> str | None:
    """The new version, or None where the condition was refused."""
    bucket, key = split(uri)
    condition = {"IfMatch": f'"{version}"'} if version is not None else {"IfNoneMatch": "*"}

    def put() -> str | None:
        try:
            answer = s3(storage).call_s3("put_object", Bucket=bucket, Key=key, Body=data, **condition)
        except OSError as error:
            if condition_refused(error):
                return None
            raise
        return str(answer["ETag"]).strip('"')

    return retried(put, uri, storage, writes=True)


def ignored_conditions(prefix: str, storage: Storage = DEFAULT_STORAGE) -> list[str]:
    """Which of the two conditions the storage does not hold to, tried on a small object below `prefix`: four requests.

    `If-None-Match` (a write that must not replace) and `If-Match` (a write that replaces one version only). Raises InputError where
    nothing may be written there.
    """
    uri = f"{prefix.rstrip('/')}/.conditions-{uuid.uuid4().hex}"
    try:
        wrong = [
            condition
            for condition, version in (("If-None-Match", None), ("If-Match", "0" * 32))
            if _accepts_wrong(uri, condition, version, storage)
        ]
    finally:
        remove([uri], storage)
    return wrong


def _accepts_wrong(uri: str, condition: str, version: str | None, storage: Storage) -> bool:
    """Whether a write whose condition does not hold goes through. A service that does not know the header has no condition either."""
    try:
        if version is None:
            retried(lambda: s3(storage).call_s3("put_object", **_object(uri), Body=b"there"), uri, storage, writes=True)
        return _put_if(uri, condition.encode(), version, storage) is not None
    except StorageError as error:
        if not_implemented(error):
            return True
        raise


def _object(uri: str) -> dict[str, str]:
    bucket, key = split(uri)
    return {"Bucket": bucket, "Key": key}


def swap(uri: str, change: Callable[[bytes | None], bytes], storage: Storage = DEFAULT_STORAGE) -> bytes:
    """Read, change, write, until nobody came in between; what was written. `change` may raise to leave the object as it is."""
    while True:
        found = read_versioned(uri, storage)
        content = change(found[0] if found else None)
        try:
            write_if(uri, content, found[1] if found else None, storage)
        except Changed:
            continue
        return content


def list_objects(uri: str, storage: Storage = DEFAULT_STORAGE, deep: bool = True) -> list[Listed]:
    """Every object below a prefix (`deep` False: directly below it), by name. One request per thousand."""
    bucket, key = split(uri.rstrip("/") + "/")
    arguments = {"Bucket": bucket, "Prefix": key} | ({} if deep else {"Delimiter": "/"})
    found: list[Listed] = []
    while True:
        page = retried(lambda: s3(storage).call_s3("list_objects_v2", **arguments), uri, storage)
        for entry in page.get("Contents", ()):
            if name := entry["Key"].removeprefix(key):
                found.append(Listed(name, int(entry["Size"]), entry["ETag"].strip('"'), entry["LastModified"].timestamp()))
        if not page.get("IsTruncated"):
            return found
        arguments["ContinuationToken"] = page["NextContinuationToken"]


def store_copy(local: Path, uri: str, storage: Storage = DEFAULT_STORAGE) -> None:
    """Copy a local file to `uri`; it is visible only when it is whole. Large ones go up in parallel parts."""
    retried(lambda: s3(storage).put_file(str(local), uri), uri, storage, writes=True)


def fetch_copy(uri: str, size: int, local: Path, storage: Storage = DEFAULT_STORAGE) -> None:
    """Copy an object of `size` bytes to a local file, in parallel ranges. Raises StorageError if it has another size."""
    local.parent.mkdir(parents=True, exist_ok=True)
    with open(local, "wb") as file:
        for block in _blocks(uri, size, storage):
            file.write(block)
    if local.stat().st_size != size:
        raise StorageError(f"{uri} has {local.stat().st_size} bytes where {size} were expected: it was replaced while it was read")


def remove(uris: list[str], storage: Storage = DEFAULT_STORAGE) -> None:
    """Delete objects; those that are gone already are passed over."""
    for uri in uris:
        retried(lambda uri=uri: s3(storage).call_s3("delete_object", **_object(uri)), uri, storage, writes=True)


def copy_object(source: str, target: str, storage: Storage = DEFAULT_STORAGE) -> None:
    """Copy within the storage, without the bytes coming here."""
    retried(lambda: s3(storage).cp_file(source, target), source, storage, writes=True)


def split(uri: str) -> tuple[str, str]:
    """(bucket, key) of an s3:// URI."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


async def _get_object(filesystem: Any, bucket: str, key: str) -> tuple[bytes, str]:
    answer = await filesystem._call_s3("get_object", Bucket=bucket, Key=key)
    return await answer["Body"].read(), str(answer["ETag"]).strip('"')


def _blocks(uri: str, size: int, storage: Storage) -> Iterator[bytes]:
    for offset in range(0, size, DOWNLOAD_BYTES):
        yield read_ranges(uri, [(offset, min(DOWNLOAD_BYTES, size - offset))], storage)[0]
