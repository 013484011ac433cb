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
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from terrace.data.types import Sample

ENDS_BYTES = 4_096


class Contents(Protocol):
    """Of a source's index: N rows."""

    columns: dict[str, np.ndarray]
    starts: dict[str, np.ndarray]

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
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(columns["image_hash"].astype(np.uint64), dtype=np.uint64)])
    pictures = sums[image_starts[1:]] - sums[image_starts[:-1]]
    return columns["text_hash"].astype(np.uint64) + pictures * np.uint64(0x9E3779B97F4A7C15)


def leaking_rows(indexes: Mapping[str, Contents]) -> dict[str, np.ndarray]:
    """bool [N] of each source: rows that are not held out and hold what is held out somewhere."""
    held = [_held_out(index) for index in indexes.values()]
    pictures, texts, bare_texts = (np.unique(np.concatenate([np.empty(0, np.uint64), *parts])) for parts in zip(*held))
    result = {}
    for name, index in indexes.items():
        starts, rows = index.starts["image"], np.zeros(len(index.columns["text_hash"]), bool)
        hits = np.concatenate([[0], np.cumsum(np.isin(index.columns["image_hash"], pictures))])
        rows |= hits[starts[1:]] > hits[starts[:-1]]
        without = starts[1:] == starts[:-1]
        said = index.columns["text_hash"]
        rows |= np.isin(said, bare_texts) | (without & np.isin(said, texts))
        rows[index.holdout_rows] = False
        result[name] = rows
    return result


def _held_out(index: Contents) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """uint64: pictures, texts, and texts of samples without a picture, of what a source holds out."""
    held, starts = index.holdout_rows, index.starts["image"]
    texts = index.columns["text_hash"][held]
    chosen = np.zeros(len(index.columns["image_hash"]) + 1, np.int64)
    np.add.at(chosen, starts[held], 1)
    np.add.at(chosen, starts[held + 1], -1)
    pictures = index.columns["image_hash"][np.cumsum(chosen)[:-1] > 0]
    return pictures, texts, texts[starts[held + 1] == starts[held]]


def repeated_rows(indexes: Mapping[str, Contents]) -> dict[str, np.ndarray]:
    """bool [N] of each source: rows that say and show what an earlier row says and shows, in the order of the sources."""
    hashes = np.concatenate([np.empty(0, np.uint64), *(index.content_hash for index in indexes.values())])
    _, first = np.unique(hashes, return_index=True)
    repeats = np.ones(len(hashes), bool)
    repeats[first] = False
    sizes = np.cumsum([0, *(len(index.content_hash) for index in indexes.values())])
    return {name: repeats[start:stop] for name, start, stop in zip(indexes, sizes, sizes[1:])}


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
