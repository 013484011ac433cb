"""Raw rows to shards: every sample checked, every refused one named, the rest written as WebDataset tars.

A source becomes `<out>/<source>/<fingerprint>/`: `shards/*.tar`, `refused.jsonl`, `ingest.json`. The fingerprint covers the source's
settings and the listing of its files (names, sizes, times), so unchanged input is never read again, a changed one never mixes
with old shards, and runs with other settings do not disturb each other. Work is cut into units; each writes its tars and then its
receipt, all by rename, so any number of workers may run, be killed and run again.

An image is decoded once here, with training's own decoder: what is truncated, no image, or a bomb never reaches training. That is
most of the cost (about 2 ms an image); a file that several rows share is checked once per worker. Image files are read, not
fingerprinted: after replacing an image under the same rows, touch the rows' file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from terrace.data.images import ImageDamage, decode_image
from terrace.data.parallel import Progress, run_units
from terrace.data.sources.conventions import ImageReference, convert_row, row_id
from terrace.data.sources.formats import Unit, plan_units, read_rows, source_files
from terrace.data.sources.placeholders import resolve_coordinates
from terrace.data.sources.refusals import REASONS, Refusal, RefusedSample
from terrace.data.sources.shards import ShardWriter
from terrace.data.sources.unpack import UnpackSettings, compressed_files, unpack_tar
from terrace.data.types import Sample
from terrace.errors import InputError
from terrace.recipe.schema import Data, Source, Storage
from terrace.storage.files import StoredFile, absolute, is_remote, join, read_file, relative_name, upload, write_file

INGEST_VERSION = 2  # part of the fingerprint: raised when ingest would write other shards for the same rows
CHECKED_IMAGES = 8_192  # remembered results of image checks per worker


@dataclass(frozen=True)
class Shard:
    """One tar of a source."""

    uri: str
    size: int
    version: str = ""  # of a shard found in the wild, to notice a later change


@dataclass(frozen=True)
class IngestReport:
    """What became of a source's rows. `in_place`: the source's own tars are indexed where they lie, `rewritten` of them as plain copies."""

    source: str
    folder: str
    fingerprint: str
    format: str
    shards: tuple[Shard, ...]
    samples: int
    refused: dict[str, int] = field(default_factory=dict)  # reason -> samples
    in_place: bool = False
    reused: bool = False
    rewritten: int = 0

    @property
    def refused_samples(self) -> int:
        return sum(self.refused.values())


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


def ingest_source(
    name: str, source: Source, data: Data, out_dir: str | Path, progress: Progress | None = None, use_ray: bool | None = None
) -> IngestReport:
    """Bring one source into shards below `out_dir`, or find that this has been done. Raises InputError when nothing is left of it."""
    format_name, files = source_files(name, source, data.storage)
    fingerprint = ingest_fingerprint(source, data, format_name, files)
    folder = join(absolute(str(out_dir)), name, fingerprint[:12])
    report = load_report(folder, data.storage)
    if report is not None:
        require_samples(name, source.uri, report.samples, report.refused, folder)
        return report
    if format_name == "webdataset":
        shards, unreadable = _plain_tars(name, files, folder, _folder_of(source.uri, files), data.storage, progress, use_ray)
        written = sum(shard.uri.startswith(folder + "/") for shard in shards)
        report = IngestReport(name, folder, fingerprint, format_name, shards, samples=-1, in_place=True, rewritten=written)
        _finish(report, unreadable, data.storage)
        return report
    settings = UnitSettings(
        name,
        source.kind,
        source.task,
        source.images_root and absolute(source.images_root),
        folder,
        data.shard_bytes,
        data.max_image_pixels,
        data.storage,
    )
    units = plan_units(format_name, files, _folder_of(source.uri, files), data.storage)
    receipts: list[dict[str, Any]] = [{} for _ in units]
    total, done = max(1, sum(unit.cost for unit in units)), 0
    what = f"ingest {name}"
    inside = None if progress is None else lambda part: progress(what, done + part, total)
    work, local_work = partial(ingest_unit, settings), partial(ingest_unit, settings, inside=inside)
    for number, receipt in run_units(work, units, [unit.cost for unit in units], use_ray, local_work):
        receipts[number] = receipt
        done += units[number].cost
        if progress is not None:
            progress(what, done, total)
    shards = tuple(Shard(join(folder, "shards", shard), size) for receipt in receipts for shard, size in receipt["shards"])
    refused = [RefusedSample(**line) for receipt in receipts for line in receipt["refused"]]
    reasons = dict(Counter(line.reason for line in refused).most_common())
    samples = sum(receipt["samples"] for receipt in receipts)
    report = IngestReport(name, folder, fingerprint, format_name, shards, samples, reasons)
    _finish(report, refused, data.storage)
    require_samples(name, source.uri, samples, reasons, folder)
    return report


def _plain_tars(
    name: str, files: list[StoredFile], folder: str, root: str, storage: Storage, progress: Progress | None, use_ray: bool | None
) -> tuple[tuple[Shard, ...], list[RefusedSample]]:
    """The tars where they lie, with plain copies of those that are compressed, in order."""
    shards = [Shard(file.uri, file.size, file.version) for file in files]
    packed = [(number, files[number], relative_name(files[number].uri, root), method)
              for number, method in compressed_files(files, storage).items()]  # fmt: skip
    costs = [file.size for _, file, _, _ in packed]
    total, done, refused = max(1, sum(costs)), 0, []
    what = f"unpack {name}"
    inside = None if progress is None else lambda part: progress(what, done + part, total)
    settings = UnpackSettings(folder, root, storage)
    work, local_work = partial(unpack_tar, settings), partial(unpack_tar, settings, inside=inside)
    for place, receipt in run_units(work, packed, costs, use_ray, local_work):
        shards[packed[place][0]] = Shard(join(folder, "shards", receipt["shard"]), receipt["size"])
        refused += [RefusedSample(**line) for line in receipt["refused"]]
        done += costs[place]
        if progress is not None:
            progress(what, done, total)
    return tuple(shards), sorted(refused, key=lambda line: line.origin)


def require_samples(name: str, uri: str, samples: int, refused: dict[str, int], folder: str) -> None:
    """InputError when a source has no healthy sample."""
    if samples == 0:
        told = "; ".join(f"{count} {reason} ({REASONS[reason]})" for reason, count in list(refused.items())[:3])
        raise InputError(
            f"source {name}: no sample of {uri} can be used: {told or 'it has no rows'}. Each is listed in {folder}/refused.jsonl"
        )


def ingest_fingerprint(source: Source, data: Data, format_name: str, files: list[StoredFile]) -> str:
    settings = {
        "version": INGEST_VERSION, "uri": source.uri, "format": format_name, "kind": source.kind, "task": source.task,
        "images_root": source.images_root, "shard_bytes": data.shard_bytes, "max_image_pixels": data.max_image_pixels,
        "files": [(file.uri, file.size, file.version) for file in files],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def load_report(folder: str, storage: Storage) -> IngestReport | None:
    """The report of a finished ingest, or None."""
    try:
        value = json.loads(read_file(join(folder, "ingest.json"), storage))
    except FileNotFoundError:
        return None
    value["shards"] = tuple(Shard(**shard | {"uri": shard_uri(folder, shard["uri"])}) for shard in value["shards"])
    return IngestReport(**value | {"reused": True, "folder": folder})


def _finish(report: IngestReport, refused: list[RefusedSample], storage: Storage) -> None:
    lines = "".join(json.dumps(line.as_json(), ensure_ascii=False) + "\n" for line in refused)
    write_file(join(report.folder, "refused.jsonl"), lines.encode("utf-8", "backslashreplace"), storage)
    value = asdict(report)
    value["shards"] = [shard | {"uri": stored_uri(report.folder, shard["uri"])} for shard in value["shards"]]
    write_file(join(report.folder, "ingest.json"), json.dumps(value, indent=1).encode(), storage)


def stored_uri(folder: str, uri: str) -> str:
    """A shard's URI as it is written down: relative below the source's folder, so that this may be moved or mounted elsewhere."""
    return uri.removeprefix(folder + "/")


def shard_uri(folder: str, stored: str) -> str:
    """The inverse of `stored_uri`."""
    return stored if is_remote(stored) or stored.startswith("/") else join(folder, stored)


def _folder_of(uri: str, files: list[StoredFile]) -> str:
    """The folder that origins and ids are shown relative to."""
    if len(files) == 1 or any(mark in uri for mark in "*?["):
        return os.path.commonpath([file.uri.rpartition("/")[0] for file in files]) if not is_remote(uri) else _common(files)
    return absolute(uri)


def _common(files: list[StoredFile]) -> str:
    parts = [file.uri.rpartition("/")[0].split("/") for file in files]
    same = [column[0] for column in zip(*parts) if len(set(column)) == 1]
    return "/".join(same)


# ---------------------------------------------------------------- one unit


def ingest_unit(settings: UnitSettings, unit: Unit, inside: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Write the shards of one unit and its receipt {"shards": [(name, bytes)], "samples", "refused"}; reuse it if it is there."""
    receipt_uri = join(settings.folder, "units", f"{unit.number:06d}.json")
    try:
        return json.loads(read_file(receipt_uri, settings.storage))
    except FileNotFoundError:
        pass
    images = ImageLoader(settings, unit)
    refused: list[RefusedSample] = []
    ids: set[str] = set()
    with _UnitWriter(settings, unit.number) as writer:
        last_told = time.monotonic()
        for origin, default_id, row, share in read_rows(unit, settings.storage):
            sample_id = row_id(row, default_id) if isinstance(row, dict) else default_id
            try:
                if isinstance(row, Refusal):
                    raise row
                sample, references = convert_row(row, default_id, settings.kind)
                if sample_id in ids:
                    raise Refusal("duplicate_id", f"an earlier row of {origin.rpartition(':')[0]} has the id {sample_id!r}")
                loaded = [images.load(reference) for reference in references]
                resolve_coordinates(sample.messages, [size for _, size in loaded])
                if settings.task is not None:
                    sample.metadata.setdefault("task", settings.task)
                writer.add(sample, [content for content, _ in loaded])
                ids.add(sample_id)
            except Refusal as refusal:
                refused.append(RefusedSample(origin, sample_id, refusal.reason, refusal.detail[:500]))
            if inside is not None and time.monotonic() - last_told > 0.5:
                last_told = time.monotonic()
                inside(int(unit.cost * share))
        shards = writer.finish()
    receipt = {"shards": shards, "samples": writer.samples, "refused": [line.as_json() for line in refused]}
    write_file(receipt_uri, json.dumps(receipt).encode(), settings.storage)
    return receipt


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


