"""A sample's bytes back from its shard, checked against the index before anyone trains on them.

Samples that lie near each other in a shard are read together: the samples of a window are shuffled by blocks, so a task that reads
its packs at once makes a few large requests per shard instead of one per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from isal.isal_zlib import crc32

from terrace.data.image_files import without_orientation
from terrace.data.index.source_index import SampleLocation, SourceIndex
from terrace.data.sources.conventions import Rules
from terrace.data.sources.placeholders import resolve_coordinates
from terrace.data.sources.refusals import Refusal
from terrace.data.sources.shards import is_image_suffix, sample_of_members
from terrace.data.types import Sample
from terrace.errors import DamagedData
from terrace.storage.files import is_remote, read_ranges
from terrace.storage.s3 import admitted


def read_sample(index: SourceIndex, row: int) -> tuple[Sample, list[bytes]]:
    """One sample and its images' bytes, in the order of its image numbers. Raises DamagedData naming shard and sample."""
    [result] = read_located([index.location(row)])
    if isinstance(result, DamagedData):
        raise result
    return result


def read_located(locations: Sequence[SampleLocation]) -> list[tuple[Sample, list[bytes]] | DamagedData]:
    """Many samples, with few requests: results in the order asked. A damaged sample is its DamagedData, returned and not raised,

    so that the caller may replace it (`on_damage: skip`) and keep the rest. A storage that fails for good raises StorageError.
    """
    by_shard: dict[tuple[str, str], list[int]] = {}
    for number, location in enumerate(locations):
        by_shard.setdefault((location.shard, location.storage.model_dump_json()), []).append(number)
    results: list[tuple[Sample, list[bytes]] | DamagedData] = [DamagedData("not read")] * len(locations)
    for (shard, _), numbers in by_shard.items():
        spans = [(number, place, member) for number in numbers for place, member in enumerate(locations[number].members)]
        ranges = [(offset, size) for _, _, (_, offset, size, _) in spans]
        if is_remote(shard):
            admitted(shard, locations[numbers[0]].storage)  # it was read when it was indexed
        try:
            blocks = read_ranges(shard, ranges, locations[numbers[0]].storage)
        except FileNotFoundError:
            for number in numbers:
                results[number] = _damaged(locations[number], "the shard is gone")
            continue
        found: dict[int, list[bytes]] = {number: [] for number in numbers}
        for (number, _, _), block in zip(spans, blocks):
            found[number].append(block)
        for number in numbers:
            results[number] = _checked(locations[number], found[number])
    return results


def _checked(location: SampleLocation, blocks: list[bytes]) -> tuple[Sample, list[bytes]] | DamagedData:
    data: dict[str, bytes] = {}
    for (suffix, offset, size, crc), block in zip(location.members, blocks):
        if len(block) != size:
            return _damaged(location, f"its {suffix} has {len(block)} of {size} bytes at {offset}; the shard was cut")
        if crc32(block) != crc:
            return _damaged(location, f"the checksum of its {suffix} at byte {offset} does not match the index")
        data[suffix] = block
    try:
        rules = Rules.of(location)
        sample, images = sample_of_members(location.id, data, location.id, location.kind, rules)
        resolve_coordinates(sample.messages, location.sizes)
    except Refusal as refusal:
        return _damaged(location, refusal.detail)
    if len(images) != len(location.sizes) or not all(is_image_suffix(suffix) for suffix in images):
        return _damaged(location, f"it has {len(images)} images, the index says {len(location.sizes)}")
    contents = [data[suffix] for suffix in images]
    if location.exif == "ignore":
        contents = [without_orientation(content) for content in contents]
    return replace(sample, id=location.id), contents  # the index may have told samples of one id apart


def _damaged(location: SampleLocation, detail: str) -> DamagedData:
    return DamagedData(
        f"source {location.source}, sample {location.id}, shard {location.shard}: {detail}. Restore the shard, index it again, or"
        f" set data.sources.{location.source}.on_damage: skip"
    )
