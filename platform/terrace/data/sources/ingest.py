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
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from terrace.data.parallel import Progress, run_units
from terrace.data.sources.ingest_unit import UnitSettings, ingest_unit
from terrace.data.sources.listing import Listing, list_source
from terrace.data.sources.planning import plan_units
from terrace.data.sources.refusals import REASONS, RefusedSample
from terrace.data.sources.unpack import UnpackSettings, compressed_files, unpack_tar
from terrace.errors import InputError
from terrace.recipe.schema import Data, Source, Storage
from terrace.storage.files import StoredFile, absolute, is_remote, join, read_file, relative_name, write_file

INGEST_VERSION = 3  # part of the fingerprint: raised when ingest would write other shards for the same rows


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
    ignored: dict[str, int] = field(default_factory=dict)  # entry of the source's `ignore` -> rows that had it
    rotated: int = 0  # pictures with an EXIF orientation, turned upright or (`exif: ignore`) left lying
    spelled: int = 0  # samples whose text spells special tokens (`special_tokens` says what becomes of them)
    renamed: int = 0  # samples whose id another sample has too: they got a suffix


def ingest_source(
    name: str, source: Source, data: Data, out_dir: str | Path, progress: Progress | None = None, use_ray: bool | None = None
) -> IngestReport:
    """Bring one source into shards below `out_dir`, or find that this has been done. Raises InputError when nothing is left of it."""
    listing = list_source(name, source, data.storage)
    files = listing.all_files
    fingerprint = ingest_fingerprint(source, data, listing)
    folder = join(absolute(str(out_dir)), name, fingerprint[:12])
    report = load_report(folder, data.storage)
    if report is not None:
        require_samples(name, source.uri, report.samples, report.refused, folder)
        return report
    root = folder_of(source.uri, files)
    tars = listing.files.get("webdataset", [])
    found, unreadable = _plain_tars(name, tars, folder, root, data.storage, progress, use_ray) if tars else ((), [])
    receipts = _ingest_rows(name, source, data, listing, folder, root, progress, use_ray)
    written = tuple(Shard(join(folder, "shards", shard), size) for receipt in receipts for shard, size in receipt["shards"])
    refused = [*unreadable, *(RefusedSample(**line) for receipt in receipts for line in receipt["refused"])]
    ignored: Counter[str] = Counter()
    for receipt in receipts:
        ignored.update(receipt["ignored"])
    report = IngestReport(
        name, folder, fingerprint, listing.name, (*found, *written),
        samples=-1 if tars else sum(receipt["samples"] for receipt in receipts),
        refused=dict(Counter(line.reason for line in refused).most_common()), in_place=bool(tars),
        rewritten=sum(shard.uri.startswith(folder + "/") for shard in found), ignored=dict(ignored),
        rotated=sum(receipt["rotated"] for receipt in receipts), renamed=sum(receipt["renamed"] for receipt in receipts),
        spelled=sum(receipt["spelled"] for receipt in receipts),
    )  # fmt: skip
    _finish(report, refused, data.storage)
    require_samples(name, source.uri, report.samples, report.refused, folder)
    return report


def _ingest_rows(
    name: str, source: Source, data: Data, listing: Listing, folder: str, root: str, progress: Progress | None, use_ray: bool | None
) -> list[dict[str, Any]]:
    """Everything of a listing that is not a tar, written into shards; the receipts of its units, in order."""
    settings = UnitSettings(
        name, source.kind, source.task, source.images_root and absolute(source.images_root), folder, data.shard_bytes,
        data.max_image_pixels, data.storage, tuple(source.ignore), source.exif, source.placeholders, source.special_tokens,
    )  # fmt: skip
    units = plan_units(listing, root, data.storage, source.datasets)
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
    return receipts


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


def ingest_fingerprint(source: Source, data: Data, listing: Listing) -> str:
    settings = {
        "version": INGEST_VERSION, "uri": source.uri, "format": listing.name, "kind": source.kind, "task": source.task,
        "images_root": source.images_root, "shard_bytes": data.shard_bytes, "max_image_pixels": data.max_image_pixels,
        "ignore": sorted(source.ignore), "exif": source.exif, "placeholders": source.placeholders, "special_tokens": source.special_tokens,
        "datasets": source.datasets,
        "files": [(file.uri, file.size, file.version) for file in listing.all_files], "told": listing.told,
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


def folder_of(uri: str, files: list[StoredFile]) -> str:
    """The folder that origins and ids are shown relative to."""
    if len(files) == 1 or any(mark in uri for mark in "*?["):
        return os.path.commonpath([file.uri.rpartition("/")[0] for file in files]) if not is_remote(uri) else _common(files)
    return absolute(uri)


def _common(files: list[StoredFile]) -> str:
    parts = [file.uri.rpartition("/")[0].split("/") for file in files]
    same = [column[0] for column in zip(*parts) if len(set(column)) == 1]
    return "/".join(same)


def iter_refused(folder: str, storage: Storage) -> Iterator[RefusedSample]:
    """Lines of a source's refused.jsonl."""
    for line in read_file(join(folder, "refused.jsonl"), storage).split(b"\n"):
        if line:
            yield RefusedSample(**json.loads(line))
