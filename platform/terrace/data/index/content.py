"""What a sample holds, as hashes: which samples are the same, whatever their ids, and which of them would leak what is held out.

Of each picture 64 bits of its file's bytes, of the text 64 bits without regard to white space. Two samples are the same when both agree.
A sample leaks held-out content when it shows a picture of a held-out sample, or, having no picture or meeting one that has none, says the
same text: the same short answer to the same question about another picture is another sample.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from terrace.data.index.columns import CHUNK
from terrace.data.types import Sample

ENDS_BYTES = 4_096
COMPARED_TOGETHER = 2**25  # hashes, while repeats are looked for: half a gigabyte


class Contents(Protocol):
    """Of a source's index: N rows."""

    columns: Mapping[str, Any]  # array-like
    starts: Mapping[str, Any]

    def __len__(self) -> int: ...

    def part(self, first: int, stop: int) -> Contents:
        """Rows [first, stop) as an index of its own, in memory."""
        ...

    @property
    def content_hash(self) -> np.ndarray: ...

    @property
    def holdout_rows(self) -> np.ndarray: ...


def hash_bytes(data: bytes) -> int:
    """64 bits of a file, the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def text_hash(sample: Sample) -> int:
    """64 bits of everything that a sample says: texts, boxes, points and calls, in order, each run of white space as one blank."""
    said = []
    for message in sample.messages:
        for item in message["content"]:
            if item["type"] in ("text", "reasoning"):
                said.append(item["text"])
            elif item["type"] not in ("image", "video"):
                said.append(json.dumps(item, sort_keys=True))
        said.append("\n")
    return hash_bytes(" ".join("".join(said).split()).encode("utf-8", "surrogatepass"))


def content_hashes(columns: Mapping[str, np.ndarray], image_starts: np.ndarray) -> np.ndarray:
    """uint64 [N]: text and pictures together."""
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(np.asarray(columns["image_hash"], np.uint64), dtype=np.uint64)])
    pictures = sums[image_starts[1:]] - sums[image_starts[:-1]]
    return np.asarray(columns["text_hash"], np.uint64) + pictures * np.uint64(0x9E3779B97F4A7C15)


def leaking_rows(indexes: Mapping[str, Contents]) -> dict[str, np.ndarray]:
    """int64, ascending, of each source: rows that are not held out and hold what is held out somewhere."""
    held = [_held_out(index) for index in indexes.values()]
    pictures, texts, bare_texts = (np.unique(np.concatenate([np.empty(0, np.uint64), *parts])) for parts in zip(*held))
    if not len(pictures) and not len(texts):
        return {name: np.empty(0, np.int64) for name in indexes}
    result = {}
    for name, index in indexes.items():
        found = [np.empty(0, np.int64)]
        for first, part in _parts(index):
            starts, said = part.starts["image"], part.columns["text_hash"]
            hits = np.concatenate([[0], np.cumsum(np.isin(part.columns["image_hash"], pictures))])
            without = starts[1:] == starts[:-1]
            rows = (hits[starts[1:]] > hits[starts[:-1]]) | np.isin(said, bare_texts) | (without & np.isin(said, texts))
            found.append(first + np.flatnonzero(rows))
        result[name] = np.setdiff1d(np.concatenate(found), index.holdout_rows, assume_unique=True)
    return result


def _parts(index: Contents) -> Iterator[tuple[int, Contents]]:
    for first in range(0, len(index), CHUNK):
        yield first, index.part(first, min(len(index), first + CHUNK))


def _held_out(index: Contents) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint64: pictures, texts, and texts of samples without a picture, of what a source holds out."""
    held = index.holdout_rows
    texts, begin, end = index.columns["text_hash"][held], index.starts["image"][held], index.starts["image"][held + 1]
    counts = end - begin
    places = np.repeat(begin - np.cumsum(counts) + counts, counts) + np.arange(int(counts.sum()))
    return index.columns["image_hash"][places], texts, texts[counts == 0]


def repeated_rows(indexes: Mapping[str, Contents]) -> dict[str, np.ndarray]:
    """int64, ascending, of each source: rows that say and show what an earlier row says and shows, in the order of the sources.

    Looked for among the hashes of one range after another, so that no more than `COMPARED_TOGETHER` or so are in memory.
    """
    sizes = np.cumsum([0, *(len(index) for index in indexes.values())])
    ranges = -(-int(sizes[-1]) // COMPARED_TOGETHER)
    width = -(-(2**64) // max(1, ranges))
    found = [np.empty(0, np.int64)]
    for number in range(ranges):
        lowest, highest = np.uint64(number * width), np.uint64(min(2**64, (number + 1) * width) - 1)
        hashes, rows = [], []
        for start, index in zip(sizes, indexes.values()):
            for first, part in _parts(index):
                own = part.content_hash
                here = np.flatnonzero((own >= lowest) & (own <= highest))
                hashes.append(own[here])
                rows.append(start + first + here)
        places = np.concatenate(rows)
        _, firsts = np.unique(np.concatenate(hashes), return_index=True)
        found.append(np.delete(places, firsts))
    repeats = np.sort(np.concatenate(found))
    return {
        name: repeats[np.searchsorted(repeats, start) : np.searchsorted(repeats, stop)] - start
        for name, start, stop in zip(indexes, sizes, sizes[1:])
    }


def overlaps(indexes: Mapping[str, Contents]) -> Counter[tuple[str, str]]:
    """(source, source) -> samples of the second that the first has too; of one source with itself, its own repeats."""
    counts: Counter[tuple[str, str]] = Counter()
    names = list(indexes)
    for place, name in enumerate(names):
        hashes = indexes[name].content_hash
        own = len(hashes) - len(np.unique(hashes))
        if own:
            counts[name, name] = own
        for other in names[place + 1 :]:
            shared = int(np.isin(indexes[other].content_hash, hashes).sum())
            if shared:
                counts[name, other] = shared
    return counts


def picture_hash(data: bytes, crc: int) -> int:
    """64 bits of a picture's file, whose checksum is known: of that, its size, and its first and last 4 KiB.

    A tenth of the time that a hash over all of it takes, of a file that is read and checked anyway.
    """
    return hash_bytes(data[:ENDS_BYTES] + data[-ENDS_BYTES:] + struct.pack("<QI", len(data), crc))


def hashes_of(sample: Sample, images: Sequence[tuple[bytes, int]]) -> dict[str, Any]:
    """A sample's columns in the index; `images` are (bytes, CRC-32)."""
    return {"text_hash": text_hash(sample), "image_hash": [picture_hash(*image) for image in images]}
