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
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa

from terrace.data.image_files import ImageDamage, check_file, orientation, without_orientation
from terrace.data.images import image_size
from terrace.data.index.content import hashes_of
from terrace.data.index.merge import id_hash, merge_parts, write_parquet
from terrace.data.parallel import Progress, run_units
from terrace.data.pieces import RUNNING_TEXT
from terrace.data.sources.conventions import Rules
from terrace.data.sources.ingest import IngestReport, Shard, iter_refused, require_samples, stored_uri
from terrace.data.sources.placeholders import resolve_coordinates
from terrace.data.sources.refusals import Refusal, RefusedSample
from terrace.data.sources.shard_walk import Group, scan_shard
from terrace.data.sources.shards import sample_of_members, used_suffixes
from terrace.data.template import Measure, measure_prompt, measure_sample
from terrace.data.tokenizer import TextTokenizer, load_tokenizer
from terrace.data.types import Sample
from terrace.errors import InputError
from terrace.families.interface import Family
from terrace.recipe.schema import Source, Storage
from terrace.storage.files import absolute, join, read_file, relative_name, write_file
from terrace.storage.s3 import DEFAULT_STORAGE

INDEX_VERSION = 2

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("id_hash", pa.uint64()),  # of the id
        ("text_hash", pa.uint64()),  # of what it says and shows: which samples are the same, and which are held out
        ("kind", pa.string()),
        ("shard", pa.int32()),
        ("member_suffix", pa.list_(pa.string())),  # per file of the sample: name behind the key, place in the shard, checksum
        ("member_offset", pa.list_(pa.int64())),
        ("member_size", pa.list_(pa.int64())),
        ("member_crc", pa.list_(pa.uint32())),
        ("width", pa.list_(pa.int32())),  # per image of the sample, in order
        ("height", pa.list_(pa.int32())),
        ("image_hash", pa.list_(pa.uint64())),
        ("fixed_tokens", pa.int32()),  # the fields of `template.Measure`
        ("supervised_tokens", pa.int32()),
        ("visual_image", pa.list_(pa.int32())),
        ("visual_frames", pa.list_(pa.int32())),
        ("visual_place", pa.list_(pa.int32())),
        ("visual_coordinates", pa.list_(pa.int32())),
        ("coordinate_image", pa.list_(pa.int32())),
        ("coordinate_axis", pa.list_(pa.int8())),
        ("coordinate_value", pa.list_(pa.float64())),
        ("cuts", pa.list_(pa.int32())),
        ("target_place", pa.int32()),
        ("target_visuals", pa.int32()),
        ("target_coordinates", pa.int32()),
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
    check_ends: bool  # shards from elsewhere: look at checksums and ends of each image file
    storage: Storage
    ignore: tuple[str, ...] = ()
    exif: str = "apply"
    placeholders: str = "read"
    special_tokens: str = "text"


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
            storage, tuple(source.ignore), source.exif, source.placeholders, source.special_tokens,
        )  # fmt: skip
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
    samples, renamed, duplicates = merge_parts(settings.folder, len(items), SCHEMA, settings.storage)
    refused += duplicates
    ignored = Counter(report.ignored)
    for receipt in receipts:
        ignored.update(receipt["ignored"])
    lines = "".join(json.dumps(line.as_json(), ensure_ascii=False) + "\n" for line in refused)
    write_file(join(settings.folder, "refused.jsonl"), lines.encode("utf-8", "backslashreplace"), settings.storage)
    summary = {
        "version": INDEX_VERSION, "source": settings.source, "kind": settings.kind, "samples": samples,
        "refused": dict(Counter(line.reason for line in refused).most_common()),
        "ignored": dict(ignored), "rotated": report.rotated + sum(receipt["rotated"] for receipt in receipts),
        "spelled": report.spelled + sum(receipt["spelled"] for receipt in receipts), "renamed": renamed, "in_place": report.in_place,
        "reading": {"ignore": list(settings.ignore), "placeholders": settings.placeholders, "special_tokens": settings.special_tokens,
                    "exif": settings.exif},
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
    rules = Rules.of(settings)
    rows = _Rows()
    refused: list[RefusedSample] = []
    rotated = 0
    shard_name = relative_name(shard.uri, settings.root)
    stem = shard_name.removesuffix(".tar").replace("/", "-")
    try:
        for count, group in enumerate(scan_shard(shard.uri, settings.storage)):
            origin, default_id = f"{shard_name}:{group.key}", f"{stem}-{group.key}"
            try:
                if group.again:
                    why = ("split_sample", str(group.refusal))
                    refused += [RefusedSample(origin, sample_id, *why) for sample_id in rows.take_away(group.key)]
                row, turned = _guarded(group, default_id, settings, tokenizer, number, rules)
                rows.add(group.key, row)
                rotated += turned
            except Refusal as refusal:
                refused.append(RefusedSample(origin, default_id, refusal.reason, refusal.detail[:500]))
            if inside is not None and count % 200 == 199 and group.members:
                inside(min(shard.size, group.members[-1].offset))
    except Refusal as refusal:  # the shard from here on
        refused.append(RefusedSample(shard_name, shard_name, refusal.reason, refusal.detail))
    table = rows.table()
    write_parquet(table, join(settings.folder, "parts", f"{number:06d}.parquet"), settings.storage)
    receipt = {
        "samples": table.num_rows, "refused": [line.as_json() for line in refused], "ignored": dict(rules.ignored), "rotated": rotated,
        "spelled": rules.spelled,
    }  # fmt: skip
    write_file(receipt_uri, json.dumps(receipt).encode(), settings.storage)
    return receipt


class _Rows:
    """The rows of a shard as columns, made every few hundred rows: lists that wait are asked by the garbage collector again and again."""

    def __init__(self) -> None:
        self._made: list[pa.Table] = []
        self._waiting: list[dict[str, Any]] = []
        self._places: dict[str, list[tuple[int, str]]] = {}  # by key: row number and id; members that come back take away what came before
        self._count = 0

    def add(self, key: str, row: dict[str, Any]) -> None:
        self._places.setdefault(key, []).append((self._count, row["id"]))
        self._waiting.append(row)
        self._count += 1
        if len(self._waiting) == 256:
            self._make()

    def take_away(self, key: str) -> list[str]:
        """Leave out the rows of a key; their ids."""
        return [sample_id for _, sample_id in self._places.pop(key, [])]

    def table(self) -> pa.Table:
        """All rows, a key's together, in the order of the keys' first."""
        self._make()
        table = pa.concat_tables(self._made)
        order = [number for places in self._places.values() for number, _ in places]
        return table if order == list(range(self._count)) else table.take(pa.array(order, pa.int64()))

    def _make(self) -> None:
        self._made.append(pa.Table.from_pylist(self._waiting, schema=SCHEMA))
        self._waiting = []


def _guarded(
    group: Group, default_id: str, settings: IndexSettings, tokenizer: TextTokenizer, shard_number: int, rules: Rules
) -> tuple[dict[str, Any], int]:
    """The index row of one sample, and how many of its pictures EXIF turns. Raises Refusal, and nothing else."""
    if group.refusal is not None:
        raise group.refusal
    try:
        return index_group(group, default_id, settings, tokenizer, shard_number, rules)
    except Refusal:
        raise
    except Exception as error:  # one sample ends nothing but itself
        raise Refusal("bad_row", f"{group.key} cannot be understood ({type(error).__name__}: {error})") from error


def index_group(
    group: Group, default_id: str, settings: IndexSettings, tokenizer: TextTokenizer, shard_number: int, rules: Rules
) -> tuple[dict[str, Any], int]:
    """The index row of one sample, and how many of its pictures EXIF turns. Raises Refusal."""
    sample, images = sample_of_members(group.key, group.data, default_id, settings.kind, rules)
    sizes, turned = [], 0
    for suffix in images:
        content = group.data[suffix]
        try:
            side_up = orientation(content) if settings.check_ends else None
            if side_up not in (1, None):
                turned += 1
                if settings.exif == "ignore":
                    content, side_up = without_orientation(content), 1
            sizes.append(image_size(content, settings.max_image_pixels, side_up))
            if settings.check_ends:
                check_file(group.data[suffix])
        except ImageDamage as damage:
            raise Refusal(damage.reason, f"{group.key}.{suffix}: {damage.detail}") from damage
    resolve_coordinates(sample.messages, sizes)
    try:
        measure = measure_any(sample, sizes, tokenizer, settings.family)
    except InputError as error:
        raise Refusal("empty_answer" if "no text to learn" in str(error) else "unsupported", str(error)) from error
    members = {member.suffix: member for member in group.members}
    used = [members[suffix] for suffix in used_suffixes(group.data, images, rules.ignore)]
    row = {
        "id": sample.id,
        "id_hash": id_hash(sample.id),
        **hashes_of(sample, [(group.data[suffix], members[suffix].crc) for suffix in images]),
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
        **_apart(("visual_image", "visual_frames", "visual_place", "visual_coordinates"), measure.visuals),
        **_apart(("coordinate_image", "coordinate_axis", "coordinate_value"), measure.coordinates),
        "cuts": list(measure.cuts),
        **dict(zip(("target_place", "target_visuals", "target_coordinates"), measure.first_target)),
    }
    return row, turned


def _apart(names: tuple[str, ...], entries: Sequence[tuple[Any, ...]]) -> dict[str, Sequence[Any]]:
    """A column for each place of the entries."""
    return dict(zip(names, zip(*entries))) if entries else dict.fromkeys(names, ())


def measure_any(sample: Sample, sizes: list[tuple[int, int]], tokenizer: TextTokenizer, family: Family) -> Measure:
    """The measure of a sample; of a prompt without an answer, that of `encode_prompt`: up to the answer's first token."""
    answered = any(message["role"] == "assistant" for message in sample.messages)
    unanswered = sample.messages[-1]["role"] not in ("assistant", RUNNING_TEXT)
    is_prompt = unanswered and (sample.kind == "prompt" or not answered)
    return (measure_prompt if is_prompt else measure_sample)(sample, sizes, tokenizer, family)