# ---------------------------------------------------------------- images


class ImageLoader:
    """Reads and checks the images that rows name, inside the folder that they may name."""

    def __init__(self, settings: UnitSettings, unit: Unit):
        self._settings = settings
        root = settings.images_root or unit.files[0].rpartition("/")[0]
        if unit.format == "image_folder":
            root = unit.root
        self._root = absolute(root)
        self._checked: dict[str, tuple[int, int] | Refusal] = {}

    def load(self, reference: ImageReference) -> tuple[bytes, tuple[int, int]]:
        """(bytes, (width, height)) of a healthy image. Raises Refusal."""
        if reference.data is not None:
            return reference.data, self._check(reference.data, reference.label)
        assert reference.path is not None
        uri = self._inside(reference.path)
        known = self._checked.get(uri)
        if isinstance(known, Refusal):
            raise known
        try:
            content = read_file(uri, self._settings.storage)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
            raise self._remember(uri, Refusal("missing_image", f"there is no file {reference.path} in {self._root}")) from None
        except OSError as error:  # name too long, no permission
            raise self._remember(uri, Refusal("missing_image", f"{reference.path}: {error.strerror}")) from error
        if known is None:
            try:
                known = self._check(content, reference.path)
            except Refusal as refusal:
                raise self._remember(uri, refusal) from None
            self._remember(uri, known)
        return content, known

    def _check(self, content: bytes, label: str) -> tuple[int, int]:
        try:
            height, width, _ = decode_image(content, self._settings.max_image_pixels).shape
        except ImageDamage as damage:
            raise Refusal(damage.reason, f"{label}: {damage.detail}") from damage
        return width, height

    def _remember(self, uri: str, result: Any) -> Any:
        if len(self._checked) >= CHECKED_IMAGES:
            self._checked.pop(next(iter(self._checked)))
        self._checked[uri] = result
        return result

    def _inside(self, path: str) -> str:
        """The URI of a row's image path, which must stay in the folder of images: rows may come from strangers."""
        parts = path.replace("\\", "/").split("/")
        if ".." in parts:
            raise Refusal("unsafe_path", f"{path!r} holds `..`; paths are relative to {self._root}")
        if is_remote(path):
            if not path.startswith(self._root.rstrip("/") + "/"):
                raise Refusal("unsafe_path", f"{path!r} lies outside {self._root}; set images_root to allow it")
            return path
        if path.startswith("/"):
            if is_remote(self._root) or not os.path.abspath(path).startswith(self._root.rstrip("/") + "/"):
                raise Refusal("unsafe_path", f"{path!r} lies outside {self._root}; set images_root to allow it")
            return os.path.abspath(path)
        if "\0" in path:
            raise Refusal("unsafe_path", "the path holds a zero byte")
        return join(self._root, path)


def iter_refused(folder: str, storage: Storage) -> Iterator[RefusedSample]:
    """Lines of a source's refused.jsonl."""
    for line in read_file(join(folder, "refused.jsonl"), storage).split(b"\n"):
        if line:
            yield RefusedSample(**json.loads(line))
