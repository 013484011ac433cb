"""One unit of rows to shards: each row converted, its pictures checked, written or refused, and a receipt for all of it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32

from terrace.data.sources.conventions import Rules, convert_row, row_id
from terrace.data.sources.formats import Unit
from terrace.data.sources.image_loader import ImageLoader
from terrace.data.sources.placeholders import resolve_coordinates
from terrace.data.sources.readers import read_rows
from terrace.data.sources.refusals import Refusal, RefusedSample
from terrace.data.sources.running_text import alternatives
from terrace.data.sources.shard_writing import ShardWriter
from terrace.data.types import Sample
from terrace.recipe.schema import Storage
from terrace.storage.faults import StorageError
from terrace.storage.files import is_remote, join, read_file, upload, write_file


@dataclass(frozen=True)
class UnitSettings:
    """What a worker needs beside its unit."""

    source: str
    kind: str
    task: str | None
    images_root: str | None
    folder: str
    shard_bytes: int
    max_image_pixels: int
    storage: Storage
    ignore: tuple[str, ...] = ()
    exif: str = "apply"
    placeholders: str = "read"
    special_tokens: str = "text"


def ingest_unit(settings: UnitSettings, unit: Unit, inside: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Write the shards of one unit and its receipt; reuse it if it is there.

    The receipt: {"shards": [(name, bytes)], "samples", "refused", "ignored": {entry: rows}, "rotated", "renamed", "spelled"}.
    """
    receipt_uri = join(settings.folder, "units", f"{unit.number:06d}.json")
    try:
        return json.loads(read_file(receipt_uri, settings.storage))
    except FileNotFoundError:
        pass
    images = ImageLoader(settings, unit)
    rules = Rules.of(settings)
    repeats = _Repeats()
    refused: list[RefusedSample] = []
    with _UnitWriter(settings, unit.number) as writer:
        last_told = time.monotonic()
        for origin, default_id, whole_row, share in read_rows(unit, settings.storage):
            rows = alternatives(whole_row, settings.kind)
            for number, row in enumerate(rows):
                own_id = default_id if len(rows) == 1 else f"{default_id}-{number}"
                sample_id = row_id(row, own_id) if isinstance(row, dict) else own_id
                try:
                    sample, contents = read_sample(row, own_id, settings, rules, images)
                    if sample_id != own_id:
                        repeats.check(sample, contents)
                    writer.add(sample, contents)
                except Refusal as refusal:
                    refused.append(RefusedSample(origin, sample_id, refusal.reason, refusal.detail[:500]))
            if inside is not None and time.monotonic() - last_told > 0.5:
                last_told = time.monotonic()
                inside(int(unit.cost * share))
        shards = writer.finish()
    receipt = {
        "shards": shards, "samples": writer.samples, "refused": [line.as_json() for line in refused], "ignored": dict(rules.ignored),
        "rotated": images.rotated, "renamed": repeats.renamed, "spelled": rules.spelled,
    }  # fmt: skip
    write_file(receipt_uri, json.dumps(receipt).encode(), settings.storage)
    return receipt


def read_sample(row: Any, default_id: str, settings: UnitSettings, rules: Rules, images: ImageLoader) -> tuple[Sample, list[bytes]]:
    """A row's sample and its images' bytes. Raises Refusal, and beside it only what the storage raises."""
    if isinstance(row, Refusal):
        raise row
    try:
        sample, references = convert_row(row, default_id, settings.kind, rules)
        loaded = [images.load(reference) for reference in references]
        resolve_coordinates(sample.messages, [size for _, size in loaded])
    except (Refusal, StorageError, OSError):
        raise
    except Exception as error:
        raise Refusal("bad_row", f"the row cannot be understood ({type(error).__name__}: {error})") from error
    if settings.task is not None:
        sample.metadata.setdefault("task", settings.task)
    return sample, [content for content, _ in loaded]


class _Repeats:
    """The samples of a unit by the ids that rows give themselves: a true repeat is refused.

    Ids that name a picture, or count from 0 in every file, are ordinary; the index tells their samples apart.
    """

    def __init__(self) -> None:
        self._contents: dict[str, set[int]] = {}
        self.renamed = 0

    def check(self, sample: Sample, images: list[bytes]) -> None:
        try:
            content = hash((json.dumps(sample.messages, sort_keys=True), *(crc32(image) for image in images)))
        except (TypeError, ValueError) as error:  # bytes or dates from Parquet inside `tools`
            raise Refusal("bad_row", f"the row holds what JSON cannot ({error})") from error
        before = self._contents.setdefault(sample.id, set())
        if content in before:
            raise Refusal("duplicate_id", f"an earlier row with the id {sample.id!r} has the same text and images")
        self.renamed += bool(before)
        before.add(content)


class _UnitWriter:
    """Cuts a unit's samples into shards of about `shard_bytes`; each appears under its name only when complete."""

    def __init__(self, settings: UnitSettings, unit: int):
        self._settings, self._unit = settings, unit
        self._local: tempfile.TemporaryDirectory[str] | None = None
        self._writer: ShardWriter | None = None
        self._path: Path | None = None
        self._shards: list[tuple[str, int]] = []
        self.samples = 0

    def __enter__(self) -> _UnitWriter:
        folder = join(self._settings.folder, "shards")
        if is_remote(folder):
            self._local = tempfile.TemporaryDirectory(prefix="terrace-ingest-")
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._local = tempfile.TemporaryDirectory(prefix=".writing-", dir=folder)  # same disk: the move is a rename
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.close()
        assert self._local is not None
        self._local.cleanup()

    def add(self, sample: Sample, images: list[bytes]) -> None:
        if self._writer is None:
            assert self._local is not None
            name = f"{self._settings.source}-{self._unit:06d}-{len(self._shards):03d}.tar"
            self._path = Path(self._local.name) / name
            self._writer = ShardWriter(self._path)
        self._writer.add(sample, images)
        self.samples += 1
        if self._writer.size >= self._settings.shard_bytes:
            self._cut()

    def finish(self) -> list[tuple[str, int]]:
        if self._writer is not None and self._writer.samples:
            self._cut()
        return self._shards

    def _cut(self) -> None:
        assert self._writer is not None
        assert self._path is not None
        self._writer.close()
        size = self._path.stat().st_size
        upload(self._path, join(self._settings.folder, "shards", self._path.name), self._settings.storage)
        self._shards.append((self._path.name, size))
        self._writer = None


