"""Shards to an index: one Parquet per source that says of every healthy sample where its bytes lie and how long it is.

`<source folder>/index-<tokenizer>/`: `index.parquet` (columns below), `index.json` (shards, counts), `refused.jsonl` (ingest's and the
index's own). Made shard by shard, in this process or as a Ray Data job; a finished shard leaves a part file, so a restart goes on
where it stopped, and no more than one sample's bytes and one shard's rows are in memory anywhere. The merge keeps the shards'
order, whatever order they finished in.

The index depends on the tokenizer (token counts) but on no resolution: lengths at any resolution are arithmetic on its columns. It
does not depend on seed, holdout or caps either; those are applied when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from terrace.data.images import ImageDamage, image_size, looks_complete
from terrace.data.parallel import Progress, run_units
from terrace.data.sources.ingest import IngestReport, Shard, iter_refused, require_samples, stored_uri
from terrace.data.sources.placeholders import resolve_coordinates
from terrace.data.sources.refusals import Refusal, RefusedSample
from terrace.data.sources.shards import Group, sample_of_members, scan_shard, used_suffixes
from terrace.data.template import Measure, measure_prompt, measure_sample
from terrace.data.tokenizer import TextTokenizer, load_tokenizer
from terrace.data.types import Sample
from terrace.errors import InputError
from terrace.families.interface import Family
from terrace.recipe.schema import Source, Storage
from terrace.storage.files import DEFAULT_STORAGE, absolute, join, read_file, relative_name, upload, write_file

INDEX_VERSION = 1

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("id_hash", pa.uint64()),  # of the id; seeded choices (holdout, caps) order by a mix of it and the seed
        ("kind", pa.string()),
        ("shard", pa.int32()),
        ("member_suffix", pa.list_(pa.string())),  # per file of the sample: name behind the key, place in the shard, checksum
        ("member_offset", pa.list_(pa.int64())),
        ("member_size", pa.list_(pa.int64())),
        ("member_crc", pa.list_(pa.uint32())),
        ("width", pa.list_(pa.int32())),  # per image of the sample, in order
        ("height", pa.list_(pa.int32())),
        ("fixed_tokens", pa.int32()),  # the fields of `template.Measure`
        ("supervised_tokens", pa.int32()),
        ("visual_image", pa.list_(pa.int32())),
        ("visual_frames", pa.list_(pa.int32())),
        ("visual_place", pa.list_(pa.int32())),
        ("coordinate_image", pa.list_(pa.int32())),
        ("coordinate_axis", pa.list_(pa.int8())),
        ("coordinate_value", pa.list_(pa.float64())),
        ("cuts", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True)
class IndexSettings:
    """What a worker needs beside its shard."""

    source: str
    kind: str
    task: str | None
    root: str  # folder that shard names are shown relative to
    folder: str
    tokenizer_dir: str
    family: Family
    max_image_pixels: int
    check_ends: bool  # shards from elsewhere: look at the end of each image file for a cut
    storage: Storage


def build_index(
    name: str,
    source: Source,
    report: IngestReport,
    tokenizer: TextTokenizer,
    family: Family,
    max_image_pixels: int = 64_000_000,
    storage: Storage = DEFAULT_STORAGE,
    progress: Progress | None = None,
    use_ray: bool | None = None,
) -> str:
    """The URI of the folder that holds the source's index, built unless it is there. Raises InputError when no sample is healthy."""
    folder = index_folder(report, tokenizer, family)
    done = load_summary(folder, storage)
    if done is None:
        root = absolute(source.uri) if report.in_place else join(report.folder, "shards")
        settings = IndexSettings(
            name, source.kind, source.task, root, folder, str(tokenizer.directory), family, max_image_pixels, report.in_place,
            storage,
        )
        done = _build(settings, report, progress, use_ray)
    require_samples(name, source.uri, done["samples"], done["refused"], folder)
    return folder


def index_folder(report: IngestReport, tokenizer: TextTokenizer, family: Family) -> str:
    mark = hashlib.sha256(f"{INDEX_VERSION}:{tokenizer.fingerprint}:{family.name}:{family.version}".encode()).hexdigest()[:12]
    return join(report.folder, f"index-{mark}")


