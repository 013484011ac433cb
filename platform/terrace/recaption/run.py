"""`terrace recaption`: a source's shards in, shards of captions out, part by part.

A part is a stretch of samples of one shard. Its tar and then its receipt appear by rename, so whatever is killed goes on with the parts
that have no receipt, and nothing is lost or there twice. The folder: `shards/*.tar`, `parts/*.json` (receipts), `settings.json` (what all
of it was made with), and when everything is there `refused.jsonl` and `recaption.json`, the counts.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from terrace.data.parallel import Progress
from terrace.data.sources.conventions import Rules
from terrace.data.sources.ingest import IngestReport, Shard
from terrace.data.sources.refusals import Refusal, RefusedSample
from terrace.data.sources.shard_walk import Group, scan_shard
from terrace.data.sources.shard_writing import ShardWriter
from terrace.errors import InputError
from terrace.evaluate.processes import in_processes
from terrace.evaluate.replies import Settings
from terrace.recaption.captions import Kept, Models, NotOne, Pictured, keep_fitting, pictured
from terrace.recipe.schema import Data, Source
from terrace.recipe.schema_recaption import Recaption
from terrace.storage.files import absolute, is_remote, join, read_file, upload, write_file

VERSION = 1
ENDS = 2**16  # bytes of a model's file, from either end, that its mark holds


@dataclass(frozen=True)
class Job:
    """One entry of `recaption`, over what ingest made of its source."""

    name: str
    wanted: Recaption
    source: Source
    data: Data
    report: IngestReport
    settings: Settings

    @property
    def folder(self) -> str:
        return absolute(self.wanted.out)


@dataclass(frozen=True)
class Part:
    shard: int
    number: int
    first: int  # place in the shard of its first group
    groups: list[Group]
    ending: Refusal | None = None  # why the shard cannot be read behind it
    place: int = 0  # bytes of the shard up to its end


def run(job: Job, progress: Progress | None = None) -> dict[str, Any]:
    """Do what is not done, and the counts of everything. Raises InputError where the folder has something else, or nothing is kept."""
    mark = settings_mark(job)
    found = read_json(job, "settings.json")
    if found is not None and found != mark:
        changed = ", ".join(sorted(key for key in mark if mark[key] != found.get(key)))
        raise InputError(
            f"recaption {job.name}: {job.folder} holds what was made with another {changed}; name another `out`, or remove that folder"
        )
    write_file(join(job.folder, "settings.json"), json.dumps(mark, indent=1).encode(), job.data.storage)
    report = read_json(job, "recaption.json")
    if report is None:
        if not is_remote(job.folder):
            for left in Path(job.folder).glob(".writing-*"):  # of a killed one
                shutil.rmtree(left, ignore_errors=True)
        done = job_parts(job, progress)
        report = finish(job, done)
    if not sum(report["kept"].values()):
        told = ", ".join(f"{count} {reason}" for reason, count in report["refused"].items())
        raise InputError(f"recaption {job.name}: no caption was kept ({told}). Each is listed in {job.folder}/refused.jsonl")
    return report


def job_parts(job: Job, progress: Progress | None) -> list[tuple[int, int]]:
    """All parts, each with a receipt by now."""
    workers = job.settings.workers
    if workers == 1:
        return share_of_worker(job, 0, progress)
    shares = in_processes([partial(share_of_worker, job, worker) for worker in range(workers)], "recaption")
    return sorted(part for share in shares for part in share)


def share_of_worker(job: Job, worker: int, progress: Progress | None = None) -> list[tuple[int, int]]:
    """Make the parts that fall to a worker. Models are loaded for the first part that has no receipt."""
    from terrace.recaption.models import open_models

    done, opened, total = [], None, max(1, sum(shard.size for shard in job.report.shards))
    before = 0
    with tempfile.TemporaryDirectory() if is_remote(job.folder) else nullcontext() as local:
        for number, shard in enumerate(job.report.shards):
            for part in parts_of(number, shard, job):
                if (part.shard + part.number) % job.settings.workers != worker:
                    continue
                if read_json(job, receipt_name(part)) is None:
                    opened = opened or open_models(job.wanted, job.settings, worker)
                    make_part(job, part, shard, opened, Path(local) if local else None)
                done.append((part.shard, part.number))
                if progress is not None:
                    progress(f"recaption {job.name}", before + part.place, total)
            before += shard.size
    if opened is not None:
        opened.close()
    return done


def parts_of(number: int, shard: Shard, job: Job) -> Iterator[Part]:
    """The stretches of a shard; at least one, that says if nothing of it can be read."""
    groups: list[Group] = []
    count, part, ending, size = 0, 0, None, job.wanted.samples_per_shard
    walk = scan_shard(shard.uri, job.data.storage)
    while True:
        try:
            group = next(walk, None)
        except Refusal as refusal:
            group, ending = None, refusal
        if group is None or len(groups) == size:
            place = groups[-1].members[-1].offset if groups and groups[-1].members else 0
            yield Part(number, part, count - len(groups), groups, ending, shard.size if group is None else place)
            part, groups = part + 1, []
        if group is None:
            return
        groups.append(group)
        count += 1


def make_part(job: Job, part: Part, shard: Shard, models: Models, local: Path | None) -> None:
    """Write the part's tar, if anything is kept, and its receipt."""
    name = shard.uri.rpartition("/")[2]
    pictures, refused = readable(job, part, name)
    kept = keep_fitting(pictures, job.wanted, models)
    written = write_shard(job, part, kept, local)
    receipt = {
        "shard": written, "samples": len(part.groups), "pictures": len(pictures), "kept": kept.counts,
        "refused": [line.as_json() for line in [*refused, *kept.refused]],
    }  # fmt: skip
    write_file(join(job.folder, receipt_name(part)), json.dumps(receipt).encode("utf-8", "backslashreplace"), job.data.storage)