def load_summary(folder: str, storage: Storage = DEFAULT_STORAGE) -> dict[str, Any] | None:
    """`index.json` of a finished index, or None."""
    try:
        return json.loads(read_file(join(folder, "index.json"), storage))
    except FileNotFoundError:
        return None


def id_hash(sample_id: str) -> int:
    """64 bits of an id, the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2b(sample_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _build(settings: IndexSettings, report: IngestReport, progress: Progress | None, use_ray: bool | None) -> dict[str, Any]:
    items = list(enumerate(report.shards))
    receipts: list[dict[str, Any]] = [{} for _ in items]
    costs = [shard.size for shard in report.shards]
    total, done = max(1, sum(costs)), 0
    what = f"index {settings.source}"
    inside = None if progress is None else lambda part: progress(what, done + part, total)
    work, local_work = partial(index_shard, settings), partial(index_shard, settings, inside=inside)
    for number, receipt in run_units(work, items, costs, use_ray, local_work):
        receipts[number] = receipt
        done += costs[number]
        if progress is not None:
            progress(what, done, total)
    refused = list(iter_refused(report.folder, settings.storage))
    refused += [RefusedSample(**line) for receipt in receipts for line in receipt["refused"]]
    samples, duplicates = _merge(settings, len(items))
    refused += duplicates
    lines = "".join(json.dumps(line.as_json(), ensure_ascii=False) + "\n" for line in refused)
    write_file(join(settings.folder, "refused.jsonl"), lines.encode("utf-8", "backslashreplace"), settings.storage)
    summary = {
        "version": INDEX_VERSION, "source": settings.source, "kind": settings.kind, "samples": samples,
        "refused": dict(Counter(line.reason for line in refused).most_common()),
        "in_place": report.in_place,
        "shards": [
            {"uri": stored_uri(report.folder, shard.uri), "size": shard.size} for shard in report.shards
        ],
        "storage": settings.storage.model_dump(), "fingerprint": report.fingerprint,
    }  # fmt: skip
    write_file(join(settings.folder, "index.json"), json.dumps(summary, indent=1).encode(), settings.storage)
    return summary


# ---------------------------------------------------------------- one shard


def index_shard(settings: IndexSettings, item: tuple[int, Shard], inside: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Write the part file of one shard and its receipt {"samples", "refused"}; reuse it if it is there."""
    number, shard = item
    receipt_uri = join(settings.folder, "parts", f"{number:06d}.json")
    try:
        return json.loads(read_file(receipt_uri, settings.storage))
    except FileNotFoundError:
        pass
    tokenizer = load_tokenizer(settings.tokenizer_dir)
    rows: list[dict[str, Any]] = []
    refused: list[RefusedSample] = []
    shard_name = relative_name(shard.uri, settings.root)
    try:
        for count, group in enumerate(scan_shard(shard.uri, settings.storage)):
            stem = shard_name.removesuffix(".tar").replace("/", "-")
            default_id = f"{stem}-{group.key.replace('/', '-')}"
            try:
                rows.append(index_group(group, default_id, settings, tokenizer, number))
            except Refusal as refusal:
                refused.append(RefusedSample(f"{shard_name}:{group.key}", default_id, refusal.reason, refusal.detail[:500]))
            if inside is not None and count % 200 == 199:
                inside(min(shard.size, group.members[-1].offset))
    except Refusal as refusal:  # the shard from here on
        refused.append(RefusedSample(shard_name, shard_name, refusal.reason, refusal.detail))
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    _write_parquet(table, join(settings.folder, "parts", f"{number:06d}.parquet"), settings.storage)
    receipt = {"samples": len(rows), "refused": [line.as_json() for line in refused]}
    write_file(receipt_uri, json.dumps(receipt).encode(), settings.storage)
    return receipt