def readable(job: Job, part: Part, shard: str) -> tuple[list[Pictured], list[RefusedSample]]:
    """Samples of a part that have one healthy picture, and the others."""
    pictures, refused, stem, rules = [], [], shard.removesuffix(".tar"), Rules.of(job.source)
    for place, group in enumerate(part.groups, start=part.first):
        try:
            pictures.append(pictured(group, stem, shard, place, job.source, rules, job.data.max_image_pixels))
        except NotOne as error:
            refused.append(RefusedSample(f"{shard}:{group.key}", f"{stem}-{group.key}", "not_one_picture", str(error)[:500]))
        except Refusal as refusal:
            refused.append(RefusedSample(f"{shard}:{group.key}", f"{stem}-{group.key}", refusal.reason, refusal.detail[:500]))
    if part.ending is not None:
        refused.append(RefusedSample(shard, shard, part.ending.reason, part.ending.detail[:500]))
    return pictures, refused


def write_shard(job: Job, part: Part, kept: Kept, local: Path | None) -> tuple[str, int] | None:
    """(name, bytes) of the tar; None where nothing is kept."""
    if not kept.samples:
        return None
    name = f"{job.name}-{part.shard:06d}-{part.number:04d}.tar"
    if local is None:
        Path(job.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=local or job.folder) as folder:
        path = Path(folder) / name
        with closing(ShardWriter(path)) as writer:
            for sample, image in kept.samples:
                writer.add(sample, [image])
        size = path.stat().st_size
        upload(path, join(job.folder, "shards", name), job.data.storage)
    return name, size


def finish(job: Job, parts: list[tuple[int, int]]) -> dict[str, Any]:
    """The counts of all receipts, written last."""
    receipts = [read_json(job, receipt_name(Part(shard, number, 0, []))) for shard, number in parts]
    refused = [line for receipt in receipts for line in receipt["refused"]]
    kept: Counter[str] = Counter(dict.fromkeys(job.wanted.texts, 0))
    for receipt in receipts:
        kept.update(receipt["kept"])
    report = {
        "name": job.name, "source": job.wanted.source, "shards": join(job.folder, "shards"),
        "samples": sum(receipt["samples"] for receipt in receipts), "pictures": sum(receipt["pictures"] for receipt in receipts),
        "kept": dict(kept), "refused": dict(Counter(line["reason"] for line in refused).most_common()),
        "bytes": sum(receipt["shard"][1] for receipt in receipts if receipt["shard"]),
    }  # fmt: skip
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in refused)
    write_file(join(job.folder, "refused.jsonl"), lines.encode("utf-8", "backslashreplace"), job.data.storage)
    write_file(join(job.folder, "recaption.json"), json.dumps(report, indent=1).encode(), job.data.storage)
    return report


def settings_mark(job: Job) -> dict[str, Any]:
    """What the result depends on, as JSON reads it back."""
    wanted = job.wanted.model_dump(mode="json", exclude={"out"})
    models = {part: model_mark(Path(place)) for part in ("captioner", "filter") if (place := wanted[part]) is not None}
    how = {"precision": job.settings.precision, "engine": job.settings.engine}
    return {"version": VERSION, "rows": job.report.fingerprint, **how, **wanted, **{f"{part}_files": mark for part, mark in models.items()}}


def model_mark(directory: Path) -> str:
    """sha256 of a model directory's files: their names, sizes, and ends. Raises InputError where it is no model directory."""
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: no config.json; name a model directory, for example RUN_DIR/stages/NN-name/final")
    digest = hashlib.sha256()
    for file in sorted(path for path in directory.iterdir() if path.is_file()):
        size = file.stat().st_size
        with open(file, "rb") as opened:
            digest.update(f"{file.name}:{size}:".encode() + opened.read(ENDS))
            opened.seek(max(0, size - ENDS))
            digest.update(opened.read())
    return digest.hexdigest()


def receipt_name(part: Part) -> str:
    return f"parts/{part.shard:06d}-{part.number:04d}.json"


def read_json(job: Job, name: str) -> Any:
    try:
        return json.loads(read_file(join(job.folder, name), job.data.storage))
    except FileNotFoundError:
        return None