def index_group(group: Group, default_id: str, settings: IndexSettings, tokenizer: TextTokenizer, shard_number: int) -> dict[str, Any]:
    """The index row of one sample. Raises Refusal."""
    sample, images = sample_of_members(group.key, group.data, default_id, settings.kind)
    sizes = []
    for suffix in images:
        try:
            sizes.append(image_size(group.data[suffix], settings.max_image_pixels))
            if settings.check_ends and not looks_complete(group.data[suffix]):
                raise ImageDamage("truncated_image", "the file ends before the image does")
        except ImageDamage as damage:
            raise Refusal(damage.reason, f"{group.key}.{suffix}: {damage.detail}") from damage
    resolve_coordinates(sample.messages, sizes)
    try:
        measure = measure_any(sample, sizes, tokenizer, settings.family)
    except InputError as error:
        raise Refusal("empty_answer" if "no text to learn" in str(error) else "unsupported", str(error)) from error
    members = {member.suffix: member for member in group.members}
    used = [members[suffix] for suffix in used_suffixes(group.data, images)]
    return {
        "id": sample.id,
        "id_hash": id_hash(sample.id),
        "kind": sample.kind,
        "shard": shard_number,
        "member_suffix": [member.suffix for member in used],
        "member_offset": [member.offset for member in used],
        "member_size": [member.size for member in used],
        "member_crc": [member.crc for member in used],
        "width": [width for width, _ in sizes],
        "height": [height for _, height in sizes],
        "fixed_tokens": measure.fixed_tokens,
        "supervised_tokens": measure.supervised_tokens,
        "visual_image": [image for image, _, _ in measure.visuals],
        "visual_frames": [frames for _, frames, _ in measure.visuals],
        "visual_place": [place for _, _, place in measure.visuals],
        "coordinate_image": [image for image, _, _ in measure.coordinates],
        "coordinate_axis": [axis for _, axis, _ in measure.coordinates],
        "coordinate_value": [value for _, _, value in measure.coordinates],
        "cuts": list(measure.cuts),
    }


def measure_any(sample: Sample, sizes: list[tuple[int, int]], tokenizer: TextTokenizer, family: Family) -> Measure:
    """The measure of a sample; of a prompt without an answer, that of `encode_prompt`: up to the answer's first token."""
    measure = measure_prompt if sample.messages[-1]["role"] in ("user", "system") else measure_sample
    return measure(sample, sizes, tokenizer, family)


# ---------------------------------------------------------------- merge


def _merge(settings: IndexSettings, shards: int) -> tuple[int, list[RefusedSample]]:
    """Join the part files in shard order, leaving out ids that came before. Returns (samples, refused duplicates)."""
    parts = [join(settings.folder, "parts", f"{number:06d}.parquet") for number in range(shards)]
    hashes = [_read_parquet(part, settings.storage, ["id_hash"])["id_hash"].to_numpy() for part in parts]
    values, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]), return_counts=True)
    doubtful = set(values[counts > 1].tolist())  # small: only ids whose hash occurs more than once are compared as text
    seen: set[str] = set()
    refused: list[RefusedSample] = []
    samples = 0
    with tempfile.TemporaryDirectory(prefix="terrace-index-") as folder:
        local = Path(folder) / "index.parquet"
        with pq.ParquetWriter(local, SCHEMA, compression="zstd") as writer:
            for part, part_hashes in zip(parts, hashes):
                table = _read_parquet(part, settings.storage)
                suspects = [row for row, value in enumerate(part_hashes.tolist()) if value in doubtful] if doubtful else []
                drop = []
                for row in suspects:
                    sample_id = table["id"][row].as_py()
                    if sample_id in seen:
                        drop.append(row)
                        refused.append(
                            RefusedSample(f"shard {table['shard'][row].as_py()}", sample_id, "duplicate_id", "an earlier sample has it")
                        )
                    seen.add(sample_id)
                if drop:
                    keep = np.ones(table.num_rows, bool)
                    keep[drop] = False
                    table = table.filter(pa.array(keep))
                writer.write_table(table)
                samples += table.num_rows
        _publish(local, join(settings.folder, "index.parquet"), settings.storage)
    return samples, refused


def _write_parquet(table: pa.Table, uri: str, storage: Storage) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_file(uri, sink.getvalue().to_pybytes(), storage)


def _read_parquet(uri: str, storage: Storage, columns: list[str] | None = None) -> pa.Table:
    return pq.read_table(pa.BufferReader(read_file(uri, storage)), columns=columns)


def _publish(local: Path, uri: str, storage: Storage) -> None:
    if "://" in uri:
        upload(local, uri, storage)
    else:  # another disk perhaps: copied, then renamed
        write_file(uri, local.read_bytes(), storage)
